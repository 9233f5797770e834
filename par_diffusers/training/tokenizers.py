"""The tokenizers of images and of clips, stock models of diffusers, behind the same few calls."""

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderVidTok, DiffusionPipeline, VQModel


class ImageTokenizer:
    """
    A [`VQModel`]: images to token grids (height, width).

    Attributes: `model`, `num_codes`, and `component`, its name in a pipeline.
    """

    component, model_class = "vqvae", VQModel
    # what decides the codes: parameters whose names begin so
    _encoding = ("encoder.", "quant_conv.", "quantize.")

    def __init__(self, model: VQModel):
        self.model = model
        self.num_codes = model.config.num_vq_embeddings

    def to(self, device: str | torch.device) -> "ImageTokenizer":
        self.model.to(device)
        return self

    @property
    def fingerprint(self) -> str:
        """
        Identifies what decides the codes. Rounded to half precision, so that a tokenizer saved in float16 counts as the one
        it was made from.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if name.startswith(self._encoding):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().to(torch.float16).numpy().tobytes())
        return digest.hexdigest()[:16]

    def grid_size(self, image_size: int) -> tuple[int, ...]:
        """Tokens (height, width) of a square image."""
        return _sides(image_size, 2 ** (len(self.model.config.block_out_channels) - 1))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.LongTensor:
        """Pixels in [-1, 1], (B, 3, H, W), -> token ids (B, *grid_size) in raster layout: the nearest codes."""
        latents = self.model.encode(pixels).latents
        return self.model.quantize(latents)[2][2].view(-1, *latents.shape[-2:])

    def vectors(self) -> torch.Tensor:
        """The vector of each code, float32 (num_codes, d), on the CPU."""
        return self.model.quantize.embedding.weight.detach().float().cpu()


class VideoTokenizer(ImageTokenizer):
    """An [`AutoencoderVidTok`], causal and with finite scalar quantization: clips to token grids (frames, height, width)."""

    component, model_class = "vae", AutoencoderVidTok
    _encoding = ("encoder.", "regularization.")

    def __init__(self, model: AutoencoderVidTok):
        if model.config.regularizer != "fsq" or not model.config.is_causal:
            raise ValueError(
                "`vqvae` must be causal and have the regularizer 'fsq' where it is an AutoencoderVidTok, this one has "
                f"{model.config.regularizer!r} and is_causal={model.config.is_causal}."
            )
        self.model = model
        self.num_codes = model.config.codebook_size

    def grid_size(self, image_size: int, num_frames: int) -> tuple[int, ...]:
        """Tokens (frames, height, width) of `num_frames` square frames."""
        stride = self.model.temporal_compression_ratio
        if num_frames % stride != 1:
            raise ValueError(
                f"`num_frames` must be 1 more than a multiple of {stride} for this tokenizer, got {num_frames}."
            )
        return 1 + num_frames // stride, *_sides(image_size, 2 ** len(self.model.encoder.spatial_ds))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.LongTensor:
        """Pixels in [-1, 1], (B, 3, frames, H, W), -> token ids (B, *grid_size) in raster layout."""
        return self.model(pixels, encoder_mode=True)[1].long()

    def vectors(self) -> torch.Tensor:
        return self.model.regularization.implicit_codebook.float().cpu()


def load_tokenizer(source: str | Path) -> ImageTokenizer | VideoTokenizer:
    """The tokenizer in a pipeline folder or Hub repository, or in a folder of its own, in float32 and evaluation mode."""
    if (Path(source) / "config.json").is_file():
        subfolder, name = None, VQModel.load_config(source).get("_class_name", "another model")
    else:
        components = DiffusionPipeline.load_config(source)
        subfolder = "vae" if "vae" in components else "vqvae"
        name = components[subfolder][1] if subfolder in components else "no tokenizer"
    for kind in (ImageTokenizer, VideoTokenizer):
        if name == kind.model_class.__name__:
            return kind(kind.model_class.from_pretrained(source, subfolder=subfolder, dtype=torch.float32).eval())
    raise ValueError(
        f"`vqvae` must be a VQModel or an AutoencoderVidTok, or a pipeline with one; {source} has {name}."
    )


def _sides(image_size: int, factor: int) -> tuple[int, int]:
    if image_size % factor:
        raise ValueError(f"`image_size` must be a multiple of {factor} for this tokenizer, got {image_size}.")
    return image_size // factor, image_size // factor
