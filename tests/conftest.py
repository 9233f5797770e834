import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderVidTok, VQModel
from PIL import Image
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from par_diffusers import (
    PARConfig,
    PARForConditionalGeneration,
    PARPipeline,
    PARScheduler,
    PARTextToImagePipeline,
    PARVideoPipeline,
)
from par_diffusers.settings import ExtractionSettings
from par_diffusers.training.extract_codes import extract_codes
from par_diffusers.training.videos import write_clip


DATA = Path(__file__).parent / "data"
NAMES = "zero one two three four five six seven eight nine".split()

torch.set_num_threads(1)


def build_model(seed: int = 0, **overrides) -> PARForConditionalGeneration:
    """A tiny backbone whose output head is random too (it starts at zero)."""
    sizes = {
        "vocab_size": 32,
        "num_classes": 10,
        "num_learnable_tokens": 3,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    torch.manual_seed(seed)
    model = PARForConditionalGeneration(PARConfig(**sizes | overrides)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def build_vqvae(seed: int = 0, codes: int = 32) -> VQModel:
    torch.manual_seed(seed)
    vqvae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=8,
        num_vq_embeddings=codes,
        vq_embed_dim=4,
        scaling_factor=1.0,
        lookup_from_codebook=True,
    ).eval()
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)
    return vqvae


