"""Loads a pipeline as the commands run it: precision, quantization, packed or compiled."""

from pathlib import Path

import torch
import torch._inductor.config
from diffusers import DiffusionPipeline

from par_diffusers.cli import check_installed
from par_diffusers.pipelines import PARPipeline, PARTextToImagePipeline, PARVideoPipeline
from par_diffusers.settings import LoadingSettings


_CLASSES = {cls.__name__: cls for cls in (PARPipeline, PARTextToImagePipeline, PARVideoPipeline)}


def load_pipeline(
    model: str | Path, settings: LoadingSettings, device: str | torch.device, batch_size: int
) -> PARPipeline | PARTextToImagePipeline | PARVideoPipeline:
    """
    A pipeline of the class that its folder names, ready for calls of `batch_size` images.

    Example:

    ```py
    >>> from par_diffusers import embedded_model
    >>> from par_diffusers.sampling.loading import load_pipeline
    >>> from par_diffusers.settings import LoadingSettings

    >>> settings = LoadingSettings(dtype="bfloat16", mode="packed")
    >>> pipe = load_pipeline(embedded_model("par-glyphs-4x"), settings, "cpu", batch_size=1)
    >>> pipe.transformer.dtype
    torch.bfloat16
    ```
    """
    quantization = None
    if settings.quantization is not None:
        from diffusers import PipelineQuantizationConfig
        from transformers import TorchAoConfig

        quantization = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(int8_weights())})
    index = DiffusionPipeline.load_config(model)
    name = pipeline_class_name(index)
    if name not in _CLASSES:
        raise ValueError(f"`model` must be a pipeline of {' or '.join(_CLASSES)}, {model} is of {name}.")
    # a text encoder may be many times the backbone: it stays as it was saved, which is what "auto" says
    dtype = {"transformer": getattr(torch, settings.dtype), "text_encoder": "auto", "default": torch.float32}
    if "text_encoder" not in index:
        dtype.pop("text_encoder")
    pipe = _CLASSES[name].from_pretrained(model, dtype=dtype, quantization_config=quantization).to(device)
    prepare(pipe, settings.mode, batch_size)
    return pipe


def pipeline_class_name(index: dict) -> str:
    """Name of the class in a `model_index.json`, whether or not the folder carries its code."""
    name = index["_class_name"]
    return name if isinstance(name, str) else name[1]


def check_condition(pipe: DiffusionPipeline, model: str | Path, is_text: bool, num_frames: int | None) -> None:
    """Raises a `ValueError` where prompts are given to a model of labels, labels to one of text, or frames to one of images."""
    if num_frames is not None and not isinstance(pipe, PARVideoPipeline):
        raise ValueError(f"`num_frames` goes with models of clips, {model} draws images.")
    if is_text != isinstance(pipe, PARTextToImagePipeline):
        kinds = ("labels", "prompts")
        raise ValueError(f"`model` must draw from {kinds[is_text]}, {model} draws from {kinds[not is_text]}.")


def int8_weights():
    """torchao's configuration: weights in int8 with a scale for each row, activations as they are."""
    check_installed("torchao", "quantization")
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def stored_tensors(weight: torch.Tensor) -> list[torch.Tensor]:
    """What lies in memory for a weight: itself, or codes and scales of a quantized one."""
    data = weight.data if isinstance(weight, torch.nn.Parameter) else weight
    if type(data) is torch.Tensor:
        return [data]
    return [getattr(data, name) for name in data.__tensor_flatten__()[0]]


def prepare(pipe: PARPipeline, mode: str, batch_size: int) -> None:
    """Packs or compiles the backbone, for calls of `batch_size` images with guidance."""
    if mode == "packed":
        pipe.transformer.pack_linear_weights(2 * batch_size * pipe.scheduler.config.num_parallel_tokens)
    elif mode == "compiled" and pipe.device.type == "cuda":
        pipe.transformer.compile(mode="reduce-overhead", fullgraph=True)
    elif mode == "compiled":
        # weights that are constants are packed too; as an option of `compile` this has no effect (torch 2.13)
        torch._inductor.config.freezing = True
        pipe.transformer.compile(fullgraph=True)
