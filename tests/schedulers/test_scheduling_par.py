import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from par_diffusers import PARScheduler
from par_diffusers.schedulers import PARSchedulerOutput


@st.composite
def configurations(draw, max_side: int = 4):
    """Any valid configuration of a small grid."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    height, width = rows * draw(st.integers(1, max_side)), columns * draw(st.integers(1, max_side))
    frames = draw(st.sampled_from([None, 1, 2, 3]))
    order = draw(st.sampled_from(["region", "raster"]))
    n = draw(st.sampled_from([1, rows * columns]))
    return {
        "grid_size": (height, width) if frames is None else (frames, height, width),
        "num_parallel_tokens": n,
        "order": order,
        "region_grid": (rows, columns) if order == "region" else None,
        "initial_tokens": draw(st.sampled_from(["sequential", "parallel"])),
        "group_attention": draw(st.sampled_from(["full", "causal"])),
        "prefix_length": draw(st.integers(1, 5)),
    }


def slow_order(grid_size, order, region_grid):
    """Raster indices in generation order, from the definition: frame, place in the region, region."""
    *frames, height, width = grid_size
    rows, columns = region_grid if order == "region" else (1, 1)
    tall, wide = height // rows, width // columns
    return [
        (t * height + r * tall + y) * width + c * wide + x
        for t in range(math.prod(frames))
        for y in range(tall)
        for x in range(wide)
        for r in range(rows)
        for c in range(columns)
    ]


@settings(max_examples=200, deadline=None)
@given(configurations())
def test_order_is_the_defined_permutation_and_its_inverse_inverts(config):
    scheduler = PARScheduler(**config)
    num_tokens = math.prod(config["grid_size"])
    assert scheduler.token_order.tolist() == slow_order(config["grid_size"], config["order"], config["region_grid"])
    assert sorted(scheduler.token_order.tolist()) == list(range(num_tokens))
    grid = torch.randint(100, (2, *config["grid_size"]))
    assert torch.equal(scheduler.restore_grid(scheduler.order_tokens(grid)), grid)
    tokens = torch.randint(100, (2, num_tokens))
    assert torch.equal(scheduler.order_tokens(scheduler.restore_grid(tokens)), tokens)


@settings(max_examples=200, deadline=None)
@given(configurations())
def test_slots_carry_prefix_then_tokens_and_learnable_tokens_in_their_place(config):
    scheduler = PARScheduler(**config)
    n, prefix, num_tokens = config["num_parallel_tokens"], config["prefix_length"], math.prod(config["grid_size"])
    initial = n if config["initial_tokens"] == "sequential" else 0
    order = scheduler.token_order.tolist()
    slots = [-1] * prefix + order[:initial] + [num_tokens + j for j in range(n - 1)] + order[initial:]
    slots = slots[: num_tokens + prefix - 1]
    assert scheduler.slot_tokens.tolist() == slots
    for slot, place in zip(slots, scheduler.places.tolist(), strict=True):
        if 0 <= slot < num_tokens:
            assert slot == sum(
                coordinate * math.prod(config["grid_size"][axis + 1 :]) for axis, coordinate in enumerate(place)
            )
        else:
            assert place == [-1] * len(config["grid_size"])


@settings(max_examples=200, deadline=None)
@given(configurations())
def test_every_target_is_predicted_once_and_only_from_slots_it_may_see(config):
    scheduler = PARScheduler(**config)
    n, prefix, num_tokens = config["num_parallel_tokens"], config["prefix_length"], math.prod(config["grid_size"])
    order = scheduler.token_order.tolist()
    groups, carried = scheduler.groups.tolist(), scheduler.slot_tokens.tolist()
    # steps partition slots and tokens
    assert [slot for slots in scheduler.step_slots for slot in slots] == list(range(len(carried)))
    assert [token for tokens in scheduler.step_tokens for token in tokens] == list(range(num_tokens))
    generated = set()
    for slots, tokens in zip(scheduler.step_slots, scheduler.step_tokens, strict=True):
        for token, slot in zip(tokens, list(slots)[-len(tokens) :], strict=True):
            assert slot == prefix - 1 + token
            seen = {carried[j] for j in range(len(carried)) if groups[j] <= groups[slot]}
            # a slot sees what was generated in earlier steps at most, and never its own target
            assert {s for s in seen if 0 <= s < num_tokens} <= generated
            if config["group_attention"] == "full":
                assert {carried[j] for j in slots} <= seen or slot < prefix
        assert all(groups[j] <= groups[slots.stop - 1] for j in range(slots.stop))
        generated |= {order[token] for token in tokens}
    # groups partition the slots into runs of one slot or of n
    assert groups == sorted(groups)
    sizes = {group: groups.count(group) for group in groups}
    assert set(sizes.values()) <= ({1} if config["group_attention"] == "causal" else {1, n})


@settings(max_examples=100, deadline=None)
@given(configurations())
def test_number_of_steps_follows_the_formula(config):
    scheduler = PARScheduler(**config)
    n, num_tokens = config["num_parallel_tokens"], math.prod(config["grid_size"])
    expected = n + (num_tokens - n) // n if config["initial_tokens"] == "sequential" else num_tokens // n
    assert scheduler.num_inference_steps == len(scheduler.timesteps) == expected
    assert scheduler.timesteps.tolist() == list(range(expected))


@pytest.mark.parametrize(
    ("grid_size", "n", "steps"),
    [
        ((4, 4), 4, 7),
        ((8, 8), 4, 19),
        ((16, 16), 4, 67),
        ((24, 24), 4, 147),
        ((24, 24), 16, 51),
        ((5, 16, 16), 4, 323),
        ((5, 16, 16), 16, 95),
        ((16, 16), 16, 31),
        ((24, 24), 1, 576),
        ((5, 16, 16), 1, 1280),
        ((24, 24), 2, 289),
        ((24, 24), 6, 101),
        ((24, 24), 9, 72),
    ],
)
def test_number_of_steps_of_published_grids(grid_size, n, steps):
    assert PARScheduler(grid_size, num_parallel_tokens=n).num_inference_steps == steps


def test_slot_table_of_the_4x4_example():
    # input, place, slots seen (0 to ...), raster index predicted
    table = [
        ("C", (-1, -1), 0, 0),
        (0, (0, 0), 1, 2),
        (2, (0, 2), 2, 8),
        (8, (2, 0), 3, 10),
        (10, (2, 2), 7, 1),
        ("M1", (-1, -1), 7, 3),
        ("M2", (-1, -1), 7, 9),
        ("M3", (-1, -1), 7, 11),
        (1, (0, 1), 11, 4),
        (3, (0, 3), 11, 6),
        (9, (2, 1), 11, 12),
        (11, (2, 3), 11, 14),
        (4, (1, 0), 15, 5),
        (6, (1, 2), 15, 7),
        (12, (3, 0), 15, 13),
        (14, (3, 2), 15, 15),
    ]
    scheduler = PARScheduler((4, 4), num_parallel_tokens=4)
    assert len(scheduler.slot_tokens) == len(table)
    for slot, (carried, place, last_seen, target) in enumerate(table):
        content = -1 if carried == "C" else 15 + int(carried[1]) if isinstance(carried, str) else carried
        assert scheduler.slot_tokens[slot] == content
        assert tuple(scheduler.places[slot].tolist()) == place
        assert (scheduler.groups <= scheduler.groups[slot]).nonzero().flatten().tolist() == list(range(last_seen + 1))
        assert scheduler.token_order[slot] == target
    assert [list(slots) for slots in scheduler.step_slots] == [
        [0],
        [1],
        [2],
        [3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]


def test_video_order_keeps_frames_outermost_and_has_one_block_of_learnable_tokens():
    scheduler = PARScheduler((2, 4, 4), num_parallel_tokens=4)
    first_frame = PARScheduler((4, 4), num_parallel_tokens=4).token_order
    assert torch.equal(scheduler.token_order, torch.cat([first_frame, 16 + first_frame]))
    assert (scheduler.slot_tokens >= 32).sum() == 3
    assert scheduler.places.shape == (32, 3)
    # corners of the second frame come out as one parallel group
    step = next(i for i, tokens in enumerate(scheduler.step_tokens) if 16 in tokens)
    tokens = scheduler.step_tokens[step]
    assert scheduler.token_order[tokens.start : tokens.stop].tolist() == [16, 18, 24, 26]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 5), st.integers(2, 5))
def test_no_two_tokens_of_a_region_step_are_adjacent(rows, columns, tall, wide):
    scheduler = PARScheduler(
        (rows * tall, columns * wide), num_parallel_tokens=rows * columns, region_grid=(rows, columns)
    )
    for tokens in scheduler.step_tokens:
        places = [divmod(i, columns * wide) for i in scheduler.token_order[tokens.start : tokens.stop].tolist()]
        for i, (y, x) in enumerate(places):
            assert all(max(abs(y - v), abs(x - u)) >= min(tall, wide) >= 2 for v, u in places[i + 1 :])


def test_raster_order_generates_neighbours_together():
    scheduler = PARScheduler((4, 4), num_parallel_tokens=4, order="raster")
    assert scheduler.token_order.tolist() == list(range(16))
    assert [len(tokens) for tokens in scheduler.step_tokens] == [1, 1, 1, 1, 4, 4, 4]


def test_distant_order_one_token_at_a_time():
    scheduler = PARScheduler((4, 4), num_parallel_tokens=1, region_grid=(2, 2))
    assert scheduler.token_order.tolist() == PARScheduler((4, 4)).token_order.tolist()
    assert scheduler.num_inference_steps == 16
    assert scheduler.groups.tolist() == list(range(16))


@pytest.mark.parametrize(
    ("grid_size", "n", "expected"),
    [((24, 24), 4, (2, 2)), ((24, 24), 16, (4, 4)), ((24, 24), 6, (2, 3)), ((24, 24), 2, (1, 2)), ((24, 12), 2, (2, 1)),
     ((12, 24), 2, (1, 2)), ((9, 9), 9, (3, 3)), ((2, 24), 12, (2, 6)), ((3, 5, 10), 2, (1, 2)), ((24, 24), 1, (1, 1))],
)  # fmt: skip
def test_default_region_grid_is_the_most_square_that_divides(grid_size, n, expected):
    assert PARScheduler(grid_size, num_parallel_tokens=n).region_grid == expected


def test_set_timesteps_takes_another_grid_and_keeps_the_config():
    scheduler = PARScheduler((4, 4))
    scheduler.set_timesteps(grid_size=(6, 4))
    assert scheduler.grid_size == (6, 4)
    assert len(scheduler.token_order) == 24
    assert tuple(scheduler.config.grid_size) == (4, 4)
    scheduler.set_timesteps(num_inference_steps=7)
    assert scheduler.grid_size == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid_size": (5, 5)}, r"num_parallel_tokens.*\[1, 5, 25\].*got 4"),
        ({"grid_size": (4, 4), "num_parallel_tokens": 3}, r"num_parallel_tokens.*\[1, 2, 4, 8, 16\].*got 3"),
        (
            {"grid_size": (4, 4), "order": "raster", "num_parallel_tokens": 3},
            r"num_parallel_tokens.*\[1, 2, 4, 8, 16\]",
        ),
        ({"grid_size": (4, 4), "region_grid": (1, 2)}, "region_grid.*1 x 2"),
        ({"grid_size": (6, 8), "region_grid": (4, 1)}, r"region_grid.*\[1, 2, 3, 6\]"),
        ({"grid_size": (4, 4), "region_grid": (2,)}, "region_grid"),
        ({"grid_size": (4, 4), "region_grid": (2, 2), "order": "raster"}, "region_grid.*order"),
        ({"grid_size": (4,)}, "grid_size"),
        ({"grid_size": (1, 2, 3, 4)}, "grid_size"),
        ({"grid_size": (0, 4)}, "grid_size"),
        ({"grid_size": (4.0, 4)}, "grid_size"),
        ({"order": "spiral"}, "order.*'region' or 'raster'.*'spiral'"),
        ({"initial_tokens": "none"}, "initial_tokens"),
        ({"group_attention": "half"}, "group_attention"),
        ({"num_parallel_tokens": 0}, "num_parallel_tokens"),
        ({"num_parallel_tokens": True}, "num_parallel_tokens"),
        ({"prefix_length": 0}, "prefix_length"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_configurations_are_refused_with_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        PARScheduler(**arguments)


def test_other_numbers_of_steps_are_refused():
    scheduler = PARScheduler((4, 4))
    with pytest.raises(ValueError, match="num_inference_steps.*must be 7.*got 50"):
        scheduler.set_timesteps(50)


def test_config_round_trip(tmp_path):
    scheduler = PARScheduler((6, 4), num_parallel_tokens=6, region_grid=(3, 2), guidance_scale=1.35, top_k=7)
    scheduler.save_pretrained(tmp_path)
    loaded = PARScheduler.from_pretrained(tmp_path)
    assert loaded.token_order.tolist() == scheduler.token_order.tolist()
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["guidance_scale"] == 1.35
    changed = PARScheduler.from_config(scheduler.config, num_parallel_tokens=1)
    assert changed.num_inference_steps == 24
    assert changed.config.top_k == 7


def test_teacher_forcing_inputs_are_the_inputs_of_all_steps():
    scheduler = PARScheduler((4, 4), prefix_length=3)
    grid = torch.randint(32, (2, 4, 4))
    whole = scheduler.model_inputs(grid, 32)
    parts = [scheduler.model_inputs(grid, 32, t) for t in scheduler.timesteps]
    assert "input_ids" not in parts[0]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts[1:]], dim=1), whole["input_ids"])
    assert torch.equal(torch.cat([part["position_ids"] for part in parts]), whole["position_ids"])
    assert whole["input_ids"].shape == (2, 15)
    assert (whole["input_ids"] >= 32).sum(1).tolist() == [3, 3]


def test_steps_fill_the_grid_in_the_planned_order():
    scheduler = PARScheduler((4, 4))
    sample = torch.full((2, 4, 4), -1)
    for step, tokens in enumerate(scheduler.step_tokens):
        logits = torch.full((2, len(tokens), 32), -50.0)
        logits[..., step] = 50.0
        sample = scheduler.step(logits, step, sample, temperature=0).prev_sample
    assert sample[0].tolist() == [[0, 4, 1, 4], [5, 6, 5, 6], [2, 4, 3, 4], [5, 6, 5, 6]]


def test_step_leaves_its_input_alone_and_returns_a_tuple_on_request():
    scheduler = PARScheduler((4, 4))
    sample = torch.zeros(2, 4, 4, dtype=torch.long)
    logits = torch.randn(2, 1, 32)
    output = scheduler.step(logits, 0, sample, generator=torch.Generator().manual_seed(0))
    assert isinstance(output, PARSchedulerOutput)
    grid, tokens = scheduler.step(
        logits, torch.tensor(0), sample, generator=torch.Generator().manual_seed(0), return_dict=False
    )
    assert torch.equal(grid, output.prev_sample) and torch.equal(tokens, output.next_tokens)
    assert torch.equal(grid[:, 0, 0], tokens[:, 0])
    assert sample.sum() == 0


def test_list_of_generators_gives_each_image_its_own_stream():
    scheduler = PARScheduler((4, 4))
    logits = torch.randn(3, 4, 32)
    sample = torch.zeros(3, 4, 4, dtype=torch.long)

    def draw(rows, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return scheduler.step(logits[rows], 5, sample[rows], generator=generators).next_tokens

    together = draw([0, 1, 2], [5, 6, 7])
    assert torch.equal(together[1:2], draw([1], [6]))
    assert torch.equal(together.flip(0), draw([2, 1, 0], [7, 6, 5]))
    with pytest.raises(ValueError, match="generator.*3.*got 2"):
        scheduler.step(logits, 5, sample, generator=[torch.Generator(), torch.Generator()])


def test_one_generator_samples_the_batch_in_one_draw():
    scheduler = PARScheduler((4, 4))
    logits = torch.randn(3, 4, 32)
    tokens = scheduler.step(
        logits, 5, torch.zeros(3, 4, 4, dtype=torch.long), generator=torch.Generator().manual_seed(3)
    )
    probs = logits.softmax(-1).flatten(0, 1)
    expected = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(3)).view(3, 4)
    assert torch.equal(tokens.next_tokens, expected)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"temperature": 0}, {3}),
        ({"top_k": 1}, {3}),
        ({"top_k": 2}, {3, 1}),
        ({"top_k": 100}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.9}, {3, 1}),
        ({"top_k": 0, "top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_p": 1e-6}, {3}),
    ],
)
def test_sampling_options_keep_the_tokens_they_should(options, allowed):
    scheduler = PARScheduler((2, 2), num_parallel_tokens=1)
    logits = torch.tensor([0.04, 0.3, 0.06, 0.6]).log().expand(2000, 1, 4)
    sample = torch.zeros(2000, 2, 2, dtype=torch.long)
    tokens = scheduler.step(logits, 0, sample, generator=torch.Generator().manual_seed(0), **options).next_tokens
    assert set(tokens.flatten().tolist()) == allowed


def test_temperature_scales_logits_before_top_p():
    scheduler = PARScheduler((2, 2), num_parallel_tokens=1)
    logits = torch.tensor([0.04, 0.3, 0.06, 0.6]).log().expand(2000, 1, 4)
    sample = torch.zeros(2000, 2, 2, dtype=torch.long)
    cold = scheduler.step(logits, 0, sample, temperature=0.25, top_p=0.9, generator=torch.Generator().manual_seed(0))
    assert set(cold.next_tokens.flatten().tolist()) == {3}


def test_sampled_shares_match_the_probabilities():
    scheduler = PARScheduler((2, 2), num_parallel_tokens=1)
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    sample = torch.zeros(20000, 2, 2, dtype=torch.long)
    tokens = scheduler.step(probs.log().expand(20000, 1, 4), 0, sample, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(tokens.next_tokens.flatten(), minlength=4) / 20000
    assert (shares - probs).abs().max() < 0.015


def test_none_takes_the_configured_sampling_values():
    scheduler = PARScheduler((2, 2), num_parallel_tokens=1, temperature=0.0)
    logits = torch.tensor([0.04, 0.3, 0.06, 0.6]).log().expand(100, 1, 4)
    tokens = scheduler.step(logits, 0, torch.zeros(100, 2, 2, dtype=torch.long)).next_tokens
    assert (tokens == 3).all()


@pytest.mark.parametrize("options", [{"temperature": float("nan")}, {"top_k": 1.5}, {"top_p": -0.1}])
def test_step_refuses_bad_sampling_values(options):
    scheduler = PARScheduler((2, 2), num_parallel_tokens=1)
    with pytest.raises(ValueError, match=next(iter(options))):
        scheduler.step(torch.zeros(1, 1, 4), 0, torch.zeros(1, 2, 2, dtype=torch.long), **options)


def test_step_refuses_logits_of_another_step():
    scheduler = PARScheduler((4, 4))
    with pytest.raises(ValueError, match=r"model_output.*\(1, 4, vocab_size\).*\(1, 1, 8\)"):
        scheduler.step(torch.zeros(1, 1, 8), 5, torch.zeros(1, 4, 4, dtype=torch.long))


def test_guidance_schedules_have_their_published_forms():
    scheduler = PARScheduler((4, 4), num_parallel_tokens=1)  # 16 steps
    assert [scheduler.guidance_at(t, 5.0) for t in (0, 8, 15)] == [5.0] * 3
    assert [scheduler.guidance_at(t, 5.0, "linear") for t in (0, 4, 8, 12)] == [1.0, 2.0, 3.0, 4.0]
    cosine = [scheduler.guidance_at(t, 5.0, "power-cosine", 1.0) for t in (0, 4, 8, 12)]
    assert cosine == pytest.approx([1, 1 + 2 * (1 - 0.5**0.5), 3, 1 + 2 * (1 + 0.5**0.5)])
    late = [scheduler.guidance_at(t, 5.0, "power-cosine", 3.0) for t in range(16)]
    assert late == sorted(late) and late[8] < cosine[2]
    on = [scheduler.guidance_at(t, 5.0, guidance_interval=(3, 6)) > 1 for t in range(16)]
    assert on == [3 <= t < 6 for t in range(16)]
    configured = PARScheduler((4, 4), 1, guidance_schedule="linear", guidance_interval=(4, 16))
    assert [configured.guidance_at(t, 5.0) for t in (0, 4, 8)] == [1.0, 2.0, 3.0]
    assert configured.guidance_at(8, 5.0, "constant") == 5.0
