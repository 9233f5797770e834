# Copyright 2026 The par_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Parallel-token scheduler of PAR ("Parallelized Autoregressive Visual Generation", arXiv 2412.15119).

This file travels inside checkpoints: it imports the standard library, torch, diffusers and transformers only.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from transformers import TopKLogitsWarper, TopPLogitsWarper


@dataclass
class PARSchedulerOutput(BaseOutput):
    """
    Output of [`PARScheduler.step`].

    Args:
        prev_sample (`torch.LongTensor` of shape `(batch_size, *grid_size)`):
            The token grid with the tokens of this step written into it.
        next_tokens (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            The tokens sampled in this step, in generation order.
    """

    prev_sample: torch.LongTensor
    next_tokens: torch.LongTensor


class PARScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Owns the token plan of PAR: in which order the tokens of a grid are generated, what each input slot of the backbone
    carries, where it stands, what it may see, and which slots go through the model in which step.

    With N tokens in order z_0 .. z_(N-1), n parallel tokens and P prefix slots the slots are the prefix, z_0 .. z_(n-1),
    the n - 1 learnable tokens M_1 .. M_(n-1), z_n, z_(n+1), ... up to the last slot that predicts something: N + P - 1
    in all. Slot P - 1 + i predicts z_i, for every i: the learnable tokens turn a shift by one slot into a shift by n
    tokens (paper, section 3.2). Slot i sees slot j if and only if `groups[j] <= groups[i]`.

    The plan is computed by `set_timesteps` and held in the attributes below, which are to be read only:

    - `timesteps` (`torch.LongTensor` of shape `(num_inference_steps,)`): 0, 1, 2, ...
    - `token_order` (`torch.LongTensor` of shape `(N,)`): raster index of the i-th token generated.
    - `slot_tokens` (`torch.LongTensor` of shape `(N + P - 1,)`): what each slot carries: a raster index below N, N + j
      for the learnable token j (from 0), -1 for a prefix slot.
    - `places` (`torch.LongTensor` of shape `(N + P - 1, len(grid_size))`): grid coordinates of the token a slot carries,
      -1 for prefix and learnable slots.
    - `groups` (`torch.LongTensor` of shape `(N + P - 1,)`): attention group of each slot, not decreasing.
    - `step_slots` (`tuple[range, ...]`): the slots that go through the model in each step.
    - `step_tokens` (`tuple[range, ...]`): places in `token_order` of the tokens each step predicts.

    Args:
        grid_size (`tuple[int, ...]`, defaults to `(24, 24)`):
            Tokens of an image `(height, width)` or a clip `(frames, height, width)`. Frames are outermost in every order.
        num_parallel_tokens (`int`, defaults to 4):
            n, the tokens of a parallel step. 1 is plain autoregression.
        order (`str`, defaults to `"region"`):
            `"region"`: the grid is cut into regions; position inside the region, in raster order, is the outer loop and
            the region, in raster order, the inner one, so that the tokens of a step are far apart. `"raster"`: row by
            row, so that the tokens of a step are neighbours (an ablation of the paper).
        region_grid (`tuple[int, int]`, *optional*):
            Rows and columns of regions; their product must be `num_parallel_tokens`, or anything where that is 1 (the
            region order one token at a time). Defaults to the most square one that divides the grid.
        initial_tokens (`str`, defaults to `"sequential"`):
            `"sequential"`: the first n tokens are generated one by one. `"parallel"`: at once (an ablation).
        group_attention (`str`, defaults to `"full"`):
            `"full"`: slots of one step see each other. `"causal"`: a slot sees no later slot (an ablation).
        prefix_length (`int`, defaults to 1):
            P, the slots of the condition: 1 for a class, 120 for a caption in LlamaGen's models.
        guidance_scale (`float`, defaults to 1.0):
            Classifier-free guidance scale that pipelines use unless told otherwise.
        guidance_schedule (`str`, defaults to `"constant"`):
            How the scale s changes over the steps, see `guidance_at`: `"constant"`, `"linear"` or `"power-cosine"`.
        guidance_power (`float`, defaults to 2.5): Of the power-cosine schedule: how late guidance sets in.
        guidance_interval (`tuple[int, int]`, *optional*):
            The first step with guidance and the first one after it without; guidance is off outside. None: all steps.
        temperature (`float`, defaults to 1.0), top_k (`int`, defaults to 0), top_p (`float`, defaults to 1.0):
            Sampling values that `step` uses unless told otherwise. Temperature 0 takes the likeliest token, `top_k` 0
            and `top_p` 1 keep all.

    Example:

    ```py
    >>> from par_diffusers import PARScheduler

    >>> scheduler = PARScheduler(grid_size=(4, 4), num_parallel_tokens=4)
    >>> scheduler.num_inference_steps
    7
    >>> scheduler.token_order.tolist()
    [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]
    ```
    """

    order = 1
    # read when the module is imported: diffusers overwrites the file of remote code whenever it loads another folder
    _source = Path(__file__).read_text(encoding="utf-8")

    @register_to_config
    def __init__(
        self,
        grid_size: tuple[int, ...] = (24, 24),
        num_parallel_tokens: int = 4,
        order: str = "region",
        region_grid: tuple[int, int] | None = None,
        initial_tokens: str = "sequential",
        group_attention: str = "full",
        prefix_length: int = 1,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_power: float = 2.5,
        guidance_interval: tuple[int, int] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ):
        for name, value, allowed in (
            ("order", order, ("region", "raster")),
            ("initial_tokens", initial_tokens, ("sequential", "parallel")),
            ("group_attention", group_attention, ("full", "causal")),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be {' or '.join(map(repr, allowed))}, got {value!r}.")
        for name, value in (("num_parallel_tokens", num_parallel_tokens), ("prefix_length", prefix_length)):
            if not _is_count(value):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        self.check_sampling(guidance_interval=guidance_interval)
        # diffusers takes arguments given by position for defaults, which `from_config` would then drop
        self.register_to_config(_use_default_values=[])
        self.set_timesteps()

    @property
    def num_learnable_tokens(self) -> int:
        """Learnable tokens the plan uses: n - 1."""
        return self.config.num_parallel_tokens - 1

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        grid_size: tuple[int, ...] | None = None,
    ) -> None:
        """
        Computes the plan: n + (N - n) / n steps, or N / n where the initial tokens are parallel too.

        Args:
            num_inference_steps (`int`, *optional*):
                The plan fixes the number of steps; another number raises a `ValueError`.
            device (`str` or `torch.device`, *optional*): Where the tensors of the plan live.
            grid_size (`tuple[int, ...]`, *optional*): A grid other than the configured one.
        """
        grid_size = tuple(self.config.grid_size if grid_size is None else grid_size)
        if len(grid_size) not in (2, 3) or not all(_is_count(size) for size in grid_size):
            raise ValueError(
                "`grid_size` must be (height, width) or (frames, height, width) of whole numbers of at least 1, "
                f"got {grid_size!r}."
            )
        n, prefix = self.config.num_parallel_tokens, self.config.prefix_length
        num_tokens = math.prod(grid_size)
        self.region_grid = self._region_grid(grid_size)

        grid = torch.arange(num_tokens).view(-1, *grid_size[-2:])
        rows, columns = self.region_grid
        regions = grid.unflatten(1, (rows, -1)).unflatten(3, (columns, -1))  # (frames, R, rows / R, C, columns / C)
        token_order = regions.permute(0, 2, 4, 1, 3).flatten()

        learnable = num_tokens + torch.arange(n - 1)
        initial = n if self.config.initial_tokens == "sequential" else 0
        slots = torch.cat([torch.full((prefix,), -1), token_order[:initial], learnable, token_order[initial:]])
        slots = slots[: num_tokens + prefix - 1]
        is_placed = (slots >= 0) & (slots < num_tokens)
        places = torch.stack(torch.unravel_index(slots.where(is_placed, 0), grid_size), dim=-1)

        # the first group of n slots begins at the slot that predicts the first token of the first parallel step
        first_group = prefix - 1 + initial
        groups = torch.arange(len(slots))
        if self.config.group_attention == "full":
            groups = torch.where(groups < first_group, groups, first_group + (groups - first_group) // n)

        bounds = [0, *range(prefix, first_group + 1), *range(first_group + n, len(slots) + 1, n)]
        steps = [range(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
        if num_inference_steps is not None and num_inference_steps != len(steps):
            raise ValueError(
                f"`num_inference_steps` must be {len(steps)} for a {'x'.join(map(str, grid_size))} grid with {n} parallel "
                f"tokens (the plan fixes it; None takes it), got {num_inference_steps!r}."
            )
        self.grid_size = grid_size
        self.num_inference_steps = len(steps)
        self.timesteps = torch.arange(len(steps), device=device)
        self.token_order = token_order.to(device)
        self.slot_tokens = slots.to(device)
        self.places = places.masked_fill(~is_placed[:, None], -1).to(device)
        self.groups = groups.to(device)
        self.step_slots = tuple(steps)
        is_full = self.config.group_attention == "full"
        self._is_one_group = tuple(len(step) == 1 or (is_full and step.start >= first_group) for step in steps)
        self.step_tokens = tuple(range(max(step.start - prefix + 1, 0), step.stop - prefix + 1) for step in steps)

    def _region_grid(self, grid_size: tuple[int, ...]) -> tuple[int, int]:
        n, region_grid = self.config.num_parallel_tokens, self.config.region_grid
        height, width = grid_size[-2:]
        shape = "x".join(map(str, grid_size))
        if self.config.order == "raster":
            if region_grid is not None:
                raise ValueError(f"`region_grid` goes with `order='region'` only, got {region_grid!r}.")
            if math.prod(grid_size) % n:
                raise ValueError(
                    f"`num_parallel_tokens` must divide the {math.prod(grid_size)} tokens of a {shape} grid: "
                    f"{_divisors(math.prod(grid_size))}, got {n}."
                )
            return 1, 1
        if region_grid is None:
            fitting = [(r, n // r) for r in _divisors(n) if height % r == 0 and width % (n // r) == 0]
            if not fitting:
                possible = sorted({r * c for r in _divisors(height) for c in _divisors(width)})
                raise ValueError(
                    f"`num_parallel_tokens` must be rows x columns of regions that divide a {shape} grid: {possible}, "
                    f"got {n}."
                )
            # the most square arrangement of regions, then the most square regions
            return min(fitting, key=lambda rc: (max(rc) / min(rc), abs(math.log(height * rc[1] / (width * rc[0])))))
        if len(region_grid) != 2 or not all(_is_count(size) for size in region_grid):
            raise ValueError(f"`region_grid` must be two whole numbers, rows and columns, got {region_grid!r}.")
        rows, columns = region_grid
        if n not in (1, rows * columns):
            raise ValueError(
                f"`region_grid` must have as many regions as `num_parallel_tokens` ({n}), or that must be 1, "
                f"got {rows} x {columns}."
            )
        if height % rows or width % columns:
            raise ValueError(
                f"`region_grid` must divide a {shape} grid: rows {_divisors(height)}, columns {_divisors(width)}, "
                f"got {rows} x {columns}."
            )
        return rows, columns

    def order_tokens(self, grid: torch.LongTensor) -> torch.LongTensor:
        """Tokens in raster layout (B, *grid_size) -> the same in generation order (B, N): the training targets."""
        return grid.flatten(1)[:, self.token_order.to(grid.device)]

    def restore_grid(self, tokens: torch.LongTensor) -> torch.LongTensor:
        """The inverse of `order_tokens`: (B, N) in generation order -> (B, *grid_size) in raster layout."""
        grid = torch.empty_like(tokens)
        grid[:, self.token_order.to(tokens.device)] = tokens
        return grid.unflatten(1, self.grid_size)

    def model_inputs(
        self, sample: torch.LongTensor, vocab_size: int, timestep: int | torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """
        What the backbone takes beside its condition, for one step or (teacher forcing) for all slots at once.

        Args:
            sample (`torch.LongTensor` of shape `(batch_size, *grid_size)`):
                The token grid in raster layout, filled as far as the step needs it.
            vocab_size (`int`): Token ids; the learnable tokens have the ids from `vocab_size` on.
            timestep (`int` or `torch.Tensor`, *optional*): A value of `timesteps`. None: the slots of all steps.

        Returns:
            `input_ids` (B, slots without the prefix; absent where there are none), `position_ids` (slots, axes), and what
            sees what: `is_causal` False for a step whose slots see each other and all before, else
            `block_sequence_ids` (N + P - 1,), the group of *every* slot, as cached decoding wants them.
        """
        slots = range(len(self.slot_tokens)) if timestep is None else self.step_slots[int(timestep)]
        slots = slice(slots.start, slots.stop)
        carried = self.slot_tokens[slots]
        carried = carried[max(self.config.prefix_length - slots.start, 0) :].to(sample.device)
        inputs = {"position_ids": self.places[slots]}
        if timestep is not None and self._is_one_group[int(timestep)]:
            inputs["is_causal"] = False
        else:
            inputs["block_sequence_ids"] = self.groups
        if len(carried):
            learnable = vocab_size + torch.arange(self.num_learnable_tokens, device=sample.device)
            table = torch.cat([sample.flatten(1), learnable.expand(len(sample), -1)], dim=1)
            inputs["input_ids"] = table[:, carried]
        return inputs

    def guidance_at(
        self,
        timestep: int | torch.Tensor,
        guidance_scale: float,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
    ) -> float:
        """
        The guidance scale of one step; 1 is no guidance.

        With s the scale and x = timestep / num_inference_steps: `"constant"` s, `"linear"` 1 + (s - 1) x (ARPG),
        `"power-cosine"` 1 + (s - 1) (1 - cos(pi x^power)) / 2 (RAR); and 1 outside the interval. None takes the configured
        value. LlamaGen's and PAR's `cfg_interval` k, one token at a time, is the interval (0, k + 2).
        """
        schedule = self.config.guidance_schedule if guidance_schedule is None else guidance_schedule
        power = self.config.guidance_power if guidance_power is None else guidance_power
        interval = self.config.guidance_interval if guidance_interval is None else guidance_interval
        step = int(timestep)
        if interval is not None and not interval[0] <= step < interval[1]:
            return 1.0
        if schedule == "constant":
            return guidance_scale
        share = step / self.num_inference_steps
        if schedule == "power-cosine":
            share = (1 - math.cos(math.pi * share**power)) / 2
        return 1 + (guidance_scale - 1) * share

    def check_sampling(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
    ) -> None:
        """Raises a `ValueError` where one of these values cannot be used. None takes the configured value."""
        temperature = self.config.temperature if temperature is None else temperature
        top_k = self.config.top_k if top_k is None else top_k
        top_p = self.config.top_p if top_p is None else top_p
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        guidance_schedule = self.config.guidance_schedule if guidance_schedule is None else guidance_schedule
        guidance_power = self.config.guidance_power if guidance_power is None else guidance_power
        if not _is_number(guidance_scale) or not 0 <= guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be a finite number of at least 0, got {guidance_scale!r}.")
        schedules = ("constant", "linear", "power-cosine")
        if guidance_schedule not in schedules:
            allowed = " or ".join(map(repr, schedules))
            raise ValueError(f"`guidance_schedule` must be {allowed}, got {guidance_schedule!r}.")
        if not _is_number(guidance_power) or not 0 < guidance_power < math.inf:
            raise ValueError(f"`guidance_power` must be a finite number above 0, got {guidance_power!r}.")
        if guidance_interval is not None and not (
            len(guidance_interval) == 2
            and all(isinstance(step, int) and not isinstance(step, bool) for step in guidance_interval)
            and 0 <= guidance_interval[0] <= guidance_interval[1]
        ):
            raise ValueError(
                "`guidance_interval` must be two steps, the first with guidance and the first after it without, "
                f"got {guidance_interval!r}."
            )
        if not _is_number(temperature) or not 0 <= temperature < math.inf:
            raise ValueError(f"`temperature` must be a finite number of at least 0, got {temperature!r}.")
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 0:
            raise ValueError(f"`top_k` must be a whole number of at least 0 (0 keeps all), got {top_k!r}.")
        if not _is_number(top_p) or not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be a number above 0 and up to 1 (1 keeps all), got {top_p!r}.")

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PARSchedulerOutput | tuple[torch.LongTensor, torch.LongTensor]:
        """
        Samples the tokens of one step and writes them into the grid.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, num_tokens, vocab_size)`):
                Logits of the tokens this step predicts, guidance applied.
            timestep (`int` or `torch.Tensor`): A value of `timesteps`.
            sample (`torch.LongTensor` of shape `(batch_size, *grid_size)`): The token grid in raster layout.
            temperature (`float`, *optional*), top_k (`int`, *optional*), top_p (`float`, *optional*):
                Applied in this order; None takes the configured value.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One for the batch, or one for each image: then an image's tokens do not depend on the batch around it.
            return_dict (`bool`, defaults to `True`): Whether to return a [`PARSchedulerOutput`] or a tuple.
        """
        temperature = self.config.temperature if temperature is None else temperature
        top_k = self.config.top_k if top_k is None else top_k
        top_p = self.config.top_p if top_p is None else top_p
        self.check_sampling(temperature, top_k, top_p)
        tokens = self.step_tokens[int(timestep)]
        if model_output.ndim != 3 or model_output.shape[:2] != (len(sample), len(tokens)):
            raise ValueError(
                f"`model_output` must be the logits ({len(sample)}, {len(tokens)}, vocab_size) of step {int(timestep)}, "
                f"got {tuple(model_output.shape)}."
            )
        logits = model_output.float()
        if temperature == 0:
            next_tokens = logits.argmax(-1)
        else:
            scores = logits.flatten(0, 1) / temperature
            if top_k > 0:
                scores = TopKLogitsWarper(top_k)(None, scores)
            if top_p < 1:
                scores = TopPLogitsWarper(top_p)(None, scores)
            probs = scores.softmax(-1).view_as(logits)
            if isinstance(generator, list):
                if len(generator) != len(sample):
                    raise ValueError(
                        f"`generator` must be one generator or a list of {len(sample)}, one for each image, "
                        f"got {len(generator)}."
                    )
                next_tokens = torch.stack([_draw(p, g) for p, g in zip(probs, generator, strict=True)])
            else:
                next_tokens = _draw(probs.flatten(0, 1), generator).view(logits.shape[:-1])
        places = self.token_order[tokens.start : tokens.stop].to(sample.device)
        next_tokens = next_tokens.to(sample.device)
        prev_sample = sample.flatten(1).index_copy(1, places, next_tokens.to(sample.dtype)).view_as(sample)
        if not return_dict:
            return prev_sample, next_tokens
        return PARSchedulerOutput(prev_sample=prev_sample, next_tokens=next_tokens)


def _draw(probs: torch.Tensor, generator: torch.Generator | None) -> torch.LongTensor:
    """One index for each row of `probs` (rows, vocab_size), drawn on the generator's device."""
    device = probs.device
    if generator is not None:
        probs = probs.to(generator.device)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1).to(device)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
