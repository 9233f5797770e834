import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from launching import finish, read_losses, read_metrics, start

from par_diffusers import PARPipeline, PARScheduler
from par_diffusers.conversion.convert_llamagen import convert_llamagen_checkpoint
from par_diffusers.settings import TrainingSettings
from par_diffusers.training.codes import CodeDataset
from par_diffusers.training.tokenizers import load_tokenizer
from par_diffusers.training.train import (
    Collate,
    flops_per_sample,
    token_losses,
    train,
    validation_losses,
    with_learnable_tokens,
)


PLANS = {
    "1x": {"num_parallel_tokens": 1},
    "4x": {},
    "16x": {"num_parallel_tokens": 16},
    "raster": {"order": "raster"},
    "no initial tokens": {"initial_tokens": "parallel"},
    "causal": {"group_attention": "causal"},
}


@pytest.mark.parametrize("name", ["par_c2i_4x", "par_c2i_16x", "llamagen_c2i"])
@torch.no_grad()
def test_training_loss_equals_the_recorded_one(name, reference, tmp_path):
    recorded = reference(name)
    folder = convert_llamagen_checkpoint(
        recorded.file, recorded.vq_file, tmp_path / "out", image_size=32, num_attention_heads=4
    )
    pipe = PARPipeline.from_pretrained(folder)
    grid = recorded.tokens_raster.view(3, 8, 8)
    losses = token_losses(pipe.transformer, pipe.scheduler, 96, grid, class_labels=recorded.cond)
    assert losses.shape == (3, 64) and losses.dtype == torch.float32
    assert (losses.mean() - recorded.train_loss).abs() < 1e-5


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_gradients_equal_those_of_one_token_at_a_time(plan, make_model):
    """Each token is predicted by the cached decoding steps that sampling runs; training runs all slots at once."""
    scheduler = PARScheduler((4, 4), **plan)
    model = make_model(num_learnable_tokens=scheduler.num_learnable_tokens)
    grid = torch.randint(32, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 7])
    token_losses(model, scheduler, 32, grid, class_labels=labels).mean().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    from transformers import DynamicCache

    cache, logits = DynamicCache(config=model.config), []
    for timestep in scheduler.timesteps:
        inputs = scheduler.model_inputs(grid, 32, timestep)
        condition = {"class_labels": labels} if timestep == 0 else {}
        count = len(scheduler.step_tokens[timestep])
        output = model(**inputs, **condition, past_key_values=cache, use_cache=True, logits_to_keep=count)
        logits.append(output.logits)
    targets = scheduler.order_tokens(grid)
    torch.nn.functional.cross_entropy(torch.cat(logits, 1).flatten(0, 1), targets.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - ours[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_every_plan_trains_to_a_pipeline(plan, tiny, tmp_path, make_vqvae):
    settings = TrainingSettings(**tiny | plan | {"learning_rate": 1e-2}, output=tmp_path / "out", max_train_steps=60)
    folder = train(settings)
    losses = read_losses(folder)
    assert len(losses) == 60 and losses[0] == pytest.approx(np.log(32), abs=1e-3) and losses[-1] < 0.6 * losses[0]
    pipe = PARPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for name, value in plan.items():
        assert pipe.scheduler.config[name] == value
    assert pipe.labels["green"] == 1
    dataset = CodeDataset(tiny["data"], load_tokenizer(tiny["vqvae"]))
    known = {tuple(dataset[i, v][0].flatten().tolist()) for i in range(32, 64) for v in range(2)}
    drawn = pipe("green", generator=torch.Generator().manual_seed(0), output_type="latent").images
    # most tokens of a picture of this class are where pictures of this class have them
    assert max(np.mean(np.array(grid) == drawn.flatten().numpy()) for grid in known) > 0.5
    assert (folder / "checkpoint-60" / "model_index.json").is_file()


def test_the_folder_of_a_run_says_all_about_it(tiny, tmp_path):
    settings = TrainingSettings(
        **tiny | {"num_validation_images": 4, "logging_steps": 4},
        validation_data=tiny["data"],
        validation_samples=20,
        validation_steps=6,
        checkpointing_steps=5,
        checkpoints_total_limit=2,
        max_train_steps=16,
        output=tmp_path / "out",
    )
    folder = train(settings)
    assert sorted(f.name for f in folder.glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-16"]
    assert sorted(f.name for f in (folder / "samples").iterdir()) == [
        "step-000006.png",
        "step-000012.png",
        "step-000016.png",
    ]
    assert len(list((folder / "validation").iterdir())) == 3
    metrics = read_metrics(folder)
    assert [line["step"] for line in metrics] == [4, 5, 6, 8, 10, 12, 15, 16]
    last = metrics[-1]
    assert np.shape(last["validation_loss_per_token"]) == (8, 8)
    assert np.mean(last["validation_loss_per_token"]) == pytest.approx(last["validation_loss"], abs=1e-3)
    shares = (4 * last["validation_loss_initial"] + 60 * last["validation_loss_parallel"]) / 64
    assert shares == pytest.approx(last["validation_loss"], abs=1e-6)
    assert last["samples_per_second"] > 0 and 0 < last["mfu"] < 2
    echo = (folder / "training.yaml").read_text()
    assert "hidden_size: 32" in echo and "num_train_epochs: 300" in echo and "lr_warmup_epochs: 15" in echo
    assert not list(folder.glob(".*"))


def test_the_validation_loss_is_that_of_the_model_without_dropout(codes, vqvae_folder, make_model):
    dataset = CodeDataset(codes, load_tokenizer(vqvae_folder))
    model, scheduler = make_model(token_dropout=0.5, condition_dropout=0.5, num_classes=3), PARScheduler((8, 8))
    each = validation_losses(model, scheduler, 32, dataset, Collate(None), 30, 7, Accelerator())
    assert model.training
    model.eval()
    grids = torch.stack([dataset[i * 96 // 30, 0][0] for i in range(30)])
    labels = torch.tensor([dataset[i * 96 // 30, 0][1] for i in range(30)])
    with torch.no_grad():
        expected = token_losses(model, scheduler, 32, grids, class_labels=labels).mean(0)
    assert (each - expected).abs().max() < 1e-5


def test_labels_can_have_other_names_than_the_folders(tiny, tmp_path):
    (tmp_path / "labels.txt").write_text("sky\ngrass\nrose\n")
    settings = {**tiny, "labels": tmp_path / "labels.txt", "max_train_steps": 1, "output": tmp_path / "out"}
    assert PARPipeline.from_pretrained(train(TrainingSettings(**settings))).labels["grass"] == 1
    (tmp_path / "labels.txt").write_text("sky\n")
    with pytest.raises(ValueError, match="`labels`: .* must name the classes 0 to 2"):
        train(TrainingSettings(**settings | {"output": tmp_path / "other"}))


def test_weights_that_are_averaged_are_what_is_saved(tiny, tmp_path):
    settings = {**tiny, "max_train_steps": 12, "checkpointing_steps": 12}
    plain = train(TrainingSettings(**settings, output=tmp_path / "plain"))
    averaged = train(TrainingSettings(**settings, output=tmp_path / "averaged", ema_decay=0.5))
    assert read_losses(plain) == read_losses(averaged)
    from safetensors.torch import load_file

    state = averaged / "checkpoint-12" / "training_state"
    raw, ema = load_file(state / "model.safetensors"), load_file(state / "ema.safetensors")
    saved = PARPipeline.from_pretrained(averaged).transformer.state_dict()
    unaveraged = PARPipeline.from_pretrained(plain).transformer.state_dict()
    for name in saved:
        assert torch.equal(saved[name], ema[name]) and torch.equal(unaveraged[name], raw[name])
    assert not torch.equal(raw["lm_head.weight"], ema["lm_head.weight"])


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 4}], ids=str)
def test_memory_is_saved_without_changing_the_losses(option, tiny, tmp_path):
    settings = {**tiny, "max_train_steps": 5}
    plain = read_losses(train(TrainingSettings(**settings, output=tmp_path / "plain")))
    other = read_losses(train(TrainingSettings(**settings, **option, output=tmp_path / "other")))
    assert np.allclose(plain, other, atol=1e-5)


def test_compiled_layers_train_alike(tiny, tmp_path):
    settings = {**tiny, "max_train_steps": 4, "num_hidden_layers": 1}
    plain = read_losses(train(TrainingSettings(**settings, output=tmp_path / "plain")))
    other = train(TrainingSettings(**settings, compile=True, output=tmp_path / "other"))
    assert np.allclose(plain, read_losses(other), atol=1e-4)
    PARPipeline.from_pretrained(other)


def test_half_precision_trains_with_full_precision_weights(tiny, tmp_path):
    plain = read_losses(train(TrainingSettings(**tiny, max_train_steps=3, output=tmp_path / "plain")))
    # in a process of its own: accelerate keeps the precision of the first Accelerator
    finish(start("train", {**tiny, "mixed_precision": "bf16", "max_train_steps": 3, "output": tmp_path / "half"}))
    half = read_losses(tmp_path / "half")
    assert np.allclose(plain, half, atol=0.05) and plain != half
    assert PARPipeline.from_pretrained(tmp_path / "half").transformer.dtype == torch.float32


def test_metrics_go_to_the_tracker_too(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {**tiny, "num_validation_images": 2, "validation_data": tiny["data"], "validation_steps": 2}
    folder = train(TrainingSettings(**settings, report_to="tensorboard", max_train_steps=2, output=tmp_path / "out"))
    events = EventAccumulator(str(folder / "par_diffusers")).Reload()
    assert {"loss", "validation_loss", "learning_rate", "mfu"} <= set(events.Tags()["scalars"])
    assert {"samples", "validation"} <= set(events.Tags()["images"])
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(read_losses(folder))


# ---- from a pipeline ----


def test_a_converted_llamagen_model_becomes_the_start_of_par(reference, tmp_path):
    recorded = reference("llamagen_c2i")
    folder = convert_llamagen_checkpoint(
        recorded.file, recorded.vq_file, tmp_path / "llamagen", image_size=32, num_attention_heads=4
    )
    before = PARPipeline.from_pretrained(folder)
    for kind in ("codes", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for number in range(8):
        np.save(
            tmp_path / "data" / "codes" / f"{number}.npy", recorded.tokens_raster[number % 3].numpy().reshape(1, 1, -1)
        )
        np.save(tmp_path / "data" / "labels" / f"{number}.npy", recorded.cond[number % 3].numpy().reshape(1))
    same = {
        "data": tmp_path / "data",
        "model": folder,
        "global_batch_size": 4,
        "max_train_steps": 2,
        "lr_warmup_steps": 0,
    }
    same |= {f"{name}_dropout": 0.0 for name in ("token", "residual", "attention", "condition")}
    same |= {"num_validation_images": 0, "logging_steps": 1}

    np.save(tmp_path / "data" / "labels" / "7.npy", np.array([before.transformer.config.num_classes]))
    with pytest.raises(ValueError, match="must hold the model's .* classes, .*7.npy has class"):
        train(TrainingSettings(**same, output=tmp_path / "wrong"))
    np.save(tmp_path / "data" / "labels" / "7.npy", recorded.cond[1].numpy().reshape(1))

    # one token at a time, the first loss is that of the model as it is
    grown = train(TrainingSettings(**same, output=tmp_path / "1x"))
    grids, labels = recorded.tokens_raster.view(3, 8, 8), recorded.cond
    with torch.no_grad():
        each = token_losses(before.transformer, before.scheduler, 96, grids, class_labels=labels).mean(1)
    assert each.min() - 1e-4 < read_losses(grown)[0] < each.max() + 1e-4

    grown = train(TrainingSettings(**same, num_parallel_tokens=4, learning_rate=1e-9, output=tmp_path / "4x"))
    pipe = PARPipeline.from_pretrained(grown)
    assert pipe.scheduler.config.num_parallel_tokens == 4 and pipe.scheduler.num_inference_steps == 19
    assert pipe.config.id2label == before.config.id2label
    ours, theirs = pipe.transformer.state_dict(), before.transformer.state_dict()
    assert len(ours["model.embed_tokens.weight"]) == len(theirs["model.embed_tokens.weight"]) + 3
    for name, weight in theirs.items():
        assert (ours[name][: len(weight)] - weight).abs().max() < 1e-6, name


def test_learnable_tokens_come_and_go(make_model):
    model = make_model()
    more = with_learnable_tokens(model, 15)
    assert more.config.num_learnable_tokens == 15 and len(more.model.embed_tokens.weight) == 47
    back = with_learnable_tokens(more, 3)
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)
    assert len(set(more.model.embed_tokens.weight[35:, 0].tolist())) == 12  # the new ones differ from each other


# ---- several processes ----


def test_two_processes_train_as_one(tiny, tmp_path):
    settings = {
        **tiny,
        "max_train_steps": 8,
        "checkpointing_steps": 8,
        "validation_data": tiny["data"],
        "validation_steps": 8,
    }
    alone = train(TrainingSettings(**settings, output=tmp_path / "one"))
    printed = finish(start("train", {**settings, "output": tmp_path / "two"}, processes=2))
    assert "training steps of 8 on 2 x cpu" in printed
    assert np.allclose(read_losses(alone), read_losses(tmp_path / "two"), atol=1e-5)
    ours, theirs = read_metrics(alone)[-1], read_metrics(tmp_path / "two")[-1]
    assert theirs["validation_loss"] == pytest.approx(ours["validation_loss"], abs=1e-5)
    weights = [PARPipeline.from_pretrained(tmp_path / name).transformer.state_dict() for name in ("one", "two")]
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=2e-4), name


def test_sharded_weights_train_as_whole_ones_and_go_on_after_an_interruption(tiny, tmp_path):
    settings = {**tiny, "max_train_steps": 6, "checkpointing_steps": 3, "ema_decay": 0.9}
    settings |= {"validation_data": tiny["data"], "validation_steps": 2, "validation_samples": 7}
    alone = train(TrainingSettings(**settings, output=tmp_path / "one"))
    sharded = {**settings, "output": tmp_path / "two"}
    printed = finish(start("train", sharded, processes=2, fsdp=True))
    assert "training steps of 8 on 2 x cpu, FSDP" in printed
    losses = read_losses(tmp_path / "two")
    assert np.allclose(read_losses(alone), losses, atol=1e-5)
    saved = PARPipeline.from_pretrained(tmp_path / "two").transformer.state_dict()
    expected = PARPipeline.from_pretrained(alone).transformer.state_dict()
    for name in saved:
        assert torch.allclose(saved[name], expected[name], atol=2e-4), name

    for name in ("checkpoint-6", "model_index.json"):
        path = tmp_path / "two" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    finish(start("train", {"output": tmp_path / "two"}, "--resume", processes=2, fsdp=True))
    assert read_losses(tmp_path / "two") == losses
    again = PARPipeline.from_pretrained(tmp_path / "two").transformer.state_dict()
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_a_run_of_one_process_goes_on_in_two_that_share_the_weights(tiny, tmp_path):
    settings = {**tiny, "max_train_steps": 6, "checkpointing_steps": 3, "ema_decay": 0.9, "output": tmp_path / "out"}
    folder = train(TrainingSettings(**settings))
    losses, weights = read_losses(folder), PARPipeline.from_pretrained(folder).transformer.state_dict()
    printed = finish(start("train", {"output": folder}, "--resume", "checkpoint-3", processes=2, fsdp=True))
    assert "on 2 x cpu, FSDP" in printed
    assert read_losses(folder)[:3] == losses[:3] and np.allclose(read_losses(folder), losses, atol=1e-5)
    again = PARPipeline.from_pretrained(folder).transformer.state_dict()
    assert all(torch.allclose(weights[name], again[name], atol=2e-4) for name in weights)


# ---- errors ----


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"global_batch_size": 9, "gradient_accumulation_steps": 2}, "divisible by accumulation steps x processes"),
        ({"global_batch_size": 97}, "at most the 96 samples, got 97"),
        ({"num_parallel_tokens": 5}, "`num_parallel_tokens` must be rows x columns"),
        ({"num_attention_heads": 3}, "`num_attention_heads` must divide `hidden_size`"),
        ({"vqvae": None}, "`vqvae` must be given where `model` is not"),
        ({"data": "nowhere"}, "`data` must be a folder of extract-codes"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(changed, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(TrainingSettings(**tiny | changed, output=tmp_path / "out", max_train_steps=3))


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(pipe, tiny, tmp_path):
    pipe.transformer.lm_head.weight.data[0, 0] = torch.nan
    pipe.save_pretrained(tmp_path / "start")
    changed = {name: None for name in tiny if name.startswith(("hidden", "inter", "num_hidden", "num_att", "vqvae"))}
    settings = TrainingSettings(
        **tiny | changed | {"model": tmp_path / "start"}, output=tmp_path / "out", max_train_steps=3
    )
    with pytest.raises(ValueError, match="`learning_rate` .* at step 1 the loss is nan"):
        train(settings)
    assert len(read_metrics(tmp_path / "out")) == 1


def test_the_backbone_of_a_pipeline_has_its_own_sizes(pipe, tiny, tmp_path):
    pipe.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="`hidden_size` must not be given together with `model`"):
        train(TrainingSettings(**tiny, model=tmp_path / "start", output=tmp_path / "out"))


def test_validation_data_must_match(tiny, tmp_path, make_pictures, vqvae_folder):
    from par_diffusers.settings import ExtractionSettings
    from par_diffusers.training.extract_codes import extract_codes

    make_pictures(tmp_path / "in", 2)
    extract_codes(ExtractionSettings(tmp_path / "in", tmp_path / "codes", vqvae=vqvae_folder, image_size=16))
    with pytest.raises(ValueError, match=r"`validation_data`.*\(8, 8\) and 3 classes, got \(8, 8\) and 2"):
        train(TrainingSettings(**tiny, validation_data=tmp_path / "codes", output=tmp_path / "out"))


def test_a_folder_in_use_or_with_files_is_left_alone(tiny, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    settings = TrainingSettings(**tiny, output=tmp_path / "out", max_train_steps=1)
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ValueError, match="must not be in use by another run"):
        train(settings)
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or empty folder, .* has thesis.txt"):
        train(settings)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_operations_are_counted_as_torch_counts_them(make_model):
    from torch.utils.flop_counter import FlopCounterMode

    model, scheduler = make_model(num_key_value_heads=2), PARScheduler((4, 4))
    grid = torch.zeros(1, 4, 4, dtype=torch.long)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        token_losses(model, scheduler, 32, grid, class_labels=torch.tensor([0])).mean().backward()
    ours = flops_per_sample(model.config, len(scheduler.slot_tokens))
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_commands_print_one_line_for_a_mistake(tiny, tmp_path):
    process = start("train", {**tiny, "global_batch_size": 500, "output": tmp_path / "out"})
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    line = "par-diffusers train: error: `global_batch_size` must be at most the 96 samples, got 500."
    *_, last = printed.strip().splitlines()  # libraries that are installed may have written above it
    assert last == line and "Traceback" not in printed

    process = start("train", {**tiny, "global_batch_size": 500, "output": tmp_path / "out"}, processes=2)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and printed.count(line) == 1


def test_a_run_can_be_described_by_a_file(tiny, tmp_path):
    values = {name: value if isinstance(value, int | float) else str(value) for name, value in tiny.items()}
    (tmp_path / "run.json").write_text(json.dumps(values | {"max_train_steps": 2}))  # JSON is YAML
    finish(start("train", {"config": tmp_path / "run.json", "output": tmp_path / "out"}))
    assert len(read_losses(tmp_path / "out")) == 2
