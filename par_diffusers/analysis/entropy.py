"""How much tokens depend on each other: conditional entropies of their codebook vectors (paper, supplement D)."""

import json
import math
from pathlib import Path

import torch

from par_diffusers.analysis.heatmap import draw_heatmap
from par_diffusers.folders import write_text
from par_diffusers.sampling.generate import save_image
from par_diffusers.schedulers import PARScheduler
from par_diffusers.settings import EntropySettings
from par_diffusers.training.codes import CodeDataset
from par_diffusers.training.tokenizers import ImageTokenizer, load_tokenizer


class ConditionalEntropy:
    r"""
    Upper bounds of conditional entropies of vectors at the places of a grid, in nats.

    \\(H(v | context) \le 1/2 \log \det(2 \pi e \Sigma)\\), where \\(\Sigma\\) is the covariance of what ridge regression
    of v on the context leaves over, on samples that the regression has not seen. For Gaussian vectors the bound is tight.

    Args:
        vectors (`torch.Tensor`): (samples, places, d).
        held_out (`float`, defaults to 0.2): Share of the samples that residuals are measured on.
        ridge (`float`, defaults to 1e-3): Weight of the penalty, in units of the mean variance.

    Example:

    ```py
    >>> import torch
    >>> from par_diffusers.analysis.entropy import ConditionalEntropy

    >>> entropy = ConditionalEntropy(torch.randn(1000, 16, 4))
    >>> entropy.pairs().shape
    torch.Size([16, 16])
    ```
    """

    def __init__(self, vectors: torch.Tensor, held_out: float = 0.2, ridge: float = 1e-3):
        samples, self.places, self.width = vectors.shape
        seen = samples - round(held_out * samples)
        if seen < 2 or samples - seen < 2:
            raise ValueError(f"`held_out` must leave 2 samples or more on both sides, got {held_out} of {samples}.")
        vectors = vectors.double().flatten(1)
        # residuals are linear in the vectors: what they need is in these two matrices
        self.seen, self.unseen = vectors[:seen].T.cov(), vectors[seen:].T.cov()
        self.penalty = ridge * self.seen.diagonal().mean()

    def _bound(self, residuals: torch.Tensor) -> torch.Tensor:
        """Of covariances (..., d, d)."""
        tiny = 1e-9 * self.seen.diagonal().mean() * torch.eye(self.width, dtype=torch.double)
        return 0.5 * (torch.logdet(residuals + tiny) + self.width * math.log(2 * math.pi * math.e))

    def pairs(self) -> torch.Tensor:
        """Entropy of the vector at place i given the one at place j, float64 (places, places) at [j, i]."""
        shape = (self.places, self.width, self.places, self.width)
        seen, unseen = (matrix.view(shape).permute(0, 2, 1, 3) for matrix in (self.seen, self.unseen))
        own, own_unseen = (matrix.diagonal(dim1=0, dim2=1).movedim(-1, 0) for matrix in (seen, unseen))
        penalty = self.penalty * torch.eye(self.width, dtype=torch.double)
        # weights[j, i], (d, d): v_i is about weights' @ v_j
        weights = torch.linalg.solve((own + penalty)[:, None], seen)
        cross = weights.mT @ unseen
        explained = weights.mT @ own_unseen[:, None] @ weights
        return self._bound(own_unseen[None] - cross - cross.mT + explained)

    def marginals(self) -> torch.Tensor:
        """Entropy of the vector at each place given nothing, float64 (places,)."""
        return self.given_before(torch.arange(self.places), [0] * self.places)

    def given_before(self, order: torch.LongTensor, contexts: list[int]) -> torch.Tensor:
        """Entropy of the i-th vector of `order` given the first `contexts[i]` of it, float64 (places,) along `order`."""
        index = (order[:, None] * self.width + torch.arange(self.width)).flatten()
        seen, unseen = self.seen[index][:, index], self.unseen[index][:, index]
        # the leading block of the factor is the factor of the leading block
        factor = torch.linalg.cholesky(seen + self.penalty * torch.eye(len(seen), dtype=torch.double))
        found = []
        for place, context in enumerate(contexts):
            end = context * self.width
            own = slice(place * self.width, (place + 1) * self.width)
            residual = unseen[own, own]
            if end:
                weights = torch.cholesky_solve(seen[:end, own], factor[:end, :end])
                cross = weights.T @ unseen[:end, own]
                residual = residual - cross - cross.T + weights.T @ unseen[:end, :end] @ weights
            found.append(self._bound(residual))
        return torch.stack(found)

    def increase(self, scheduler: PARScheduler) -> torch.Tensor:
        """
        What sampling a step's tokens together costs each of them: its entropy given the tokens of earlier steps, less its
        entropy given all tokens before it in the same order. Nats, float64 in raster layout; NaN where a step has one token.
        """
        order = scheduler.token_order.cpu()
        parallel = [tokens.start for tokens in scheduler.step_tokens for _ in tokens]
        increase = self.given_before(order, parallel) - self.given_before(order, list(range(len(order))))
        increase[[len(tokens) == 1 for tokens in scheduler.step_tokens for _ in tokens]] = math.nan
        return scheduler.restore_grid(increase[None])[0]


