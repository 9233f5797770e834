import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, DynamicCache, StaticCache, TorchAoConfig

from par_diffusers import PARConfig, PARForConditionalGeneration, PARModel, PARScheduler
from par_diffusers.sampling.loading import int8_weights


PLANS = {
    "4 parallel tokens": {},
    "raster, one token": {"num_parallel_tokens": 1},
    "distant, one token": {"num_parallel_tokens": 1, "region_grid": (2, 2)},
    "2 parallel tokens": {"num_parallel_tokens": 2},
    "6 of 6x4": {"grid_size": (6, 4), "num_parallel_tokens": 6},
    "9 of 6x6": {"grid_size": (6, 6), "num_parallel_tokens": 9},
    "16 of 8x8": {"grid_size": (8, 8), "num_parallel_tokens": 16},
    "raster multi": {"order": "raster"},
    "parallel initial tokens": {"initial_tokens": "parallel"},
    "causal groups": {"group_attention": "causal"},
    "video": {"grid_size": (3, 4, 4)},
    "one group": {"grid_size": (2, 2)},
}


def build(plan, make_model, **overrides):
    scheduler = PARScheduler(**{"grid_size": (4, 4), "num_parallel_tokens": 4} | PLANS[plan])
    model = make_model(
        num_learnable_tokens=scheduler.num_learnable_tokens, rope_axes=len(scheduler.grid_size), **overrides
    )
    grid = torch.randint(32, (2, *scheduler.grid_size), generator=torch.Generator().manual_seed(1))
    return scheduler, model, grid


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(plan, make_model):
    scheduler, model, grid = build(plan, make_model)
    labels = torch.tensor([3, 8])
    full = model(class_labels=labels, **scheduler.model_inputs(grid, 32)).logits
    cache, parts = DynamicCache(config=model.config), []
    for i, tokens in enumerate(scheduler.step_tokens):
        parts.append(
            model(
                class_labels=labels if i == 0 else None,
                past_key_values=cache,
                logits_to_keep=len(tokens),
                **scheduler.model_inputs(grid, 32, i),
            ).logits
        )
    assert (torch.cat(parts, dim=1) - full).abs().max() < 1e-4


@torch.no_grad()
def test_static_cache_decodes_the_same(make_model):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    labels = torch.tensor([3, 8])
    full = model(class_labels=labels, **scheduler.model_inputs(grid, 32)).logits
    cache, parts = StaticCache(config=model.config, max_cache_len=len(scheduler.slot_tokens)), []
    for i in range(scheduler.num_inference_steps):
        inputs = scheduler.model_inputs(grid, 32, i)
        parts.append(model(class_labels=labels if i == 0 else None, past_key_values=cache, **inputs).logits)
    assert (torch.cat(parts, dim=1) - full).abs().max() < 1e-4


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_a_token_changes_the_logits_that_see_it_and_no_others(plan, make_model):
    scheduler, model, grid = build(plan, make_model)
    labels = torch.tensor([3, 8])
    before = model(class_labels=labels, **scheduler.model_inputs(grid, 32)).logits
    groups = scheduler.groups
    for slot in (scheduler.slot_tokens >= 0).nonzero().flatten().tolist():
        token = scheduler.slot_tokens[slot]
        if token >= len(scheduler.token_order):
            continue  # a learnable token
        changed = grid.clone()
        changed.flatten(1)[:, token] = (changed.flatten(1)[:, token] + 7) % 32
        after = model(class_labels=labels, **scheduler.model_inputs(changed, 32)).logits
        difference = (after - before).abs().amax((0, 2))
        sees = groups >= groups[slot]
        assert (difference[sees] > 1e-6).all()
        assert (difference[~sees] == 0).all()


