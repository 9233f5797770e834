"""Images and token ids, in the layouts that training passes around."""

import json
from pathlib import Path

import torch
from diffusers import VQModel
from safetensors import safe_open


def load_split(folder: Path, split: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """`images` uint8 (N, 3, H, W) and `labels` uint8 (N,) of a split made by par_diffusers.training.glyphs; class names."""
    file = Path(folder) / f"{split}.safetensors"
    if not file.is_file():
        raise ValueError(f"`data` must be a folder made by par_diffusers.training.glyphs, `{file}` is missing.")
    with safe_open(file, "pt") as tensors:
        classes = json.loads(tensors.metadata()["classes"])
        return {name: tensors.get_tensor(name) for name in tensors.keys()}, classes  # noqa: SIM118


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode_images(vqvae: VQModel, images: torch.Tensor, batch_size: int = 64) -> torch.LongTensor:
    """uint8 images (B, 3, H, W) -> token ids (B, H / f, W / f) in raster layout, by the tokenizer's nearest codes."""
    factor = 2 ** (len(vqvae.config.block_out_channels) - 1)
    height, width = images.shape[-2] // factor, images.shape[-1] // factor
    # filled in place: a result kept from each batch pins the heap around it, gigabytes over a large image set
    grids = torch.empty(len(images), height, width, dtype=torch.long)
    for start in range(0, len(images), batch_size):
        pixels = to_pixels(images[start : start + batch_size]).to(vqvae.device, vqvae.dtype)
        indices = vqvae.quantize(vqvae.encode(pixels).latents)[2][2]
        grids[start : start + batch_size] = indices.view(-1, height, width)
    return grids
