import json

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import save_file

from par_diffusers import PARPipeline, PARScheduler
from par_diffusers.conversion.convert_llamagen import convert_llamagen_checkpoint
from par_diffusers.evaluation.judge import accuracy, train_judge
from par_diffusers.training import train_par, train_tokenizer
from par_diffusers.training.data import encode_images, load_split, to_pixels


def coloured_squares(count: int, size: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of three classes: the channel that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator).to(torch.uint8)
    images = torch.randint(0, 60, (count, 3, 1, 1), generator=generator).expand(-1, -1, size, size).clone()
    images[torch.arange(count), labels.long()] = 220
    return images.to(torch.uint8), labels


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, (split, count) in enumerate({"train": 192, "validation": 48}.items()):
        images, labels = coloured_squares(count, seed=seed)
        file = folder / f"{split}.safetensors"
        save_file({"images": images, "labels": labels}, file, {"classes": json.dumps(["red", "green", "blue"])})
    return folder


@pytest.mark.parametrize("name", ["par_c2i_4x", "par_c2i_16x", "llamagen_c2i"])
@torch.no_grad()
def test_training_loss_equals_the_recorded_one(name, reference, tmp_path):
    recorded = reference(name)
    folder = convert_llamagen_checkpoint(
        recorded.file, recorded.vq_file, tmp_path / "out", image_size=32, num_attention_heads=4
    )
    pipe = PARPipeline.from_pretrained(folder)
    grid = recorded.tokens_raster.view(3, 8, 8)
    loss = train_par.training_loss(pipe.transformer, pipe.scheduler, 96, grid, recorded.cond)
    assert (loss - recorded.train_loss).abs() < 1e-5
    repeated = (grid.repeat(5, 1, 1), recorded.cond.repeat(5))
    assert abs(train_par.validation_loss(pipe.transformer, pipe.scheduler, 96, *repeated) - recorded.train_loss) < 1e-5


@pytest.mark.parametrize(
    "plan",
    [{}, {"num_parallel_tokens": 1}, {"num_parallel_tokens": 16}, {"order": "raster"}, {"initial_tokens": "parallel"},
     {"group_attention": "causal"}],
    ids=str,
)  # fmt: skip
def test_every_plan_learns_a_handful_of_grids(plan, make_model):
    scheduler = PARScheduler((4, 4), **plan)
    model = make_model(num_learnable_tokens=scheduler.num_learnable_tokens, vocab_size=16)
    grids = torch.randint(16, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2])
    before = train_par.validation_loss(model, scheduler, 16, grids, labels)
    train_par.train_par(
        model, scheduler, grids.repeat(8, 1, 1), labels.repeat(8), validation=(grids, labels), steps=60, batch_size=24,
        learning_rate=3e-3, log_every=60,
    )  # fmt: skip
    after = train_par.validation_loss(model, scheduler, 16, grids, labels)
    assert before > 2 and after < 0.2


def test_training_repeats_from_its_seed(make_model):
    results = []
    for _ in range(2):
        model = make_model(token_dropout=0.1, condition_dropout=0.1)
        grids = torch.randint(32, (32, 4, 4), generator=torch.Generator().manual_seed(0))
        labels = torch.arange(32) % 10
        train_par.train_par(
            model, PARScheduler((4, 4)), grids, labels, validation=(grids, labels), steps=3, batch_size=8
        )
        results.append(model.lm_head.weight.clone())
    assert torch.equal(*results)


def test_weight_decay_is_for_matrices(make_model):
    model = make_model()
    matrices, vectors = train_par.parameter_groups(model, 0.05)
    assert matrices["weight_decay"] == 0.05 and vectors["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in vectors["params"]) and len(vectors["params"]) == 2 * 3 + 1
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_commands_train_a_tokenizer_and_a_pipeline(data, tmp_path, capsys):
    command = ["--data", str(data), "--output", str(tmp_path / "vq"), "--steps", "300", "--batch-size", "16"]
    command += ["--learning-rate", "3e-3", "--codebook-size", "16", "--block-out-channels", "8", "16"]
    train_tokenizer.main(command)
    printed = capsys.readouterr().out
    report = json.loads(printed.split("validation ")[1].replace("'", '"'))
    assert report["l1"] < 0.15 and report["psnr"] > 20
    vqvae = VQModel.from_pretrained(tmp_path / "vq")
    norms = vqvae.quantize.embedding.weight.norm(dim=-1)
    assert (norms - 1).abs().max() < 1e-5

    command = [
        "--data",
        str(data),
        "--tokenizer",
        str(tmp_path / "vq"),
        "--output",
        str(tmp_path / "par"),
        "--steps",
        "60",
    ]
    command += [
        "--hidden-size",
        "32",
        "--intermediate-size",
        "64",
        "--num-hidden-layers",
        "2",
        "--num-attention-heads",
        "2",
    ]
    command += ["--batch-size", "32", "--learning-rate", "5e-3", "--guidance-scale", "2.0"]
    train_par.main(command)
    pipe = PARPipeline.from_pretrained(tmp_path / "par")
    assert pipe.scheduler.config.guidance_scale == 2.0 and tuple(pipe.scheduler.config.grid_size) == (8, 8)
    pipe.set_progress_bar_config(disable=True)
    labels = ["red", "green", "blue"] * 4
    images = pipe(labels, generator=torch.Generator().manual_seed(0), output_type="pt").images
    brightest = images.mean((2, 3)).argmax(1)
    assert (brightest == torch.tensor([0, 1, 2] * 4)).float().mean() > 0.9


def test_tokens_of_images_are_the_nearest_codes(make_vqvae):
    vqvae = make_vqvae()
    images, _ = coloured_squares(10)
    grids = encode_images(vqvae, images, batch_size=4)
    assert grids.shape == (10, 8, 8) and grids.dtype == torch.long
    with torch.no_grad():
        latents = vqvae.encode(to_pixels(images)).latents
    distances = (latents[:, None] - vqvae.quantize.embedding.weight[None, :, :, None, None]).square().sum(2)
    assert torch.equal(grids, distances.argmin(1))


def test_quantizing_takes_the_code_of_the_smallest_angle():
    codebook = torch.tensor([[3.0, 0.0], [0.0, 0.1], [-1.0, -1.0]])
    latents = torch.tensor([[1.0, 0.1], [0.1, 1.0], [-1.0, -0.5]]).T.reshape(1, 2, 1, 3)
    codes, indices = train_tokenizer.quantize(torch.nn.functional.normalize(latents, dim=1), codebook)
    assert indices.flatten().tolist() == [0, 1, 2]
    assert torch.allclose(codes.norm(dim=1), torch.ones(1, 1, 3))


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="data.*train.safetensors.*missing"):
        load_split(tmp_path, "train")


def test_judge_names_what_it_has_learnt():
    images, labels = coloured_squares(400)
    judge = train_judge(images, labels, steps=60, batch_size=64)
    held_out, answers = coloured_squares(100, seed=1)
    assert accuracy(judge, to_pixels(held_out), answers) > 0.95
    wrong = accuracy(judge, to_pixels(held_out), (answers + 1) % 3)
    assert wrong < 0.05
