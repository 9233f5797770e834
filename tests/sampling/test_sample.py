import json
import random
import time

import numpy as np
import psutil
import pytest
import torch
from launching import finish, start
from PIL import Image
from safetensors.torch import load_file

from par_diffusers import PARPipeline, PARTextToImagePipeline
from par_diffusers.sampling.sample import image_labels, image_seed, sample
from par_diffusers.settings import SamplingSettings


@pytest.fixture(scope="module")
def model(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def options(model, tmp_path):
    return {"model": model, "output": tmp_path / "out", "num_samples": 37, "shard_size": 10, "seed": 5}


def load(folder) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz") as arrays:
        return arrays["arr_0"], arrays["arr_1"]


@pytest.fixture
def plain(options, tmp_path):
    return load(sample(SamplingSettings(**options | {"output": tmp_path / "plain"})))


def test_the_npz_is_what_the_evaluator_reads(plain):
    images, labels = plain
    assert images.shape == (37, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(37)] and labels.dtype == np.int64


def test_an_image_depends_on_seed_and_number_alone(options, plain, model):
    pipe = PARPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for index in (0, 9, 10, 36):
        generator = [torch.Generator().manual_seed(image_seed(5, index))]
        tokens = pipe([index % 10], generator=generator, output_type="latent").images
        pixels = (127.5 * pipe.decode_latents(tokens) + 128).clamp(0, 255).permute(0, 2, 3, 1)
        assert np.abs(plain[0][index] - pixels[0].detach().numpy()).max() <= 1
    more = load(sample(SamplingSettings(**options | {"num_samples": 50})))
    assert np.array_equal(more[0][:30], plain[0][:30])
    other = load(sample(SamplingSettings(**options | {"seed": 6, "output": options["output"].parent / "other"})))
    assert not np.array_equal(other[0], plain[0])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_size_changes_nothing(batch_size, options, plain):
    images, labels = load(sample(SamplingSettings(**options, batch_size=batch_size)))
    assert np.abs(images.astype(int) - plain[0]).max() <= 1 and np.array_equal(labels, plain[1])


def test_two_processes_draw_what_one_draws(options, plain):
    printed = finish(start("sample", options, processes=2))
    assert "37 images, 37 of them now" in printed
    images, labels = load(options["output"])
    assert np.abs(images.astype(int) - plain[0]).max() <= 1 and np.array_equal(labels, plain[1])


def kill_repeatedly(options: dict, kills: int, seed: int | None = None, **launch) -> int:
    """
    Kills the command after its first new shard, `kills` times at most; how often it was killed. With a seed it dies at
    random moments: of its start, of its work, or while the .npz is written.
    """
    rng, killed, log = random.Random(seed), 0, options["output"].parent / "log.txt"
    while killed < kills:
        process = start("sample", options, log=log, **launch)
        before = len(list(options["output"].glob("samples-*")))
        starting = seed is not None and rng.random() < 0.2
        deadline = time.monotonic() + (rng.uniform(0, 8) if starting else 300)
        while process.poll() is None and time.monotonic() < deadline:
            if not starting and len(list(options["output"].glob("samples-*"))) > before:
                starting, deadline = True, time.monotonic() + (0 if seed is None else rng.uniform(0, 0.6))
            time.sleep(0.005)
        if process.poll() is not None:
            assert process.returncode == 0, log.read_text()
            return killed
        family = psutil.Process(process.pid)
        for member in [family, *family.children(recursive=True)]:
            member.kill()
        process.wait()
        killed += 1
    return killed


def assert_same_samples(folder, expected):
    images, labels = load(folder)
    assert np.array_equal(images, expected[0]) and np.array_equal(labels, expected[1])
    assert not list(folder.glob(".*partial"))


def test_killed_samplings_lose_and_repeat_nothing(options, plain):
    assert kill_repeatedly(options, 2) == 2
    finish(start("sample", options))
    assert_same_samples(options["output"], plain)


@pytest.mark.slow
def test_a_hundred_kills_lose_and_repeat_nothing(options, tmp_path):
    options |= {"num_samples": 40000, "shard_size": 20, "batch_size": 20}
    expected = load(sample(SamplingSettings(**options | {"output": tmp_path / "plain"})))
    killed = kill_repeatedly(options, 15, seed=1, processes=2)
    killed += kill_repeatedly(options, 100 - killed, seed=2)
    print(f"{killed} kills")
    finish(start("sample", options))
    assert_same_samples(options["output"], expected)
    assert killed >= 90


def test_what_is_there_is_kept(options):
    folder = sample(SamplingSettings(**options))
    whole = load(folder)
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("samples-*")}
    (folder / "samples-00002.safetensors").unlink()
    (folder / "samples.npz").unlink()
    (folder / ".samples-00002.safetensors.partial").write_bytes(b"half")
    sample(SamplingSettings(**options))
    assert np.array_equal(load(folder)[0], whole[0])
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("samples-*")}
    assert [name for name in times if kept[name] != times[name]] == ["samples-00002.safetensors"]


