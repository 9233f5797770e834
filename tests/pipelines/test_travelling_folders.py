"""Pipeline folders between machines with and without the package, each leg in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from par_diffusers import PARPipeline


TESTS = Path(__file__).parent.parent
FILES = {
    "README.md",
    "model_index.json",
    "modeling_par.py",
    "pipeline_par.py",
    "scheduler/scheduler_config.json",
    "scheduler/scheduling_par.py",
    "transformer/config.json",
    "transformer/model.safetensors",
    "transformer/modeling_par.py",
    "vqvae/config.json",
    "vqvae/diffusion_pytorch_model.safetensors",
}


TEXT_FILES = FILES - {"pipeline_par.py"} | {
    "pipeline_par_text_to_image.py",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
}


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """Runs legs with caches of their own and a Hub on the loopback address."""
    root = tmp_path_factory.mktemp("journey")
    hub = subprocess.Popen(
        [sys.executable, TESTS / "loopback_hub.py", root / "hub"], stdout=subprocess.PIPE, text=True
    )
    port = hub.stdout.readline().strip()

    class Journey:
        folder = root
        repositories = root / "hub"
        environment = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip

        def python(self, cache: str, *arguments, **extra) -> subprocess.CompletedProcess:
            environment = {**self.environment, "HF_HOME": str(root / f"cache-{cache}"), **extra}
            return subprocess.run(
                [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=root, env=environment
            )

        def leg(self, loader: str, source, *options, cache: str | None = None, **extra) -> dict:
            result = root / f"leg-{len(list(root.iterdir()))}.pt"
            cache = cache or result.stem
            run = self.python(cache, TESTS / "travel.py", loader, source, result, *options, **extra)
            assert run.returncode == 0, run.stderr
            return torch.load(result, weights_only=True)

    yield Journey()
    hub.terminate()
    hub.wait()


@pytest.fixture(scope="module")
def home(journey, request):
    """A folder saved by the package, and what it draws."""
    from conftest import build_pipeline

    pipe = build_pipeline()
    folder = journey.folder / "home"
    pipe.save_pretrained(folder)
    pipe.save_pretrained(folder, variant="fp16")  # beside the other weights
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return folder, pipe(["three", "eight"], generator=generator, output_type="latent").images


def test_saved_folder_carries_its_code_and_short_names(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == FILES
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_par", "PARPipeline"]
    assert index["transformer"] == ["modeling_par", "PARForConditionalGeneration"]
    assert index["scheduler"] == ["scheduling_par", "PARScheduler"]
    assert index["vqvae"] == ["diffusers", "VQModel"]
    assert index["id2label"]["3"] == "three"
    PARPipeline.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    for name in FILES:
        if name.endswith(".json"):
            assert str(tmp_path).encode() not in contents(tmp_path / "again")[name]
    for name in FILES:
        if name.endswith(".py"):
            for line in (tmp_path / name).read_text().splitlines():
                assert (
                    not line.lstrip().startswith(("from .", "from par_diffusers", "import par_diffusers"))
                    or ">>>" in line
                )


def test_a_text_folder_travels_alone_and_back(journey, make_text_pipeline):
    pipe = make_text_pipeline()
    folder, kind = journey.folder / "text", ("--pipeline", "PARTextToImagePipeline")
    pipe.save_pretrained(folder)
    assert set(contents(folder)) == TEXT_FILES
    source = (folder / "pipeline_par_text_to_image.py").read_text()
    assert "class PARPipelineBase" in source and "from .pipeline_par" not in source
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    tokens = pipe(["three", "eight"], generator=generator, output_type="latent").images
    remote = journey.leg("remote", folder, "--save", journey.folder / "text-2", "--push", "me/text")
    assert torch.equal(remote["tokens"], tokens) and remote["pipeline"].startswith("diffusers_modules")
    package = journey.leg("package", journey.folder / "text-2", *kind, "--save", journey.folder / "text-3")
    assert torch.equal(package["tokens"], tokens) and package["remote"] == []
    assert package["pipeline"] == "par_diffusers.pipelines.pipeline_par_text_to_image"
    first, second, third = (contents(journey.folder / name) for name in ("text", "text-2", "text-3"))
    first.pop("tokenizer/tokenizer_config.json")  # transformers notes in it how a tokenizer was loaded
    assert second.pop("tokenizer/tokenizer_config.json") == third.pop("tokenizer/tokenizer_config.json")
    assert first == second == third
    assert set(contents(journey.repositories / "me" / "text")) == TEXT_FILES
    from_hub = journey.leg("remote", "me/text", cache="text")
    assert torch.equal(from_hub["tokens"], tokens)


def test_a_video_folder_travels_alone_and_back(journey, make_video_pipeline):
    pipe = make_video_pipeline()
    folder, kind = journey.folder / "video", ("--pipeline", "PARVideoPipeline")
    pipe.save_pretrained(folder)
    names = {name.replace("vqvae/", "vae/") for name in FILES} - {"pipeline_par.py"} | {"pipeline_par_video.py"}
    assert set(contents(folder)) == names
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    tokens = pipe(["three", "eight"], generator=generator, output_type="latent").frames
    remote = journey.leg("remote", folder, "--save", journey.folder / "video-2")
    assert torch.equal(remote["tokens"], tokens) and remote["pipeline"].startswith("diffusers_modules")
    package = journey.leg("package", journey.folder / "video-2", *kind, "--save", journey.folder / "video-3")
    assert torch.equal(package["tokens"], tokens) and package["remote"] == []
    assert torch.equal(package["pixels"], remote["pixels"])
    first, second, third = (contents(journey.folder / name) for name in ("video", "video-2", "video-3"))
    assert first == second == third


def test_package_folder_to_remote_class_to_folder_to_package(journey, home):
    folder, tokens = home
    single = journey.folder / "single"
    from conftest import build_pipeline

    build_pipeline().save_pretrained(single)
    remote = journey.leg("remote", single, "--save", journey.folder / "second")
    assert torch.equal(remote["tokens"], tokens)
    assert remote["pipeline"].startswith("diffusers_modules")
    assert remote["classes"]["transformer"].startswith("diffusers_modules")
    again = journey.leg("package", journey.folder / "second", "--save", journey.folder / "third")
    assert torch.equal(again["tokens"], tokens) and torch.equal(again["pixels"], remote["pixels"])
    assert again["pipeline"] == "par_diffusers.pipelines.pipeline_par"
    assert again["classes"]["transformer"] == "par_diffusers.models.modeling_par"
    assert again["classes"]["scheduler"] == "par_diffusers.schedulers.scheduling_par"
    assert again["remote"] == []  # no code of the folder ran
    last = journey.leg("remote", journey.folder / "third", "--save", journey.folder / "fourth")
    assert torch.equal(last["tokens"], tokens)
    assert contents(single) == contents(journey.folder / "second") == contents(journey.folder / "third")
    assert contents(single) == contents(journey.folder / "fourth")


def test_hub_takes_and_gives_the_same_pipeline(journey, home):
    folder, tokens = home
    pushed = journey.leg("package", folder, "--push", "me/par")
    assert torch.equal(pushed["tokens"], tokens)
    assert set(contents(journey.repositories / "me" / "par")) == FILES
    card = (journey.repositories / "me" / "par" / "README.md").read_text()
    assert 'from_pretrained("me/par", trust_remote_code=True)' in card and "[TODO" not in card
    remote = journey.leg("remote", "me/par", "--save", journey.folder / "from-hub", "--push", "me/second", cache="a")
    assert torch.equal(remote["tokens"], tokens)
    assert remote["pipeline"].startswith("diffusers_modules")
    package = journey.leg("package", "me/second", cache="b")
    assert torch.equal(package["tokens"], tokens) and package["remote"] == []
    offline = journey.leg("package", "me/second", cache="b", HF_HUB_OFFLINE="1")
    assert torch.equal(offline["tokens"], tokens)
    first, second = (contents(journey.repositories / "me" / name) for name in ("par", "second"))
    assert {name: data for name, data in first.items() if name != "README.md"} == {
        name: data for name, data in second.items() if name != "README.md"
    }


def test_a_card_edited_on_the_hub_survives_a_push(journey, home):
    (journey.repositories / "me" / "edited").mkdir(parents=True)
    edited = "---\nlicense: mit\nlibrary_name: diffusers\n---\n\n# Mine\n"
    (journey.repositories / "me" / "edited" / "README.md").write_text(edited)
    journey.leg("package", home[0], "--push", "me/edited", "--save-and-push", f"{journey.folder / 'pushed'}=me/pushed")
    assert "# Mine" in (journey.repositories / "me" / "edited" / "README.md").read_text()
    assert set(contents(journey.repositories / "me" / "pushed")) == FILES
    assert "## Token plan" in (journey.repositories / "me" / "pushed" / "README.md").read_text()


@pytest.mark.parametrize("loader", ["package", "remote"])
def test_variants_and_dtypes(loader, journey, home):
    folder, tokens = home
    variant = journey.leg(loader, folder, "--variant", "fp16", "--save", journey.folder / f"variant-{loader}")
    assert torch.equal(variant["tokens"], tokens)
    assert (journey.folder / f"variant-{loader}" / "transformer" / "model.fp16.safetensors").exists()
    half = journey.leg(loader, folder, "--dtype", "bfloat16")
    assert half["dtype"] == "torch.bfloat16" and half["pixels"].isfinite().all()


AUTO = """
import sys
if sys.argv[2] == "remote":
    sys.modules["par_diffusers"] = None
