"""Folder of images or videos -> shards of codes."""

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
from par_diffusers.training.codes import INDEX
from par_diffusers.training.images import UNREADABLE, ImageFolder, MediaFolder, to_pixels
from par_diffusers.training.tokenizers import VideoTokenizer, load_tokenizer
from par_diffusers.training.videos import VideoFolder


class _Samples:
    """All views of the files of a range, None where a file cannot be read."""

    def __init__(self, folder: MediaFolder, indices: range):
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
    Writes the codes of a folder of images, or of videos where the tokenizer is one of videos, as shards and returns the
    folder.

    `settings.output` gets `codes-00000.safetensors`, ... and `index.json`. A shard holds `codes` (files, views, *grid_size)
    and `labels` (files,) of `shard_size` files in the order of their names, less those that cannot be read. Several
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
    tokenizer = load_tokenizer(settings.vqvae).to(accelerator.device)
    classes = None if settings.classes is None else list(read_labels(settings.classes, argument="classes").values())
    names = ["image_size", "augmentation", "shard_size"]
    if isinstance(tokenizer, VideoTokenizer):
        settings.image_size = settings.image_size or 128
        names += ["num_frames", "frame_rate", "num_clips", "seed"]
        view = {
            name: getattr(settings, name) for name in ("num_frames", "frame_rate", "num_clips", "augmentation", "seed")
        }
        grid = tokenizer.grid_size(settings.image_size, settings.num_frames)
        media = VideoFolder(settings.data, settings.image_size, **view, classes=classes)
    else:
        settings.image_size = settings.image_size or 384
        names += ["crop_range"]
        grid = tokenizer.grid_size(settings.image_size)
        media = ImageFolder(
            settings.data, settings.image_size, settings.augmentation, settings.crop_range, classes=classes
        )
    output = Path(settings.output)
    facts = {name: value for name, value in dataclasses.asdict(settings).items() if name in names} | {
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.num_codes,
        "grid_size": list(grid),
        "num_views": media.num_views,
        "classes": media.classes,
        media.kind: media.fingerprint,
    }
    ranges = [
        range(start, min(start + settings.shard_size, len(media)))
        for start in range(0, len(media), settings.shard_size)
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
        bar = tqdm(total=sum(len(indices) for _, indices in missing), unit=media.kind, desc="encoding")
        for file, indices in missing:
            _write_shard(file, media, indices, tokenizer, grid, facts, settings, bar)
            done += len(indices)
        bar.close()
        seconds = time.perf_counter() - started
        done = int(accelerator.reduce(torch.tensor(done, device=accelerator.device)))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            index = _write_index(output, files, facts)
            kept, skipped = sum(shard["num_images"] for shard in index["shards"]), index["skipped"]
            print(
                f"{output}: {kept} {media.kind} of {len(media.classes)} classes, {media.num_views} views of "
                f"{'x'.join(map(str, grid))} tokens each, {len(files)} shards; {done} {media.kind} now, "
                f"{done / seconds:.0f} {media.kind}/s"
            )
            if skipped:
                print(
                    f"{len(skipped)} {media.kind} could not be read and were skipped: {', '.join(skipped[:5])}"
                    f"{', ...' if len(skipped) > 5 else ''}"
                )
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return output


def _write_shard(file, media, indices, tokenizer, grid, facts, settings, bar) -> None:
    loader = DataLoader(
        _Samples(media, indices),
        batch_size=settings.batch_size,
        num_workers=settings.dataloader_num_workers,
        collate_fn=list,
    )
    codes_type = torch.uint16 if facts["vocab_size"] <= 2**16 else torch.int32
    # filled in place: a result kept from each batch pins the heap around it, gigabytes over a large image set
    codes = torch.empty(len(indices), media.num_views, *grid, dtype=codes_type)
    labels, skipped = [], []
    place = iter(indices)
    for batch in loader:
        readable = []
        for views in batch:
            index = next(place)
            if views is None:
                skipped.append(media.files[index])
            else:
                readable.append(views)
                labels.append(media.labels[index])
        if readable:
            pixels = to_pixels(torch.cat(readable).to(tokenizer.model.device))
            tokens = tokenizer.encode(pixels).view(len(readable), media.num_views, *grid)
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
        raise ValueError(f"`data` must hold files that can be read, none of {len(skipped)} can.")
    index = facts | {"shards": shards, "skipped": skipped}
    write_text(output / INDEX, json.dumps(index, indent=1) + "\n")
    return index
