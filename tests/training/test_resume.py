"""Runs that are killed and continued, as real processes."""

import errno
import json
import random
import shutil
import time

import psutil
import pytest
from diffusers import VQModel
from launching import finish, read_losses, read_metrics, start

from par_diffusers import PARPipeline
from par_diffusers.settings import TrainingSettings
from par_diffusers.training import run as run_module
from par_diffusers.training.train import train


def kill_until_done(command: str, values: dict, kills: int, seed: int, resume: tuple = ("--resume",), **launch) -> int:
    """Kills the command at random moments, `kills` times at most, and lets it end; how often it was killed."""
    rng, killed, words = random.Random(seed), 0, ()
    log = values["output"].parent / "log.txt"
    while killed < kills:
        process = start(command, values, *words, log=log, **launch)
        # some kills while modules are imported or the state is loaded, most among the steps and checkpoints
        early = rng.random() < 0.2
        deadline = time.monotonic() + (rng.uniform(0, 4) if early else 120)
        while time.monotonic() < deadline and process.poll() is None:
            printed = log.read_text()
            if not early and ("step " in printed or "encoding" in printed):
                early, deadline = True, time.monotonic() + rng.uniform(0, 1.5)
            time.sleep(0.01)
        if process.poll() is not None:
            assert process.returncode == 0, log.read_text()
            return killed
        family = psutil.Process(process.pid)
        for member in [family, *family.children(recursive=True)]:  # a launcher's processes outlive it
            member.kill()
        process.wait()
        killed += 1
        # killed before the run had a folder to continue, it starts anew
        words = resume if (values["output"] / "training.yaml").is_file() else ()
    finish(start(command, values, *words, **launch))
    return killed


@pytest.fixture
def run(tiny):
    """Options of a short run in which everything is random that can be."""
    dropouts = {f"{name}_dropout": 0.1 for name in ("token", "residual", "attention", "condition")}
    return (
        tiny | dropouts | {"max_train_steps": 60, "checkpointing_steps": 2, "ema_decay": 0.9, "mixed_precision": "no"}
    )


def weights_of(folder):
    return PARPipeline.from_pretrained(folder).transformer.state_dict()


def assert_same_run(folder, expected):
    assert read_losses(folder) == read_losses(expected)
    ours, theirs = weights_of(folder), weights_of(expected)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert not list(folder.glob(".checkpoint*"))


