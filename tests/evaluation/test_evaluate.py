import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch

from par_diffusers.cli import main
from par_diffusers.evaluation.evaluate import describe_result, evaluate
from par_diffusers.evaluation.judge import GlyphJudge
from par_diffusers.settings import EvaluationSettings


def frechet(ours: np.ndarray, theirs: np.ndarray) -> float:
    means, covariances = [x.mean(0) for x in (ours, theirs)], [np.cov(x, rowvar=False) for x in (ours, theirs)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    return ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


@pytest.fixture
def two_sets(make_images, tmp_path):
    """Files of 40 and 50 images."""
    for name, count, seed in (("ours", 40, 1), ("theirs", 50, 2)):
        images = make_images(count, 8, 8, seed=seed)
        np.savez(tmp_path / f"{name}.npz", images, np.arange(count) % 5)
    return tmp_path / "ours.npz", tmp_path / "theirs.npz"


def images_of(file) -> np.ndarray:
    with np.load(file) as arrays:
        return arrays["arr_0"].astype(np.float64)


def inception_features(file) -> np.ndarray:
    pixels = images_of(file) / 255
    return np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2), ddof=1)], axis=1)


def test_images_are_compared_by_inception(two_sets, scripts, tmp_path):
    ours, theirs = two_sets
    network = scripts("inception")
    output = tmp_path / "result.json"
    found = evaluate(EvaluationSettings(ours, network, theirs, batch_size=7, output=output))
    metrics = found["metrics"]
    assert metrics["fid"] == pytest.approx(frechet(*map(inception_features, (ours, theirs))), rel=1e-4)
    assert 1 < metrics["inception_score"] < 5 and metrics["inception_score_deviation"] > 0
    assert 0 < metrics["precision"] <= 1 and 0 < metrics["recall"] <= 1
    assert set(metrics) == {"fid", "inception_score", "inception_score_deviation", "precision", "recall"}
    assert json.loads(output.read_text()) == found
    for side, file, count in (("samples", ours, 40), ("reference", theirs, 50)):
        facts = found[side]
        assert (facts["name"], facts["count"], facts["shape"]) == (file.name, count, [8, 8, 3])
        assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["extractor"]["sha256"] == hashlib.sha256(network.read_bytes()).hexdigest()
    assert found["extractor"]["num_features"] == 6


def test_the_inception_score_leaves_out_the_bias_of_the_last_layer(two_sets, scripts):
    settings = EvaluationSettings(two_sets[0], scripts("inception"), metrics=("inception-score",))
    score = evaluate(settings)["metrics"]["inception_score"]
    network = torch.jit.load(settings.extractor)
    with torch.no_grad():
        network.mix.bias.add_(torch.tensor([9.0, 0, 0, 0, 0]))
    network.save(settings.extractor)
    assert evaluate(settings)["metrics"]["inception_score"] == score


def test_statistics_stand_for_the_images(two_sets, scripts, tmp_path):
    ours, theirs = two_sets
    network = scripts("inception")
    whole = evaluate(EvaluationSettings(ours, network, theirs))
    moments = tmp_path / "moments.npz"
    evaluate(EvaluationSettings(theirs, network, save_statistics=moments))
    found = evaluate(EvaluationSettings(ours, network, moments))
    assert found["metrics"]["fid"] == pytest.approx(whole["metrics"]["fid"], rel=1e-6)
    assert "precision" not in found["metrics"] and not any("do not say" in trap for trap in found["warnings"])
    with np.load(moments) as arrays:
        assert arrays["count"] == 50
        named = dict(arrays)
    assert np.allclose(named["mu"], inception_features(theirs).mean(0), rtol=1e-5)

    # as in the ADM files: images of a part, moments of all
    np.savez(tmp_path / "adm.npz", images_of(theirs)[:10].astype(np.uint8), mu=named["mu"], sigma=named["sigma"])
    found = evaluate(EvaluationSettings(ours, network, tmp_path / "adm.npz"))
    assert found["metrics"]["fid"] == pytest.approx(whole["metrics"]["fid"], rel=1e-6)
    assert found["metrics"]["recall"] in [i / 10 for i in range(11)]
    assert any("do not say which network" in trap for trap in found["warnings"])


