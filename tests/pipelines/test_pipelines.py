"""What all pipelines share: each test runs with labels and with text, which are the same words, of images, and of clips."""

import numpy as np
import pytest
import torch
import torch._inductor.config
from accelerate import cpu_offload
from diffusers import VQModel
from diffusers.callbacks import PipelineCallback
from sampling_helpers import draw, logits, seeded, tokens

from par_diffusers import PARScheduler


PAIR = ["three", "eight"]


@pytest.fixture(params=["class", "text", "video"])
def build(request, make_pipeline, make_text_pipeline, make_video_pipeline):
    return {"class": make_pipeline, "text": make_text_pipeline, "video": make_video_pipeline}[request.param]


@pytest.fixture
def pipe(build):
    return build()


@pytest.fixture(params=["class", "text"])
def image_pipe(request, make_pipeline, make_text_pipeline):
    return {"class": make_pipeline, "text": make_text_pipeline}[request.param]()


def per_prompt(pipe) -> str:
    return "num_videos_per_prompt" if hasattr(pipe, "vae") else "num_images_per_prompt"


def test_output_types(image_pipe):
    pipe = image_pipe
    images = pipe(PAIR, generator=seeded(0, 1)).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    arrays = pipe(PAIR, generator=seeded(0, 1), output_type="np").images
    assert arrays.shape == (2, 8, 8, 3) and arrays.min() >= 0 and arrays.max() <= 1
    tensors = pipe(PAIR, generator=seeded(0, 1), output_type="pt").images
    assert np.allclose(tensors.permute(0, 2, 3, 1).numpy(), arrays)
    assert np.array_equal(np.asarray(images[0]), (arrays[0] * 255).round().astype("uint8"))
    grid = tokens(pipe, PAIR, generator=seeded(0, 1))
    assert grid.shape == (2, 4, 4) and grid.dtype == torch.long
    decoded = pipe.vqvae.decode(grid, force_not_quantize=True, shape=(2, 4, 4, 4)).sample
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1), tensors)


def test_the_tokenizer_decodes_in_chunks(image_pipe):
    pipe = image_pipe
    sizes = []
    pipe.vqvae.decoder.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    latents = torch.randint(32, (5, 4, 4), generator=torch.Generator().manual_seed(0))
    whole = pipe(["one"] * 5, generator=seeded(*range(5)), output_type="pt").images
    assert sizes == [5]
    chunked = pipe(["one"] * 5, generator=seeded(*range(5)), output_type="pt", decode_chunk_size=2).images
    assert sizes[1:] == [2, 2, 1] and torch.allclose(whole, chunked, atol=1e-5)
    pipe.decode_latents(latents.repeat(60, 1, 1))
    assert sizes[4:] == [256, 44]  # 4096 tokens at a time


def test_return_dict_false_gives_a_tuple_of_the_same(pipe):
    (drawn,) = pipe(PAIR, generator=seeded(0, 1), output_type="pt", return_dict=False)
    output = pipe(PAIR, generator=seeded(0, 1), output_type="pt")
    assert torch.equal(drawn, output.frames if "frames" in output else output.images)


def test_an_image_is_the_same_whatever_the_batch_around_it(pipe):
    alone = tokens(pipe, ["eight"], generator=seeded(5))
    batch = tokens(pipe, ["one", "eight", "three", "eight"], generator=seeded(4, 5, 6, 7))
    assert torch.equal(batch[1:2], alone)
    repeated = tokens(pipe, ["one", "eight"], **{per_prompt(pipe): 2}, generator=seeded(0, 1, 5, 2))
    assert torch.equal(repeated[2:3], alone)
    pixels = draw(pipe, ["one", "eight", "three"], generator=seeded(4, 5, 6))
    assert (pixels[1:2] - draw(pipe, ["eight"], generator=seeded(5))).abs().max() < 1e-4