def build_pipeline(seed: int = 0, num_parallel_tokens: int = 4, **overrides) -> PARPipeline:
    """4x4 tokens, 8x8 pixels, classes "zero" to "nine"."""
    pipe = PARPipeline(
        build_model(seed, num_learnable_tokens=num_parallel_tokens - 1, **overrides),
        build_vqvae(seed),
        PARScheduler((4, 4), num_parallel_tokens=num_parallel_tokens, guidance_scale=1.5),
        id2label={str(i): name for i, name in enumerate(NAMES)},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_text_pipeline(seed: int = 0, num_parallel_tokens: int = 4, width: int = 16, **overrides):
    """The same with prompts: a T5 that knows the ten words and letters, captions of 6 tokens."""
    torch.manual_seed(seed)
    words = [("▁" + word, -1.0) for word in NAMES] + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0), *words]
    config = T5Config(vocab_size=len(vocabulary), d_model=width, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    encoder = {
        "text_encoder": T5EncoderModel(config).eval(),
        "tokenizer": T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512),
    }
    caption = {"condition": "caption", "caption_length": 6, "caption_channels": width}
    pipe = PARTextToImagePipeline(
        build_model(seed, num_learnable_tokens=num_parallel_tokens - 1, **caption, **overrides),
        build_vqvae(seed),
        PARScheduler((4, 4), num_parallel_tokens=num_parallel_tokens, guidance_scale=1.5, prefix_length=6),
        **encoder,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_vidtok(seed: int = 0, width: int = 2, **overrides) -> AutoencoderVidTok:
    """64 codes; 4 x 4 pixels and 4 frames a token, but 1 frame for the first."""
    torch.manual_seed(seed)
    sizes = {"ch": 8, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "regularizer": "fsq", "double_z": False}
    return AutoencoderVidTok(**sizes | {"z_channels": width, "codebook_size": 8**width} | overrides).eval()


def build_video_pipeline(seed: int = 0, num_parallel_tokens: int = 4, **overrides) -> PARVideoPipeline:
    """3x4x4 tokens, 9 frames of 16x16 pixels, classes "zero" to "nine"."""
    model = {"num_learnable_tokens": num_parallel_tokens - 1, "vocab_size": 64, "rope_axes": 3}
    pipe = PARVideoPipeline(
        build_model(seed, **model | overrides),
        build_vidtok(seed),
        PARScheduler((3, 4, 4), num_parallel_tokens=num_parallel_tokens, guidance_scale=1.5),
        id2label={str(i): name for i, name in enumerate(NAMES)},
        frame_rate=8.0,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def make_model():
    return build_model


@pytest.fixture(scope="session")
def make_vqvae():
    return build_vqvae


@pytest.fixture(scope="session")
def make_pipeline():
    return build_pipeline


@pytest.fixture(scope="session")
def make_text_pipeline():
    return build_text_pipeline


@pytest.fixture(scope="session")
def make_vidtok():
    return build_vidtok


@pytest.fixture(scope="session")
def make_video_pipeline():
    return build_video_pipeline


@pytest.fixture
def pipe():
    return build_pipeline()


@pytest.fixture(scope="session")
def reference():
    """name -> the paths and the recorded outputs of a reference checkpoint."""

    def load(name: str) -> SimpleNamespace:
        with torch.serialization.safe_globals([argparse.Namespace]):
            expected = torch.load(DATA / f"{name}.expected.pt", weights_only=True)
        return SimpleNamespace(file=DATA / f"{name}.pt", vq_file=DATA / "vq_f4.pt", **expected)

    return load


# ---- training data ----

COLOURS = ("blue", "green", "red")


def draw_pictures(folder: Path, count: int, size: int = 16, seed: int = 0) -> Path:
    """`count` pictures of three classes: the channel that is bright."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        name = COLOURS[number % 3]
        pixels = torch.randint(0, 60, (3, 1, 1), generator=generator).expand(-1, size, size).clone()
        pixels[2 - number % 3] = 220
        pixels[:, size // 2 :] //= 1 + number % 2
        (folder / name).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy())
        image.save(folder / name / f"{number:04}.png")
    return folder


@pytest.fixture(scope="session")
def make_pictures():
    return draw_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """96 pictures of 16 x 16."""
    return draw_pictures(tmp_path_factory.mktemp("pictures") / "train", 96)


@pytest.fixture(scope="session")
def vqvae_folder(make_vqvae, tmp_path_factory) -> Path:
    """A random tokenizer: 32 codes, 2 x 2 pixels a token."""
    folder = tmp_path_factory.mktemp("vqvae")
    make_vqvae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def codes(pictures, vqvae_folder, tmp_path_factory) -> Path:
    """The pictures as 8 x 8 tokens, two views each."""
    output = tmp_path_factory.mktemp("codes") / "codes"
    return extract_codes(ExtractionSettings(pictures, output, vqvae=vqvae_folder, image_size=16, shard_size=40))


@pytest.fixture
def tiny(codes, vqvae_folder):
    """Options of a small backbone on the codes, without what is random."""
    return {
        "data": codes,
        "vqvae": vqvae_folder,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "token_dropout": 0.0,
        "residual_dropout": 0.0,
        "attention_dropout": 0.0,
        "condition_dropout": 0.0,
        "global_batch_size": 8,
        "learning_rate": 3e-3,
        "lr_warmup_steps": 2,
        "logging_steps": 1,
        "num_validation_images": 0,
    }


# ---- clips ----


def draw_videos(folder: Path, count: int, frames: int = 24, size: int = 16) -> Path:
    """`count` videos of three classes, 8 frames a second: the channel that grows brighter, each at a pace of its own."""
    for number in range(count):
        name = COLOURS[number % 3]
        video = np.full((frames, size, size, 3), 20, np.uint8)
        video[..., 2 - number % 3] = np.linspace(40 + number, 220, frames).astype(np.uint8)[:, None, None]
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_clip(folder / name / f"{number:04}.mp4", video, 8)
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """18 videos of 3 seconds."""
    return draw_videos(tmp_path_factory.mktemp("videos") / "train", 18)


@pytest.fixture(scope="session")
def vidtok_folder(make_vidtok, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vidtok")
    make_vidtok().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_codes(videos, vidtok_folder, tmp_path_factory) -> Path:
    """Two clips of each video as 3 x 4 x 4 tokens, with their mirror images."""
    output = tmp_path_factory.mktemp("clips") / "codes"
    settings = ExtractionSettings(
        videos, output, vqvae=vidtok_folder, image_size=16, num_frames=9, num_clips=2, shard_size=8
    )
    return extract_codes(settings)


# ---- evaluation ----


def random_images(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, *shape, 3); images differ in brightness, so that their features do."""
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 200, (count, *(1,) * len(shape), 3))
    return (level + rng.integers(0, 56, (count, *shape, 3))).astype(np.uint8)


@pytest.fixture
def make_images():
    return random_images


@pytest.fixture
def write_folder(tmp_path):
    """Images as PNG files, in folders of classes where there are labels."""

    def write(images: np.ndarray, labels=None, name: str = "pictures"):
        folder = tmp_path / name
        for number, image in enumerate(images):
            file = folder / ("" if labels is None else f"class {labels[number]}") / f"{number:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
        return folder

    return write


class Inception(torch.nn.Module):
    """Called as Inception's TorchScript file is, with 6 features and 5 classes."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(6, 5)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        assert img.dtype == torch.uint8
        pixels = img.float() / 255
        features = torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1)
        if return_features:
            return features
        scores = features @ self.mix.weight.T
        if not no_output_bias:
            scores = scores + self.mix.bias
        return scores.softmax(1)


class I3D(torch.nn.Module):
    """Called as I3D's TorchScript file is, with 4 features."""

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features and x.dim() == 5
        x = x / 127.5 - 1
        motion = (x[:, :, 1:] - x[:, :, :-1]).abs().mean((1, 2, 3, 4))
        return torch.cat([x.mean((2, 3, 4)), motion[:, None]], 1)


class Means(torch.nn.Module):
    """Any network: 3 features."""

    def forward(self, images):
        return images.float().mean((2, 3), keepdim=True)


@pytest.fixture
def scripts(tmp_path):
    """name -> a TorchScript file."""

    def save(name: str):
        torch.manual_seed(0)
        file = tmp_path / f"{name}.pt"
        torch.jit.script({"inception": Inception, "i3d": I3D, "means": Means}[name]()).save(file)
        return file

    return save