@torch.no_grad()
def test_tokens_of_the_last_step_are_never_read(make_model):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    before = model(class_labels=torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)).logits
    last = scheduler.step_tokens[-1]
    grid.flatten(1)[:, scheduler.token_order[last.start : last.stop]] = 0
    after = model(class_labels=torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("plan", ["4 parallel tokens", "causal groups", "video"])
@torch.no_grad()
def test_attention_implementations_agree(plan, implementation, make_model):
    # flex attention on a CPU wants head widths that are powers of two
    scheduler, model, grid = build(plan, make_model, hidden_size=64)
    inputs = {"class_labels": torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)}
    expected = model(**inputs).logits
    model.set_attn_implementation(implementation)
    assert (model(**inputs).logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_a_batch_shares_one_mask(make_model):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    shapes = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: shapes.append(kwargs["attention_mask"].shape), with_kwargs=True
    )
    model(class_labels=torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32))
    hook.remove()
    slots = len(scheduler.slot_tokens)
    assert shapes == [(1, 1, slots, slots)]


@torch.no_grad()
def test_groups_equal_the_published_mask(make_model):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    slots = len(scheduler.slot_tokens)
    mask = torch.ones(slots, slots).tril().bool()
    for start in range(4, slots, 4):
        mask[start : start + 4, : start + 4] = True
    inputs = {"class_labels": torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)}
    expected = model(**inputs).logits
    del inputs["block_sequence_ids"]
    given = model(**inputs, attention_mask=mask.expand(2, 1, slots, slots)).logits
    assert (given - expected).abs().max() < 1e-5


@torch.no_grad()
def test_masked_slots_are_not_seen(make_model):
    scheduler = PARScheduler((4, 4), prefix_length=5)
    model = make_model(condition="caption", caption_channels=6, caption_length=5)
    grid = torch.randint(32, (2, 4, 4))
    features = torch.randn(2, 5, 6)
    mask = torch.ones(2, len(scheduler.slot_tokens), dtype=torch.long)
    mask[0, :3] = 0
    inputs = {"attention_mask": mask, "logits_to_keep": 16, **scheduler.model_inputs(grid, 32)}
    before = model(encoder_hidden_states=features, **inputs).logits
    features[:, :3] += 1
    after = model(encoder_hidden_states=features, **inputs).logits
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3


@torch.no_grad()
def test_caption_prefix_decodes_like_the_full_forward(make_model):
    scheduler = PARScheduler((4, 4), prefix_length=5, initial_tokens="parallel")
    model = make_model(condition="caption", caption_channels=6, caption_length=5)
    grid, features = torch.randint(32, (2, 4, 4)), torch.randn(2, 5, 6)
    full = model(encoder_hidden_states=features, logits_to_keep=16, **scheduler.model_inputs(grid, 32)).logits
    cache, parts = DynamicCache(config=model.config), []
    for i, tokens in enumerate(scheduler.step_tokens):
        inputs = scheduler.model_inputs(grid, 32, i) | {"encoder_hidden_states": features if i == 0 else None}
        parts.append(model(past_key_values=cache, logits_to_keep=len(tokens), **inputs).logits)
    assert (torch.cat(parts, dim=1) - full).abs().max() < 1e-4


def slow_rotation(position, head_dim, axes, theta):
    """Complex rotations of the channel pairs of a head at one place, from the definition."""
    pairs = head_dim // 2
    later = pairs // axes
    rotation = []
    for axis, count in enumerate([pairs - later * (axes - 1)] + [later] * (axes - 1)):
        rotation += [position[axis] / theta ** (pair / count) for pair in range(count)]
    return torch.polar(torch.ones(pairs), torch.tensor(rotation))


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("unplaced", ["zero", "identity"])
def test_rotary_embedding_rotates_pairs_by_their_place(axes, unplaced, make_model):
    from par_diffusers.models.modeling_par import rotate

    model = make_model(rope_axes=axes, rope_unplaced=unplaced, hidden_size=80)
    places = torch.tensor([[-1] * axes, [0] * axes, [3, 5, 2][:axes], [11, 0, 7][:axes]])
    cos, sin = model.model.rotary_emb(places)
    states = torch.randn(1, 1, 4, 20)
    rotated = rotate(states, cos, sin)
    assert torch.equal(rotated[0, 0, 0], torch.zeros(20) if unplaced == "zero" else states[0, 0, 0])
    for slot in range(1, 4):
        pairs = torch.view_as_complex(states[0, 0, slot].view(-1, 2))
        expected = torch.view_as_real(pairs * slow_rotation(places[slot].tolist(), 20, axes, 10000.0)).flatten()
        assert (rotated[0, 0, slot] - expected).abs().max() < 1e-5


