"""Clips in bulk, on the command line, and in an evaluation."""

import json

import numpy as np
import pytest
import torch
from conftest import draw_videos
from PIL import Image
from safetensors.torch import load_file

from par_diffusers import PARVideoPipeline
from par_diffusers.cli import main
from par_diffusers.evaluation.evaluate import describe_result, evaluate
from par_diffusers.evaluation.judge import GlyphJudge
from par_diffusers.evaluation.sources import open_source
from par_diffusers.sampling.sample import image_seed, sample
from par_diffusers.settings import EvaluationSettings, SamplingSettings
from par_diffusers.training.videos import VideoFolder


@pytest.fixture(scope="module")
def model(make_video_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_video_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("samples") / "out"
    return sample(SamplingSettings(model, output, num_samples=23, shard_size=10, batch_size=4, seed=5, png=True))


def test_clips_are_drawn_each_from_its_number_alone(drawn, model):
    with np.load(drawn / "samples.npz") as arrays:
        clips, labels = arrays["arr_0"], arrays["arr_1"]
    assert (
        clips.shape == (23, 9, 16, 16, 3)
        and clips.dtype == np.uint8
        and labels.tolist() == [i % 10 for i in range(23)]
    )
    pipe = PARVideoPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    for index in (0, 9, 10, 22):
        generator = [torch.Generator().manual_seed(image_seed(5, index))]
        tokens = pipe([index % 10], generator=generator, output_type="latent").frames
        with torch.no_grad():
            pixels = (127.5 * pipe.decode_latents(tokens) + 128).clamp(0, 255).permute(0, 2, 3, 4, 1)[0]
        assert np.abs(clips[index] - pixels.numpy()).max() <= 1
    assert load_file(drawn / "samples-00002.safetensors")["images"].shape == (3, 9, 16, 16, 3)


def test_previews_and_files_play_the_clips(drawn):
    manifest = json.loads((drawn / "manifest.json").read_text())
    assert manifest["frame_rate"] == 8 and manifest["id2label"]["3"] == "three"
    with Image.open(drawn / "preview.gif") as preview:
        assert preview.size == (5 * 16, 4 * 16) and preview.n_frames == 9 and preview.info["duration"] == 120
    assert sorted(file.name for file in (drawn / "gif").iterdir()) == [f"{i:06}.gif" for i in range(23)]


def test_other_sizes_are_drawn_where_they_are_asked_for(model, tmp_path):
    options = {"num_samples": 2, "num_frames": 5, "height": 16, "width": 24, "image_size_eval": 12}
    folder = sample(SamplingSettings(model, tmp_path / "out", **options))
    assert open_source(folder).shape == (2, 5, 12, 12, 3)


def test_frames_are_refused_for_images(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="`num_frames` goes with models of clips"):
        sample(SamplingSettings(tmp_path / "model", tmp_path / "out", num_frames=5))


def test_generate_writes_a_gif(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["generate", "--model", str(model), "--labels", "three", "7", "--seed", "3"])
    assert "generated.gif: 2 clips in 15 steps each" in capsys.readouterr().out
    with Image.open("generated.gif") as picture:
        assert picture.size == (32, 16) and picture.n_frames == 9
    words = ["generate", "--model", str(model), "--labels", "three", "--num-images", "3", "--num-frames", "5"]
    main([*words, "--output", "more.gif"])
    with Image.open("more.gif") as picture:
        assert picture.n_frames == 5
    with pytest.raises(SystemExit):
        main([*words, "--output", "more.png"])
    assert "--output must end in .gif" in capsys.readouterr().err


def test_clips_are_compared_with_those_of_a_folder_of_videos(drawn, scripts, tmp_path):
    real = draw_videos(tmp_path / "real", 18)
    shared = {"num_frames": 5, "per_class": 2}
    settings = EvaluationSettings(drawn, scripts("i3d"), real, num_clips=3, **shared, output=tmp_path / "fvd.json")
    found = evaluate(settings)
    assert set(found["metrics"]) == {"fvd", "precision", "recall"}
    assert found["samples"] | {"sha256": ""} == {
        "name": "out", "kind": "samples", "sha256": "", "count": 20, "shape": [5, 16, 16, 3], "stored_frames": 9, "per_class": 2,
    }  # fmt: skip
    theirs = found["reference"]
    assert (theirs["kind"], theirs["count"], theirs["shape"]) == ("videos", 6, [5, 16, 16, 3])
    assert (theirs["frame_rate"], theirs["clips_per_video"], theirs["per_class"]) == (8.0, 3, 2)
    printed = describe_result(found)
    assert "20 of 5 x 16 x 16 (first 5 of 9 frames, 2 of each class)" in printed
    assert "6 of 5 x 16 x 16 (8 frames a second, 3 clips of each video, 2 of each class)" in printed
    assert any("5 frames: FVD is mostly of 16" in trap for trap in found["warnings"])

    with pytest.raises(ValueError, match="`num_frames` must be at most the 9 of .*out, got 10"):
        open_source(drawn, num_frames=10)

    # the same by hand
    media = VideoFolder(real, 16, 5, 8.0, num_clips=3)
    clips = torch.cat([media.load(index) for index in (0, 6, 12)])
    kept = torch.stack([clips[number] for number in (0, 1, 3, 4, 6, 7)])
    source = open_source(real, 16, num_frames=5, per_class=2, num_clips=3)
    assert torch.equal(torch.cat(list(source.batches(4))), kept) and source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    ours = open_source(drawn, **shared)
    whole = torch.cat(list(open_source(drawn).batches(5)))
    assert torch.equal(torch.cat(list(ours.batches(7))), whole[:20, :, :5])


def test_the_judge_names_the_middle_frame(drawn, tmp_path):
    torch.manual_seed(0)
    judge = GlyphJudge(image_size=16, num_classes=8, num_features=4, classes="efnostxz").eval()
    found = evaluate(EvaluationSettings(drawn, "judge"), judge)
    with np.load(drawn / "samples.npz") as arrays:
        frames, labels = torch.from_numpy(arrays["arr_0"][:, 4]).movedim(-1, 1), arrays["arr_1"]
    with torch.no_grad():
        named = judge(frames)[1].argmax(-1).tolist()
    first = "zottffssen"  # of zero, one, ..., nine
    expected = np.mean(["efnostxz"[name] == first[label] for name, label in zip(named, labels, strict=True)])
    assert found["metrics"]["accuracy"] == expected > 0
    short = GlyphJudge(image_size=16, num_classes=3, num_features=4, classes="efn").eval()
    with pytest.raises(ValueError, match="labels that begin with a character of judge"):
        evaluate(EvaluationSettings(drawn, "judge"), short)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 10}, "`num_frames` must be at most the 9 of"),
        (
            {"reference": "videos", "num_frames": 3, "metrics": ("inception-score",)},
            "inception-score needs class scores",
        ),
        ({"extractor": "means"}, "`extractor` must be a network of videos"),
        ({"samples": "videos"}, "`image_size` must be given for videos"),
    ],
)
def test_what_cannot_be_compared_is_named(changes, message, drawn, videos, scripts, tmp_path):
    places = {"videos": videos, "means": scripts("means")}
    changes = {name: places.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    settings = {"samples": drawn, "extractor": scripts("i3d"), "reference": videos} | changes
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluationSettings(**settings))


def test_entropy_and_plan_draw_clips(clip_codes, vidtok_folder, model, tmp_path, capsys):
    words = ["--data", str(clip_codes), "--vqvae", str(vidtok_folder), "--output", str(tmp_path / "entropy")]
    main(["entropy", *words, "--num-samples", "18"])
    facts = json.loads((tmp_path / "entropy" / "entropy.json").read_text())
    assert facts["grid_size"] == [3, 4, 4] and np.array(facts["marginals"]).shape == (3, 4, 4)
    assert list(facts["pairs"]) == ["10", "26", "42"]  # in the middle of each frame
    with Image.open(tmp_path / "entropy" / "pairs.png") as picture:
        assert picture.width > 2 * 14 * 28  # three frames side by side
    main(["plan", "--model", str(model), "--output", str(tmp_path / "plan.png")])
    printed = capsys.readouterr().out
    assert "3 x 4 x 4 = 48 tokens" in printed and "frame 2" in printed and "15 (4 of one token, 11 of 4)" in printed
    assert Image.open(tmp_path / "plan.png").width > 400
