"""Bulk sampling: many images or clips of a pipeline, each determined by the seed and its number alone."""

import dataclasses
import hashlib
import json
import time
import zipfile
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import tqdm
from diffusers.utils import make_image_grid
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from par_diffusers._version import __version__
from par_diffusers.folders import lock_folder, publish, write_text
from par_diffusers.pipelines import PARPipeline, PARTextToImagePipeline, PARVideoPipeline
from par_diffusers.sampling.generate import as_drawn, save_image
from par_diffusers.sampling.loading import check_condition, load_pipeline, stored_tensors
from par_diffusers.settings import SamplingSettings


MANIFEST = "manifest.json"
# what may differ between a run and its continuation: it changes no image
_FREE = ("output", "model", "batch_size", "png", "num_preview_images", "prompts")


def image_seed(seed: int, index: int, purpose: str = "tokens") -> int:
    """A seed below 2**63 for one image."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}/{purpose}".encode(), digest_size=8).digest(), "big") >> 1


def image_labels(
    pipe: PARPipeline | PARVideoPipeline, labels: tuple[str, ...], seed: int, indices: range
) -> list[int]:
    """Class ids of images: `("balanced",)`, `("random",)`, or names and ids that are taken in turn."""
    classes = pipe.transformer.config.num_classes
    if labels == ("balanced",):
        return [index % classes for index in indices]
    if labels == ("random",):
        return [image_seed(seed, index, "label") % classes for index in indices]
    names = [int(name) if name.isdecimal() and name not in pipe.labels else name for name in labels]
    ids = pipe.prepare_class_labels(names)
    return [ids[index % len(ids)] for index in indices]


def read_prompts(file: str | Path) -> list[str]:
    """The prompts of a file: its lines, or those of a TSV's column `prompt` (its first, where none has that name)."""
    file = Path(file)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`prompts`: `{file}` cannot be read: {error}") from None
    first = 1
    if file.suffix == ".tsv":
        rows = [line.split("\t") for line in lines]
        names = [name.strip().lower() for name in rows[0]] if rows else []
        column = names.index("prompt") if "prompt" in names else 0
        first = 2 if "prompt" in names else 1
        lines = [row[column] if column < len(row) else "" for row in rows[first - 1 :]]
    empty = [str(number) for number, line in enumerate(lines, first) if not line.strip()]
    if empty or not lines:
        which = f"line {', '.join(empty[:5])} has none" if lines else "it has none"
        raise ValueError(f"`prompts`: `{file}` must have a prompt in every line, {which}.")
    return [line.strip() for line in lines]


@torch.no_grad()
def draw_images(
    pipe: PARPipeline | PARTextToImagePipeline | PARVideoPipeline,
    indices: range,
    labels: list[int | str],
    settings: SamplingSettings,
) -> torch.Tensor:
    """
    The images of `indices`, uint8 (B, H, W, 3), or clips (B, frames, H, W, 3), on the CPU, converted as the published
    scripts do.
    """
    generators = [torch.Generator(pipe.device).manual_seed(image_seed(settings.seed, i)) for i in indices]
    arguments = settings.call_arguments()
    (tokens,) = pipe(labels, generator=generators, output_type="latent", return_dict=False, **arguments)
    pixels = pipe.decode_latents(tokens).float().movedim(1, -3)  # frames, where there are any, before channels
    if settings.image_size_eval is not None:
        frames = pixels.flatten(0, -4)
        frames = F.interpolate(frames, size=(settings.image_size_eval,) * 2, mode="bicubic")
        pixels = frames.view(*pixels.shape[:-2], *frames.shape[-2:])
    return (127.5 * pixels + 128).clamp(0, 255).movedim(-3, -1).to(torch.uint8).contiguous().cpu()


