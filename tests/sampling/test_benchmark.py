import json

import pytest
import torch

from par_diffusers import PARPipeline, PARScheduler
from par_diffusers.cli import main
from par_diffusers.sampling.benchmark import Machine, Work, random_pipeline, token_agreement


@pytest.fixture
def folder(make_pipeline, tmp_path):
    make_pipeline(num_parallel_tokens=4).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_the_table_has_a_row_for_each_combination(folder, tmp_path, capsys):
    words = ["--grid-size", "4", "4", "--repeats", "2", "--output", str(tmp_path / "out"), "--device", "cpu"]
    main(["benchmark", "--model", str(folder), "--num-parallel-tokens", "1", "4", "--batch-size", "1", "3", *words])
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    rows = found["rows"]
    assert [(row["batch_size"], row["num_parallel_tokens"], row["steps"]) for row in rows] == [
        (1, 1, 16),
        (1, 4, 7),
        (3, 1, 16),
        (3, 4, 7),
    ]
    for row in rows:
        total = row["seconds_per_image"] * row["batch_size"]
        assert total >= 0.9 * max(row["token_seconds"], row["pixel_seconds"])
        assert row["images_per_second"] * row["seconds_per_image"] == pytest.approx(1)
        assert row["ms_per_step"] == pytest.approx(1000 * row["token_seconds"] / row["steps"])
        assert 0 < row["share_of_floor"] < 1 and row["peak_memory"] > 1e8
    assert rows[0]["speedup"] == rows[2]["speedup"] == 1
    assert rows[1]["speedup"] == pytest.approx(rows[0]["seconds_per_image"] / rows[1]["seconds_per_image"])
    table = (tmp_path / "out" / "benchmark.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n| ") == 5
    assert (tmp_path / "out" / "roofline.png").stat().st_size > 5000


def test_pipelines_of_clips_are_timed(make_video_pipeline, tmp_path, capsys):
    make_video_pipeline().save_pretrained(tmp_path / "pipe")
    words = [
        "benchmark",
        "--model",
        str(tmp_path / "pipe"),
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--num-parallel-tokens",
        "1",
        "4",
    ]
    main([*words, "--output", str(tmp_path / "out")])
    assert "3x4x4 tokens" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [48, 15] and [row["agreement"] for row in rows] == [1, 1]
    for further, message in [
        (["--channels-last"], "`channels_last` is for tokenizers of images"),
        (["--grid-size", "4", "4"], "`transformer.config.rope_axes` must be 2 in this pipeline, got 3"),
    ]:
        with pytest.raises(SystemExit):
            main([*words, *further])
        assert message in capsys.readouterr().err


def test_packed_and_eager_rows_do_the_same_work(folder, tmp_path):
    words = ["--grid-size", "4", "4", "--num-parallel-tokens", "4", "--mode", "eager", "packed", "--device", "cpu"]
    main(["benchmark", "--model", str(folder), *words, "--repeats", "1", "--output", str(tmp_path / "out")])
    eager, packed = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert (eager["mode"], packed["mode"]) == ("eager", "packed")
    assert eager["bytes"] == packed["bytes"] and eager["flops"] == packed["flops"]


def test_quantized_rows_read_less_and_say_how_many_tokens_stay(folder, tmp_path):
    words = [
        "--grid-size",
        "4",
        "4",
        "--num-parallel-tokens",
        "4",
        "--quantization",
        "none",
        "int8",
        "--device",
        "cpu",
    ]
    main(["benchmark", "--model", str(folder), *words, "--repeats", "1", "--output", str(tmp_path / "out")])
    plain, quantized = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert plain["agreement"] == 1 and 0.7 < quantized["agreement"] <= 1
    assert plain["bytes"] / 4 < quantized["bytes"] < plain["bytes"] / 2


def test_tokens_that_differ_are_counted(make_pipeline):
    pipe, other = make_pipeline(), make_pipeline(seed=1)
    reference = pipe([0, 1], generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert token_agreement(pipe, reference, 1.5) == 1
    assert token_agreement(other, reference, 1.5) < 0.5
    pipe.scheduler.register_to_config(temperature=0)
    assert token_agreement(pipe, reference, 1.5) < 1


def test_work_is_weights_once_a_step_and_the_cache_so_far(folder):
    pipe = PARPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.scheduler = PARScheduler((4, 4), 4)
    model = pipe.transformer
    matrices = sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear))
    norms = sum(p.nbytes for p in model.parameters() if p.ndim == 1)
    work = Work.of(pipe, streams=2)
    slot = 2 * 3 * 48 * 4  # keys and values of three layers of width 48 in float32
    assert work.bytes == [matrices + norms + slot * slots.start * 2 for slots in pipe.scheduler.step_slots]
    linear = 2 * (matrices + norms) // 4
    assert work.flops[-1] == 4 * 2 * (linear + 4 * 3 * 48 * pipe.scheduler.step_slots[-1].stop)
    reads, computes = Machine("", 1e3, {"float32": 1e30}), Machine("", 1e30, {"float32": 1e3})
    assert work.floor(reads, "float32") == pytest.approx(sum(work.bytes) / 1e3)
    assert work.floor(computes, "float32") == pytest.approx(sum(work.flops) / 1e3)


def test_published_sizes_have_their_parameters():
    with torch.device("meta"):
        pipe = random_pipeline("L", 4, (24, 24))
    assert sum(p.numel() for p in pipe.transformer.parameters()) == pytest.approx(342.9e6, rel=1e-3)
    assert sum(p.numel() for p in pipe.vqvae.parameters()) == pytest.approx(72e6, rel=0.02)
    assert pipe.vae_scale_factor == 16 and pipe.scheduler.num_inference_steps == 147


def test_bad_values_are_one_line(folder, capsys):
    for words in (["--model", "M"], ["--num-parallel-tokens", "7"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    "benchmark",
                    "--model",
                    str(folder),
                    "--grid-size",
                    "4",
                    "4",
                    "--warmup",
                    "0",
                    "--repeats",
                    "1",
                    *words,
                ]
            )
        assert stop.value.code == 2
        assert len([line for line in capsys.readouterr().err.splitlines() if "error" in line]) == 1
