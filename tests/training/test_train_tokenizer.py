import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import VQModel
from launching import finish, read_losses, read_metrics, start

from par_diffusers.settings import TokenizerSettings
from par_diffusers.training.images import ImageFolder, to_pixels
from par_diffusers.training.tokenizers import ImageTokenizer
from par_diffusers.training.train_tokenizer import (
    ImageObjective,
    build_tokenizer,
    quantize,
    reconstruction_report,
    train_tokenizer,
)


@pytest.fixture
def tiny(pictures):
    return {
        "data": pictures,
        "validation_data": pictures,
        "validation_samples": 20,
        "image_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "codebook_size": 16,
        "codebook_dim": 4,
        "global_batch_size": 8,
        "max_train_steps": 12,
        "autoencoder_steps": 4,
        "revival_steps": 3,
        "lr_warmup_steps": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "mixed_precision": "no",
    }


def test_quantizing_takes_the_code_of_the_smallest_angle():
    codebook = torch.tensor([[3.0, 0.0], [0.0, 0.1], [-1.0, -1.0]])
    latents = torch.tensor([[1.0, 0.1], [0.1, 1.0], [-1.0, -0.5]]).T.reshape(1, 2, 1, 3)
    codes, indices = quantize(torch.nn.functional.normalize(latents, dim=1), codebook)
    assert indices.flatten().tolist() == [0, 1, 2]
    assert torch.allclose(codes.norm(dim=1), torch.ones(1, 1, 3))


def test_a_tokenizer_learns_to_reproduce_its_pictures(tiny, tmp_path):
    changes = {"max_train_steps": 250, "autoencoder_steps": 60, "revival_steps": 20, "checkpointing_steps": 250}
    folder = train_tokenizer(TokenizerSettings(**tiny | changes, output=tmp_path / "vq"))
    last = read_metrics(folder)[-1]
    assert last["validation_l1"] < 0.15 and last["validation_psnr"] > 20 and last["validation_codebook_usage"] > 0.5
    vqvae = VQModel.from_pretrained(folder).eval()
    norms = vqvae.quantize.embedding.weight.norm(dim=-1)
    assert (norms - 1).abs().max() < 1e-5
    # the stock model reproduces the pictures by itself, from codes alone
    images = ImageFolder(tiny["data"], 16)
    pixels = to_pixels(torch.stack([images[i, 0] for i in range(0, 96, 5)]))
    with torch.no_grad():
        codes = ImageTokenizer(vqvae).encode(pixels)
        decoded = vqvae.decode(codes, force_not_quantize=True, shape=(*codes.shape, 4)).sample
    assert (decoded - pixels).abs().mean() < 0.15


@torch.no_grad()
def test_the_trained_codes_are_the_stock_models(tiny):
    objective = ImageObjective(build_tokenizer(TokenizerSettings(**tiny, output="unused")).model, 0.25)
    codes = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    objective.codebook.copy_(torch.nn.functional.normalize(codes, dim=1))
    images = ImageFolder(tiny["data"], 16)
    pixels = to_pixels(torch.stack([images[i, 0] for i in range(6)]))
    ours = objective(pixels, quantizes=True)["indices"]
    assert torch.equal(ours, ImageTokenizer(objective.model).encode(pixels))


def test_the_report_is_over_the_whole_data(tiny):
    objective = ImageObjective(build_tokenizer(TokenizerSettings(**tiny, output="unused")).model, 0.25)
    images = ImageFolder(tiny["data"], 16)
    reports = [reconstruction_report(objective, images, 16, 96, size, Accelerator()) for size in (5, 96)]
    assert reports[0] == pytest.approx(reports[1])
    with torch.no_grad():
        whole = objective(to_pixels(torch.stack([images[i, 0] for i in range(96)])), quantizes=True)
    assert reports[0]["validation_l1"] == pytest.approx(whole["l1"].item(), abs=1e-5)


def test_codes_that_nothing_uses_move_to_the_data(tiny, tmp_path):
    changes = {"codebook_size": 64, "max_train_steps": 40, "revival_steps": 5, "autoencoder_steps": 0}
    usage = [
        line["codebook_usage"]
        for line in read_metrics(train_tokenizer(TokenizerSettings(**tiny | changes, output=tmp_path / "vq")))
        if "codebook_usage" in line
    ]
    # without revival the usage of a codebook drawn from one batch of flat colours only falls
    asleep = {**changes, "revival_steps": 1000}
    without = train_tokenizer(TokenizerSettings(**tiny | asleep, output=tmp_path / "asleep"))
    assert max(usage) > read_metrics(without)[-1]["validation_codebook_usage"]


