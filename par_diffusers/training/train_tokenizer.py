"""Trains an image tokenizer: a stock `diffusers.VQModel` with an l2-normalised codebook.

    python -m par_diffusers.training.train_tokenizer --data glyphs --output tokenizer

The first fifth of the steps trains a plain autoencoder on normalised latents; the codebook then starts from latents of
the data, which leaves few dead codes, and codes nothing has used for a while are moved onto latents of the batch at hand.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import VQModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch.utils.data import DataLoader, TensorDataset

from par_diffusers.cli import one_line_errors
from par_diffusers.training.data import load_split, to_pixels


REVIVE_EVERY = 100  # steps without a single use that make a code dead


def quantize(latents: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.LongTensor]:
    """Nearest unit-norm code of each normalised latent.

    latents (B, d, h, w) -> codes (B, d, h, w) and indices (B, h, w); `codebook` is (K, d), any norm.
    """
    codebook = F.normalize(codebook, dim=-1)
    indices = torch.einsum("bdhw,kd->bhwk", latents, codebook).argmax(-1)
    return codebook[indices].permute(0, 3, 1, 2), indices


def train_tokenizer(
    vqvae: VQModel,
    images: torch.Tensor,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    autoencoder_fraction: float = 0.2,
    commitment: float = 0.25,
    log_every: int = 200,
    seed: int = 0,
) -> VQModel:
    """Trains `vqvae` on `images`, uint8 (N, 3, H, W), and returns it with a unit-norm codebook.

    Runs in one process. Losses: L1 on pixels in [-1, 1], codebook and commitment (times `commitment`) squared
    distances between normalised latents and codes.
    """
    set_seed(seed)
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"The tokenizer trains in one process, got {accelerator.num_processes}.")
    warmup_steps = min(200, steps // 10)
    optimizer = torch.optim.AdamW(vqvae.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps)
    loader = DataLoader(TensorDataset(images), batch_size=batch_size, shuffle=True, drop_last=True)
    model, optimizer, schedule, loader = accelerator.prepare(vqvae, optimizer, schedule, loader)
    vqvae = accelerator.unwrap_model(model)
    codebook = vqvae.quantize.embedding.weight
    uses = torch.zeros(len(codebook), device=accelerator.device)

    step, started = 0, time.perf_counter()
    first_quantized = math.ceil(steps * autoencoder_fraction)
    while step < steps:
        for (batch,) in loader:
            pixels = to_pixels(batch)
            latents = F.normalize(vqvae.quant_conv(vqvae.encoder(pixels)), dim=1)
            candidates = latents.detach().permute(0, 2, 3, 1).reshape(-1, codebook.shape[1])
            if step == first_quantized:
                chosen = torch.randperm(len(candidates), device=candidates.device)[: len(codebook)]
                codebook.data.copy_(candidates[chosen])
            codes, indices = quantize(latents, codebook)
            quantizes = step >= first_quantized
            decoded = latents + (codes - latents).detach() if quantizes else latents
            decoded = vqvae.decoder(vqvae.post_quant_conv(decoded))
            loss = reconstruction = F.l1_loss(decoded, pixels)
            if quantizes:
                loss = loss + F.mse_loss(codes, latents.detach()) + commitment * F.mse_loss(latents, codes.detach())
                uses += torch.bincount(indices.flatten(), minlength=len(codebook))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1

            if quantizes and (step - first_quantized) % REVIVE_EVERY == 0:
                dead = (uses == 0).nonzero().flatten()
                # no revival in the last fifth: a code moved late would never be trained
                if len(dead) and step < 0.8 * steps:
                    chosen = torch.randint(len(candidates), (len(dead),), device=candidates.device)
                    codebook.data[dead] = candidates[chosen]
                used = len(codebook) - len(dead)
                uses.zero_()
            if step % log_every == 0:
                psnr = -10 * F.mse_loss(decoded, pixels).div(4).log10().item()
                usage = f" codes used {used}/{len(codebook)}" if step - first_quantized >= REVIVE_EVERY else ""
                speed = step * batch_size / (time.perf_counter() - started)
                accelerator.print(
                    f"step {step}/{steps} L1 {reconstruction.item():.4f} PSNR {psnr:.1f} dB{usage} {speed:.0f} images/s",
                    flush=True,
                )
            if step == steps:
                break
    codebook.data.copy_(F.normalize(codebook.data, dim=-1))
    return vqvae.eval()


@torch.no_grad()
def reconstruction_report(vqvae: VQModel, images: torch.Tensor, batch_size: int = 64) -> dict[str, float]:
    """Mean L1 on [-1, 1], PSNR in dB and share of codes used, of `images` uint8 (N, 3, H, W) through the tokenizer."""
    l1 = mse = 0.0
    used = set()
    for batch in images.split(batch_size):
        pixels = to_pixels(batch)
        quantized, _, (_, _, indices) = vqvae.quantize(vqvae.encode(pixels).latents)
        decoded = vqvae.decoder(vqvae.post_quant_conv(quantized))
        l1 += F.l1_loss(decoded, pixels).item() * len(batch)
        mse += F.mse_loss(decoded, pixels).item() * len(batch)
        used.update(indices.flatten().tolist())
    psnr = -10 * math.log10(mse / len(images) / 4)
    return {"l1": l1 / len(images), "psnr": psnr, "codebook_usage": len(used) / vqvae.config.num_vq_embeddings}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m par_diffusers.training.train_tokenizer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder made by par_diffusers.training.glyphs")
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained VQModel")
    parser.add_argument("--steps", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--codebook-size", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--codebook-dim", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--block-out-channels", type=int, nargs="+", default=[24, 48, 96], help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    images = load_split(args.data, "train")[0]["images"]
    levels = len(args.block_out_channels)
    torch.manual_seed(args.seed)
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=1,
        latent_channels=args.block_out_channels[-1],
        sample_size=images.shape[-1],
        num_vq_embeddings=args.codebook_size,
        norm_num_groups=8,
        vq_embed_dim=args.codebook_dim,
        scaling_factor=1.0,
        lookup_from_codebook=True,
    ).to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in vqvae.parameters()) / 1e6:.2f} M parameters, {len(images)} images", flush=True)
    vqvae = train_tokenizer(
        vqvae, images, steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate, seed=args.seed
    )
    vqvae.save_pretrained(args.output)
    held_out = load_split(args.data, "validation")[0]["images"]
    print("validation", {name: round(value, 4) for name, value in reconstruction_report(vqvae, held_out).items()})


if __name__ == "__main__":
    with one_line_errors("python -m par_diffusers.training.train_tokenizer"):
        main()
