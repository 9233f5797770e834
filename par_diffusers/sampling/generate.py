"""Draws a handful of images and lays them out as one picture."""

import math
import os
import tempfile
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from par_diffusers.pipelines import PARPipeline, PARTextToImagePipeline


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
    pipe: PARPipeline | PARTextToImagePipeline,
    labels: list[str | int | None],
    *,
    num_images: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    **kwargs,
) -> list[Image.Image | None]:
    """
    `num_images` images of each label or prompt, one after the other; None labels give None.

    Image i is drawn from the seed `seed + i` alone, so that neither the batch size nor its neighbours change it.

    Args:
        pipe (`PARPipeline` or `PARTextToImagePipeline`): The pipeline.
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
    if isinstance(pipe, PARPipeline):
        pipe.prepare_class_labels([label for _, label in jobs])  # an unknown label stops before the first batch
    images = [None] * (len(labels) * num_images)
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        generators = [torch.Generator(pipe.device).manual_seed(seed + i) for i, _ in batch]
        drawn = pipe([label for _, label in batch], generator=generators, **kwargs).images
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


def save_image(image: Image.Image, file: str | Path) -> None:
    """Writes `image` as PNG, whole or not at all."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".png")
    try:
        with os.fdopen(handle, "wb") as stream:
            image.save(stream, format="PNG")
        os.chmod(scratch, 0o644)
        os.replace(scratch, file)
    except BaseException:
        os.unlink(scratch)
        raise