def test_one_generator_repeats_the_batch(pipe):
    first = tokens(pipe, PAIR, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, tokens(pipe, PAIR, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(first, tokens(pipe, PAIR, generator=torch.Generator().manual_seed(1)))


def test_num_images_per_prompt_repeats_each_label_in_turn(pipe):
    expected = tokens(pipe, ["three", "three", "eight", "eight"], generator=seeded(0, 1, 2, 3))
    assert torch.equal(tokens(pipe, PAIR, **{per_prompt(pipe): 2}, generator=seeded(0, 1, 2, 3)), expected)


@pytest.mark.parametrize("num_parallel_tokens", [1, 2, 4, 16])
def test_greedy_tokens_equal_the_argmax_of_the_full_forward(build, num_parallel_tokens):
    pipe = build(num_parallel_tokens=num_parallel_tokens)
    grid = tokens(pipe, PAIR, temperature=0, guidance_scale=2.0)
    cond, uncond = (logits(pipe, PAIR, grid, is_null) for is_null in (False, True))
    guided = uncond + 2.0 * (cond - uncond)
    assert torch.equal(guided.argmax(-1), pipe.scheduler.order_tokens(grid))


def test_guidance_up_to_one_uses_the_condition_alone(pipe):
    grid = tokens(pipe, PAIR, temperature=0, guidance_scale=1.0)
    assert torch.equal(logits(pipe, PAIR, grid).argmax(-1), pipe.scheduler.order_tokens(grid))
    assert torch.equal(tokens(pipe, PAIR, temperature=0, guidance_scale=0.5), grid)


def test_defaults_come_from_the_scheduler_config(pipe):
    config = pipe.scheduler.config
    pipe.scheduler = PARScheduler.from_config(config, guidance_scale=3.0, temperature=0.7, top_k=5, top_p=0.9)
    explicit = {"guidance_scale": 3.0, "temperature": 0.7, "top_k": 5, "top_p": 0.9}
    default = tokens(pipe, PAIR, generator=seeded(0, 1))
    assert pipe.guidance_scale == 3.0 and pipe.do_classifier_free_guidance
    assert torch.equal(default, tokens(pipe, PAIR, generator=seeded(0, 1), **explicit))
    for name in explicit:
        changed = explicit | {name: {"guidance_scale": 1.0, "temperature": 5.0, "top_k": 1, "top_p": 0.1}[name]}
        assert not torch.equal(default, tokens(pipe, PAIR, generator=seeded(0, 1), **changed))


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_schedule": "linear"},
        {"guidance_schedule": "power-cosine", "guidance_power": 1.5},
        {"guidance_interval": (2, 5)},
        {"guidance_schedule": "linear", "guidance_interval": (0, 6)},
    ],
    ids=str,
)
def test_guidance_follows_its_schedule(options, pipe):
    grid = tokens(pipe, PAIR, temperature=0, guidance_scale=6.0, **options)
    scales = [pipe.scheduler.guidance_at(step, 6.0, **options) for step in range(pipe.num_timesteps)]
    assert len(set(scales)) > 1
    each = torch.tensor([scale for scale, step in zip(scales, pipe.scheduler.step_tokens, strict=True) for _ in step])
    cond, uncond = (logits(pipe, PAIR, grid, is_null) for is_null in (False, True))
    guided = uncond + each[:, None] * (cond - uncond)
    assert torch.equal(guided.argmax(-1), pipe.scheduler.order_tokens(grid))
    # the checkpoint's own
    pipe.scheduler = PARScheduler.from_config(pipe.scheduler.config, **options)
    assert torch.equal(tokens(pipe, PAIR, temperature=0, guidance_scale=6.0), grid)


def test_number_of_steps_is_the_plans(pipe):
    expected, steps = tokens(pipe, ["three"], generator=seeded(0)), pipe.scheduler.num_inference_steps
    assert torch.equal(tokens(pipe, ["three"], generator=seeded(0), num_inference_steps=steps), expected)
    assert pipe.num_timesteps == steps == 4 + (expected.numel() - 4) // 4
    with pytest.raises(ValueError, match=f"num_inference_steps.*must be {steps}.*got 50"):
        pipe(["three"], num_inference_steps=50)