def test_a_killed_run_goes_on_with_the_same_losses(run, tmp_path):
    finish(start("train", {**run, "output": tmp_path / "whole"}))
    killed = kill_until_done("train", {**run, "output": tmp_path / "killed"}, kills=4, seed=1)
    assert killed >= 3
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills, seed", [(1, 16, 2), (2, 10, 3)])
def test_many_kills_leave_no_trace(processes, kills, seed, run, tmp_path):
    run |= {"max_train_steps": 300, "checkpointing_steps": 5}
    finish(start("train", {**run, "output": tmp_path / "whole"}, processes=processes))
    killed = kill_until_done("train", {**run, "output": tmp_path / "killed"}, kills, seed, processes=processes)
    print(f"{killed} kills")
    assert killed >= kills // 2
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_tokenizer_goes_on_with_the_same_losses(pictures, tmp_path):
    values = {"data": pictures, "image_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1}
    values |= {"norm_num_groups": 4, "codebook_size": 16, "codebook_dim": 4, "global_batch_size": 8}
    values |= {"max_train_steps": 200, "autoencoder_steps": 60, "revival_steps": 7, "lr_warmup_steps": 5}
    values |= {"learning_rate": 1e-3, "logging_steps": 1, "checkpointing_steps": 10, "mixed_precision": "no"}
    finish(start("train-tokenizer", {**values, "output": tmp_path / "whole"}))
    killed = kill_until_done("train-tokenizer", {**values, "output": tmp_path / "killed"}, kills=8, seed=4)
    print(f"{killed} kills")
    assert killed >= 4
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "whole")
    ours, theirs = (VQModel.from_pretrained(tmp_path / name).state_dict() for name in ("killed", "whole"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_killed_extraction_goes_on_without_loss_or_repeats(make_pictures, vqvae_folder, tmp_path):
    make_pictures(tmp_path / "in", 900)
    values = {"data": tmp_path / "in", "vqvae": vqvae_folder, "image_size": 16, "shard_size": 10, "batch_size": 2}
    finish(start("extract-codes", {**values, "output": tmp_path / "whole"}))
    killed = kill_until_done(
        "extract-codes", {**values, "output": tmp_path / "killed"}, kills=6, seed=5, resume=(), processes=2
    )
    print(f"{killed} kills")
    assert killed >= 3
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert sorted(file.name for file in (tmp_path / "killed").iterdir() if file.name != ".lock") == names
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- without killing ----


@pytest.fixture
def short(tiny, tmp_path):
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    options = {**tiny, "output": tmp_path / "out", "max_train_steps": 6, "checkpointing_steps": 2}
    return options | {"checkpoints_total_limit": 9}


def settings_of(options, **changes):
    return TrainingSettings(**{**options, **changes})


def test_a_run_continues_from_the_checkpoint_named(short):
    folder = train(settings_of(short))
    losses = read_losses(folder)
    for name in ("latest", "checkpoint-2", "checkpoint-4"):
        train(settings_of(short), resume=name)
        assert read_losses(folder) == losses
    with pytest.raises(
        ValueError, match="one of .'checkpoint-2', 'checkpoint-4', 'checkpoint-6'., got 'checkpoint-3'"
    ):
        train(settings_of(short), resume="checkpoint-3")


def test_a_run_killed_before_its_first_checkpoint_starts_anew(short):
    folder = train(settings_of(short))
    losses = read_losses(folder)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (folder / ".checkpoint-2.partial").mkdir()
    train(settings_of(short), resume="latest")
    assert read_losses(folder) == losses


def test_a_run_killed_after_its_last_step_is_finished(short):
    folder = train(settings_of(short))
    whole = weights_of(folder)
    (folder / "model_index.json").unlink()
    shutil.rmtree(folder / "transformer")
    train(settings_of(short), resume="latest")
    assert all(weight.equal(weights_of(folder)[name]) for name, weight in whole.items())


def test_a_torn_line_of_the_log_is_dropped(short):
    folder = train(settings_of(short))
    whole = (folder / "metrics.jsonl").read_text()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    train(settings_of(short), resume="checkpoint-6")
    assert (folder / "metrics.jsonl").read_text() == whole


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seed": 1}, r"seed \(0, now 1\)"),
        ({"learning_rate": 1e-2}, r"learning_rate \(0.003, now 0.01\)"),
        ({"num_parallel_tokens": 16}, r"num_parallel_tokens \(None, now 16\)"),
        ({"max_train_steps": 9}, r"max_train_steps \(6, now 9\)"),
    ],
    ids=str,
)
def test_other_settings_are_not_a_continuation(change, said, short):
    train(settings_of(short))
    refused = "`resume` must continue with the settings of the run in .*, these differ: "
    with pytest.raises(ValueError, match=refused + said):
        train(settings_of(short, **change), resume="latest")


def test_other_data_is_not_a_continuation(short, codes, tmp_path):
    folder = train(settings_of(short))
    shutil.copytree(codes, tmp_path / "codes")
    index = json.loads((codes / "index.json").read_text())
    index["shards"] = index["shards"][:1]
    (tmp_path / "codes" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="`resume` must continue with the data of the run"):
        train(settings_of(short, data=tmp_path / "codes"), resume="latest")
    shutil.copytree(codes, tmp_path / "moved")
    shutil.rmtree(folder / "checkpoint-6")
    train(settings_of(short, data=tmp_path / "moved", logging_steps=1), resume="latest")  # the same data elsewhere


def test_there_must_be_a_run_to_continue(short, tmp_path):
    with pytest.raises(ValueError, match="`resume` continues a run, .* holds none"):
        train(settings_of(short), resume="latest")


def test_a_full_disk_leaves_the_checkpoints_that_are_there(short, monkeypatch):
    saved = []

    def fail_at_the_second(tensors, file, *args):
        saved.append(file)
        if len(saved) == 4:  # model and optimizer of the first checkpoint, model of the second
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(tensors, file, *args)

    save = run_module.save_file
    monkeypatch.setattr(run_module, "save_file", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        train(settings_of(short, checkpoints_total_limit=1))
    folder = short["output"]
    assert [item.name for item in folder.glob("*checkpoint*")] == ["checkpoint-2"]
    assert not list(folder.glob(".checkpoint*"))
    PARPipeline.from_pretrained(folder / "checkpoint-2")

    monkeypatch.setattr(run_module, "save_file", save)
    train(settings_of(short, checkpoints_total_limit=1), resume="latest")
    whole = train(settings_of(short, output=folder.parent / "whole"))
    assert read_losses(folder) == read_losses(whole)


def test_looking_at_a_run_does_not_change_it(short):
    losses = read_losses(train(settings_of(short)))
    watched = {"num_validation_images": 2, "validation_data": short["data"], "validation_steps": 1, "logging_steps": 3}
    watched |= {"output": short["output"].parent / "watched", "checkpointing_steps": 1}
    assert read_losses(train(settings_of(short, **watched))) == losses
    assert len(read_metrics(short["output"].parent / "watched")) == 6
