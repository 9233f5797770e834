"""Image folder -> shards of codes."""

import dataclasses
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from par_diffusers.conversion.convert_llamagen import read_labels
from par_diffusers.folders import check_same_extraction, lock_folder, publish, write_text
from par_diffusers.settings import ExtractionSettings
from par_diffusers.training.codes import INDEX, encode, grid_size, load_vqvae, tokenizer_fingerprint
from par_diffusers.training.images import UNREADABLE, ImageFolder, to_pixels


class _Images:
    """Images of a range as (views, 3, H, W), None where the file cannot be read."""

    def __init__(self, folder: ImageFolder, indices: range):
        self.folder, self.indices = folder, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> torch.Tensor | None:
        try:
            return self.folder.load(self.indices[place])
        except UNREADABLE:
            return None


def extract_codes(settings: ExtractionSettings) -> Path:
    """
    Writes the codes of an image folder as shards and returns the folder.

    `settings.output` gets `codes-00000.safetensors`, ... and `index.json`. A shard holds `codes` (images, views, h, w) and
    `labels` (images,) of `shard_size` images in the order of their names, less those that cannot be read. Several
    processes (accelerate) share the shards. A shard is whole as soon as it is there: called again after an interruption,
    the function makes those that are missing.

    Example:

    ```py
    >>> from par_diffusers.training.extract_codes import extract_codes
    >>> from par_diffusers.settings import ExtractionSettings

    >>> extract_codes(ExtractionSettings("imagenet/train", "codes", vqvae="par-xl-4x"))  # doctest: +SKIP
    ```
    """
    accelerator = Accelerator()
    vqvae = load_vqvae(settings.vqvae).to(accelerator.device)
    classes = None if settings.classes is None else list(read_labels(settings.classes, argument="classes").values())
    images = ImageFolder(
        settings.data, settings.image_size, settings.augmentation, settings.crop_range, classes=classes
    )
    grid = grid_size(vqvae, settings.image_size)
    output = Path(settings.output)
    names = ("image_size", "augmentation", "crop_range", "shard_size")
    facts = {name: value for name, value in dataclasses.asdict(settings).items() if name in names} | {
        "tokenizer": tokenizer_fingerprint(vqvae),
        "vocab_size": vqvae.config.num_vq_embeddings,
        "grid_size": list(grid),
        "num_views": images.num_views,
        "classes": images.classes,
        "images": images.fingerprint,
    }
    ranges = [
        range(start, min(start + settings.shard_size, len(images)))
        for start in range(0, len(images), settings.shard_size)
    ]
    files = [output / f"codes-{number:05}.safetensors" for number in range(len(ranges))]
    with lock_folder(output, accelerator):
        if accelerator.is_main_process:
            for partial in output.glob(".*.partial"):
                partial.unlink()
            check_same_extraction(output, "codes", files, facts)
        accelerator.wait_for_everyone()
        mine = list(zip(files, ranges, strict=True))[accelerator.process_index :: accelerator.num_processes]
        missing = [(file, indices) for file, indices in mine if not file.exists()]
        started, done = time.perf_counter(), 0
        bar = tqdm(total=sum(len(indices) for _, indices in missing), unit="images", desc="encoding")
        for file, indices in missing:
            _write_shard(file, images, indices, vqvae, grid, facts, settings, bar)
            done += len(indices)
        bar.close()
        seconds = time.perf_counter() - started
        done = int(accelerator.reduce(torch.tensor(done, device=accelerator.device)))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            index = _write_index(output, files, facts)
            kept, skipped = sum(shard["num_images"] for shard in index["shards"]), index["skipped"]
            print(
                f"{output}: {kept} images of {len(images.classes)} classes, {images.num_views} views of "
                f"{grid[0]}x{grid[1]} tokens each, {len(files)} shards; {done} images now, {done / seconds:.0f} images/s"
            )
            if skipped:
                print(
                    f"{len(skipped)} images could not be read and were skipped: {', '.join(skipped[:5])}"
                    f"{', ...' if len(skipped) > 5 else ''}"
                )
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return output


def _write_shard(file, images, indices, vqvae, grid, facts, settings, bar) -> None:
    loader = DataLoader(
        _Images(images, indices),
        batch_size=settings.batch_size,
        num_workers=settings.dataloader_num_workers,
        collate_fn=list,
    )
    codes_type = torch.uint16 if facts["vocab_size"] <= 2**16 else torch.int32
    # filled in place: a result kept from each batch pins the heap around it, gigabytes over a large image set
    codes = torch.empty(len(indices), images.num_views, *grid, dtype=codes_type)
    labels, skipped = [], []
    place = iter(indices)
    for batch in loader:
        readable = []
        for views in batch:
            index = next(place)
            if views is None:
                skipped.append(images.files[index])
            else:
                readable.append(views)
                labels.append(images.labels[index])
        if readable:
            pixels = to_pixels(torch.cat(readable).to(vqvae.device))
            tokens = encode(vqvae, pixels).view(len(readable), images.num_views, *grid)
            codes[len(labels) - len(readable) : len(labels)] = tokens.cpu().to(codes_type)
        bar.update(len(batch))
    tensors = {"codes": codes[: len(labels)].contiguous(), "labels": torch.tensor(labels, dtype=torch.int32)}
    partial = file.with_name(f".{file.name}.partial")
    # one entry: safetensors writes several in an order of its own, and the same shard would not be the same bytes
    save_file(tensors, partial, {"extraction": json.dumps(facts | {"skipped": skipped})})
    publish(partial, file)


def _write_index(output: Path, files: list[Path], facts: dict) -> dict:
    shards, skipped = [], []
    for file in files:
        with safe_open(file, "pt") as shard:
            shards.append({"file": file.name, "num_images": shard.get_slice("labels").get_shape()[0]})
            skipped += json.loads(shard.metadata()["extraction"])["skipped"]
    if not any(shard["num_images"] for shard in shards):
        raise ValueError(f"`data` must hold images that can be read, none of {len(skipped)} can.")
    index = facts | {"shards": shards, "skipped": skipped}
    write_text(output / INDEX, json.dumps(index, indent=1) + "\n")
    return index