def test_callback_sees_each_step_and_may_replace_the_tokens(pipe):
    seen = []

    def callback(pipeline, step, timestep, kwargs):
        assert set(kwargs) == {"latents"}
        assert pipeline.current_timestep == timestep
        seen.append((step, int(timestep), kwargs["latents"].clone()))
        if step == pipeline.num_timesteps - 1:
            kwargs["latents"] = torch.zeros_like(kwargs["latents"])
        return kwargs

    assert tokens(pipe, ["three"], generator=seeded(0), callback_on_step_end=callback).sum() == 0
    assert [(step, timestep) for step, timestep, _ in seen] == [(i, i) for i in range(pipe.num_timesteps)]
    assert torch.equal(seen[-1][2], tokens(pipe, ["three"], generator=seeded(0)))
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs.*latents.*got.*logits"):
        pipe(["three"], callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["logits"])


def test_callback_classes_name_their_own_tensors(pipe):
    class Zero(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step, timestep, kwargs):
            return {"latents": kwargs["latents"] * 0}

    grid = tokens(
        pipe, ["three"], callback_on_step_end=Zero(cutoff_step_ratio=1.0), callback_on_step_end_tensor_inputs=[]
    )
    assert grid.sum() == 0


def test_guidance_scale_is_read_at_each_step(pipe):
    def raise_scale(pipeline, step, timestep, kwargs):
        pipeline._guidance_scale += 1.0
        return kwargs

    tokens(pipe, ["three"], guidance_scale=2.0, callback_on_step_end=raise_scale)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps

    def stop_guidance(pipeline, step, timestep, kwargs):
        pipeline._guidance_scale = 1.0
        return kwargs

    stopped = tokens(pipe, PAIR, temperature=0, guidance_scale=2.0, callback_on_step_end=stop_guidance)
    cond, uncond = (logits(pipe, PAIR, stopped, is_null) for is_null in (False, True))
    guided = torch.cat([(uncond + 2.0 * (cond - uncond))[:, :1], cond[:, 1:]], dim=1)
    assert torch.equal(guided.argmax(-1), pipe.scheduler.order_tokens(stopped))


def test_interrupt_stops_generating(pipe):
    steps = []

    def callback(pipeline, step, timestep, kwargs):
        steps.append(step)
        pipeline._interrupt = step == 2
        return kwargs

    grid = tokens(pipe, ["three"], temperature=0, callback_on_step_end=callback)
    assert steps == [0, 1, 2]
    finished = tokens(pipe, ["three"], temperature=0)
    assert torch.equal(grid.flatten()[[0, 2, 8]], finished.flatten()[[0, 2, 8]])
    assert grid.flatten()[[1, 3, 10, 15]].sum() == 0


def test_latents_are_the_grid_before_the_first_step(pipe):
    start = torch.full((1, *pipe.scheduler.grid_size), 31)
    first = []

    def callback(pipeline, step, timestep, kwargs):
        first.append(kwargs["latents"].clone())
        return kwargs

    grid = tokens(pipe, ["three"], latents=start, generator=seeded(0), callback_on_step_end=callback)
    assert (first[0].flatten()[1:] == 31).all()
    assert (start == 31).all()
    assert torch.equal(grid, tokens(pipe, ["three"], generator=seeded(0)))


def test_progress_bar_counts_the_steps(pipe, capfd):
    pipe.set_progress_bar_config(disable=False)
    pipe(["three"])
    assert f"{pipe.num_timesteps}/{pipe.num_timesteps}" in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(["three"])
    assert capfd.readouterr().err == ""


