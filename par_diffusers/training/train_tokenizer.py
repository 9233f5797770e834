"""
Trains a tokenizer: of images a stock `diffusers.VQModel` with an l2-normalised codebook, of videos a stock
`diffusers.AutoencoderVidTok` with finite scalar quantization.
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import AutoencoderVidTok, VQModel
from torch import nn
from torch.utils.data import DataLoader

from par_diffusers.folders import lock_folder
from par_diffusers.sampling.generate import as_drawn, contact_sheet, lay_out
from par_diffusers.settings import TokenizerSettings
from par_diffusers.training.batches import BatchSchedule, seed_step
from par_diffusers.training.images import ImageFolder, MediaFolder, to_pixels
from par_diffusers.training.run import (
    TrainingRun,
    gather_state,
    make_accelerator,
    optimizer_and_schedule,
)
from par_diffusers.training.tokenizers import ImageTokenizer, VideoTokenizer, load_tokenizer
from par_diffusers.training.videos import VideoFolder


def quantize(latents: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.LongTensor]:
    """Nearest unit-norm code of each normalised latent.

    latents (B, d, h, w) -> codes (B, d, h, w) and indices (B, h, w); `codebook` is (K, d), any norm.
    """
    codebook = F.normalize(codebook, dim=-1)
    indices = torch.einsum("bdhw,kd->bhwk", latents, codebook).argmax(-1)
    return codebook[indices].permute(0, 3, 1, 2), indices


# what describes a tokenizer that starts from scratch
_MODEL = {
    "architecture": "VQModel",
    "codebook_size": 16384,
    "codebook_dim": 8,
    "block_out_channels": (128, 128, 256, 256, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


def build_tokenizer(settings: TokenizerSettings) -> ImageTokenizer | VideoTokenizer:
    """The tokenizer that the settings ask for, from scratch or from `settings.vqvae`, for training in float32."""
    if settings.vqvae is None:
        described = {name: getattr(settings, name) or default for name, default in _MODEL.items()}
        torch.manual_seed(settings.seed)
        is_image = described.pop("architecture") == "VQModel"
        return (_new_vqmodel if is_image else _new_vidtok)(image_size=settings.image_size, **described)

    for name in _MODEL:
        if getattr(settings, name) is not None:
            raise ValueError(f"`{name}` must not be given together with `vqvae`, which has its own.")
    tokenizer = load_tokenizer(settings.vqvae)
    if isinstance(tokenizer, VideoTokenizer):
        return tokenizer
    norms = tokenizer.vectors().norm(dim=-1)
    if (norms - 1).abs().max() > 1e-2:
        raise ValueError(
            f"`vqvae` must have codes of norm 1 to train from, those of {settings.vqvae} have norms from {norms.min():.3g} to "
            f"{norms.max():.3g}."
        )
    return tokenizer


def _new_vqmodel(
    image_size, codebook_size, codebook_dim, block_out_channels, layers_per_block, norm_num_groups
) -> ImageTokenizer:
    levels = len(block_out_channels)
    return ImageTokenizer(
        VQModel(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            latent_channels=block_out_channels[-1],
            sample_size=image_size,
            num_vq_embeddings=codebook_size,
            norm_num_groups=norm_num_groups,
            vq_embed_dim=codebook_dim,
            scaling_factor=1.0,
            lookup_from_codebook=True,
        )
    )


def _new_vidtok(codebook_size, block_out_channels, layers_per_block, **_) -> VideoTokenizer:
    first = block_out_channels[0]
    if any(width % first for width in block_out_channels):
        raise ValueError(f"`block_out_channels` must be multiples of the first, got {block_out_channels}.")
    width = round(math.log(codebook_size, 8))
    if codebook_size != 8**width:
        raise ValueError(f"`codebook_size` must be a power of 8, got {codebook_size}.")
    model = AutoencoderVidTok(
        ch=first,
        ch_mult=[width // first for width in block_out_channels],
        num_res_blocks=layers_per_block,
        z_channels=width,
        double_z=False,
        regularizer="fsq",
        codebook_size=codebook_size,
    )
    # Residual branches start at zero and what is around them keeps variances: the model starts as a linear one, which learns
    # from its first steps on.
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if "conv2" in name or "proj_out" in name:
                nn.init.zeros_(module.weight)
            elif "conv1" not in name:
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    return VideoTokenizer(model)


class ImageObjective(nn.Module):
    """
    The losses of a [`VQModel`]: L1 on pixels in [-1, 1], and squared distances between normalised latents and codes, to
    move the codes (weight 1) and the latents (weight `commitment`). With `quantizes` False the decoder gets the latents
    themselves.
    """

    def __init__(self, model: VQModel, commitment: float):
        super().__init__()
        self.model, self.commitment = model.to(memory_format=torch.channels_last), commitment

    @property
    def codebook(self) -> nn.Parameter:
        return self.model.quantize.embedding.weight

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, d, h, w) in float32."""
        return F.normalize(self.model.quant_conv(self.model.encoder(pixels)).float(), dim=1)

    def forward(self, pixels: torch.Tensor, quantizes: bool) -> dict[str, torch.Tensor]:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        latents = self.encode(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            codes, indices = quantize(latents, self.codebook)
            distances = F.mse_loss(codes, latents.detach()) + self.commitment * F.mse_loss(latents, codes.detach())
        straight_through = latents + (codes - latents).detach() if quantizes else latents
        decoded = self.model.decoder(self.model.post_quant_conv(straight_through)).float()
        reconstruction = F.l1_loss(decoded, pixels)
        # the codes are part of the graph in every step, as processes that share gradients need
        return {
            "loss": reconstruction + float(quantizes) * distances,
            "l1": reconstruction.detach(),
            "squared_error": F.mse_loss(decoded.detach(), pixels),
            "latents": latents.detach(),
            "indices": indices,
            "decoded": decoded.detach(),
        }

    def export(self) -> VQModel:
        """The tokenizer as users load it, on the CPU, with codes of unit norm."""
        trained = VQModel.from_config(self.model.config)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"], dim=-1)
        trained.load_state_dict(weights)
        return trained


class VideoObjective(nn.Module):
    """
    The loss of an [`AutoencoderVidTok`] with finite scalar quantization: the squared error of pixels in [-1, 1]. (With L1 the
    first thousands of clips teach backgrounds alone, the medians.) Its codes are fixed.
    """

    codebook = None

    def __init__(self, model: AutoencoderVidTok):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor, quantizes: bool) -> dict[str, torch.Tensor]:
        latents, indices = self.model(pixels, encoder_mode=True)
        decoded = self.model.decode(latents).float()
        squared_error = F.mse_loss(decoded, pixels)
        return {
            "loss": squared_error,
            "l1": F.l1_loss(decoded.detach(), pixels),
            "squared_error": squared_error.detach(),
            "indices": indices.long(),
            "decoded": decoded.detach(),
        }

    def export(self) -> AutoencoderVidTok:
        trained = AutoencoderVidTok.from_config(self.model.config)
        trained.load_state_dict({name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()})
        return trained