def test_unplaced_slots_attend_uniformly_under_zero_rotation(make_model):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    model.set_attn_implementation("eager")
    output = model(class_labels=torch.tensor([3, 8]), output_attentions=True, **scheduler.model_inputs(grid, 32))
    assert len(output.attentions) == 3
    for weights in output.attentions:
        assert (weights[:, :, 5, :8] - 1 / 8).abs().max() < 1e-6  # M1 sees slots 0 to 7
    assert len(model(class_labels=torch.tensor([3, 8]), output_hidden_states=True, **scheduler.model_inputs(grid, 32)).hidden_states) == 4  # fmt: skip


def test_positions_may_differ_within_a_batch(make_model):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    inputs = {"class_labels": torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)}
    expected = model(**inputs).logits
    batched = inputs["position_ids"].repeat(2, 1, 1)
    assert torch.equal(model(**inputs | {"position_ids": batched}).logits, expected)
    batched[1, 1:] += 2
    shifted = model(**inputs | {"position_ids": batched}).logits
    assert torch.equal(shifted[0], expected[0])
    assert not torch.equal(shifted[1], expected[1])


def test_loss_is_the_mean_cross_entropy_of_all_targets(make_model):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    targets = scheduler.order_tokens(grid)
    output = model(class_labels=torch.tensor([3, 8]), labels=targets, **scheduler.model_inputs(grid, 32))
    logits = model(class_labels=torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)).logits
    expected = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert (output.loss - expected).abs() < 1e-6
    assert torch.equal(output.logits, logits)


def test_logits_to_keep_keeps_the_last_slots(make_model):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    inputs = {"class_labels": torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)}
    assert (model(**inputs, logits_to_keep=4).logits - model(**inputs).logits[:, -4:]).abs().max() < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(make_model):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    inputs = {"class_labels": torch.tensor([3, 8]), "labels": scheduler.order_tokens(grid), "use_cache": False}
    model.train()

    def gradients():
        model.zero_grad()
        model(**inputs, **scheduler.model_inputs(grid, 32)).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_dropouts_act_in_training_only(make_model):
    scheduler, model, grid = build(
        "4 parallel tokens", make_model, token_dropout=0.3, residual_dropout=0.3, attention_dropout=0.3
    )
    inputs = {"class_labels": torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)}
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_condition_dropout_replaces_whole_conditions_by_the_null_class(make_model):
    embedding = make_model(condition_dropout=0.25).model.embed_condition
    labels = torch.full((4000,), 3)
    assert torch.equal(embedding(labels), embedding.embedding(labels).unsqueeze(1))
    embedding.train()
    torch.manual_seed(0)
    drawn = embedding(labels).squeeze(1)
    is_null = (drawn == embedding.embedding.weight[10]).all(1)
    assert ((drawn == embedding.embedding.weight[3]).all(1) | is_null).all()
    assert 0.22 < is_null.float().mean() < 0.28


def test_new_weights_start_as_published():
    torch.manual_seed(0)
    model = PARForConditionalGeneration(
        PARConfig(vocab_size=500, num_classes=100, num_learnable_tokens=15, hidden_size=128, intermediate_size=256,
                  num_hidden_layers=2, num_attention_heads=4)
    )  # fmt: skip
    assert model.lm_head.weight.abs().max() == 0
    for name in ("embed_tokens", "embed_condition.embedding", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        weight = model.model.get_submodule(name).weight
        assert abs(weight.std().item() - 0.02) < 0.001
        assert abs(weight.mean().item()) < 0.001
    assert (model.model.norm.weight == 1).all()


@pytest.mark.parametrize(
    ("sizes", "millions"),
    [((24, 1024, 2816, 16), 342.9), ((36, 1280, 3584, 20), 774.7), ((48, 1536, 4096, 24), 1411.0), ((24, 3200, 8704, 32), 3096.7)],
)  # fmt: skip
def test_parameter_counts_of_the_published_sizes(sizes, millions):
    layers, width, intermediate, heads = sizes
    config = PARConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=intermediate, num_attention_heads=heads
    )
    with torch.device("meta"):
        model = PARForConditionalGeneration(config)
    assert round(model.num_parameters() / 1e6, 1) == millions


