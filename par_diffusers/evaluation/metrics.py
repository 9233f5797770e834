"""Metrics of features: what torchmetrics has is taken from there."""

import warnings

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore


class _Features(nn.Identity):
    """Stands in the place of a network where features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), float64."""
    metric = _frechet(features.shape[1])
    _update(metric, features, real=True)
    count = metric.real_features_num_samples
    mean = metric.real_features_sum / count
    return mean, (metric.real_features_cov_sum - count * mean.outer(mean)) / (count - 1)


def frechet_distance(samples: torch.Tensor, reference: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> float:
    """
    Fréchet distance of Gaussians with the moments of two sets of features (N, D): FID with Inception's, FVD with I3D's.

    `reference` may be the moments themselves, mean (D,) and covariance (D, D). Raises a `ValueError` for features that hold
    nothing to compare, as those of a few plain pictures.
    """
    metric = _frechet(samples.shape[1])
    _update(metric, samples, real=False)
    if isinstance(reference, tuple):
        # the sums that any number of images with these moments would have
        mean, covariance = (moment.double() for moment in reference)
        metric.real_features_num_samples = torch.tensor(2)
        metric.real_features_sum = 2 * mean
        metric.real_features_cov_sum = covariance + 2 * mean.outer(mean)
    else:
        _update(metric, reference, real=True)
    try:
        return metric.compute().item()
    except torch.linalg.LinAlgError:
        raise ValueError(
            f"`samples` and `reference` must differ in all {samples.shape[1]} features of the extractor, too many of them are "
            "alike in all images."
        ) from None


def _frechet(num_features: int) -> FrechetInceptionDistance:
    return FrechetInceptionDistance(feature=_Features(num_features))


def _update(metric: FrechetInceptionDistance, features: torch.Tensor, real: bool) -> None:
    for part in features.split(4096):
        metric.update(part.double(), real=real)


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over `splits` random parts of the Inception score, from logits (N, classes)."""
    with warnings.catch_warnings(action="ignore"):  # that it keeps what it is given
        metric = InceptionScore(feature=_Features(logits.shape[1]), splits=splits)
    metric.update(logits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def precision_recall(
    samples: torch.Tensor, reference: torch.Tensor, neighbors: int = 3, chunk_size: int = 256
) -> tuple[float, float]:
    """
    Improved precision and recall (arXiv 1904.06991): the share of `samples` (N, D) inside the manifold of `reference`
    (M, D), and the other way round. A set's manifold is the union of the balls around its points that reach their
    `neighbors`-th nearest neighbour. Distances are made for `chunk_size` points at a time.
    """
    # squared distances |x|^2 + |y|^2 - 2 xy are differences of large numbers: near the origin less is lost
    origin = reference.mean(dim=0)

    def covered(points: torch.Tensor, centres: torch.Tensor) -> float:
        centres = centres - origin
        squares = centres.square().sum(dim=1)
        radii = [
            # one more: a point is its own nearest
            torch.addmm(squares, part, centres.T, alpha=-2).kthvalue(neighbors + 1).values + own
            for part, own in zip(centres.split(chunk_size), squares.split(chunk_size), strict=True)
        ]
        reach = squares - torch.cat(radii)
        inside = []
        for part in points.split(chunk_size):
            part = part - origin
            beyond = torch.addmm(reach, part, centres.T, alpha=-2) + part.square().sum(dim=1, keepdim=True)
            inside.append((beyond <= 0).any(dim=1))
        return torch.cat(inside).double().mean().item()

    return covered(samples, reference), covered(reference, samples)
