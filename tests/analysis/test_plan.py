import pytest
import torch

from par_diffusers import PARScheduler
from par_diffusers.analysis.plan import describe_plan, draw_plan, step_grid


def test_step_grid_is_that_of_the_8x8_example():
    steps = (step_grid(PARScheduler((8, 8))) + 1).tolist()
    assert steps[0] == [1, 5, 6, 7, 2, 5, 6, 7]
    assert steps[1] == [8, 9, 10, 11, 8, 9, 10, 11]
    assert steps[4] == [3, 5, 6, 7, 4, 5, 6, 7]
    assert steps[7] == [16, 17, 18, 19, 16, 17, 18, 19]


def test_every_step_generates_as_many_tokens_as_it_should():
    scheduler = PARScheduler((3, 4, 4))
    counts = torch.bincount(step_grid(scheduler).flatten()).tolist()
    assert counts == [1] * 4 + [4] * 11


def test_description_counts_slots_and_steps():
    text = describe_plan(PARScheduler((24, 24), num_parallel_tokens=16, prefix_length=120), max_steps=3)
    assert "24 x 24 = 576 tokens" in text and "region, 4 x 4 regions" in text
    assert "695: 120 prefix, 15 learnable, 560 tokens" in text
    assert "51 (16 of one token, 35 of 16): 11.29 tokens a step" in text
    assert text.endswith("... 48 more")
    assert "16 (0 of one token, 16 of 1)" not in describe_plan(PARScheduler((4, 4), num_parallel_tokens=1))


@pytest.mark.parametrize("grid_size", [(4, 4), (24, 24), (3, 6, 4), (1, 4)])
def test_picture_colours_tokens_of_one_step_alike(grid_size):
    n = 2 if grid_size == (1, 4) else 4
    scheduler = PARScheduler(grid_size, num_parallel_tokens=n)
    image = draw_plan(scheduler)
    assert image.mode == "RGB"
    assert len(image.getcolors(1 << 24)) > 4
    cell = max(12, min(44, 1200 // max(grid_size[-2:])))
    steps = step_grid(scheduler).view(-1, *grid_size[-2:])[0].tolist()
    corners = {}
    for y, row in enumerate(steps):
        for x, step in enumerate(row):
            corners.setdefault(step, set()).add(image.getpixel((24 + x * cell + 4, 34 + y * cell + 4)))
    assert all(len(colours) == 1 for colours in corners.values())
