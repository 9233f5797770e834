import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import VQModel

from par_diffusers import PARConfig, PARForConditionalGeneration, PARPipeline, PARScheduler


DATA = Path(__file__).parent / "data"

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
    names = "zero one two three four five six seven eight nine".split()
    pipe = PARPipeline(
        build_model(seed, num_learnable_tokens=num_parallel_tokens - 1, **overrides),
        build_vqvae(seed),
        PARScheduler((4, 4), num_parallel_tokens=num_parallel_tokens, guidance_scale=1.5),
        id2label={str(i): name for i, name in enumerate(names)},
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