def load_vectors(dataset: CodeDataset, tokenizer: ImageTokenizer, num_samples: int, seed: int = 0) -> torch.Tensor:
    """Codebook vectors of `num_samples` samples drawn at random, first views, float32 (samples, tokens, d)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(dataset), generator=generator)[:num_samples].tolist()
    codes = torch.stack([dataset[index, 0][0].flatten() for index in chosen])
    return tokenizer.vectors()[codes]


def entropy(settings: EntropySettings) -> Path:
    """
    The dependency analysis of the paper (figures 11 and 12) on codes. Returns the folder `settings.output`.

    - `pairs.png`: entropy of each token given one reference token (white), for nine of those; of clips, for three in the
      middle of the first, the middle and the last frame, frame after frame.
    - `information.png`: the same as what the reference token tells: how much lower than without it.
    - `increase.png`: see `ConditionalEntropy.increase`, for the region order and the raster order.
    - `entropy.json`: the numbers, and what a token tells about another (how much lower its entropy is) by their distance.
    """
    tokenizer = load_tokenizer(settings.vqvae)
    dataset = CodeDataset(settings.data, tokenizer)
    if len(dataset) < settings.num_samples:
        raise ValueError(
            f"`num_samples` must be at most the {len(dataset)} samples of `data`, got {settings.num_samples}."
        )
    orders = {
        order: PARScheduler(dataset.grid_size, settings.num_parallel_tokens, order=order)
        for order in ("region", "raster")
    }
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    vectors = load_vectors(dataset, tokenizer, settings.num_samples, settings.seed)
    estimate = ConditionalEntropy(vectors, settings.held_out, settings.ridge)

    grid = dataset.grid_size
    pairs = estimate.pairs()
    pairs.fill_diagonal_(math.nan)
    if len(grid) == 2:
        shown = [row * grid[1] + column for row in _spread(grid[0]) for column in _spread(grid[1])]
    else:
        shown = [(frame * grid[1] + grid[1] // 2) * grid[2] + grid[2] // 2 for frame in _spread(grid[0])]
    marginals = estimate.marginals()
    increase = {order: estimate.increase(scheduler) for order, scheduler in orders.items()}
    pictures = {
        "pairs": _planes(pairs[shown], grid),
        "information": _planes((marginals - pairs)[shown], grid),
        "increase": _planes(torch.stack(list(increase.values())), grid),
    }
    facts = {
        "data": dataset.fingerprint,
        "settings": {name: getattr(settings, name) for name in ("num_samples", "held_out", "ridge", "seed")},
        "grid_size": list(grid),
        "unit": "nats",
        "marginals": _rounded(marginals.view(grid)),
        "information_by_distance": _by_distance(marginals - pairs, grid),
        "pairs": {str(place): _rounded(pairs[place].view(grid)) for place in shown},
        "num_parallel_tokens": settings.num_parallel_tokens,
        "increase": {
            order: {"mean": round(values.nanmean().item(), 4), "tokens": _rounded(values)}
            for order, values in increase.items()
        },
    }
    for name, values in pictures.items():
        save_image(draw_heatmap(values), output / f"{name}.png")
    write_text(output / "entropy.json", json.dumps(facts) + "\n")
    return output


def describe_entropy(folder: Path) -> str:
    """What `entropy` found, as text."""
    facts = json.loads((folder / "entropy.json").read_text(encoding="utf-8"))
    lines = ["what a token tells about another, in nats, by their distance:"]
    lines += [f"  {distance:>3}  {value:.3f}" for distance, value in facts["information_by_distance"].items()]
    lines.append(f"increase by sampling {facts['num_parallel_tokens']} tokens together, mean in nats:")
    lines += [f"  {order:6}  {found['mean']:.3f}" for order, found in facts["increase"].items()]
    return "\n".join([*lines, f"drawn: {folder}"])


def _planes(values: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Maps of tokens, (maps, tokens), as planes: frames of a clip stand side by side."""
    values = values.reshape(len(values), -1, *grid[-2:])
    gaps = torch.full((*values.shape[:-1], 1), math.nan, dtype=values.dtype)
    return torch.cat([values, gaps], dim=-1).movedim(1, 2).flatten(2)[..., :-1]


def _spread(count: int) -> list[int]:
    """First, middle and last."""
    return sorted({0, count // 2, count - 1})


def _by_distance(information: torch.Tensor, grid: tuple[int, ...]) -> dict[str, float]:
    """Mean over all pairs of places that are about 1, 2, 3, ... apart."""
    places = torch.cartesian_prod(*(torch.arange(side, dtype=torch.double) for side in grid))
    distances = torch.cdist(places, places).round()
    each = {int(distance): information[distances == distance] for distance in distances.unique() if distance}
    return {str(distance): round(values.mean().item(), 4) for distance, values in each.items()}


def _rounded(values: torch.Tensor) -> list:
    """As nested lists; NaN is None."""
    if values.ndim:
        return [_rounded(row) for row in values]
    return None if math.isnan(values) else round(values.item(), 4)
