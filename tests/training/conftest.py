from pathlib import Path

import pytest
import torch
from PIL import Image

from par_diffusers.settings import ExtractionSettings
from par_diffusers.training.extract_codes import extract_codes


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


@pytest.fixture
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
