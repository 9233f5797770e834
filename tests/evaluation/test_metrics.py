import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from par_diffusers.evaluation.metrics import frechet_distance, inception_score, precision_recall, statistics


def with_moments(mean: list[float], variances: list[float], count: int = 500, seed: int = 0) -> torch.Tensor:
    """Features whose sample mean and covariance are exactly these, up to rounding."""
    noise = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise -= noise.mean(dim=0)
    covariance = noise.T @ noise / (count - 1)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), noise.T, upper=False).T
    return white * torch.tensor(variances).double().sqrt() + torch.tensor(mean).double()


def random_features(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix + torch.randn(width, generator=generator)


# ---- Fréchet distance ----


def test_frechet_distance_of_gaussians_has_the_closed_form():
    ours, theirs = with_moments([0, 1, 2], [1, 4, 9], seed=1), with_moments([3, 1, 0], [4, 4, 1], seed=2)
    expected = (9 + 0 + 4) + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2
    assert frechet_distance(ours, theirs) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_agrees_with_scipy():
    ours, theirs = random_features(700, 24, 1), random_features(900, 24, 2)
    means = [x.double().mean(0).numpy() for x in (ours, theirs)]
    covariances = [np.cov(x.double().numpy(), rowvar=False) for x in (ours, theirs)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(ours, theirs) == pytest.approx(expected, rel=1e-4)


def test_moments_stand_for_the_features_they_are_of():
    ours, theirs = random_features(300, 8, 1), random_features(400, 8, 2) + 50
    mean, covariance = statistics(theirs)
    assert torch.allclose(mean, theirs.double().mean(0))
    assert np.allclose(covariance, np.cov(theirs.double().numpy(), rowvar=False), rtol=1e-6)
    assert frechet_distance(ours, (mean, covariance)) == pytest.approx(frechet_distance(ours, theirs), rel=1e-6)
    assert frechet_distance(theirs, (mean, covariance)) == pytest.approx(0, abs=1e-4)


# ---- Inception score ----


def test_inception_score_lies_between_one_and_the_number_of_classes():
    assert inception_score(torch.zeros(200, 7)) == pytest.approx((1, 0), abs=1e-5)
    certain = torch.nn.functional.one_hot(torch.arange(7).repeat(4000)).float() * 100
    mean, deviation = inception_score(certain)
    assert mean == pytest.approx(7, rel=1e-3) and deviation < 0.01


@pytest.mark.filterwarnings("ignore:std")  # of one part there is no deviation
def test_inception_score_is_the_divergence_that_defines_it():
    logits = random_features(230, 5, 3)
    score, _ = inception_score(logits, splits=1)
    probabilities = logits.double().softmax(1)
    marginal = probabilities.mean(0)
    divergence = sum((p * (p / marginal).log()).sum() for p in probabilities) / len(logits)
    assert score == pytest.approx(divergence.exp().item(), rel=1e-4)
    assert inception_score(logits) == inception_score(logits)


# ---- precision and recall ----


def slow_share(points: torch.Tensor, centres: torch.Tensor, neighbors: int) -> float:
    """As the definition reads."""
    inside = 0
    for point in points:
        for centre in centres:
            others = sorted((centre - other).norm().item() for other in centres if other is not centre)
            if (point - centre).norm().item() <= others[neighbors - 1]:
                inside += 1
                break
    return inside / len(points)


@settings(max_examples=20, deadline=None)
@given(
    samples=st.integers(5, 30),
    reference=st.integers(5, 30),
    width=st.integers(1, 6),
    neighbors=st.integers(1, 4),
    chunk_size=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_precision_and_recall_are_what_the_definition_says(samples, reference, width, neighbors, chunk_size, seed):
    ours = random_features(samples, width, seed).double()
    theirs = random_features(reference, width, seed + 1).double()
    expected = [slow_share(ours, list(theirs), neighbors), slow_share(theirs, list(ours), neighbors)]
    assert precision_recall(ours, theirs, neighbors, chunk_size) == pytest.approx(expected)


def test_precision_and_recall_of_known_sets():
    line = torch.arange(100.0)[:, None]
    assert precision_recall(line, line) == (1, 1)
    assert precision_recall(line, line + 1000) == (0, 0)
    # half of the line: all of it is real, and it reaches half of what is real and three steps further
    precision, recall = precision_recall(line[:50], line)
    assert precision == 1 and recall == pytest.approx(0.53)


def test_precision_and_recall_are_exact_far_from_the_origin():
    ours, theirs = random_features(60, 4, 1), random_features(60, 4, 2)
    assert precision_recall(ours + 1e4, theirs + 1e4) == precision_recall(
        (ours + 1e4).double(), (theirs + 1e4).double()
    )


def test_features_that_are_alike_in_all_images_are_refused(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("failed to converge")

    # whether eigenvalues of such features are found depends on the linear algebra library
    monkeypatch.setattr(torch.linalg, "eigvals", fail)
    with pytest.raises(ValueError, match="must differ in all 3 features"):
        frechet_distance(torch.ones(9, 3), torch.ones(9, 3))
