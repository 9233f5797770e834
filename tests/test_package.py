import json
import re
import subprocess
import sys
from pathlib import Path

import par_diffusers
from par_diffusers import PARPipeline, embedded_model


ROOT = Path(__file__).parent.parent


def test_public_names_are_there():
    assert set(par_diffusers.__all__) == {
        "__version__", "PARConfig", "PARForConditionalGeneration", "PARModel", "PARPipeline", "PARScheduler",
        "convert_llamagen_checkpoint", "embedded_model",
    }  # fmt: skip
    for name in par_diffusers.__all__:
        assert getattr(par_diffusers, name) is not None
        assert name in dir(par_diffusers)


def test_bare_checkout_imports_and_subfolders_are_the_package():
    code = "import par_diffusers, par_diffusers.pipelines as p; print(par_diffusers.__file__, p.__file__)"
    run = subprocess.run([sys.executable, "-S", "-c", "import sys; print(sys.version)"], capture_output=True)
    assert run.returncode == 0
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == [str(ROOT / "par_diffusers/__init__.py"), str(ROOT / "pipelines/__init__.py")]


def test_travelling_files_import_no_sibling_and_nothing_of_ours():
    files = [
        *ROOT.glob("pipelines/pipeline_*.py"),
        *ROOT.glob("schedulers/scheduling_*.py"),
        *ROOT.glob("par_diffusers/models/modeling_*.py"),
    ]
    assert len(files) == 3
    for file in files:
        for line in file.read_text().splitlines():
            match = re.match(r"\s*(?:from|import) (\S+)", line)
            if match:
                top = match[1].split(".")[0]
                allowed = {"torch", "torch_xla", "diffusers", "transformers", "huggingface_hub"}
                assert top in allowed | sys.stdlib_module_names, (file, line)


def test_imagenet_names_ship():
    names = json.loads((ROOT / "par_diffusers" / "assets" / "imagenet_labels.json").read_text())
    assert list(names) == [str(i) for i in range(1000)]
    assert names["1"] == "goldfish, Carassius auratus" and names["999"].startswith("toilet")


def test_docstring_examples_run():
    import doctest

    import par_diffusers.assets
    import par_diffusers.models.modeling_par
    import par_diffusers.schedulers.scheduling_par

    modules = (par_diffusers.assets, par_diffusers.models.modeling_par, par_diffusers.schedulers.scheduling_par)
    for module in modules:
        result = doctest.testmod(module)
        assert result.attempted >= 2 and result.failed == 0


def test_pipeline_example_runs():
    import doctest

    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner()
    (example,) = finder.find(PARPipeline.__call__, "__call__", globs={})
    assert len(example.examples) > 4
    assert runner.run(example).failed == 0


def test_embedded_model_is_small_half_precision_and_named():
    folder = embedded_model("par-glyphs-4x")
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    assert sum(sizes.values()) < 15e6
    assert "transformer/model.safetensors" in sizes and "vqvae/diffusion_pytorch_model.safetensors" in sizes
    pipe = PARPipeline.from_pretrained(folder)
    assert str(pipe.transformer.dtype) == "torch.float16"
    assert sorted(pipe.labels) == sorted("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    assert pipe.scheduler.num_inference_steps == 39