def test_dtypes_of_components_may_differ(pipe):
    pipe.transformer.to(torch.bfloat16)
    images = draw(pipe, PAIR, generator=seeded(0, 1))
    assert images.dtype == torch.float32 and images.isfinite().all()
    pipe.to(torch.bfloat16)
    assert draw(pipe, PAIR, generator=seeded(0, 1)).dtype == torch.bfloat16
    assert len(draw(pipe, ["three"], "pil")) == 1


def test_components_are_never_moved_or_changed_by_a_call(pipe):
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe(["three"])
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    assert not pipe.transformer.training


def test_components_rebuild_the_pipeline(pipe):
    options = {name: pipe.config[name] for name in ("id2label",) if name in pipe.config}
    again = type(pipe)(**pipe.components, **options)
    assert torch.equal(tokens(again, ["three"], generator=seeded(0)), tokens(pipe, ["three"], generator=seeded(0)))


def test_vqvae_without_an_own_embedding_width_decodes(image_pipe):
    pipe = image_pipe
    torch.manual_seed(0)
    pipe.vqvae = VQModel(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                         up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=32, lookup_from_codebook=True)  # fmt: skip
    assert pipe.vqvae.config.vq_embed_dim is None
    assert pipe(["three"]).images[0].size == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": seeded(0)}, "generator.*list of 2.*got 1"),
        ({"generator": seeded(0, 1), "num_images_per_prompt": 2}, "generator.*list of 4.*got 2"),
        ({"generator": 0}, "generator.*got 0"),
        ({"generator": [0, 1]}, "generator"),
        ({"generator": [None, None]}, "generator"),
        ({"output_type": "jpeg"}, "output_type.*'pil', 'np', 'pt' or 'latent'.*'jpeg'"),
        ({"output_type": None}, "output_type"),
        ({"top_k": -1}, "top_k.*got -1"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p.*got 1.01"),
        ({"temperature": -0.1}, "temperature.*got -0.1"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"guidance_scale": -1.0}, "guidance_scale.*got -1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule.*'power-cosine', got 'cosine'"),
        ({"guidance_power": 0}, "guidance_power.*above 0, got 0"),
        ({"guidance_interval": (5, 2)}, "guidance_interval.*got .5, 2."),
        ({"guidance_interval": (1, 2, 3)}, "guidance_interval.*two steps"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt.*got 0"),
        ({"num_images_per_prompt": 1.0}, "num_images_per_prompt"),
        ({"decode_chunk_size": 0}, "decode_chunk_size.*got 0"),
        ({"num_inference_steps": 8}, "num_inference_steps.*7"),
        ({"latents": torch.zeros(2, 4, 4)}, "latents.*torch.long.*float32"),
        ({"latents": torch.zeros(1, 4, 4, dtype=torch.long)}, r"latents.*\(2, 4, 4\).*\(1, 4, 4\)"),
        ({"latents": torch.full((2, 4, 4), 32)}, "latents.*0 to 31"),
        ({"latents": [[0]]}, "latents.*list"),
        ({"callback_on_step_end_tensor_inputs": ["probs"]}, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_bad_arguments_are_refused_before_any_compute(image_pipe, arguments, message, monkeypatch):
    pipe = image_pipe

    def computed(*args, **kwargs):
        raise AssertionError("computed before the arguments were checked")

    monkeypatch.setattr(pipe.transformer, "forward", computed)
    with pytest.raises(ValueError, match=message):
        pipe(PAIR, **arguments)


@pytest.mark.parametrize(
    ("name", "exchange", "message"),
    [
        (
            "scheduler",
            {"num_parallel_tokens": 16},
            "num_parallel_tokens.*at most 4.*got 16",
        ),
        ("scheduler", {"grid_size": (2, 4, 4)}, "rope_axes.*must be 3.*got 2"),
        ("scheduler", {"prefix_length": 9}, "prefix_length.*must be . in.*got 9"),
        ("vqvae", {"codes": 64}, "num_vq_embeddings.*must be 32.*got 64"),
    ],
)
def test_components_that_do_not_fit_together_are_refused(image_pipe, make_vqvae, name, exchange, message):
    pipe = image_pipe
    if name == "vqvae":
        pipe.vqvae = make_vqvae(**exchange)
    else:
        pipe.scheduler = PARScheduler.from_config(pipe.scheduler.config, **exchange)
    with pytest.raises(ValueError, match=message):
        pipe(["three"])


def test_offloaded_components_draw_the_same(pipe):
    expected = draw(pipe, PAIR, generator=seeded(0, 1))
    components = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    assert set(pipe.model_cpu_offload_seq.split("->")) == {
        name for name, component in pipe.components.items() if component in components
    }
    for component in components:
        cpu_offload(component, execution_device="cpu", offload_buffers=True)
    assert pipe.transformer.lm_head.weight.device.type == "meta"
    assert torch.equal(draw(pipe, PAIR, generator=seeded(0, 1)), expected)


@pytest.mark.parametrize(
    "how, num_parallel_tokens, graphs", [("in place", 1, 1), ("in place", 4, 2), ("wrapped", 4, 2)]
)
def test_a_compiled_transformer_draws_the_same_with_a_graph_for_each_kind_of_step(
    how, num_parallel_tokens, graphs, build
):
    pipe = build(num_parallel_tokens=num_parallel_tokens)
    labels = [PAIR, ["one", "one"], ["zero", "five"]]
    expected = [tokens(pipe, pair, generator=torch.Generator().manual_seed(7)) for pair in labels]
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if how == "in place":
        pipe.transformer.compile(backend=backend, fullgraph=True)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
    for pair, grid in zip(labels, expected, strict=True):
        assert tokens(pipe, pair, generator=torch.Generator().manual_seed(7)).equal(grid)
    assert len(compiled) == graphs


@pytest.mark.slow
@pytest.mark.parametrize("freezing", [False, True])
def test_the_compiler_draws_the_same_tokens_in_float32(freezing, pipe):
    labels = [PAIR, ["one", "one"], ["zero", "five"]]
    expected = [tokens(pipe, pair, generator=torch.Generator().manual_seed(7)) for pair in labels]
    torch._dynamo.reset()
    pipe.transformer.compile(fullgraph=True)
    with torch._inductor.config.patch(freezing=freezing):
        found = [tokens(pipe, pair, generator=torch.Generator().manual_seed(7)) for pair in labels]
    assert all(map(torch.equal, found, expected))


def test_other_sizes_have_their_own_plan(image_pipe):
    pipe = image_pipe
    seen = []

    def record(pipe, step, timestep, tensors):
        seen.append(pipe.scheduler.places[pipe.scheduler.step_slots[step]].max(0).values.tolist())
        return {}

    assert pipe(["three"], height=16, width=24).images[0].size == (24, 16)
    grid = tokens(pipe, PAIR, height=16, width=24, temperature=0, guidance_scale=2.0, callback_on_step_end=record)
    assert grid.shape == (2, 8, 12) and pipe.num_timesteps == len(seen) == 4 + (96 - 4) // 4
    assert seen[-1] == PARScheduler((8, 12)).places[-4:].max(0).values.tolist() == [7, 10]
    cond, uncond = (logits(pipe, PAIR, grid, is_null) for is_null in (False, True))
    assert torch.equal((uncond + 2.0 * (cond - uncond)).argmax(-1), PARScheduler((8, 12)).order_tokens(grid))
    assert tokens(pipe, PAIR, height=16).shape == (2, 8, 4)
    assert tokens(pipe, PAIR).shape == (2, 4, 4)  # without sizes, the checkpoint's


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"height": 7}, "height.*multiple of 2.*got 7"),
        ({"width": 0}, "width.*multiple of 2.*got 0"),
        ({"width": 8.0}, "width.*got 8.0"),
        ({"height": 6, "width": 6}, "num_parallel_tokens.*3x3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, message, image_pipe):
    with pytest.raises(ValueError, match=message):
        image_pipe(PAIR, **sizes)