def test_videos_are_compared_by_i3d(make_images, scripts, tmp_path):
    for name, seed in (("ours", 1), ("theirs", 2)):
        np.savez(tmp_path / f"{name}.npz", make_images(20, 4, 8, 8, seed=seed))
    network = scripts("i3d")
    found = evaluate(EvaluationSettings(tmp_path / "ours.npz", network, tmp_path / "theirs.npz"))

    def features(name):
        videos = images_of(tmp_path / f"{name}.npz") / 127.5 - 1
        motion = np.abs(np.diff(videos, axis=1)).mean((1, 2, 3, 4))
        return np.concatenate([videos.mean((1, 2, 3)), motion[:, None]], axis=1)

    assert found["metrics"]["fvd"] == pytest.approx(frechet(features("ours"), features("theirs")), rel=1e-4)
    assert set(found["metrics"]) == {"fvd", "precision", "recall"}


def test_any_network_is_an_extractor(two_sets, scripts):
    ours, theirs = two_sets
    expected = frechet(*(images_of(file).mean((1, 2)) for file in two_sets))
    by_script = evaluate(EvaluationSettings(ours, scripts("means"), theirs))

    class Flat(torch.nn.Module):
        def forward(self, images):
            return images.float().mean((2, 3))

    by_module = evaluate(EvaluationSettings(ours, "channel means", theirs), Flat())
    for found in (by_script, by_module):
        assert set(found["metrics"]) == {"frechet_distance", "precision", "recall"}
        assert found["metrics"]["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert by_module["extractor"]["name"] == "channel means"


def test_features_that_are_not_numbers_are_refused(two_sets):
    class Overflowing(torch.nn.Module):
        def forward(self, images):
            return images.float().mean((2, 3)) / (images.float().mean((2, 3)) > 128)

    with pytest.raises(ValueError, match="overflowing must give finite features, of some of .*ours.npz it does not"):
        evaluate(EvaluationSettings(two_sets[0], "overflowing", two_sets[1]), Overflowing())


def test_the_judge_names_images(make_images, write_folder, tmp_path):
    torch.manual_seed(0)
    judge = GlyphJudge(image_size=16, num_classes=3, num_features=4).eval()
    images, labels = make_images(30, 16, 16), np.arange(30) % 3
    np.savez(tmp_path / "ours.npz", images, labels)
    theirs = write_folder(images[:12], labels[:12])
    found = evaluate(EvaluationSettings(tmp_path / "ours.npz", "judge", theirs), judge)
    with torch.no_grad():
        named = judge(torch.from_numpy(images).movedim(-1, 1))[1].argmax(-1).numpy()
    assert found["metrics"]["accuracy"] == (named == labels).mean()
    assert found["metrics"]["reference_accuracy"] == (named[:12] == labels[:12]).mean()
    assert {"frechet_distance", "inception_score", "precision", "recall"} < set(found["metrics"])
    alone = evaluate(EvaluationSettings(tmp_path / "ours.npz", "judge"), judge)["metrics"]
    assert set(alone) == {"accuracy", "inception_score", "inception_score_deviation"}

    np.savez(tmp_path / "clips.npz", make_images(12, 5, 16, 16))
    with pytest.raises(ValueError, match="`reference` must hold images as .*ours.npz does, .*clips.npz holds clips"):
        evaluate(EvaluationSettings(tmp_path / "ours.npz", "judge", tmp_path / "clips.npz"), judge)
    with pytest.raises(ValueError, match="ours.npz must hold clips, of which 5 frames"):
        evaluate(EvaluationSettings(tmp_path / "clips.npz", "judge", tmp_path / "ours.npz"), judge)


def test_the_batch_size_changes_no_result(two_sets, scripts):
    ours, theirs = two_sets
    network = scripts("inception")
    results = [evaluate(EvaluationSettings(ours, network, theirs, batch_size=size))["metrics"] for size in (1, 7, 64)]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5)