def sample(settings: SamplingSettings) -> Path:
    """
    Draws `num_samples` images or clips and returns the folder `settings.output`. With prompts, the labels of images are the
    numbers of their prompts, from 0.

    The folder gets shards (`samples-00000.safetensors`: `images` uint8 (n, H, W, 3), or clips (n, frames, H, W, 3), and
    `labels`), each whole as soon as it is there, and at the end `samples.npz` as the ADM suite reads it (`arr_0` the images,
    `arr_1` the labels), and `preview.png` or `preview.gif`. `manifest.json` says what was asked for, of which model, with which versions. Several processes
    (accelerate) share the shards. Called again after an interruption, the function draws those that are missing.

    Example:

    ```py
    >>> from par_diffusers.sampling.sample import sample
    >>> from par_diffusers.settings import SamplingSettings

    >>> sample(SamplingSettings(model="par-xl-4x", output="samples", image_size_eval=256))  # doctest: +SKIP
    ```
    """
    accelerator = Accelerator()
    pipe = load_pipeline(settings.model, settings, accelerator.device, settings.batch_size)
    pipe.set_progress_bar_config(disable=True)
    check_condition(pipe, settings.model, settings.prompts is not None, settings.num_frames)
    is_video = isinstance(pipe, PARVideoPipeline)
    unit = "clips" if is_video else "images"
    prompts = None if settings.prompts is None else read_prompts(settings.prompts)
    count = settings.num_samples or (len(prompts) if prompts is not None else 10000 if is_video else 50000)

    def label_ids(indices: range) -> list[int]:
        """Class ids, or numbers of prompts."""
        if prompts is not None:
            return [index % len(prompts) for index in indices]
        return image_labels(pipe, settings.labels, settings.seed, indices)

    label_ids(range(1))  # an unknown label stops before the first image
    pipe.scheduler.check_sampling(**settings.sampling_arguments())
    facts = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _FREE}
    facts |= _resolved(pipe, settings) | {"num_samples": count, "weights": _fingerprint(pipe)}
    facts["labels"] = (
        list(settings.labels) if prompts is None else hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    )
    output = Path(settings.output)
    starts = range(0, count, settings.shard_size)
    ranges = [range(start, min(start + settings.shard_size, count)) for start in starts]
    files = [output / f"samples-{number:05}.safetensors" for number in range(len(ranges))]
    with lock_folder(output, accelerator):
        if accelerator.is_main_process:
            for partial in output.glob(".*.partial"):
                partial.unlink()
            _write_manifest(output, pipe, settings, facts)
        accelerator.wait_for_everyone()
        mine = list(zip(files, ranges, strict=True))[accelerator.process_index :: accelerator.num_processes]
        missing = [(file, indices) for file, indices in mine if not file.exists()]
        to_draw = sum(len(indices) for _, indices in missing)
        started = time.perf_counter()
        bar = tqdm(total=to_draw, unit=unit, desc="sampling")
        for file, indices in missing:
            labels = label_ids(indices)
            conditions = labels if prompts is None else [prompts[number] for number in labels]
            parts = []
            for start in range(0, len(indices), settings.batch_size):
                part = slice(start, start + settings.batch_size)
                parts.append(draw_images(pipe, indices[part], conditions[part], settings))
                bar.update(len(parts[-1]))
            partial = file.with_name(f".{file.name}.partial")
            save_file({"images": torch.cat(parts), "labels": torch.tensor(labels)}, partial)
            publish(partial, file)
        bar.close()
        seconds = time.perf_counter() - started
        drawn = int(accelerator.reduce(torch.tensor(to_draw, device=accelerator.device)))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_npz(output / "samples.npz", files)
            if settings.num_preview_images:
                _write_preview(output, files, settings.num_preview_images, pipe.config.get("frame_rate"))
            if settings.png:
                _write_files(output, files, pipe.config.get("frame_rate"))
            print(
                f"{output}: {count} {unit}, {drawn} of them now"
                + (f", {drawn / seconds:.2f} {unit}/s" if drawn else "")
            )
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return output


def _resolved(pipe: PARPipeline, settings: SamplingSettings) -> dict:
    """What the pipeline's call will use."""
    given = settings.sampling_arguments()
    return {name: pipe.scheduler.config[name] if value is None else value for name, value in given.items()}