def test_labels_are_balanced_random_or_given(model):
    pipe = PARPipeline.from_pretrained(model)
    assert image_labels(pipe, ("balanced",), 0, range(8, 13)) == [8, 9, 0, 1, 2]
    random = image_labels(pipe, ("random",), 0, range(5000))
    assert np.bincount(random).min() > 400 and random[:5] == image_labels(pipe, ("random",), 0, range(5))
    assert random[:20] != image_labels(pipe, ("random",), 1, range(20))
    assert image_labels(pipe, ("three", "7"), 0, range(1, 4)) == [7, 3, 7]


def test_images_are_resized_as_the_published_protocol(options, model):
    folder = sample(SamplingSettings(**options | {"num_samples": 3}, image_size_eval=5))
    pipe = PARPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(image_seed(5, i)) for i in range(3)]
    tokens = pipe([0, 1, 2], generator=generators, output_type="latent").images
    with torch.no_grad():
        pixels = torch.nn.functional.interpolate(pipe.decode_latents(tokens), size=(5, 5), mode="bicubic")
    expected = (127.5 * pixels + 128.0).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    assert np.abs(load(folder)[0].astype(int) - expected).max() <= 1
    assert "without antialias" in json.loads((folder / "manifest.json").read_text())["conversion"]


def test_files_and_preview_show_the_same_images(options):
    folder = sample(SamplingSettings(**options, png=True, num_preview_images=9))
    images, _ = load(folder)
    files = sorted((folder / "png").iterdir())
    assert len(files) == 37 and files[0].name == "000000.png"
    for index in (0, 20, 36):
        assert np.array_equal(np.asarray(Image.open(files[index])), images[index])
    preview = np.asarray(Image.open(folder / "preview.png"))
    assert preview.shape == (24, 24, 3) and np.array_equal(preview[:8, 8:16], images[1])


def test_the_manifest_says_what_was_asked_for(options):
    folder = sample(SamplingSettings(**options, guidance_scale=3.0, guidance_interval=(1, 4)))
    manifest = json.loads((folder / "manifest.json").read_text())
    settings = manifest["settings"]
    assert settings["guidance_scale"] == 3.0 and settings["guidance_interval"] == [1, 4] and settings["seed"] == 5
    assert settings["temperature"] == 1.0 and len(settings["weights"]) == 64  # what the model's own value was
    assert {"par_diffusers", "torch", "diffusers", "transformers", "accelerate"} == manifest["versions"].keys()
    assert load_file(folder / "samples-00003.safetensors")["images"].shape == (7, 8, 8, 3)


