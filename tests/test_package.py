import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import par_diffusers
from par_diffusers import (
    PARForConditionalGeneration,
    PARPipeline,
    PARScheduler,
    PARVideoPipeline,
    embedded_model,
)
from par_diffusers.cli import main
from par_diffusers.evaluation.judge import GlyphJudge
from par_diffusers.pipelines.pipeline_par import travelling_source
from par_diffusers.training.glyph_clips import MOTIONS
from par_diffusers.training.tokenizers import load_tokenizer


ROOT = Path(__file__).parent.parent


def test_public_names_are_there():
    assert set(par_diffusers.__all__) == {
        "__version__", "PARConfig", "PARForConditionalGeneration", "PARModel", "PARPipeline", "PARScheduler",
        "PARTextToImagePipeline", "PARVideoPipeline", "convert_llamagen_checkpoint", "embedded_model",
    }  # fmt: skip
    for name in par_diffusers.__all__:
        assert getattr(par_diffusers, name) is not None
        assert name in dir(par_diffusers)


def test_bare_checkout_imports_and_subfolders_are_the_package():
    code = (
        "import sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)]  # not the installed one\n"
        "import par_diffusers, par_diffusers.pipelines as pipelines\n"
        "print(par_diffusers.__file__, pipelines.__file__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == [str(ROOT / "par_diffusers/__init__.py"), str(ROOT / "pipelines/__init__.py")]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_help_waits_for_no_heavy_import():
    code = (
        "import sys, par_diffusers.cli\n"
        "try: par_diffusers.cli.main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'diffusers', 'accelerate', 'numpy'} & set(sys.modules)))\n"
    )
    assert run(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("first, second", [("par_diffusers", "transformers"), ("transformers", "par_diffusers")])
def test_auto_classes_know_the_model_whichever_is_imported_first(first, second):
    code = f"import {first}, {second}; print(transformers.AutoConfig.for_model('par').hidden_size)"
    assert run(code).split() == ["1024"]


def test_files_import_nothing_of_ours_as_they_travel():
    files = [
        *ROOT.glob("pipelines/pipeline_*.py"),
        *ROOT.glob("schedulers/scheduling_*.py"),
        *ROOT.glob("par_diffusers/models/modeling_*.py"),
    ]
    assert len(files) == 5
    for file in files:
        for line in travelling_source(file).splitlines():
            match = re.match(r"\s*(?:from|import) (\S+)", line)
            if match:
                top = match[1].split(".")[0]
                allowed = {"torch", "torch_xla", "diffusers", "transformers", "huggingface_hub"}
                assert top in allowed | sys.stdlib_module_names, (file, line)


def test_imagenet_names_ship():
    names = json.loads((ROOT / "par_diffusers" / "assets" / "imagenet_labels.json").read_text())
    assert list(names) == [str(i) for i in range(1000)]
    assert names["1"] == "goldfish, Carassius auratus" and names["999"].startswith("toilet")


@pytest.mark.parametrize(
    "documented",
    [PARPipeline.__call__, PARScheduler, PARForConditionalGeneration, embedded_model],
    ids=lambda o: o.__name__,
)
def test_docstring_examples_run(documented):
    text = re.sub(r"(?m)^ *```.*$", "", documented.__doc__)
    example = doctest.DocTestParser().get_doctest(text, {}, documented.__name__, None, None)
    assert len(example.examples) >= 2
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("name, steps", [("par-glyphs-1x", 144), ("par-glyphs-4x", 39), ("par-glyphs-16x", 24)])
def test_embedded_models_are_small_half_precision_and_named(name, steps):
    folder = embedded_model(name)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    assert sum(sizes.values()) < 25e6 / 3  # three of them in 25 MB
    assert "transformer/model.safetensors" in sizes and "vqvae/diffusion_pytorch_model.safetensors" in sizes
    pipe = PARPipeline.from_pretrained(folder)
    assert str(pipe.transformer.dtype) == "torch.float16"
    assert sorted(pipe.labels) == sorted("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    assert pipe.scheduler.num_inference_steps == steps


def test_embedded_model_of_clips_is_small_and_draws_a_gif(tmp_path):
    folder = embedded_model("par-glyph-clips")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 12e6
    pipe = PARVideoPipeline.from_pretrained(folder)
    assert str(pipe.transformer.dtype) == "torch.float16" and pipe.config.frame_rate == 8
    assert sorted(pipe.labels) == [f"{letter} {motion}" for letter in "ACEGHKPRSX" for motion in MOTIONS]
    assert pipe.scheduler.num_inference_steps == 48
    output = tmp_path / "clip.gif"
    main(
        [
            "generate",
            "--model",
            "par-glyph-clips",
            "--labels",
            "A moves",
            "X turns",
            "--seed",
            "0",
            "--output",
            str(output),
        ]
    )
    with Image.open(output) as clip:
        assert clip.n_frames == 17 and clip.info["duration"] == 120  # hundredths of a second


def test_embedded_tokenizer_has_codes_of_unit_norm():
    vqvae = load_tokenizer(embedded_model("par-glyphs-4x")).model
    norms = vqvae.quantize.embedding.weight.norm(dim=1)
    assert vqvae.config.num_vq_embeddings == 512 and (norms - 1).abs().max() < 1e-3


def test_embedded_judge_is_small():
    folder = embedded_model("glyphs-judge")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1e6
    assert GlyphJudge.load_config(folder)["num_classes"] == 36