def _fingerprint(pipe: PARPipeline | PARTextToImagePipeline) -> str:
    """SHA-256 of plan and weights."""
    digest = hashlib.sha256()
    plan = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    digest.update(json.dumps(plan, sort_keys=True).encode())
    for _, component in sorted(pipe.components.items()):
        if isinstance(component, torch.nn.Module):
            add_weights(digest, component)
    return digest.hexdigest()


def add_weights(digest, component: torch.nn.Module) -> None:
    """Feeds names and values of all weights to a hash of hashlib."""
    for name, tensor in sorted(component.state_dict().items()):
        digest.update(name.encode())
        for part in stored_tensors(tensor):
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _write_manifest(output: Path, pipe: PARPipeline, settings: SamplingSettings, facts: dict) -> None:
    facts = json.loads(json.dumps(facts))
    file = output / MANIFEST
    if file.is_file():
        earlier = json.loads(file.read_text(encoding="utf-8"))["settings"]
        other = [f"{n} ({earlier.get(n)!r}, now {facts[n]!r})" for n in facts if earlier.get(n) != facts[n]]
        if other:
            raise ValueError(
                f"`output` must be new or hold the same sampling, {output} differs in {', '.join(other)}."
            )
        return
    there = sorted(item.name for item in output.iterdir() if item.name != ".lock")
    if there:
        raise ValueError(f"`output` must be a new or empty folder, {output} has {there[0]}.")
    versions = {module.__name__: module.__version__ for module in (accelerate, diffusers, torch, transformers)}
    manifest = {
        "model": settings.model,
        "settings": facts,
        "id2label": pipe.config.get("id2label"),
        "frame_rate": pipe.config.get("frame_rate"),
        "conversion": "(127.5 x + 128) clamped to 0..255 and cut to whole numbers"
        + (", after F.interpolate(mode='bicubic') without antialias" if settings.image_size_eval else ""),
        "versions": {"par_diffusers": __version__} | versions,
    }
    write_text(file, json.dumps(manifest, indent=1) + "\n")


def _write_npz(file: Path, shards: list[Path]) -> None:
    """`arr_0`, the images, and `arr_1`, the labels, one shard in memory at a time."""
    if file.is_file():
        return
    counts, image_shape = [], None
    for shard in shards:
        with safe_open(shard, "pt") as tensors:
            count, *image_shape = tensors.get_slice("images").get_shape()
            counts.append(count)
    partial = file.with_name(f".{file.name}.partial")
    arrays = {"arr_0": ("images", "|u1", tuple(image_shape)), "arr_1": ("labels", "<i8", ())}
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, (key, descr, shape) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                header = {"descr": descr, "fortran_order": False, "shape": (sum(counts), *shape)}
                np.lib.format.write_array_header_1_0(stream, header)
                for shard in shards:
                    stream.write(load_file(shard)[key].numpy().tobytes())
    publish(partial, file)


def _write_preview(folder: Path, shards: list[Path], count: int, frame_rate: float | None) -> None:
    """The first `count` images side by side, as `preview.png`; clips as `preview.gif`."""
    drawn = []
    for shard in shards:
        with safe_open(shard, "pt") as tensors:
            drawn += [as_drawn(sample) for sample in tensors.get_slice("images")[: count - len(drawn)]]
        if len(drawn) == count:
            break
    columns = max(1, round(len(drawn) ** 0.5))
    drawn = drawn[: len(drawn) // columns * columns]
    if isinstance(drawn[0], list):
        frames = [
            make_image_grid([clip[i] for clip in drawn], len(drawn) // columns, columns) for i in range(len(drawn[0]))
        ]
        save_image(frames, folder / "preview.gif", frame_rate)
    else:
        save_image(make_image_grid(drawn, len(drawn) // columns, columns), folder / "preview.png")


def _write_files(folder: Path, shards: list[Path], frame_rate: float | None) -> None:
    """One file an image, `png/000000.png`, ..., or a clip, `gif/000000.gif`, ...; those that are there are whole."""
    index = 0
    for shard in shards:
        for sample in load_file(shard)["images"]:
            kind = "png" if sample.ndim == 3 else "gif"
            file = folder / kind / f"{index:06}.{kind}"
            if not file.exists():
                save_image(as_drawn(sample), file, frame_rate)
            index += 1
