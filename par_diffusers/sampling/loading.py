"""Loads a pipeline as the commands run it: precision, quantization, packed or compiled."""

from pathlib import Path

import torch
import torch._inductor.config

from par_diffusers.cli import check_installed
from par_diffusers.pipelines import PARPipeline
from par_diffusers.settings import LoadingSettings


def load_pipeline(
    model: str | Path, settings: LoadingSettings, device: str | torch.device, batch_size: int
) -> PARPipeline:
    """
    A pipeline, ready for calls of `batch_size` images.

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
    dtype = {"transformer": getattr(torch, settings.dtype), "default": torch.float32}
    pipe = PARPipeline.from_pretrained(model, dtype=dtype, quantization_config=quantization).to(device)
    prepare(pipe, settings.mode, batch_size)
    return pipe


def int8_weights():
    """torchao's configuration: weights in int8 with a scale for each row, activations as they are."""
    check_installed("torchao", "quantization")
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


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
