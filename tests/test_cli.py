import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from par_diffusers import PARPipeline, PARTextToImagePipeline
from par_diffusers.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of single characters, 4x4 tokens."""
    from conftest import build_pipeline

    folder = tmp_path_factory.mktemp("model") / "letters"
    PARPipeline(
        **build_pipeline().components, id2label=dict(zip("0123456789", "ABCDEFGH12", strict=True))
    ).save_pretrained(folder)
    return folder


def failure(argv, capsys) -> str:
    """The one line a command prints when it refuses."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2, captured
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err and "error: " in captured.err
    return captured.err


def test_generate_spells_a_text_and_says_how_to_get_it_again(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["generate", "ab 1", "--model", str(folder), "--num-images", "2", "--output", "out/one.png"])
    line = capsys.readouterr().out
    assert "6 images in 7 steps each" in line
    picture = Image.open("out/one.png")
    assert picture.size == (4 * 8, 2 * 8)
    assert (np.asarray(picture)[:, 16:24] == 255).all()  # the space
    import shlex

    again = shlex.split(line.split("The same again: ")[1])
    assert again[0] == "par-diffusers" and "--seed" in again
    again[again.index("out/one.png")] = "two.png"
    main(again[1:])
    assert (np.asarray(Image.open("two.png")) == np.asarray(picture)).all()


def test_generate_draws_labels_whatever_the_batch_size(folder, tmp_path, capsys):
    pictures = []
    for batch_size in ("1", "3", "32"):
        file = tmp_path / f"{batch_size}.png"
        command = ["generate", "--labels", "A", "3", "2", "--model", str(folder), "--num-images", "3", "--seed", "5"]
        main([*command, "--batch-size", batch_size, "--output", str(file)])
        pictures.append(np.asarray(Image.open(file)).astype(int))
    assert pictures[0].shape == (24, 24, 3)
    assert abs(pictures[0] - pictures[1]).max() <= 1 and abs(pictures[0] - pictures[2]).max() <= 1
    # each image has its own seed: the second of "A" alone
    pipe = PARPipeline.from_pretrained(folder)
    import torch

    alone = pipe("A", generator=[torch.Generator().manual_seed(6)]).images[0]
    assert abs(np.asarray(alone).astype(int) - pictures[0][:8, 8:16]).max() <= 1


def test_generate_draws_prompts(make_text_pipeline, folder, tmp_path, capsys):
    make_text_pipeline().save_pretrained(tmp_path / "text")
    command = ["generate", "--model", str(tmp_path / "text"), "--seed", "5", "--output", str(tmp_path / "a.png")]
    main([*command, "--prompt", "three eight", "nine", "--num-images", "3"])
    assert "6 images in 7 steps" in capsys.readouterr().out
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (3 * 8, 2 * 8)
    import torch

    pipe = PARTextToImagePipeline.from_pretrained(tmp_path / "text")
    alone = pipe("nine", generator=torch.Generator().manual_seed(5 + 3)).images[0]
    assert abs(np.asarray(alone).astype(int) - np.asarray(picture)[8:, :8]).max() <= 1
    capsys.readouterr()  # the bars of drawing
    assert "must draw from labels" in failure([*command, "--labels", "3"], capsys)
    assert "must draw from prompts" in failure(["generate", "--model", str(folder), "--prompt", "a"], capsys)
    assert "give either TEXT, --labels or --prompt" in failure([*command, "A", "--prompt", "a"], capsys)


