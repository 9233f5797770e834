"""Draws a handful of images or clips and lays them out as one picture."""

import math
import os
from pathlib import Path

import torch
from diffusers.utils import export_to_gif, make_image_grid
from PIL import Image

from par_diffusers.pipelines import PARPipeline, PARTextToImagePipeline, PARVideoPipeline


# an image, or the frames of a clip
Drawn = Image.Image | list[Image.Image]


def as_drawn(pixels: torch.ByteTensor) -> Drawn:
    """uint8 (H, W, 3) -> an image, (frames, H, W, 3) -> the frames of a clip."""
    if pixels.ndim == 3:
        return Image.fromarray(pixels.numpy())
    return [Image.fromarray(frame) for frame in pixels.numpy()]


def spell(pipe: PARPipeline, text: str) -> list[str | None]:
    """One label for each character of `text`, None for a space; for pipelines whose labels are single characters."""
    labels = []
    for character in text:
        if character.isspace():
            labels.append(None)
        elif character in pipe.labels or character.upper() in pipe.labels:
            labels.append(character if character in pipe.labels else character.upper())
        else:
            single = "".join(name for name in pipe.labels if len(name) == 1)
            known = (
                f"the characters it knows are {single}"
                if single
                else "it has no labels of one character: use --labels"
            )
            raise ValueError(f"`text`: {character!r} is not a label of this model; {known}.")
    return labels


def generate(
    pipe: PARPipeline | PARTextToImagePipeline | PARVideoPipeline,
    labels: list[str | int | None],
    *,
    num_images: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    **kwargs,
) -> list[Drawn | None]:
    """
    `num_images` images or clips of each label or prompt, one after the other; None labels give None.

    Image i is drawn from the seed `seed + i` alone, so that neither the batch size nor its neighbours change it.

    Args:
        pipe (`PARPipeline`, `PARTextToImagePipeline` or `PARVideoPipeline`): The pipeline.
        labels (`list`): Label names or class ids, or prompts; None leaves a gap.
        num_images (`int`, defaults to 1): Images of each of them.
        seed (`int`, defaults to 0): Seed of the first image.
        batch_size (`int`, defaults to 32): Images generated at a time.
        kwargs: More arguments of the pipeline's call: `guidance_scale`, `temperature`, `top_k`, ...
    """
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be from 0 to 2**63 - 1, got {seed}.")
    jobs = [
        (i, label) for i, label in enumerate(label for label in labels for _ in range(num_images)) if label is not None
    ]
    if not jobs:
        raise ValueError("`labels` must name at least one image, got none.")
    if not isinstance(pipe, PARTextToImagePipeline):
        pipe.prepare_class_labels([label for _, label in jobs])  # an unknown label stops before the first batch
    images = [None] * (len(labels) * num_images)
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        generators = [torch.Generator(pipe.device).manual_seed(seed + i) for i, _ in batch]
        (drawn,) = pipe([label for _, label in batch], generator=generators, return_dict=False, **kwargs)
        for (i, _), image in zip(batch, drawn, strict=True):
            images[i] = image
    return images


def lay_out(images: list[Image.Image | None], num_images: int, is_text: bool) -> Image.Image:
    """Text: one row for each of `num_images`, so that rows read as words. Labels: about square, label after label."""
    size = next(image.size for image in images if image is not None)
    images = [image or Image.new("RGB", size, "white") for image in images]
    if is_text:
        columns = len(images) // num_images
        images = [images[column * num_images + row] for row in range(num_images) for column in range(columns)]
    else:
        columns = num_images if 1 < num_images < len(images) else math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    images += [Image.new("RGB", size, "white")] * (rows * columns - len(images))
    return make_image_grid(images, rows=rows, cols=columns)


def lay_out_clips(clips: list[list[Image.Image] | None], num_images: int, is_text: bool) -> list[Image.Image]:
    """Clips that play beside each other, laid out as images are: the frames of one clip."""
    num_frames = next(len(clip) for clip in clips if clip is not None)
    return [
        lay_out([clip and clip[frame] for clip in clips], num_images, is_text=is_text) for frame in range(num_frames)
    ]


def contact_sheet(drawn: list[Drawn], num_frames: int = 5) -> Image.Image:
    """Images about square; of clips `num_frames` frames, from the first to the last, in a row for each."""
    if isinstance(drawn[0], Image.Image):
        return lay_out(drawn, 1, is_text=False)
    shown = [round(number * (len(drawn[0]) - 1) / max(num_frames - 1, 1)) for number in range(num_frames)]
    return make_image_grid([clip[frame] for clip in drawn for frame in shown], rows=len(drawn), cols=num_frames)


def save_image(image: Drawn, file: str | Path, frame_rate: float | None = None) -> None:
    """Writes an image as PNG, a clip as GIF (10 frames a second unless told), whole or not at all."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        if isinstance(image, list):
            export_to_gif(image, os.fspath(partial), fps=frame_rate or 10)
        else:
            image.save(partial, format="PNG")
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