def test_known_traps_are_named(two_sets, make_images, scripts, tmp_path):
    ours, theirs = two_sets
    network = scripts("inception")
    traps = evaluate(EvaluationSettings(ours, network, theirs))["warnings"]
    assert any("40 samples" in trap for trap in traps) and any("no mu and sigma" in trap for trap in traps)
    assert any("are the same" in trap for trap in evaluate(EvaluationSettings(ours, network, ours))["warnings"])
    np.savez(tmp_path / "large.npz", make_images(20, 16, 16), np.arange(20) % 4)
    traps = evaluate(EvaluationSettings(ours, network, tmp_path / "large.npz"))["warnings"]
    assert any("8 x 8 pixels, the reference of 16 x 16" in trap for trap in traps)
    assert any("samples are of 5 classes, the reference is of 4" in trap for trap in traps)


def test_what_cannot_be_measured_stops_before_the_features(two_sets, make_images, scripts, tmp_path):
    ours, theirs = two_sets
    network, means, i3d = scripts("inception"), scripts("means"), scripts("i3d")
    np.savez(tmp_path / "few.npz", make_images(6, 8, 8))
    np.savez(tmp_path / "moments.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(tmp_path / "other.npz", mu=np.zeros(6), sigma=np.eye(6), extractor="0" * 64)
    for values, said in (
        (
            (tmp_path / "few.npz", network, theirs),
            "few.npz must hold more images than the features have dimensions, 6; it has 6",
        ),
        ((ours, network, tmp_path / "few.npz"), "few.npz must hold more images"),
        ((ours, network, tmp_path / "moments.npz"), "gives 6 features and .*moments.npz is of 4"),
        ((ours, network, tmp_path / "other.npz"), r"is of another \(000000000000\)"),
        ((tmp_path / "moments.npz", network, ours), "`samples` must hold images"),
        ((ours, i3d, theirs), "`extractor` must be a network of images for .*ours.npz, i3d.pt is one of videos"),
        ((ours, means), "`reference` must be given"),
        ((ours, means, None, ("frechet",)), "frechet needs a `reference`"),
        (
            (ours, means, theirs, ("inception-score",)),
            "inception-score needs class scores, which means.pt does not give",
        ),
        ((ours, network, theirs, ("accuracy",)), "accuracy needs the glyph judge"),
        ((ours, network, tmp_path / "other.npz", ("precision-recall",)), "needs a `reference` with images"),
        ((ours, "glyphs-judge", theirs), "glyphs-judge takes images of 48 pixels a side, .*ours.npz has 8 x 8"),
        ((ours, tmp_path / "none.pt"), "there is no file"),
        ((ours, ours), "`extractor` must be a TorchScript file, .*ours.npz is not"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(EvaluationSettings(*values))
    with pytest.raises(ValueError, match=r"ours.npz must hold clips, of which 4 frames \(`num_frames`\)"):
        evaluate(EvaluationSettings(ours, network, theirs, num_frames=4))
    with pytest.raises(ValueError, match="`output` must be a file in a folder that exists"):
        evaluate(EvaluationSettings(ours, network, theirs, output=tmp_path / "none" / "result.json"))


def test_the_command_prints_what_it_compared(two_sets, scripts, tmp_path, capsys):
    ours, theirs = two_sets
    words = ["--samples", str(ours), "--reference", str(theirs), "--extractor", str(scripts("inception"))]
    main(["evaluate", *words, "--metrics", "frechet", "--output", str(tmp_path / "r.json")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert printed == describe_result(found) + "\n"
    assert f"fid: {found['metrics']['fid']:.4f}" in printed and "warning: 40 samples" in printed
    assert f"reference: theirs.npz, 50 of 8 x 8, {found['reference']['sha256'][:16]}" in printed
    for wrong in (["--metrics", "sfid"], ["--samples", str(tmp_path / "none.npz")]):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *words, *wrong])
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_fifty_thousand_images_stay_below_three_gigabytes(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "ours.npz", rng.integers(0, 256, (50000, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "theirs.npz", rng.integers(0, 256, (50000, 32, 32, 3), np.uint8))

    class Wide(torch.nn.Module):
        def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
            x = img.flatten(1)
            return x[:, :2048].float() if return_features else x[:, :1008].float().softmax(1)

    torch.jit.script(Wide()).save(tmp_path / "wide.pt")
    code = (
        "import resource, sys\n"
        "from par_diffusers.cli import main\n"
        "main(sys.argv[1:])\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)\n"
    )
    words = ["evaluate", "--samples", "ours.npz", "--reference", "theirs.npz", "--extractor", "wide.pt"]
    result = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    assert float(result.stdout.split("peak ")[1]) < 3