def test_parameter_count_of_the_video_model():
    config = PARConfig(
        vocab_size=64000, num_classes=101, hidden_size=1200, intermediate_size=3328, num_hidden_layers=36,
        num_attention_heads=20, rope_axes=3,
    )  # fmt: skip
    with torch.device("meta"):
        model = PARForConditionalGeneration(config)
    assert round(model.num_parameters() / 1e6, 1) == 792.5


def test_save_and_load_keep_logits_in_every_dtype(make_model, tmp_path):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    inputs = {"class_labels": torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)}
    model.save_pretrained(tmp_path)
    expected = model(**inputs).logits
    loaded = PARForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)
    for dtype in (torch.bfloat16, torch.float16):
        half = PARForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        assert half.dtype == dtype
        # rounding the weights, not losing the rotation or the mask
        assert (half(**inputs).logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    mapped = PARForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(mapped(**inputs).logits, expected)


def test_auto_classes_load_the_registered_model(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is PARConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is PARForConditionalGeneration
    assert type(AutoModel.from_config(config)) is PARForConditionalGeneration


def test_base_model_loads_from_the_full_checkpoint(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    base = PARModel.from_pretrained(tmp_path)
    assert torch.equal(base.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_grouped_query_attention_equals_repeated_heads(make_model):
    scheduler, grouped, grid = build("4 parallel tokens", make_model, num_key_value_heads=2)
    full = make_model(num_key_value_heads=4)
    state = grouped.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].view(2, 12, 48).repeat_interleave(2, 0).reshape(48, 48)
    full.load_state_dict(state)
    inputs = {"class_labels": torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)}
    assert (grouped(**inputs).logits - full(**inputs).logits).abs().max() < 1e-4


def test_tensor_parallel_plan_names_existing_layers(make_model):
    model = make_model()
    for pattern in model.config.base_model_tp_plan:
        model.model.get_submodule(pattern.replace("*", "0"))
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    model.get_submodule("lm_head")


def test_eight_sizes_alone_make_a_valid_config():
    config = PARConfig(
        vocab_size=32, num_classes=10, num_learnable_tokens=3, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    assert (config.rms_norm_eps, config.rope_theta, config.rope_axes, config.condition) == (1e-5, 10000, 2, "class")
    assert config.head_dim == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads.*hidden_size.*48.*got 5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads.*num_attention_heads.*got 3"),
        ({"hidden_size": 12}, "even"),
        ({"rope_unplaced": "none"}, "rope_unplaced.*'zero' or 'identity'.*'none'"),
        ({"condition": "depth"}, "condition.*'class' or 'caption'.*'depth'"),
        ({"rope_axes": 4}, "rope_axes.*2 or 3"),
    ],
)
def test_bad_configs_are_refused(overrides, message, make_model):
    with pytest.raises(ValueError, match=message):
        make_model(**overrides)


def test_forward_refuses_missing_slots_and_positions(make_model):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    inputs = scheduler.model_inputs(grid, 32)
    with pytest.raises(ValueError, match="input_ids.*class_labels"):
        model(position_ids=inputs["position_ids"])
    with pytest.raises(ValueError, match="position_ids.*16 slots"):
        model(class_labels=torch.tensor([3, 8]), input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=r"position_ids.*\(4, 2\)"):
        model(
            class_labels=torch.tensor([3, 8]), input_ids=inputs["input_ids"], position_ids=inputs["position_ids"][:4]
        )


def test_compiled_decoding_uses_two_graphs(make_model):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    labels = torch.tensor([3, 8])
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model.model, fullgraph=True, backend=count, dynamic=False)
    with torch.no_grad():
        for _ in range(2):
            cache = StaticCache(config=model.config, max_cache_len=len(scheduler.slot_tokens))
            model.model(class_labels=labels, past_key_values=cache, **scheduler.model_inputs(grid, 32, 0))
            for i in range(1, scheduler.num_inference_steps):
                step(past_key_values=cache, **scheduler.model_inputs(grid, 32, i))
    assert len(graphs) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_multiply_as_before_and_save_as_before(dtype, make_model, tmp_path):
    scheduler, model, grid = build("4 parallel tokens", make_model)
    model.to(dtype)
    inputs = {"class_labels": torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)}
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**inputs).logits
        packed = model.pack_linear_weights(rows=8)
        assert packed is model and not any(isinstance(module, torch.nn.Linear) for module in model.modules())
        error = (model(**inputs).logits - expected).abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 0.05) * expected.abs().max()
    model.save_pretrained(tmp_path)
    loaded = PARForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert loaded.keys() == state.keys() and all(loaded[name].equal(state[name]) for name in state)
    model.to("cpu")
    with pytest.raises(ValueError, match="move or cast the model before packing"):
        model.to(torch.float64)