def test_other_settings_are_not_a_continuation(options, make_pipeline, tmp_path):
    folder = sample(SamplingSettings(**options))
    with pytest.raises(ValueError, match=r"differs in seed \(5, now 6\)"):
        sample(SamplingSettings(**options | {"seed": 6}))
    with pytest.raises(ValueError, match=r"differs in guidance_scale \(1.5, now 4.0\)"):
        sample(SamplingSettings(**options, guidance_scale=4.0))
    make_pipeline(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differs in weights"):
        sample(SamplingSettings(**options | {"model": tmp_path / "other"}))
    sample(SamplingSettings(**options | {"batch_size": 3}))  # changes no image
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or empty folder, .* has thesis.txt"):
        sample(SamplingSettings(**options | {"output": tmp_path / "mine"}))
    assert load(folder)[0].shape[0] == 37


def test_what_cannot_be_drawn_is_said_first(options):
    with pytest.raises(ValueError, match="`class_labels`: 'zebra' is not a label"):
        sample(SamplingSettings(**options, labels=("zebra",)))
    with pytest.raises(ValueError, match="`guidance_interval` must be two steps"):
        sample(SamplingSettings(**options, guidance_interval=(3, 1)))
    assert not options["output"].exists()


def test_other_sizes_are_drawn_and_are_another_sampling(options):
    images, _ = load(sample(SamplingSettings(**options, height=16, width=12)))
    assert images.shape == (37, 16, 12, 3)
    with pytest.raises(ValueError, match="differs in height"):
        sample(SamplingSettings(**options))


@pytest.mark.parametrize("how", [{"mode": "packed"}, {"quantization": "int8"}], ids=str)
def test_packed_and_quantized_models_draw_nearly_the_same(how, options, plain):
    images, labels = load(sample(SamplingSettings(**options | how)))
    assert np.array_equal(labels, plain[1])
    assert (np.abs(images.astype(int) - plain[0]).max((1, 2, 3)) <= 1).mean() > 0.5
    with pytest.raises(ValueError, match="differs in"):
        sample(SamplingSettings(**options))


PROMPTS = ["three eight", "nine", "one two six"]


@pytest.fixture(scope="module")
def text_model(make_text_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    make_text_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.tsv", "headless.tsv"])
def test_prompts_are_taken_in_turn(name, text_model, tmp_path):
    text = {
        "prompts.txt": "\n".join(PROMPTS) + "\n",
        "prompts.tsv": "Category\tPrompt\n" + "".join(f"numbers\t{prompt}\n" for prompt in PROMPTS),
        "headless.tsv": "".join(f"{prompt}\tnumbers\n" for prompt in PROMPTS),
    }
    (tmp_path / name).write_text(text[name])
    options = {"model": text_model, "prompts": tmp_path / name, "output": tmp_path / "out", "seed": 5, "batch_size": 2}
    images, labels = load(sample(SamplingSettings(**options, png=True)))
    assert labels.tolist() == [0, 1, 2]
    assert sorted(file.name for file in (tmp_path / "out" / "png").iterdir()) == [f"{i:06}.png" for i in range(3)]
    pipe = PARTextToImagePipeline.from_pretrained(text_model)
    for index, prompt in enumerate(PROMPTS):
        generator = [torch.Generator().manual_seed(image_seed(5, index))]
        pixels = pipe.decode_latents(pipe(prompt, generator=generator, output_type="latent").images)
        expected = (127.5 * pixels + 128).clamp(0, 255).permute(0, 2, 3, 1).detach().numpy()
        assert np.abs(images[index] - expected[0]).max() <= 1
    more = load(sample(SamplingSettings(**options | {"output": tmp_path / "more", "num_samples": 5})))
    assert more[1].tolist() == [0, 1, 2, 0, 1] and np.abs(more[0][:3].astype(int) - images).max() <= 1
    assert not np.array_equal(more[0][0], more[0][3])


def test_other_prompts_are_another_sampling(text_model, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("one\nsix\n")
    options = {"model": text_model, "output": tmp_path / "out"}
    sample(SamplingSettings(**options, prompts=tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="`output`.*differs in labels"):
        sample(SamplingSettings(**options, prompts=tmp_path / "b.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`prompts`.*a prompt in every line, it has none"),
        ("one\n\ntwo\n  \n", "`prompts`.*line 2, 4 has none"),
        (b"\xff\xfe", "`prompts`.*cannot be read"),
        (None, "`prompts`.*cannot be read"),
    ],
)
def test_bad_prompt_files_are_refused(text, message, text_model, tmp_path):
    if text is not None:
        (tmp_path / "prompts.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        sample(SamplingSettings(model=text_model, prompts=tmp_path / "prompts.txt", output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_prompts_go_with_models_of_text_only(model, text_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n")
    with pytest.raises(ValueError, match="`model` must draw from prompts, .* draws from labels"):
        sample(SamplingSettings(model=model, prompts=tmp_path / "prompts.txt", output=tmp_path / "out"))
    with pytest.raises(ValueError, match="`model` must draw from labels, .* draws from prompts"):
        sample(SamplingSettings(model=text_model, output=tmp_path / "out"))