def test_generate_hands_sampling_options_on(folder, tmp_path):
    def draw(name, *options):
        command = ["generate", "A", "--model", str(folder), "--seed", "1", "--output", str(tmp_path / name)]
        main([*command, *options])
        return np.asarray(Image.open(tmp_path / name))

    greedy = draw("a.png", "--temperature", "0")
    assert (greedy == draw("b.png", "--top-k", "1")).all()
    assert not (greedy == draw("c.png")).all()
    guided = draw("d.png", "--temperature", "0", "--guidance-scale", "9")
    assert not (greedy == guided).all()
    off = ["--temperature", "0", "--guidance-scale", "9", "--guidance-interval", "0", "0"]
    assert (draw("e.png", *off) == draw("f.png", "--temperature", "0", "--guidance-scale", "1")).all()
    late = ["--guidance-schedule", "power-cosine", "--guidance-power", "8"]
    assert not (guided == draw("g.png", "--temperature", "0", "--guidance-scale", "9", *late)).all()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate"], "TEXT, --labels or --prompt"),
        (["generate", "A", "--labels", "A"], "TEXT, --labels or --prompt"),
        (["generate", " "], "TEXT"),
        (["generate", "AZ"], "'Z' is not a label.*"),
        (["generate", "--labels", "Z"], "'Z' is not a label"),
        (["generate", "--labels", "10"], "0 to 9"),
        (["generate", "A", "--num-images", "0"], "num_images"),
        (["generate", "A", "--batch-size", "0"], "batch_size"),
        (["generate", "A", "--seed", "-1"], "seed"),
        (["generate", "A", "--temperature", "-1"], "temperature"),
        (["generate", "A", "--top-p", "2"], "top_p"),
        (["generate", "A", "--guidance-scale", "nan"], "guidance_scale"),
        (["generate", "A", "--output", "picture.jpg"], ".png"),
        (["generate", "A", "--seed", "one"], "--seed"),
        (["generate", "A", "--unknown"], "--unknown"),
        (["generate", "A", "--num", "2"], "--num"),
        (["generate", "A", "--dtype", "int8"], "--dtype"),
    ],
)
def test_generate_refuses_bad_input_in_one_line(argv, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import re

    assert re.search(message, failure([*argv, "--model", str(folder)], capsys))
    assert list(tmp_path.iterdir()) == []


def test_unknown_models_are_refused(capsys, tmp_path):
    assert "embedded model" in failure(["generate", "A", "--model", "par-unknown"], capsys)
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in failure(["generate", "A", "--model", str(tmp_path / "empty")], capsys)
    assert "embedded model" in failure(["plan", "--model", "par-unknown"], capsys)


def test_convert_makes_a_folder_that_generate_draws_from(reference, tmp_path, capsys):
    recorded = reference("par_c2i_4x")
    command = ["convert", "--checkpoint", str(recorded.file), "--vq-checkpoint", str(recorded.vq_file)]
    command += ["--output", str(tmp_path / "par"), "--image-size", "32"]
    assert "--num-attention-heads" in failure(command, capsys)
    command += ["--num-attention-heads", "4"]
    main(command)
    assert "8x8 tokens in 19 steps, guidance scale 1" in capsys.readouterr().out
    assert "--overwrite" in failure(command, capsys)
    main([*command, "--overwrite", "--guidance-scale", "2.5", "--dtype", "float16"])
    scheduler = json.loads((tmp_path / "par" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["guidance_scale"] == 2.5
    capsys.readouterr()
    draw = ["generate", "--model", str(tmp_path / "par"), "--labels", "3", "7", "--output", str(tmp_path / "out.png")]
    main(draw)
    assert Image.open(tmp_path / "out.png").size == (64, 32)
    capsys.readouterr()
    assert "no labels of one character" in failure(["generate", "A", "--model", str(tmp_path / "par")], capsys)


def test_plan_prints_and_draws(tmp_path, capsys):
    main(["plan", "--grid-size", "4", "4", "--output", str(tmp_path / "plan.png")])
    text = capsys.readouterr().out
    assert "1 5 2 5\n6 7 6 7\n3 5 4 5\n6 7 6 7\n" in text
    assert "7 (4 of one token, 3 of 4)" in text
    assert Image.open(tmp_path / "plan.png").width > 400


def test_plan_reads_the_scheduler_of_a_folder(folder, capsys):
    main(["plan", "--model", str(folder)])
    from_folder = capsys.readouterr().out
    main(["plan", "--grid-size", "4", "4"])
    assert capsys.readouterr().out == from_folder
    main(["plan", "--model", str(folder), "--num-parallel-tokens", "1"])
    assert "16 (16 of one token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--grid-size", "5", "5"], "num_parallel_tokens"),
        (["plan", "--grid-size", "4"], "grid_size"),
        (["plan", "--order", "spiral"], "order"),
        (["plan", "--region-grid", "2", "3"], "region_grid"),
        (["plan", "--output", "plan.jpg"], ".png"),
        (["convert", "--checkpoint", "a", "--vq-checkpoint", "b", "--output", "c"], "`a` is not a file"),
        (["convert", "--checkpoint", "a"], "--vq-checkpoint"),
        ([], "COMMAND"),
        (["draw"], "draw"),
    ],
)
def test_commands_refuse_bad_input_in_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in failure(argv, capsys)
    assert list(tmp_path.iterdir()) == []


def test_help_has_examples(capsys):
    for command in ("generate", "convert", "plan"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"  par-diffusers {command} " in capsys.readouterr().out


def test_module_and_script_are_the_same_command(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    module = subprocess.run(
        [sys.executable, "-m", "par_diffusers", "plan", "--grid-size", "4", "4"], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert module.returncode == 0 and "7 (4 of one token" in module.stdout
    script = os.path.join(os.path.dirname(sys.executable), "par-diffusers")
    result = subprocess.run([script, "plan", "--grid-size", "4", "4"], capture_output=True, text=True, env=environment)
    assert result.stdout == module.stdout
    bad = subprocess.run([script, "plan", "--grid-size", "5", "5"], capture_output=True, text=True, env=environment)
    *_, last = bad.stderr.splitlines()  # libraries that are installed may have written above it
    assert bad.returncode == 2 and "error: " in last and "5x5" in last and "Traceback" not in bad.stderr


@pytest.mark.parametrize(
    "package, extra, words",
    [
        ("torchmetrics", "evaluation", ["evaluate", "--samples", "a.npz", "--extractor", "glyphs-judge"]),
        ("matplotlib", "evaluation", ["benchmark", "--output", "out"]),
        ("torchao", "quantization", ["generate", "A", "--quantization", "int8"]),
    ],
)
def test_a_missing_optional_package_is_named(package, extra, words, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert f"{package} is needed: pip install 'par_diffusers[{extra}]'" in capsys.readouterr().err