def test_only_what_can_be_packed_is(make_model):
    with pytest.raises(ValueError, match="float32 or bfloat16 on the CPU, the model is torch.float64"):
        make_model().double().pack_linear_weights()


@pytest.mark.parametrize("heads, widths", [(4, {16}), (6, {8}), (2, {24}), (3, {16})])
def test_attention_runs_on_heads_of_whole_multiples_of_eight(heads, widths, make_model):
    scheduler, model, grid = build(
        "4 parallel tokens", make_model, num_attention_heads=heads, num_key_value_heads=heads
    )
    inputs = {"class_labels": torch.tensor([3, 8]), **scheduler.model_inputs(grid, 32)}
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        assert {layer.keys.shape[-1] for layer in output.past_key_values.layers} == widths
        for layer in model.model.layers:
            layer.self_attn.padding = 0
        assert torch.allclose(model(**inputs).logits, output.logits, atol=1e-5)


def test_quantized_weights_are_not_packed(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    quantization = TorchAoConfig(int8_weights())
    model = PARForConditionalGeneration.from_pretrained(tmp_path, quantization_config=quantization)
    with pytest.raises(ValueError, match="those of the model are quantized"):
        model.pack_linear_weights()


def test_rotary_sections_share_a_heads_channels(make_model):
    """12 channels a head: 6 pairs, for three axes."""
    assert make_model(rope_axes=3).model.rotary_emb.sections == [2, 2, 2]
    assert make_model(hidden_size=40, rope_axes=3).model.rotary_emb.sections == [3, 1, 1]  # 5 pairs
    split = make_model(rope_axes=3, rope_sections=(2, 4, 0))
    again = type(split)(PARConfig.from_dict(json.loads(split.config.to_json_string())))
    places = torch.tensor([[3, 1, 2], [3, 1, 7], [3, 6, 2], [8, 1, 2]])
    for model in (split, again):
        cos, sin = model.model.rotary_emb(places)
        assert (
            cos.shape == (4, 6) and torch.equal(cos[0], cos[1]) and torch.equal(sin[0], sin[1])
        )  # no pair for columns
        assert torch.equal(cos[0, :2], cos[2, :2]) and not torch.isclose(cos[0, 2:], cos[2, 2:]).all()
        assert torch.equal(cos[0, 2:], cos[3, 2:]) and not torch.isclose(cos[0, :2], cos[3, :2]).all()
    for sections in ((2, 2), (2, 2, 1), (7, -1, 0), (2.0, 2, 2)):
        with pytest.raises(ValueError, match="`rope_sections` must be 3 whole numbers with the sum 6"):
            make_model(rope_axes=3, rope_sections=sections)
