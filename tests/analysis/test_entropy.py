import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from par_diffusers import PARScheduler
from par_diffusers.analysis.entropy import ConditionalEntropy
from par_diffusers.cli import main


def field(grid: tuple[int, int], width: int, samples: int, reach: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian vectors whose correlation falls with the distance of their places, (samples, places, width), and their covariance."""
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.double) for side in grid))
    correlation = torch.exp(-torch.cdist(places, places) / reach)
    torch.manual_seed(0)
    mix = torch.randn(width, width, dtype=torch.double) / width**0.5 + torch.eye(width, dtype=torch.double)
    covariance = torch.kron(correlation, mix @ mix.T)
    noise = torch.randn(samples, len(covariance), dtype=torch.double)
    return (noise @ torch.linalg.cholesky(covariance).T).view(samples, len(places), width), covariance


def known_entropy(covariance: torch.Tensor, width: int, place: int, context: list[int]) -> float:
    """Of a Gaussian vector given others: by the Schur complement."""

    def index(places):
        return torch.tensor([p * width + i for p in places for i in range(width)], dtype=torch.long)

    own, seen = index([place]), index(context)
    block = covariance[own][:, own]
    if context:
        cross = covariance[seen][:, own]
        block = block - cross.T @ torch.linalg.solve(covariance[seen][:, seen], cross)
    return 0.5 * (torch.logdet(block).item() + width * math.log(2 * math.pi * math.e))


def test_entropies_of_pairs_are_those_of_the_field():
    vectors, covariance = field((3, 4), 2, samples=40000)
    pairs = ConditionalEntropy(vectors, held_out=0.5, ridge=1e-6).pairs()
    for reference in range(12):
        for place in set(range(12)) - {reference}:
            expected = known_entropy(covariance, 2, place, [reference])
            assert pairs[reference, place].item() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("order", ["region", "raster"])
def test_the_increase_is_that_of_the_field(order):
    vectors, covariance = field((4, 4), 2, samples=40000, reach=2.0)
    scheduler = PARScheduler((4, 4), 4, order=order)
    increase = ConditionalEntropy(vectors, held_out=0.5, ridge=1e-6).increase(scheduler).flatten()
    tokens = scheduler.token_order.tolist()
    for step in scheduler.step_tokens:
        for i in step:
            if len(step) == 1:
                assert math.isnan(increase[tokens[i]])
                continue
            together = known_entropy(covariance, 2, tokens[i], tokens[: step.start])
            alone = known_entropy(covariance, 2, tokens[i], tokens[:i])
            assert increase[tokens[i]].item() == pytest.approx(together - alone, abs=0.03)


def test_neighbours_cost_more_together_than_distant_tokens():
    vectors, _ = field((8, 8), 2, samples=3000)
    estimate = ConditionalEntropy(vectors)
    region, raster = (
        estimate.increase(PARScheduler((8, 8), 4, order=order)).nanmean() for order in ("region", "raster")
    )
    assert raster > 0.05 and abs(region) < 0.02


def test_independent_vectors_tell_nothing_about_each_other():
    torch.manual_seed(0)
    vectors = torch.randn(4000, 9, 3)
    estimate = ConditionalEntropy(vectors)
    marginal = 1.5 * math.log(2 * math.pi * math.e)
    off = ~torch.eye(9, dtype=torch.bool)
    assert (estimate.pairs()[off] - marginal).abs().max() < 0.15
    assert (estimate.marginals() - marginal).abs().max() < 0.15
    # residuals are measured on other samples than the fit: many regressors feign no dependence
    few = ConditionalEntropy(torch.randn(120, 25, 3))
    assert few.given_before(torch.arange(25), list(range(25)))[-1] > marginal


def test_a_copy_is_known_from_its_original():
    torch.manual_seed(0)
    vectors = torch.randn(500, 2, 3)
    vectors[:, 1] = vectors[:, 0] @ torch.randn(3, 3)
    assert ConditionalEntropy(vectors, ridge=1e-9).pairs()[0, 1] < -20


def test_the_command_draws_and_prints(make_vqvae, tmp_path, capsys):
    vqvae = make_vqvae()
    vqvae.save_pretrained(tmp_path / "vqvae")
    rng = np.random.default_rng(0)
    for name in ("codes", "labels"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for number in range(60):
        codes = np.repeat(np.repeat(rng.integers(0, 32, (2, 2)), 2, 0), 2, 1)  # four equal tokens each
        np.save(tmp_path / "data" / "codes" / f"{number}.npy", codes.reshape(1, 1, 16))
        np.save(tmp_path / "data" / "labels" / f"{number}.npy", np.array([0]))
    words = ["--data", str(tmp_path / "data"), "--vqvae", str(tmp_path / "vqvae"), "--output", str(tmp_path / "out")]
    main(["entropy", *words, "--num-samples", "60"])
    facts = json.loads((tmp_path / "out" / "entropy.json").read_text())
    assert facts["grid_size"] == [4, 4] and list(facts["information_by_distance"]) == ["1", "2", "3", "4"]
    assert facts["information_by_distance"]["1"] > facts["information_by_distance"]["3"] + 1
    assert facts["pairs"]["0"][0][0] is None
    assert facts["pairs"]["0"][0][1] < facts["pairs"]["0"][0][2] - 5
    assert facts["increase"]["raster"]["mean"] > facts["increase"]["region"]["mean"]
    known = [value is None for value in facts["increase"]["region"]["tokens"][0]]
    assert known == [True, False, True, False]  # the first tokens of the regions have steps of their own
    printed = capsys.readouterr().out
    assert f"raster  {facts['increase']['raster']['mean']:.3f}" in printed
    for name in ("pairs", "information", "increase"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(10**6)) > 10
    with pytest.raises(SystemExit):
        main(["entropy", *words])
    assert "`num_samples` must be at most the 60 samples" in capsys.readouterr().err