@torch.no_grad()
def reconstruction_report(
    objective: ImageObjective | VideoObjective,
    media: MediaFolder,
    num_codes: int,
    num_samples: int,
    batch_size: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean L1 on [-1, 1], PSNR in dB and share of codes used, of `num_samples` samples spread evenly over `media`."""
    num_samples = min(num_samples, len(media))
    device = accelerator.device
    sums, uses = torch.zeros(2, dtype=torch.float64, device=device), torch.zeros(num_codes, device=device)
    objective.eval()
    for part in torch.arange(accelerator.process_index, num_samples, accelerator.num_processes).split(batch_size):
        pixels = torch.stack([media[int(place) * len(media) // num_samples, 0] for place in part])
        result = objective(to_pixels(pixels.to(device)), quantizes=True)
        sums += len(part) * torch.stack([result["l1"], result["squared_error"]]).double()
        uses += torch.bincount(result["indices"].flatten(), minlength=num_codes)
    objective.train()
    l1, squared_error = (accelerator.reduce(sums, "sum") / num_samples).tolist()
    usage = (accelerator.reduce(uses, "sum") > 0).float().mean().item()
    return {"validation_l1": l1, "validation_psnr": _psnr(squared_error), "validation_codebook_usage": usage}


def _psnr(squared_error: float) -> float:
    """dB, for pixels in [-1, 1]."""
    return -10 * math.log10(max(squared_error, 1e-12) / 4)


def train_tokenizer(settings: TokenizerSettings, resume: str | None = None) -> Path:
    """
    Trains a tokenizer, from scratch or from another one, and returns the folder `settings.output`, then that of an
    `AutoencoderVidTok`, or of a `VQModel` with a unit-norm codebook.

    Of a `VQModel` the first `autoencoder_steps` train a plain autoencoder on normalised latents; the codebook then starts from latents of
    the data, which leaves few dead codes. Codes that nothing used for `revival_steps` move to latents of the batch at
    hand, but in the last fifth of the training: a code moved late would never be trained. Checkpoints and `resume` as in
    [`~par_diffusers.training.train.train`].

    Example:

    ```py
    >>> from par_diffusers.settings import TokenizerSettings
    >>> from par_diffusers.training.train_tokenizer import train_tokenizer

    >>> train_tokenizer(TokenizerSettings("imagenet/train", "vq", codebook_size=16384))  # doctest: +SKIP
    ```
    """
    accelerator = make_accelerator(settings)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("train-tokenizer shares batches, not weights: launch it without FSDP.")
    tokenizer = build_tokenizer(settings)
    if settings.autoencoder_steps is None:
        settings.autoencoder_steps = 2000 if settings.vqvae is None else 0
    held_out = None
    if isinstance(tokenizer, VideoTokenizer):
        objective = VideoObjective(tokenizer.model)
        tokenizer.grid_size(settings.image_size, settings.num_frames)
        clip = (settings.image_size, settings.num_frames, settings.frame_rate)
        media = VideoFolder(settings.data, *clip, settings.num_clips, settings.augmentation)
        if settings.validation_data is not None:
            held_out = VideoFolder(settings.validation_data, *clip)
    else:
        objective = ImageObjective(tokenizer.model, settings.commitment)
        tokenizer.grid_size(settings.image_size)
        media = ImageFolder(settings.data, settings.image_size, settings.augmentation, settings.crop_range)
        if settings.validation_data is not None:
            held_out = ImageFolder(settings.validation_data, settings.image_size)
    batches = BatchSchedule(
        len(media),
        media.num_views,
        settings.global_batch_size,
        settings.seed,
        range(settings.max_train_steps),
        settings.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    with lock_folder(Path(settings.output), accelerator):
        run = TrainingRun(accelerator, settings, resume, media.fingerprint)
        batches.steps = range(run.step, settings.max_train_steps)
        _train(run, objective, tokenizer.num_codes, media, held_out, batches)
    return run.folder


def _train(run, objective, num_codes, media, held_out, batches) -> None:
    settings, accelerator = run.settings, run.accelerator
    device, total_steps = accelerator.device, settings.max_train_steps
    optimizer, schedule = optimizer_and_schedule(objective, settings, total_steps, settings.lr_warmup_steps)
    model, optimizer = accelerator.prepare(objective, optimizer)
    codebook = objective.codebook
    uses = torch.zeros(num_codes, dtype=torch.long, device=device)
    tensors, state = run.restore(model, optimizer.optimizer, schedule)
    usage = state.get("usage")
    if tensors:
        uses.copy_(tensors["codebook"]["uses"])
    accelerator.print(
        f"{sum(p.numel() for p in objective.parameters()) / 1e6:.2f} M parameters, {len(media)} {media.kind}, {total_steps} steps of "
        f"{settings.global_batch_size} on {accelerator.num_processes} x {device.type}",
        flush=True,
    )

    def draw_latents(latents: torch.Tensor, count: int, step: int) -> torch.Tensor:
        """`count` of the latents that all processes have at hand, the same ones on each."""
        candidates = accelerator.gather(latents.contiguous()).permute(0, 2, 3, 1).flatten(0, 2)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        chosen = torch.randperm(len(candidates), generator=generator).repeat(-(-count // len(candidates)))[:count]
        return candidates[chosen.to(device)]

    def export(folder: Path) -> None:
        objective.export().save_pretrained(folder)

    loader = iter(
        DataLoader(
            media,
            batch_sampler=batches,
            num_workers=settings.dataloader_num_workers,
            collate_fn=torch.stack,
            pin_memory=device.type == "cuda",
        )
    )
    # loss, L1 and squared error since the last line of the log
    window, seconds, logged = torch.zeros(3, device=device), 0.0, run.step
    model.train()
    for step in range(run.step + 1, total_steps + 1):
        started = time.perf_counter()
        quantizes = codebook is None or step > settings.autoencoder_steps
        for part in range(settings.gradient_accumulation_steps):
            pixels = to_pixels(next(loader).to(device))
            seed_step(settings.seed, step, part, accelerator.process_index)
            if codebook is not None and step == settings.autoencoder_steps + 1 and part == 0:
                with torch.no_grad(), accelerator.autocast():
                    codebook.copy_(draw_latents(objective.encode(pixels), num_codes, step))
            with accelerator.accumulate(model):
                result = model(pixels, quantizes)
                accelerator.backward(result["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if quantizes:
                uses += torch.bincount(result["indices"].flatten(), minlength=num_codes)
            losses = torch.stack([result["loss"].detach(), result["l1"], result["squared_error"]])
            window += losses / settings.gradient_accumulation_steps
        rate = schedule.get_last_lr()[0]
        schedule.step()
        if quantizes and (step - settings.autoencoder_steps) % settings.revival_steps == 0:
            dead = (accelerator.reduce(uses, "sum") == 0).nonzero().flatten()
            usage = 1 - len(dead) / num_codes
            if codebook is not None and len(dead) and step < 0.8 * total_steps:
                codebook.data[dead] = draw_latents(result["latents"], len(dead), step)
            uses.zero_()
        validates = step % settings.validation_steps == 0 or step == total_steps
        saves = step % settings.checkpointing_steps == 0 or step == total_steps
        logs = step % settings.logging_steps == 0 or validates or saves
        if logs:
            loss, l1, squared_error = (accelerator.reduce(window, "mean") / (step - logged)).tolist()
        seconds += time.perf_counter() - started
        if not logs:
            continue

        metrics = {"loss": loss, "l1": l1, "psnr": _psnr(squared_error), "learning_rate": rate}
        metrics["samples_per_second"] = round((step - logged) * settings.global_batch_size / seconds, 2)
        line = f"step {step}/{total_steps} loss {loss:.4f} L1 {l1:.4f} PSNR {metrics['psnr']:.2f} dB"
        if usage is not None:
            metrics["codebook_usage"] = usage
            line += f" codes used {usage:.1%}"
        if validates and held_out is not None:
            metrics |= reconstruction_report(
                objective,
                held_out,
                num_codes,
                settings.validation_samples,
                max(settings.global_batch_size // accelerator.num_processes, 1),
                accelerator,
            )
            line += (
                f" validation L1 {metrics['validation_l1']:.4f} PSNR {metrics['validation_psnr']:.2f} dB "
                f"codes used {metrics['validation_codebook_usage']:.1%}"
            )
        run.log(step, metrics)
        accelerator.print(f"{line} lr {rate:.2e} {metrics['samples_per_second']:.3g} {media.kind}/s", flush=True)
        if validates and held_out is not None and accelerator.is_main_process:
            run.log_picture(step, "samples", _side_by_side(objective, held_out, device))
        if saves:
            total_uses = accelerator.reduce(uses, "sum")
            tensors = gather_state(model, optimizer.optimizer, None) | {"codebook": {"uses": total_uses.cpu()}}
            run.save_checkpoint(step, tensors, schedule, export, usage=usage)
        window, seconds, logged = torch.zeros(3, device=device), 0.0, step
    run.finish(export)


@torch.no_grad()
def _side_by_side(
    objective: ImageObjective | VideoObjective, media: MediaFolder, device: torch.device, count: int = 8
):
    """Samples spread over the data, each beside its reconstruction; clips above theirs."""
    from PIL import Image

    objective.eval()
    pairs = []
    for place in range(min(count, len(media))):
        original = media[place * len(media) // min(count, len(media)), 0]
        decoded = objective(to_pixels(original[None].to(device)), quantizes=True)["decoded"][0]
        decoded = ((decoded.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pairs += [as_drawn(pixels.movedim(0, -1)) for pixels in (original, decoded)]
    objective.train()
    return lay_out(pairs, 2, is_text=False) if isinstance(pairs[0], Image.Image) else contact_sheet(pairs)
