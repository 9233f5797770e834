"""Settings of the commands: each field is a command-line option and, where a command takes --config, a line of a YAML file."""

import argparse
import dataclasses
import os
import types
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints


def option(
    default: Any, help: str, choices: tuple | None = None, least: float | None = None, above: float | None = None
):
    """A field with its help and what its values may be: one of `choices`, at least `least`, or above `above`."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least, "above": above})


@dataclass
class _Settings:
    """Values are checked, and converted from what YAML makes of them, when a settings object is made."""

    def __post_init__(self):
        for item in dataclasses.fields(self):
            kind, text = _value_type(type(self), item.name), _holds_text(type(self), item.name)
            setattr(self, item.name, _checked(item, kind, getattr(self, item.name), text and kind is tuple))


@dataclass
class _RunSettings(_Settings):
    """What the trainers have in common."""

    data: str = option(MISSING, "training data")
    output: str = option(MISSING, "folder of the run and of what it trains")
    validation_data: str | None = option(None, "data for validation, of the same kind")
    validation_samples: int = option(4096, "samples of the validation data to use, spread over it", least=1)
    validation_steps: int = option(1000, "steps between validations", least=1)
    logging_steps: int = option(100, "steps between lines of the log", least=1)
    checkpointing_steps: int = option(1000, "steps between checkpoints", least=1)
    checkpoints_total_limit: int = option(2, "checkpoints to keep", least=1)
    report_to: str | None = option(None, "tracker that gets the metrics too", ("tensorboard", "wandb"))
    seed: int = option(0, "of the weights, the order of the data and the dropouts", least=0)
    dataloader_num_workers: int = option(0, "processes that load data, for each training process", least=0)
    global_batch_size: int = option(256, "samples of a step over all processes and accumulation steps", least=1)
    gradient_accumulation_steps: int = option(1, "parts that a batch is run in, one after the other", least=1)
    max_train_steps: int | None = option(None, "steps to train, instead of epochs", least=1)
    lr_scheduler: str = option(
        "cosine", "learning rate after the warm-up", ("cosine", "linear", "constant", "constant_with_warmup")
    )
    lr_warmup_steps: int | None = option(None, "steps of linear warm-up, instead of epochs", least=0)
    learning_rate: float = option(1e-4, "peak learning rate of AdamW", above=0)
    adam_beta1: float = option(0.9, "first beta of AdamW", least=0)
    adam_beta2: float = option(0.95, "second beta of AdamW", least=0)
    weight_decay: float = option(0.05, "weight decay of matrices", least=0)
    max_grad_norm: float = option(1.0, "norm that gradients are clipped to", above=0)
    mixed_precision: str | None = option(
        None, "dtype of the computations (default: bf16, without an accelerator no)", ("no", "fp16", "bf16")
    )


@dataclass
class TrainingSettings(_RunSettings):
    """
    Settings of [`~par_diffusers.training.train.train`]. The defaults are the paper's for PAR-L and PAR-XL on ImageNet
    (table 5) and for clips (table 6); `None` where the data or a pipeline to start from decides, or nothing does.
    """

    data: str = option(MISSING, "folder of codes made by extract-codes, or in LlamaGen's layout (codes/, labels/)")
    vqvae: str | None = option(
        None, "tokenizer of the codes: pipeline folder, VQModel or AutoencoderVidTok folder, or embedded model"
    )
    model: str | None = option(None, "pipeline folder whose backbone training starts from (default: from scratch)")
    features: str | None = option(None, "folder made by extract-features: train on captions (default: on classes)")
    validation_features: str | None = option(None, "the same of the validation data")
    labels: str | None = option(
        None,
        "label names in the order of class ids: JSON, one a line, imagenet or ucf101 (default: the classes of the data)",
    )
    num_parallel_tokens: int | None = option(None, "tokens of a parallel step (default: 4)", least=1)
    order: str | None = option(None, "token order (default: region)", ("region", "raster"))
    region_grid: tuple[int, ...] | None = option(
        None, "rows and columns of regions (default: the most square)", least=1
    )
    initial_tokens: str | None = option(None, "first tokens (default: sequential)", ("sequential", "parallel"))
    group_attention: str | None = option(None, "attention inside a step (default: full)", ("full", "causal"))
    guidance_scale: float | None = option(None, "default of the pipeline (default: 1)", least=0)
    top_k: int | None = option(None, "default of the pipeline (default: 0, which keeps all)", least=0)
    hidden_size: int | None = option(None, "width of the backbone (default: 1024)", least=1)
    intermediate_size: int | None = option(None, "width of its feed-forward (default: 2816)", least=1)
    num_hidden_layers: int | None = option(None, "its layers (default: 24)", least=1)
    num_attention_heads: int | None = option(None, "its attention heads (default: 16)", least=1)
    num_key_value_heads: int | None = option(None, "its key and value heads (default: the attention heads)", least=1)
    token_dropout: float = option(0.1, "dropout of embedded tokens", least=0)
    residual_dropout: float = option(0.1, "dropout of the output of attention and feed-forward", least=0)
    attention_dropout: float = option(0.1, "dropout of attention weights", least=0)
    condition_dropout: float = option(0.1, "share of conditions replaced by the null condition", least=0)
    num_train_epochs: int | None = option(None, "passes through the data (default: 300, of clips 3000)", least=1)
    lr_warmup_epochs: int | None = option(
        None, "epochs of linear warm-up, at most a tenth of the steps (default: 15, of clips 150)", least=0
    )
    ema_decay: float | None = option(
        None, "decay of the average of the weights that is saved (default: none)", above=0
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    attn_implementation: str = option(
        "sdpa",
        "attention of transformers to train with (eager is faster on a CPU)",
        ("sdpa", "eager", "flex_attention"),
    )
    compile: bool = option(False, "compile the layers with torch.compile")
    num_validation_images: int = option(16, "images of the sample grid at each validation, 0 for none", least=0)
    peak_tflops: float | None = option(
        None, "of a device, that MFU relates to (default: measured with a matrix product)", above=0
    )


@dataclass
class TokenizerSettings(_RunSettings):
    """Settings of [`~par_diffusers.training.train_tokenizer.train_tokenizer`]."""

    data: str = option(MISSING, "folder of images, or of videos")
    vqvae: str | None = option(
        None, "tokenizer that training starts from: folder, pipeline or embedded model (default: from scratch)"
    )
    architecture: str | None = option(
        None, "model of diffusers: of images, or of videos (default: VQModel)", ("VQModel", "AutoencoderVidTok")
    )
    global_batch_size: int = option(128, "samples of a step over all processes and accumulation steps", least=1)
    max_train_steps: int = option(40000, "steps to train", least=1)
    lr_warmup_steps: int = option(200, "steps of linear warm-up", least=0)
    weight_decay: float = option(0.0, "weight decay of matrices", least=0)
    image_size: int = option(256, "pixels of a side", least=1)
    num_frames: int = option(17, "frames of a clip", least=1)
    frame_rate: float = option(8.0, "frames a second of a clip, 0 for every frame of the video", least=0)
    num_clips: int = option(8, "clips of each video, at random places", least=1)
    augmentation: str = option(
        "flip", "views of an image, or a clip (none, flip), to train on", ("none", "flip", "ten-crop")
    )
    crop_range: float = option(1.1, "of ten-crop: side of the centre crop over the side of its ten crops", least=1)
    codebook_size: int | None = option(
        None, "codes (default: 16384); of AutoencoderVidTok a power of 8 (4096, 32768, 262144)", least=2
    )
    codebook_dim: int | None = option(None, "width of a code of a VQModel (default: 8)", least=1)
    block_out_channels: tuple[int, ...] | None = option(
        None,
        "channels of each level (default: 128 128 256 256 512); each but the last halves the sides (AutoencoderVidTok: "
        "multiples of the first)",
        least=1,
    )
    layers_per_block: int | None = option(None, "residual blocks of a level (default: 2)", least=1)
    norm_num_groups: int | None = option(None, "groups of the group norms of a VQModel (default: 32)", least=1)
    commitment: float = option(0.25, "weight of the commitment loss (VQModel)", least=0)
    autoencoder_steps: int | None = option(
        None,
        "first steps of a VQModel, without quantization, after which the codes are drawn (default: 2000, with vqvae none)",
        least=0,
    )
    revival_steps: int = option(
        100, "steps without a use after which a code moves to a latent of the batch (VQModel)", least=1
    )


@dataclass
class ExtractionSettings(_Settings):
    """Settings of [`~par_diffusers.training.extract_codes.extract_codes`]."""

    data: str = option(
        MISSING, "images, or videos: in a folder for each class, or flat with metadata.csv or metadata.jsonl"
    )
    output: str = option(MISSING, "folder of the shards")
    vqvae: str = option(
        MISSING, "tokenizer: pipeline folder, VQModel folder, embedded model; of videos, AutoencoderVidTok folder"
    )
    image_size: int | None = option(None, "pixels of a side (default: 384, of videos 128)", least=1)
    augmentation: str = option("flip", "views of an image, or a clip (none, flip)", ("none", "flip", "ten-crop"))
    crop_range: float = option(1.1, "of ten-crop: side of the centre crop over the side of its ten crops", least=1)
    num_frames: int = option(17, "frames of a clip", least=1)
    frame_rate: float = option(8.0, "frames a second of a clip, 0 for every frame of the video", least=0)
    num_clips: int = option(1, "clips of each video, at random places", least=1)
    seed: int = option(0, "of where clips begin", least=0)
    classes: str | None = option(
        None, "class names in the order of their ids: JSON, one a line, imagenet or ucf101 (default: sorted)"
    )
    shard_size: int = option(4096, "files of a shard", least=1)
    batch_size: int = option(32, "files at a time", least=1)
    dataloader_num_workers: int = option(0, "processes that load files, for each process", least=0)


@dataclass
class FeatureSettings(_Settings):
    """Settings of [`~par_diffusers.training.extract_features.extract_features`]."""

    data: str = option(MISSING, "folder of codes whose images have captions, or a file with a caption a line")
    output: str = option(MISSING, "folder of the shards")
    text_encoder: str = option(MISSING, "folder or Hub repository of a T5 with its tokenizer")
    max_length: int = option(120, "tokens of a caption; longer ones are cut", least=1)
    clean_caption: bool = option(False, "clean captions of links, HTML, ... (needs ftfy and beautifulsoup4)")
    dtype: str = option("float32", "of the encoder and of the features", ("float32", "bfloat16"))
    shard_size: int = option(4096, "captions of a shard", least=1)
    batch_size: int = option(32, "captions at a time", least=1)


@dataclass(kw_only=True)
class CallSettings(_Settings):
    """Arguments of a pipeline's call; None takes the model's own."""

    guidance_scale: float | None = option(None, "classifier-free guidance (default: the model's own)", least=0)
    guidance_schedule: str | None = option(
        None, "guidance over the steps (default: the model's own)", ("constant", "linear", "power-cosine")
    )
    guidance_power: float | None = option(None, "of power-cosine (default: the model's own)", above=0)
    guidance_interval: tuple[int, ...] | None = option(
        None, "first step with guidance and first one after without (default: the model's own)", least=0
    )
    temperature: float | None = option(None, "0 takes the likeliest tokens (default: the model's own)", least=0)
    top_k: int | None = option(None, "keep the k likeliest tokens, 0 all (default: the model's own)", least=0)
    top_p: float | None = option(None, "keep the likeliest tokens of mass p (default: the model's own)", above=0)

    height: int | None = option(None, "pixels (default: the model's own)", least=1)
    width: int | None = option(None, "pixels (default: the model's own)", least=1)
    num_frames: int | None = option(None, "frames of a clip (default: the model's own)", least=1)

    def call_arguments(self) -> dict[str, Any]:
        arguments = {item.name: getattr(self, item.name) for item in dataclasses.fields(CallSettings)}
        if self.num_frames is None:
            arguments.pop("num_frames")  # which pipelines of images do not take
        return arguments

    def sampling_arguments(self) -> dict[str, Any]:
        """Those that a scheduler has defaults for."""
        sizes = ("height", "width", "num_frames")
        return {name: value for name, value in self.call_arguments().items() if name not in sizes}


@dataclass(kw_only=True)
class LoadingSettings(_Settings):
    """How a pipeline runs; see [`~par_diffusers.sampling.loading.load_pipeline`]."""

    dtype: str = option("float32", "of the backbone", ("float32", "float16", "bfloat16"))
    quantization: str | None = option(
        None, "of the backbone's weights, by torchao (default: none); --dtype is of the rest", ("int8",)
    )
    mode: str = option(
        "eager",
        "packed: weights laid out for a CPU; compiled: torch.compile, the first images wait for it",
        ("eager", "packed", "compiled"),
    )


@dataclass
class SamplingSettings(CallSettings, LoadingSettings):
    """Settings of [`~par_diffusers.sampling.sample.sample`]."""

    model: str = option(MISSING, "pipeline folder, Hub repository or embedded model")
    output: str = option(MISSING, "folder of the samples")
    num_samples: int | None = option(
        None, "images or clips (default: 50000 images, 10000 clips, or one for each prompt)", least=1
    )
    prompts: str | None = option(
        None, "for models that draw from text: a prompt a line, or .tsv with a column prompt; they are taken in turn"
    )
    labels: tuple[str, ...] = option(
        ("balanced",), "balanced (each class as often), random, or label names and class ids to take in turn"
    )
    seed: int = option(0, "of all images; image i is drawn from this and i alone", least=0)
    image_size_eval: int | None = option(None, "resize to this side, as the published protocol (bicubic)", least=1)
    batch_size: int = option(32, "images or clips at a time, for each process", least=1)
    shard_size: int = option(1000, "images or clips of a shard", least=1)
    png: bool = option(False, "write the images as PNG files too, or the clips as GIF files")
    num_preview_images: int = option(
        64, "first images to show in preview.png, or clips in preview.gif, 0 for none", least=0
    )


@dataclass
class EvaluationSettings(_Settings):
    """Settings of [`~par_diffusers.evaluation.evaluate.evaluate`]."""

    samples: str = option(MISSING, "what is measured: .npz, folder made by sample, or folder of images or videos")
    extractor: str = option(
        MISSING, "network of the features: TorchScript file (Inception, I3D, any), or glyphs-judge"
    )
    reference: str | None = option(
        None, "what it is compared with: the same kinds, or .npz with mu and sigma (default: nothing)"
    )
    metrics: tuple[str, ...] | None = option(
        None,
        "what to compute (default: all that can be)",
        ("frechet", "inception-score", "precision-recall", "accuracy"),
    )
    image_size: int | None = option(
        None,
        "side of the centre crop of the images or videos of a folder (default: as they are; of videos the samples')",
        least=1,
    )
    num_frames: int | None = option(None, "first frames of each clip to compare (default: all)", least=1)
    per_class: int | None = option(None, "first images or clips of each class to compare (default: all)", least=1)
    frame_rate: float = option(8.0, "frames a second of clips of a folder of videos, 0 for all of a video", least=0)
    num_clips: int = option(1, "clips of each video of a folder, at random places", least=1)
    batch_size: int = option(64, "images or clips at a time", least=1)
    device: str | None = option(None, "as torch names it (default: an accelerator where there is one, else cpu)")
    output: str | None = option(None, "JSON file of the result")
    save_statistics: str | None = option(None, ".npz file for mu and sigma of the samples, to be a reference later")


@dataclass
class BenchmarkSettings(_Settings):
    """Settings of [`~par_diffusers.sampling.benchmark.benchmark`]; lists are combined with each other."""

    model: tuple[str, ...] = option(
        ("L",), "published sizes with random weights (B, L, XL, XXL, 3B), pipeline folders or embedded models"
    )
    num_parallel_tokens: tuple[int, ...] = option((1, 4, 16), "tokens of a parallel step", least=1)
    grid_size: tuple[int, ...] | None = option(
        None, "tokens: height width, or frames height width (default: 24 24, of a model its own)", least=1
    )
    batch_size: tuple[int, ...] = option((1,), "images or clips at a time", least=1)
    dtype: tuple[str, ...] = option(("float32",), "of the backbone", ("float32", "float16", "bfloat16"))
    quantization: tuple[str, ...] = option(("none",), "of the backbone's weights, by torchao", ("none", "int8"))
    mode: tuple[str, ...] = option(
        ("eager",),
        "packed: weights laid out for a CPU; compiled: torch.compile",
        ("eager", "packed", "compiled"),
    )
    channels_last: bool = option(False, "the tokenizer's memory format")
    guidance: bool = option(True, "with classifier-free guidance, which doubles the work")
    warmup: int = option(1, "calls before those that count", least=0)
    repeats: int = option(3, "calls that count", least=1)
    device: str | None = option(None, "as torch names it (default: an accelerator where there is one, else cpu)")
    output: str | None = option(None, "folder for the table, benchmark.json and roofline.png")


@dataclass
class EntropySettings(_Settings):
    """Settings of [`~par_diffusers.analysis.entropy.entropy`]."""

    data: str = option(MISSING, "folder of codes made by extract-codes, or in LlamaGen's layout (codes/, labels/)")
    vqvae: str = option(MISSING, "tokenizer of the codes: pipeline folder, VQModel folder or embedded model")
    output: str = option(MISSING, "folder of the pictures and numbers")
    num_samples: int = option(10000, "images, drawn at random", least=4)
    num_parallel_tokens: int = option(4, "tokens of a parallel step", least=2)
    held_out: float = option(0.2, "share of the images that residuals are measured on, below 1", above=0)
    ridge: float = option(1e-3, "penalty of the regression, in units of the mean variance", above=0)
    seed: int = option(0, "of the choice of images", least=0)


def add_options(parser: argparse.ArgumentParser, settings_type: type, config: bool = True) -> None:
    """Adds an option for each field, and --config."""
    if config:
        parser.add_argument("--config", metavar="FILE", help="YAML file of options, which those given here override")
    for item in dataclasses.fields(settings_type):
        kind = _value_type(settings_type, item.name)
        help = item.metadata["help"]
        if item.default not in (None, MISSING) and kind is not bool:
            default = " ".join(map(str, item.default)) if kind is tuple else item.default
            help += f" (default: {default})"
        options = {"default": argparse.SUPPRESS, "help": help, "choices": item.metadata["choices"]}
        if kind is bool:
            options = {"default": argparse.SUPPRESS, "help": help, "action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            text = _holds_text(settings_type, item.name)
            options |= {"type": str if text else int, "nargs": "+"}
            if options["choices"] is None:
                options["metavar"] = "NAME" if text else "N"
        elif options["choices"] is None:
            options |= {"type": kind, "metavar": {int: "N", float: "X", str: "PATH"}[kind]}
        parser.add_argument("--" + item.name.replace("_", "-"), **options)


def read_settings(settings_type: type, args: argparse.Namespace, echo: str | None = None):
    """
    The settings of a command: options over the lines of --config over the defaults.

    `echo` is the file that an earlier run left: it takes the place of what neither options nor --config say.
    """
    values = {}
    for file in (echo, getattr(args, "config", None)):
        if file is not None:
            values |= _read_yaml(file, settings_type)
    names = {item.name for item in dataclasses.fields(settings_type)}
    values |= {name: value for name, value in vars(args).items() if name in names}
    required = [item.name for item in dataclasses.fields(settings_type) if item.default is MISSING]
    missing = ["--" + name.replace("_", "-") for name in required if name not in values]
    if missing:
        raise ValueError(f"these options are needed, here or in the file of --config: {', '.join(missing)}.")
    return settings_type(**values)


def save_settings(settings, file: Path) -> None:
    """Writes the settings as YAML, under a temporary name first."""
    import yaml

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    os.replace(partial, file)


def _read_yaml(file: str, settings_type: type) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`config` must be a YAML file, {file} is not: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"`config` must be a YAML file of `name: value` lines, {file} is not.")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(values.keys() - {item.name for item in dataclasses.fields(settings_type)})
    if unknown:
        raise ValueError(f"`config`: {file} has unknown names: {', '.join(unknown)}.")
    return values


def _value_type(settings_type: type, name: str) -> type:
    """int, float, str, bool or tuple (of int)."""
    hint = get_type_hints(settings_type)[name]
    kinds = (
        [kind for kind in get_args(hint) if kind is not type(None)] if isinstance(hint, types.UnionType) else [hint]
    )
    return tuple if get_args(kinds[0]) else kinds[0]


def _holds_text(settings_type: type, name: str) -> bool:
    """Whether a tuple is one of text."""
    return "str" in str(get_type_hints(settings_type)[name])


def _checked(item: dataclasses.Field, kind: type, value: Any, text: bool = False) -> Any:
    if value is None and item.default is None:
        return None
    limits = item.metadata
    kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "whole numbers"}
    allowed = "a list of text" if text else kinds[kind]
    if limits["choices"] is not None:
        allowed = " or ".join(map(repr, limits["choices"]))
    elif limits["least"] is not None:
        allowed += f" of at least {limits['least']}"
    elif limits["above"] is not None:
        allowed += f" above {limits['above']}"
    wrong = ValueError(f"`{item.name}` must be {allowed}, got {value!r}.")
    try:
        if kind is tuple:
            value = (value,) if isinstance(value, str) else tuple(value)
            value = tuple(map(str, value)) if text else value
            fits = bool(value) and (text or all(isinstance(v, int) and not isinstance(v, bool) for v in value))
        elif kind is float:
            fits = not isinstance(value, bool)
            value = float(value)  # YAML takes 1e-4 for text
            fits = fits and abs(value) < float("inf")
        else:
            value = os.fspath(value) if kind is str and isinstance(value, os.PathLike) else value
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    except (TypeError, ValueError):
        raise wrong from None
    if fits and limits["choices"] is not None:
        fits = all(each in limits["choices"] for each in (value if kind is tuple else (value,)))
    if fits and kind in (int, float, tuple):
        numbers = value if kind is tuple else (value,)
        if limits["least"] is not None:
            fits = min(numbers) >= limits["least"]
        if limits["above"] is not None:
            fits = min(numbers) > limits["above"]
    if not fits:
        raise wrong
    return value
