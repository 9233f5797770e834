# Copyright 2026 The par_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Converts published PAR and LlamaGen checkpoints, class- or text-conditional, with VQ tokenizers, to a pipeline folder.

    python -m par_diffusers.conversion.convert_llamagen --checkpoint PAR-XL-4x.pt --vq-checkpoint vq_ds16_c2i.pt \
        --output par-xl-4x

The files are unpickled with `weights_only=True`, memory-mapped, and written one shard at a time, so that memory stays far
below the size of the checkpoint.
"""

import argparse
import json
import pickle
import re
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5EncoderModel
from transformers.dynamic_module_utils import custom_object_save

from par_diffusers.models import PARConfig, PARForConditionalGeneration
from par_diffusers.pipelines import PARPipeline, PARTextToImagePipeline
from par_diffusers.schedulers import PARScheduler


# (layers, width) -> name and attention heads of the published sizes (LlamaGen, table 1)
PUBLISHED_SIZES = {
    (12, 768): ("B", 12),
    (24, 1024): ("L", 16),
    (36, 1280): ("XL", 20),
    (48, 1536): ("XXL", 24),
    (48, 2560): ("XXXL", 40),
    (22, 2048): ("1B", 32),
    (24, 3200): ("3B", 32),
    (32, 4096): ("7B", 32),
}
# (size, parallel tokens) -> guidance scale of the published evaluations at 384 pixels: PAR (table 5 and README) and
# LlamaGen (README). The other sampling values are temperature 1, top-k 0 and top-p 1 for all of them.
PUBLISHED_GUIDANCE = {
    ("L", 4): 1.60,
    ("XL", 4): 1.50,
    ("XXL", 4): 1.435,
    ("3B", 4): 1.345,
    ("3B", 16): 1.5,
    ("L", 1): 2.0,
    ("XL", 1): 1.75,
    ("XXL", 1): 1.75,
    ("3B", 1): 1.65,
}
# LlamaGen's text-conditional models (sample_t2i.py)
PUBLISHED_TEXT_SAMPLING = {"guidance_scale": 7.5, "top_k": 1000}
CLASS_MODEL, TEXT_MODEL, TOKENIZER = "a class-conditional model", "a text-conditional model", "a VQ tokenizer"
DTYPES = ("float32", "float16", "bfloat16")
SHARD_SIZE = 1 << 30  # bytes of the tensors held in memory at a time
ASSETS = Path(__file__).parent.parent / "par_diffusers" / "assets"


def load_state_dict(file: str | Path) -> dict[str, torch.Tensor]:
    """
    The model's tensors of a checkpoint in any published wrapping, memory-mapped.

    Published files are `{"model": ...}` (DDP; beside it the optimizer, the step and an `argparse.Namespace`),
    `{"module": ...}` (DeepSpeed), `{"state_dict": ...}` or the bare tensors (FSDP). Nothing but tensors, plain containers
    and namespaces is unpickled.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"`{file}` is not a file.")
    if not zipfile.is_zipfile(file):
        raise ValueError(f"`{file}` is not a checkpoint written by torch.save, or it is truncated.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"(?:GLOBAL|Unsupported \w+|class|type) ([\w.]*\.[\w.]+)", str(error))
        raise ValueError(
            f"`{file}` holds Python objects other than tensors and was not opened{f': {culprit[1]}' if culprit else ''}."
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"`{file}` is damaged or truncated: {str(error).splitlines()[0]}") from None
    if isinstance(checkpoint, dict):
        for key in ("model", "module", "state_dict"):
            if isinstance(checkpoint.get(key), dict):
                checkpoint = checkpoint[key]
                break
    if not isinstance(checkpoint, dict) or not any(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise ValueError(
            f"`{file}` holds no model: expected tensors by name, or such under model, module or state_dict."
        )
    return {name: value for name, value in checkpoint.items() if isinstance(value, torch.Tensor)}


def _kind(state_dict: dict[str, torch.Tensor]) -> str:
    if "quantize.embedding.weight" in state_dict:
        return TOKENIZER
    if "cls_embedding.cap_proj.fc1.weight" in state_dict:
        return TEXT_MODEL
    if "tok_embeddings.weight" in state_dict:
        return CLASS_MODEL
    return "neither a PAR or LlamaGen model nor a VQ tokenizer"


def _load_kind(file: str | Path, kinds: tuple[str, ...], argument: str) -> dict[str, torch.Tensor]:
    state_dict = load_state_dict(file)
    found = _kind(state_dict)
    if found not in kinds:
        raise ValueError(f"`{argument}` must be {' or '.join(kinds)}, `{file}` is {found}.")
    return state_dict


def _tensor(state_dict: dict[str, torch.Tensor], name: str, ndim: int) -> torch.Tensor:
    if name not in state_dict or state_dict[name].ndim != ndim:
        found = tuple(state_dict[name].shape) if name in state_dict else "nothing"
        raise ValueError(f"The checkpoint must have a tensor `{name}` of {ndim} dimensions, got {found}.")
    return state_dict[name]


def model_config(state_dict: dict[str, torch.Tensor], num_attention_heads: int | None = None) -> PARConfig:
    """Sizes of a checkpoint, read off its tensors; the heads come from `PUBLISHED_SIZES` unless given."""
    vocab_size, hidden_size = _tensor(state_dict, "tok_embeddings.weight", 2).shape
    layers = {int(match[1]) for match in (re.match(r"layers\.(\d+)\.", name) for name in state_dict) if match}
    num_layers = max(layers, default=-1) + 1
    if num_attention_heads is None:
        if (num_layers, hidden_size) not in PUBLISHED_SIZES:
            raise ValueError(
                f"`num_attention_heads` (--num-attention-heads) must be given for a model of {num_layers} layers and width "
                f"{hidden_size}, which is none of the published sizes {[name for name, _ in PUBLISHED_SIZES.values()]}."
            )
        num_attention_heads = PUBLISHED_SIZES[num_layers, hidden_size][1]
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        raise ValueError(
            f"`num_attention_heads` (--num-attention-heads) must divide the width {hidden_size}, got {num_attention_heads}."
        )
    rows = _tensor(state_dict, "layers.0.attention.wqkv.weight", 2).shape[0]
    # (heads + 2 * key-value heads) * head width
    num_key_value_heads = (rows * num_attention_heads // hidden_size - num_attention_heads) // 2
    learnable = state_dict.get("spe_tok_embeddings.special_embeddings.weight")
    if _kind(state_dict) == CLASS_MODEL:
        condition = {"num_classes": _tensor(state_dict, "cls_embedding.embedding_table.weight", 2).shape[0] - 1}
    else:
        length, channels = _tensor(state_dict, "cls_embedding.uncond_embedding", 2).shape
        condition = {"condition": "caption", "caption_length": length, "caption_channels": channels}
    return PARConfig(
        **condition,
        vocab_size=vocab_size,
        num_learnable_tokens=0 if learnable is None else len(learnable),
        hidden_size=hidden_size,
        intermediate_size=_tensor(state_dict, "layers.0.feed_forward.w1.weight", 2).shape[0],
        num_hidden_layers=num_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=max(num_key_value_heads, 1),
        rope_unplaced="zero",
    )


_CONDITION_SOURCES = {
    "model.embed_condition.embedding.weight": "cls_embedding.embedding_table.weight",
    "model.embed_condition.null_features": "cls_embedding.uncond_embedding",
    "model.embed_condition.fc1.weight": "cls_embedding.cap_proj.fc1.weight",
    "model.embed_condition.fc2.weight": "cls_embedding.cap_proj.fc2.weight",
}
_LAYER_SOURCES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _sources(name: str, config: PARConfig) -> tuple[list[str], slice]:
    """Published tensors whose rows, stacked and then sliced, make the tensor `name` of our model."""
    whole = slice(None)
    if name == "model.embed_tokens.weight":
        learnable = ["spe_tok_embeddings.special_embeddings.weight"] if config.num_learnable_tokens else []
        return ["tok_embeddings.weight", *learnable], whole
    if name in _CONDITION_SOURCES:
        return [_CONDITION_SOURCES[name]], whole
    if name == "lm_head.weight":
        return ["output.weight"], whole
    name = name.removeprefix("model.")
    if name == "norm.weight":
        return [name], whole
    layer, part = re.fullmatch(r"(layers\.\d+)\.(.*)\.weight", name).groups()
    if part in _LAYER_SOURCES:
        return [f"{layer}.{_LAYER_SOURCES[part]}.weight"], whole
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    rows = {"q": slice(0, query), "k": slice(query, query + key), "v": slice(query + key, query + 2 * key)}
    return [f"{layer}.attention.wqkv.weight"], rows[part.removeprefix("self_attn.")[0]]


def _published_shapes(model: PARForConditionalGeneration) -> dict[str, torch.Size]:
    """Names and shapes a published checkpoint of this model must have."""
    config = model.config
    shapes = {}
    for name, tensor in model.state_dict().items():
        sources, rows = _sources(name, config)
        shapes |= dict.fromkeys(sources, tensor.shape)
        if rows.stop is not None:  # the last slice, the values, ends the stacked tensor
            shapes[sources[0]] = torch.Size((rows.stop, *tensor.shape[1:]))
    shapes["tok_embeddings.weight"] = torch.Size((config.vocab_size, config.hidden_size))
    if config.num_learnable_tokens:
        learnable = "spe_tok_embeddings.special_embeddings.weight"
        shapes[learnable] = torch.Size((config.num_learnable_tokens, config.hidden_size))
    return shapes


def _check_tensors(expected: dict[str, torch.Size], found: dict[str, torch.Tensor], file: str | Path) -> None:
    for what, names in (("misses", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"`{file}` {what} {shown}.")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(f"`{file}`: `{name}` must have the shape {tuple(shape)}, got {tuple(found[name].shape)}.")
        if not found[name].is_floating_point():
            raise ValueError(f"`{file}`: `{name}` must hold floating-point numbers, got {found[name].dtype}.")


def _check_finite(name: str, tensor: torch.Tensor, file: str | Path) -> None:
    if not tensor.isfinite().all():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"`{file}`: `{name}` holds values that are not finite in {dtype}.")


def write_transformer(
    file: str | Path, model: PARForConditionalGeneration, folder: Path, dtype: torch.dtype | None
) -> None:
    """Writes the weights of `file` as the folder of `model`, which lies on the meta device, one shard at a time."""
    config = model.config
    state_dict = load_state_dict(file)
    _check_tensors(_published_shapes(model), state_dict, file)
    dtype = dtype or state_dict["output.weight"].dtype

    folder.mkdir()
    targets = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    shards = split_torch_state_dict_into_shards(
        targets, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_SIZE
    )
    for shard, names in shards.filename_to_tensors.items():
        state_dict = load_state_dict(file)  # a new map for each shard: pages of the last one are given back
        tensors = {}
        for name in names:
            sources, rows = _sources(name, config)
            parts = [state_dict[source] for source in sources]
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0][rows]
            tensors[name] = tensor.to(dtype).contiguous()
            _check_finite(" + ".join(sources), tensors[name], file)
        save_file(tensors, folder / shard, {"format": "pt"})
        del state_dict, tensors, parts, tensor
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    # what PreTrainedModel.save_pretrained writes beside the weights
    config.architectures = [type(model).__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)


_VQ_RENAMES = [
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.0\.", ".mid_block.resnets.0."),
    (r"\.mid\.1\.", ".mid_block.attentions.0."),
    (r"\.mid\.2\.", ".mid_block.resnets.1."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"^encoder\.conv_blocks\.", "encoder.down_blocks."),
    (r"^decoder\.conv_blocks\.", "decoder.up_blocks."),
    (r"(_blocks\.\d+)\.res\.", r"\1.resnets."),
    (r"(_blocks\.\d+)\.attn\.", r"\1.attentions."),
    (r"(_blocks\.\d+)\.downsample\.", r"\1.downsamplers.0."),
    (r"(_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]


def convert_vq(file: str | Path, sample_size: int) -> VQModel:
    """
    A published VQ tokenizer (VQ-16, VQ-8 or of another size) as a stock `VQModel` in float32.

    The published code normalises the codebook whenever it is used; here it is normalised once.
    """
    state_dict = _load_kind(file, (TOKENIZER,), "vq_checkpoint")
    state_dict.pop("quantize.codebook_used", None)  # usage statistics of training
    levels = 0
    while f"encoder.conv_blocks.{levels}.res.0.conv1.weight" in state_dict:
        levels += 1
    widths = [len(_tensor(state_dict, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)) for i in range(levels)]
    if not levels:
        raise ValueError(f"`{file}` misses encoder.conv_blocks.0.res.0.conv1.weight.")
    layers = 0
    while f"encoder.conv_blocks.0.res.{layers}.conv1.weight" in state_dict:
        layers += 1
    codes, dim = _tensor(state_dict, "quantize.embedding.weight", 2).shape
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        latent_channels=len(_tensor(state_dict, "post_quant_conv.weight", 4)),
        sample_size=sample_size,
        num_vq_embeddings=codes,
        vq_embed_dim=dim,
        norm_num_groups=32,
        scaling_factor=1.0,
        lookup_from_codebook=True,
    )
    converted = {}
    for name, value in state_dict.items():
        _check_finite(name, value, file)
        new = name
        for pattern, replacement in _VQ_RENAMES:
            new = re.sub(pattern, replacement, new)
        if re.search(r"attentions\.\d+\.to_", new) and value.ndim == 4:
            value = value[:, :, 0, 0]  # 1x1 convolution -> linear
        converted[new] = value.float()
    _check_tensors({name: tensor.shape for name, tensor in vqvae.state_dict().items()}, converted, file)
    converted["quantize.embedding.weight"] = F.normalize(converted["quantize.embedding.weight"], dim=-1)
    vqvae.load_state_dict(converted)
    return vqvae.eval()


def read_labels(file: str | Path, num_classes: int | None = None, argument: str = "labels") -> dict[str, str]:
    """
    `id2label` from a JSON object (id to name), a JSON list, or a text file with one name a line.

    "imagenet" and "ucf101" are lists that ship with the package. There must be `num_classes` names, where that is given;
    errors call the file `argument`.
    """
    file = Path(file)
    if str(file) in ("imagenet", "ucf101") and not file.exists():
        file = ASSETS / f"{file}_labels.json"
    try:
        text = file.read_text(encoding="utf-8")
        names = json.loads(text) if file.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}`: `{file}` cannot be read: {error}") from None
    names = dict(enumerate(names)) if isinstance(names, list) else names
    num_classes = len(names) if num_classes is None else num_classes
    if not isinstance(names, dict) or {str(key) for key in names} != {str(i) for i in range(num_classes)}:
        raise ValueError(
            f"`{argument}`: `{file}` must name the classes 0 to {num_classes - 1}, one line or JSON entry each, got {len(names)}."
        )
    names = {str(key): value for key, value in names.items()}
    if not all(isinstance(name, str) and name.strip() for name in names.values()):
        raise ValueError(f"`{argument}`: `{file}` must hold names that are text and not empty.")
    return {str(i): names[str(i)].strip() for i in range(num_classes)}


def load_text_encoder(source: str | Path, channels: int | None = None) -> dict[str, Any]:
    """`text_encoder` and `tokenizer` of a T5, with features of the width `channels` where that is given."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        encoder = T5EncoderModel.from_pretrained(source, dtype="auto")
    except (OSError, ValueError) as error:
        raise ValueError(f"`text_encoder`: `{source}` is not a T5 with a tokenizer: {error}") from None
    if channels not in (None, encoder.config.d_model):
        raise ValueError(
            f"`text_encoder` must have features of width {channels}, `{source}` has {encoder.config.d_model}."
        )
    return {"text_encoder": encoder, "tokenizer": tokenizer}


def convert_llamagen_checkpoint(
    checkpoint: str | Path,
    vq_checkpoint: str | Path,
    output: str | Path,
    *,
    image_size: int = 384,
    num_attention_heads: int | None = None,
    dtype: str | torch.dtype | None = None,
    guidance_scale: float | None = None,
    labels: str | Path | None = None,
    text_encoder: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Converts a PAR or LlamaGen checkpoint and its VQ tokenizer to a pipeline folder: of [`PARPipeline`] where the model is
    class-conditional, of [`PARTextToImagePipeline`] where it is text-conditional.

    Args:
        checkpoint (`str` or `Path`): The published `.pt` of the model.
        vq_checkpoint (`str` or `Path`): The published `.pt` of the tokenizer.
        output (`str` or `Path`): The folder to make. It appears whole or not at all.
        image_size (`int`, defaults to 384): Pixels of a side; the grid is that over the tokenizer's downsampling.
        num_attention_heads (`int`, *optional*): For sizes other than the published ones.
        dtype (`str` or `torch.dtype`, *optional*):
            float32, float16 or bfloat16 for the model's weights. Defaults to the file's own. The tokenizer stays float32.
        guidance_scale (`float`, *optional*):
            Default of the pipeline. Defaults to the published value of the size, or 1 (none) where there is no such value.
        labels (`str` or `Path`, *optional*): File of class names. ImageNet's for 1,000 classes unless given.
        text_encoder (`str` or `Path`, *optional*):
            Folder or Hub repository of the T5 whose encoder and tokenizer the folder gets (LlamaGen's is flan-t5-xl). Without
            it, prompts come as embeddings.
        overwrite (`bool`, defaults to `False`): Whether to replace a folder that is not empty.

    Returns:
        `Path`: `output`.

    Raises:
        ValueError: before anything is written, naming the argument, where a file or value cannot be used.

    Example:

    ```py
    >>> from par_diffusers import PARPipeline, convert_llamagen_checkpoint

    >>> folder = convert_llamagen_checkpoint("PAR-XL-4x.pt", "vq_ds16_c2i.pt", "par-xl-4x")  # doctest: +SKIP
    >>> pipe = PARPipeline.from_pretrained(folder)  # doctest: +SKIP
    ```
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` must be a folder, `{output}` is a file.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"`output`: the folder `{output}` is not empty; `overwrite` (--overwrite) replaces it.")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype!r}.")
        dtype = getattr(torch, dtype)

    state_dict = _load_kind(checkpoint, (CLASS_MODEL, TEXT_MODEL), "checkpoint")
    config = model_config(state_dict, num_attention_heads)
    size = PUBLISHED_SIZES.get((config.num_hidden_layers, config.hidden_size), ("", 0))[0]
    del state_dict
    if config.condition == "caption" and labels is not None:
        raise ValueError(f"`labels` goes with class-conditional models, `{checkpoint}` is {TEXT_MODEL}.")
    if config.condition == "class" and text_encoder is not None:
        raise ValueError(f"`text_encoder` goes with text-conditional models, `{checkpoint}` is {CLASS_MODEL}.")
    vqvae = convert_vq(vq_checkpoint, image_size)
    if vqvae.config.num_vq_embeddings != config.vocab_size:
        raise ValueError(
            f"`vq_checkpoint` must have as many codes as the model has tokens, {config.vocab_size}, "
            f"got {vqvae.config.num_vq_embeddings}."
        )
    factor = 2 ** (len(vqvae.config.block_out_channels) - 1)
    if image_size < 1 or image_size % factor:
        raise ValueError(f"`image_size` (--image-size) must be a multiple of {factor}, got {image_size}.")
    n = config.num_learnable_tokens + 1
    sampling = {"guidance_scale": PUBLISHED_GUIDANCE.get((size, n), 1.0)}
    if config.condition == "caption":
        sampling = dict(PUBLISHED_TEXT_SAMPLING)
    if guidance_scale is not None:
        sampling["guidance_scale"] = guidance_scale
    try:
        scheduler = PARScheduler(
            (image_size // factor,) * 2, num_parallel_tokens=n, prefix_length=config.num_condition_slots
        )
    except ValueError as error:
        raise ValueError(f"`image_size` (--image-size) {image_size} gives a grid that does not fit: {error}") from None
    scheduler = PARScheduler.from_config(scheduler.config, **sampling)
    if labels is None and config.condition == "class" and config.num_classes == 1000:
        labels = "imagenet"
    id2label = read_labels(labels, config.num_classes) if labels is not None else None
    encoder = {} if text_encoder is None else load_text_encoder(text_encoder, config.caption_channels)

    with torch.device("meta"):
        model = PARForConditionalGeneration(config)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        folder = Path(scratch) / "pipeline"
        folder.mkdir()
        write_transformer(checkpoint, model, folder / "transformer", dtype)
        vqvae.save_pretrained(folder / "vqvae")
        scheduler.save_pretrained(folder / "scheduler")
        for name, component in encoder.items():
            component.save_pretrained(folder / name)
        if config.condition == "class":
            pipe = PARPipeline(model, vqvae, scheduler, id2label=id2label)
        else:
            pipe = PARTextToImagePipeline(model, vqvae, scheduler, **encoder)
        pipe.save_config(folder)
        if output.is_dir():
            output.rename(Path(scratch) / "replaced")
        folder.rename(output)
    return output


if __name__ == "__main__":
    from par_diffusers.cli import main

    main(["convert", *sys.argv[1:]])
