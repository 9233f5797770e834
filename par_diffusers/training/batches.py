"""The order in which training passes through its data."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class BatchSchedule(Sampler[list[tuple[int, int]]]):
    """
    Batches of one process, as lists of (sample, view): a pure function of its arguments, so that training resumes at any
    batch, and that the samples of a step do not depend on how many processes and accumulation steps share them.

    An epoch is a permutation of the samples, cut into batches of `global_batch_size` (the rest is left out); each sample
    shows one of its `num_views` views, drawn anew in every epoch. A batch is cut into `accumulation_steps` parts, and
    those into one for each process.
    """

    def __init__(
        self,
        num_samples: int,
        num_views: int,
        global_batch_size: int,
        seed: int,
        steps: range,
        accumulation_steps: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if global_batch_size % (accumulation_steps * num_processes):
            raise ValueError(
                f"`global_batch_size` must be divisible by accumulation steps x processes ({accumulation_steps} x "
                f"{num_processes}), got {global_batch_size}."
            )
        if global_batch_size > num_samples:
            raise ValueError(
                f"`global_batch_size` must be at most the {num_samples} samples, got {global_batch_size}."
            )
        self.num_samples, self.num_views, self.seed, self.steps = num_samples, num_views, seed, steps
        self.global_batch_size, self.accumulation_steps = global_batch_size, accumulation_steps
        self.process_index, self.num_processes = process_index, num_processes

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        parts = self.accumulation_steps * self.num_processes
        drawn = None
        for step in self.steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.num_samples, generator=generator)
                views = torch.randint(self.num_views, (self.num_samples,), generator=generator)
                drawn = epoch
            batch = order[place * self.global_batch_size : (place + 1) * self.global_batch_size]
            for part in batch.chunk(parts)[self.process_index :: self.num_processes]:
                yield list(zip(part.tolist(), views[part].tolist(), strict=True))


def seed_step(seed: int, step: int, part: int, process_index: int) -> None:
    """
    Seeds torch for one forward and backward pass, so that its dropouts depend on nothing that went before: a resumed run
    draws what the interrupted one would have drawn, whatever was validated or sampled in between.
    """
    torch.manual_seed(((seed * 10_000_019 + step) * 1009 + part) * 65_537 + process_index & 0x7FFF_FFFF_FFFF_FFFF)
