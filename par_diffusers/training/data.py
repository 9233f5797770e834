"""Images and token ids, in the layouts that training passes around."""

import torch
from diffusers import VQModel


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode_images(vqvae: VQModel, images: torch.Tensor, batch_size: int = 64) -> torch.LongTensor:
    """uint8 images (B, 3, H, W) -> token ids (B, H / f, W / f) in raster layout, by the tokenizer's nearest codes."""
    grids = []
    for batch in images.split(batch_size):
        latents = vqvae.encode(to_pixels(batch).to(vqvae.device, vqvae.dtype)).latents
        indices = vqvae.quantize(latents)[2][2]
        grids.append(indices.view(len(batch), *latents.shape[-2:]))
    return torch.cat(grids)
