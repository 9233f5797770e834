"""Captions -> shards of features."""

import hashlib
import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from safetensors.torch import save_file

from par_diffusers.conversion.convert_llamagen import load_text_encoder
from par_diffusers.folders import check_same_extraction, lock_folder, publish, write_text
from par_diffusers.pipelines.pipeline_par_text_to_image import CaptionPreprocessing, encode_text
from par_diffusers.sampling.sample import add_weights, read_prompts
from par_diffusers.settings import FeatureSettings
from par_diffusers.training.codes import INDEX
from par_diffusers.training.features import captions_fingerprint


def extract_features(settings: FeatureSettings) -> Path:
    """
    Writes the features that a T5 gives for captions as shards, and returns the folder.

    `settings.output` gets `features-00000.safetensors`, ... and `index.json`. A shard holds, of `shard_size` captions in the
    order of the codes' captions (or the file's lines), `features` (tokens of all, channels) and `ends` (captions,), where
    each ends; padding is not stored. Several processes (accelerate) share the shards. A shard is whole as soon as it is there: called
    again after an interruption, the function makes those that are missing.

    Example:

    ```py
    >>> from par_diffusers.training.extract_features import extract_features
    >>> from par_diffusers.settings import FeatureSettings

    >>> extract_features(FeatureSettings("codes", "features", text_encoder="google/flan-t5-xl"))  # doctest: +SKIP
    ```
    """
    accelerator = Accelerator()
    captions = read_captions(settings.data)
    parts = load_text_encoder(settings.text_encoder)
    encoder = parts["text_encoder"].to(accelerator.device, getattr(torch, settings.dtype)).eval()
    digest = hashlib.sha256()
    add_weights(digest, encoder)
    names = ("max_length", "clean_caption", "dtype", "shard_size")
    facts = {name: getattr(settings, name) for name in names} | {
        "captions": captions_fingerprint(captions),
        "channels": encoder.config.d_model,
        "text_encoder": digest.hexdigest()[:16],
    }
    output = Path(settings.output)
    starts = range(0, len(captions), settings.shard_size)
    files = [output / f"features-{number:05}.safetensors" for number in range(len(starts))]
    with lock_folder(output, accelerator):
        if accelerator.is_main_process:
            for partial in output.glob(".*.partial"):
                partial.unlink()
            check_same_extraction(output, "features", files, facts)
        accelerator.wait_for_everyone()
        mine = list(zip(files, starts, strict=True))[accelerator.process_index :: accelerator.num_processes]
        missing = [(file, captions[start : start + settings.shard_size]) for file, start in mine if not file.exists()]
        done = sum(len(part) for _, part in missing)
        started = time.perf_counter()
        bar = tqdm(total=done, unit="captions", desc="encoding")
        for file, part in missing:
            texts = CaptionPreprocessing()._text_preprocessing(part, clean_caption=settings.clean_caption)
            found = []
            for first in range(0, len(texts), settings.batch_size):
                batch = texts[first : first + settings.batch_size]
                features, mask = encode_text(
                    encoder, parts["tokenizer"], batch, settings.max_length, accelerator.device
                )
                lengths = mask.sum(1).tolist()
                found += [each[:length].cpu() for each, length in zip(features, lengths, strict=True)]
                bar.update(len(batch))
            ends = torch.tensor([len(each) for each in found]).cumsum(0)
            partial = file.with_name(f".{file.name}.partial")
            tensors = {"features": torch.cat(found).contiguous(), "ends": ends}
            save_file(tensors, partial, {"extraction": json.dumps(facts)})
            publish(partial, file)
        bar.close()
        seconds = time.perf_counter() - started
        done = int(accelerator.reduce(torch.tensor(done, device=accelerator.device)))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            index = facts | {"shards": [{"file": file.name} for file in files]}
            write_text(output / INDEX, json.dumps(index, indent=1) + "\n")
            print(
                f"{output}: {len(captions)} captions, {len(files)} shards; {done} now, {done / seconds:.0f} captions/s"
            )
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return output


def read_captions(data: str | Path) -> list[str]:
    """The captions of a folder of codes, in the order of their ids, or the lines of a file."""
    index = Path(data) / INDEX
    if not index.is_file():
        return read_prompts(data)
    captions = json.loads(index.read_text(encoding="utf-8")).get("classes")
    if not captions:
        raise ValueError(
            f"`data` must be a folder of codes with captions, or a file with one a line, {data} is neither."
        )
    return captions