def test_an_interrupted_tokenizer_goes_on_with_the_same_losses(tiny, tmp_path):
    settings = TokenizerSettings(**tiny, output=tmp_path / "vq", checkpointing_steps=2, checkpoints_total_limit=9)
    folder = train_tokenizer(settings)
    losses, weights = read_losses(folder), VQModel.from_pretrained(folder).state_dict()
    for step in (2, 6, 10):  # before the codes are drawn, amid a revival window, after the last revival
        train_tokenizer(settings, resume=f"checkpoint-{step}")
        assert read_losses(folder) == losses
        again = VQModel.from_pretrained(folder).state_dict()
        assert all(weights[name].equal(again[name]) for name in weights)
    shutil.rmtree(folder / "checkpoint-12")
    train_tokenizer(settings, resume="latest")
    assert read_losses(folder) == losses


def test_training_starts_from_a_tokenizer(tiny, tmp_path):
    first = train_tokenizer(TokenizerSettings(**tiny, output=tmp_path / "first"))
    described = ("block_out_channels", "layers_per_block", "norm_num_groups", "codebook_size", "codebook_dim")
    further = {name: value for name, value in tiny.items() if name not in (*described, "autoencoder_steps")}
    settings = TokenizerSettings(**further, vqvae=first, output=tmp_path / "further", checkpointing_steps=6)
    # the first step sees its weights and its codes, none of which is drawn anew
    objective = ImageObjective(build_tokenizer(settings).model, 0.25)
    images = ImageFolder(tiny["data"], 16)
    last = read_metrics(first)[-1]
    report = reconstruction_report(objective, images, 16, 20, 8, Accelerator(cpu=True))
    assert report["validation_l1"] == pytest.approx(last["validation_l1"], abs=1e-4)
    folder = train_tokenizer(settings)
    losses = read_losses(folder)
    assert losses[0] < read_losses(first)[0]
    assert VQModel.load_config(folder)["num_vq_embeddings"] == 16
    train_tokenizer(settings, resume="checkpoint-6")
    assert read_losses(folder) == losses


def test_two_processes_train_a_tokenizer_as_one(tiny, tmp_path):
    alone = train_tokenizer(TokenizerSettings(**tiny, output=tmp_path / "one"))
    printed = finish(start("train-tokenizer", {**tiny, "output": tmp_path / "two"}, processes=2))
    assert "12 steps of 8 on 2 x cpu" in printed
    assert np.allclose(read_losses(alone), read_losses(tmp_path / "two"), atol=2e-3)
    # until the codes are drawn nothing amplifies the rounding
    assert np.allclose(read_losses(alone)[:5], read_losses(tmp_path / "two")[:5], atol=1e-5)


def test_weights_are_not_sharded(tiny, tmp_path):
    process = start("train-tokenizer", {**tiny, "output": tmp_path / "two"}, processes=2, fsdp=True)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "launch it without FSDP" in printed


def test_settings_that_cannot_work_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="`image_size` must be a multiple of 2"):
        train_tokenizer(TokenizerSettings(**tiny | {"image_size": 17}, output=tmp_path / "vq"))
    with pytest.raises(ValueError, match="`data` must be a folder of images"):
        train_tokenizer(TokenizerSettings(**tiny | {"data": "nowhere"}, output=tmp_path / "vq"))
    with pytest.raises(ValueError, match="`codebook_size` must not be given together with `vqvae`"):
        train_tokenizer(TokenizerSettings(**tiny | {"vqvae": "vq"}, output=tmp_path / "vq"))
    VQModel(norm_num_groups=4, block_out_channels=(8,), layers_per_block=1).save_pretrained(tmp_path / "loose")
    loose = TokenizerSettings(tiny["data"], tmp_path / "vq", vqvae=tmp_path / "loose", image_size=16)
    with pytest.raises(ValueError, match="`vqvae` must have codes of norm 1 to train from.*have norms from 0.00"):
        train_tokenizer(loose)
