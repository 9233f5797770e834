import json
import subprocess
import sys

import pytest
import torch
from launching import as_options
from PIL import Image

from par_diffusers.evaluation.ablations import STRATEGIES, main
from par_diffusers.schedulers import PARScheduler


class Means(torch.nn.Module):
    """3 features."""

    def forward(self, images):
        return images.float().mean((2, 3))


def test_strategies_are_the_plans_of_the_paper():
    steps = {}
    for name, strategy in STRATEGIES.items():
        plan = {key: value for key, value in strategy.changes.items() if not key.endswith(("size", "layers", "heads"))}
        steps[name] = PARScheduler((24, 24), **plan).num_inference_steps
    assert steps == {name: strategy.paper_steps for name, strategy in STRATEGIES.items()}
    distant = PARScheduler((4, 4), **STRATEGIES["distant-one"].changes)
    assert distant.token_order.equal(PARScheduler((4, 4), 4).token_order) and distant.num_inference_steps == 16


def test_a_study_trains_draws_and_measures_each_strategy_once(tiny, make_images, write_folder, tmp_path, capsys):
    torch.jit.script(Means()).save(tmp_path / "means.pt")
    values = tiny | {"max_train_steps": 2, "validation_data": tiny["data"], "output": tmp_path / "study"}
    values |= {"strategies": ("distant-multi", "causal"), "num_samples": 60, "sampling_batch_size": 30}
    values |= {
        "reference": write_folder(make_images(60, 16, 16)),
        "extractor": tmp_path / "means.pt",
        "show": ("red", "blue"),
    }
    main(as_options(values))
    facts = json.loads((tmp_path / "study" / "ablations.json").read_text())["rows"]
    assert list(facts) == ["distant-multi", "causal"]
    table = (tmp_path / "study" / "ablations.md").read_text()
    assert table in capsys.readouterr().out
    for name, row in facts.items():
        result = json.loads((tmp_path / "study" / name / "result.json").read_text())
        assert row["frechet_distance"] == result["metrics"]["frechet_distance"] and result["samples"]["count"] == 60
        assert 0 < row["colours"]["frechet_distance"] < 48
        assert row["steps"] == 19 and row["seconds_per_image"] > 0 and row["validation_loss"] > 0
        assert f"| {STRATEGIES[name].title} | {row['parameters'] / 1e6:.2f} | 19 |" in table
    with Image.open(tmp_path / "study" / "strategies.png") as rows:
        assert rows.height == 4 + 2 * 20 and rows.width == 300 + 2 * 20
    assert (tmp_path / "study" / "ablations.png").stat().st_size > 5000

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "study").rglob("*.safetensors")}
    main(as_options(values))
    assert {file: file.stat().st_mtime_ns for file in before} == before
    with pytest.raises(ValueError, match=r"settings of the run in .*study, .* max_train_steps \(2, now 3\)"):
        main(as_options(values | {"max_train_steps": 3}))


def test_a_study_goes_on_with_more_strategies_in_a_new_process(tiny, make_images, write_folder, tmp_path):
    torch.jit.script(Means()).save(tmp_path / "means.pt")
    values = tiny | {"max_train_steps": 2, "mixed_precision": "bf16", "output": tmp_path / "study"}
    values |= {
        "num_samples": 60,
        "reference": write_folder(make_images(60, 16, 16)),
        "extractor": tmp_path / "means.pt",
        "show": ("red",),
    }
    command = [sys.executable, "-m", "par_diffusers.evaluation.ablations"]
    for strategies in ("distant-multi",), ("distant-multi", "raster-one"):
        subprocess.run([*command, *as_options(values | {"strategies": strategies})], check=True)
    assert list(json.loads((tmp_path / "study" / "ablations.json").read_text())["rows"]) == list(strategies)


def test_an_unknown_strategy_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        main(["--strategies", "zigzag", "--reference", "none", "--output", str(tmp_path / "out")])