else:
    import par_diffusers
import torch
from transformers import AutoConfig, AutoModel
options = {"trust_remote_code": True} if sys.argv[2] == "remote" else {}
for source, more in ((sys.argv[1] + "/transformer", {}), (sys.argv[1], {"subfolder": "transformer"})):
    config = AutoConfig.from_pretrained(source, **more, **options)
    model = AutoModel.from_pretrained(source, **more, **options)
    assert type(config).__name__ == "PARConfig" and type(model).__name__ == "PARForConditionalGeneration"
    assert type(model).__module__.startswith("par_diffusers" if sys.argv[2] == "package" else "transformers_modules")
    print(sum(p.double().sum() for p in model.parameters()).item())
"""


@pytest.mark.parametrize("loader", ["package", "remote"])
def test_auto_model_loads_by_folder_and_by_subfolder(loader, journey, home):
    run = journey.python(f"auto-{loader}", "-c", AUTO, home[0], loader)
    assert run.returncode == 0, run.stderr
    expected = sum(p.double().sum() for p in PARPipeline.from_pretrained(home[0]).transformer.parameters()).item()
    assert [float(line) for line in run.stdout.split()] == [expected, expected]


def test_auto_model_loads_from_the_hub(journey, home):
    journey.leg("package", home[0], "--push", "me/auto")
    code = (
        "import sys; sys.modules['par_diffusers'] = None\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('me/auto', subfolder='transformer', trust_remote_code=True)\n"
        "print(type(model).__module__)\n"
    )
    run = journey.python("auto-hub", "-c", code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("transformers_modules")


def test_code_loaded_later_does_not_replace_what_a_pipeline_saves(journey, home):
    # diffusers keeps one file for all folders: saving must write the code a pipeline was loaded with
    other = journey.folder / "other"
    PARPipeline.from_pretrained(home[0]).save_pretrained(other)
    for name in ("pipeline_par.py", "scheduler/scheduling_par.py"):
        (other / name).write_text((other / name).read_text() + "\n# another version\n")
    code = (
        "import sys; sys.modules['par_diffusers'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"a = DiffusionPipeline.from_pretrained({str(home[0])!r}, trust_remote_code=True)\n"
        f"b = DiffusionPipeline.from_pretrained({str(other)!r}, trust_remote_code=True)\n"
        f"a.save_pretrained({str(journey.folder / 'a')!r}); b.save_pretrained({str(journey.folder / 'b')!r})\n"
    )
    run = journey.python("versions", "-c", code)
    assert run.returncode == 0, run.stderr
    for name in ("pipeline_par.py", "scheduler/scheduling_par.py"):
        assert "another version" not in (journey.folder / "a" / name).read_text()
        assert "another version" in (journey.folder / "b" / name).read_text()


def test_remote_code_is_not_run_without_trust(journey, home):
    code = f"from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained({str(home[0])!r})"
    run = journey.python("trust", "-c", code)
    assert run.returncode != 0 and "trust_remote_code" in run.stderr


def test_model_card_describes_the_pipeline(pipe, tmp_path):
    card_pipe = PARPipeline(
        **pipe.components, id2label=pipe.config.id2label, card_data={"license": "mit", "datasets": ["imagenet-1k"]}
    )
    card_pipe.save_pretrained(tmp_path / "a", samples=Image.new("RGB", (16, 8), "red"))
    text = (tmp_path / "a" / "README.md").read_text()
    _, front_matter, body = text.split("---\n", 2)
    data = yaml.safe_load(front_matter)
    assert data["library_name"] == "diffusers" and data["license"] == "mit" and data["datasets"] == ["imagenet-1k"]
    assert data["pipeline_tag"] == "unconditional-image-generation" and "par" in data["tags"]
    for part in ("trust_remote_code=True", "class_labels=['eight']", "4 x 4", "| steps | 7 |", "8 x 8 pixels",
                 "![samples](samples.png)", "guidance scale 1.5"):  # fmt: skip
        assert part in body
    assert Image.open(tmp_path / "a" / "samples.png").size == (16, 8)
    again = PARPipeline.from_pretrained(tmp_path / "a")
    assert again.config.card_data == {"license": "mit", "datasets": ["imagenet-1k"]}
    (tmp_path / "a" / "README.md").write_text("mine")
    again.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text() == "mine"
    again.save_pretrained(tmp_path / "b")
    assert "samples.png" not in (tmp_path / "b" / "README.md").read_text()


def test_compiled_components_are_saved_as_what_they_are(pipe, tmp_path):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"][0] == "modeling_par"
    assert set(contents(tmp_path)) == FILES


def test_components_can_be_exchanged_while_loading(home):
    from par_diffusers import PARScheduler

    scheduler = PARScheduler((8, 8))
    pipe = PARPipeline.from_pretrained(home[0], scheduler=scheduler)
    assert pipe.scheduler is scheduler and pipe.scheduler.num_inference_steps == 19
