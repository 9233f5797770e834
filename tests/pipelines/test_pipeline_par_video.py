"""What is particular to clips; the rest is in test_pipelines.py."""

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderVidTok
from diffusers.utils import export_to_gif
from PIL import Image
from sampling_helpers import draw, logits, seeded, tokens

from par_diffusers import PARPipeline, PARScheduler, PARVideoPipeline


PAIR = ["three", "eight"]


@pytest.fixture
def pipe(make_video_pipeline):
    return make_video_pipeline()


def test_call_signature_is_the_documented_one():
    parameters = inspect.signature(PARVideoPipeline.__call__).parameters
    assert list(parameters)[1:] == [
        "class_labels", "num_frames", "height", "width", "num_inference_steps", "guidance_scale",
        "num_videos_per_prompt", "temperature", "top_k", "top_p", "generator", "latents", "output_type", "return_dict",
        "callback_on_step_end", "callback_on_step_end_tensor_inputs", "guidance_schedule", "guidance_power",
        "guidance_interval", "decode_chunk_size",
    ]  # fmt: skip


def test_output_types(pipe, tmp_path):
    clips = pipe(PAIR, generator=seeded(0, 1)).frames
    assert [len(clip) for clip in clips] == [9, 9] and clips[0][0].size == (16, 16)
    arrays = pipe(PAIR, generator=seeded(0, 1), output_type="np").frames
    assert arrays.shape == (2, 9, 16, 16, 3) and arrays.min() >= 0 and arrays.max() <= 1
    tensors = pipe(PAIR, generator=seeded(0, 1), output_type="pt").frames
    assert tensors.shape == (2, 9, 3, 16, 16) and np.allclose(tensors.movedim(2, -1).numpy(), arrays)
    assert np.array_equal(np.asarray(clips[1][4]), (arrays[1, 4] * 255).round().astype("uint8"))
    grid = tokens(pipe, PAIR, generator=seeded(0, 1))
    assert grid.shape == (2, 3, 4, 4) and grid.dtype == torch.long
    with torch.no_grad():
        decoded = pipe.vae.decode(grid, decode_from_indices=True).movedim(1, 2)
    assert torch.allclose((decoded / 2 + 0.5).clamp(0, 1), tensors)
    export_to_gif(clips[0], str(tmp_path / "clip.gif"), fps=pipe.config.frame_rate)
    assert Image.open(tmp_path / "clip.gif").n_frames > 1


def test_the_tokenizer_decodes_in_chunks(pipe, monkeypatch):
    sizes = []
    pipe.vae.decoder.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    whole = draw(pipe, ["one"] * 3, generator=seeded(0, 1, 2))
    chunked = draw(pipe, ["one"] * 3, generator=seeded(0, 1, 2), decode_chunk_size=2)
    assert sizes == [3, 2, 1] and torch.allclose(whole, chunked, atol=1e-5)
    monkeypatch.setattr(pipe.vae, "decode", lambda chunk, **kwargs: sizes.append(len(chunk)) or chunk)
    pipe.decode_latents(torch.zeros(90, 3, 4, 4, dtype=torch.long))
    assert sizes[3:] == [85, 5]  # 4096 tokens at a time


@torch.no_grad()
def test_a_token_changes_nothing_before_it(pipe):
    """Neither logits of earlier groups, and so of earlier frames, nor pixels further back than the tokenizer looks."""
    scheduler, grid = pipe.scheduler, torch.randint(64, (1, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    before, pixels = logits(pipe, ["three"], grid), pipe.decode_latents(grid)
    slots = scheduler.slot_tokens.tolist()
    for raster in (0, 5, 10, 15, 16, 21, 31, 32, 43, 47):
        changed = grid.clone()
        changed.view(-1)[raster] = (changed.view(-1)[raster] + 1) % 64
        different = (logits(pipe, ["three"], changed) != before).any(-1)[0]
        if raster in slots:  # the last tokens of the order are read by no slot
            group = scheduler.groups[slots.index(raster)]
            assert torch.equal(different, scheduler.groups >= group)
            frames = scheduler.token_order[different] // 16
            assert frames.min() >= raster // 16
        else:
            assert not different.any()
        # VidTok's decoder looks three frames ahead, between which it interpolates
        first = max(4 * (raster // 16) - 6, 0)
        moved = (pipe.decode_latents(changed) != pixels).any(1).flatten(2).any(-1)[0]
        assert not moved[:first].any() and moved[first:].any()


def test_no_step_spans_two_frames_and_the_clip_has_one_start(pipe):
    for n, steps in ((1, 1280), (4, 323), (16, 95)):
        scheduler = PARScheduler((5, 16, 16), num_parallel_tokens=n)
        assert scheduler.num_inference_steps == steps
        frames = [set((scheduler.token_order[list(tokens)] // 256).tolist()) for tokens in scheduler.step_tokens]
        assert all(len(each) == 1 for each in frames) and frames == sorted(frames, key=min)
        assert sum(len(tokens) == 1 for tokens in scheduler.step_tokens) == (n if n > 1 else 1280)


def test_other_sizes_have_their_own_plan(pipe):
    grid = tokens(pipe, PAIR, num_frames=5, height=32, width=24, temperature=0, guidance_scale=2.0)
    assert grid.shape == (2, 2, 8, 6) and pipe.num_timesteps == 4 + 92 // 4
    cond, uncond = (logits(pipe, PAIR, grid, is_null) for is_null in (False, True))
    expected = PARScheduler((2, 8, 6)).order_tokens(grid)
    assert torch.equal((uncond + 2.0 * (cond - uncond)).argmax(-1), expected)
    assert len(pipe("three", num_frames=1).frames[0]) == 1
    assert tokens(pipe, PAIR).shape == (2, 3, 4, 4)  # without sizes, the checkpoint's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 8}, r"num_frames.*1 more than a multiple of 4 \(1, 5, 9, ...\).*got 8"),
        ({"num_frames": 0}, "num_frames.*got 0"),
        ({"num_frames": 9.0}, "num_frames.*got 9.0"),
        ({"height": 10}, "height.*multiple of 4.*got 10"),
        ({"width": 12, "height": 12}, "num_parallel_tokens.*3x3x3"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt.*got 0"),
        ({"generator": seeded(0)}, "list of 2, one for each video, got 1"),
        ({"latents": torch.zeros(2, 4, 4, dtype=torch.long)}, r"latents.*\(2, 3, 4, 4\).*\(2, 4, 4\)"),
        ({"latents": torch.full((2, 3, 4, 4), 64)}, "latents.*0 to 63"),
        ({"output_type": "gif"}, "output_type.*'pil', 'np', 'pt' or 'latent'.*'gif'"),
    ],
)
def test_bad_arguments_are_refused_before_any_compute(pipe, arguments, message, monkeypatch):
    def computed(*args, **kwargs):
        raise AssertionError("computed before the arguments were checked")

    monkeypatch.setattr(pipe.transformer, "forward", computed)
    with pytest.raises(ValueError, match=message):
        pipe(PAIR, **arguments)
    with pytest.raises(ValueError, match="'eleven' is not a label.*zero"):
        pipe("eleven")


def test_tokenizers_that_do_not_fit_are_refused(pipe, make_vidtok, make_vqvae, make_pipeline):
    fitting = pipe.vae
    for vae, message in (
        (make_vqvae(), "`vae` must be of the class AutoencoderVidTok in this pipeline, got VQModel"),
        (make_vidtok(width=3), "vae.config.codebook_size.*must be 64.*got 512"),
        (make_vidtok(is_causal=False), "vae.config.is_causal.*must be True"),
        (AutoencoderVidTok(ch=8, ch_mult=[1, 1, 1], codebook_size=64), "vae.config.regularizer.*'fsq'.*'kl'"),
    ):
        pipe.vae = vae
        with pytest.raises(ValueError, match=message):
            pipe("three")
    images = make_pipeline()
    images.vqvae = fitting
    with pytest.raises(
        ValueError, match="`vqvae` must be of the class VQModel in this pipeline, got AutoencoderVidTok"
    ):
        images("three")
    # an image tokenizer is named by the call even where the pipeline was built with it
    with pytest.raises(ValueError, match="`vae` must be of the class AutoencoderVidTok"):
        PARVideoPipeline(pipe.transformer, make_vqvae(), pipe.scheduler)(3)
    with pytest.raises(ValueError, match="rope_axes.*must be 2.*got 3"):
        PARPipeline(pipe.transformer, make_vqvae(), PARScheduler((4, 4)))(3)


def test_the_card_tells_of_clips(pipe, tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    pipe.save_pretrained(tmp_path, samples=frames)
    card = (tmp_path / "README.md").read_text()
    assert "| clip | 9 frames of 16 x 16 pixels, 8 a second |" in card and "(samples.gif)" in card
    assert (
        "Class-conditional videos by **PAR**" in card and ".frames" in card and "| grid | 3 x 4 x 4 tokens |" in card
    )
    assert Image.open(tmp_path / "samples.gif").n_frames == 2
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_par_video", "PARVideoPipeline"]
    assert index["vae"] == ["diffusers", "AutoencoderVidTok"] and index["frame_rate"] == 8.0


@pytest.mark.parametrize("width", [4, 5, 6])
def test_vidtoks_vocabularies_are_sampled_and_decoded(width, make_vidtok, make_model):
    pipe = PARVideoPipeline(
        make_model(vocab_size=8**width, hidden_size=24, num_hidden_layers=1, rope_axes=3),
        make_vidtok(width=width),
        PARScheduler((2, 2, 2), num_parallel_tokens=4),
    )
    pipe.set_progress_bar_config(disable=True)
    grid = tokens(pipe, [1], generator=seeded(0))
    assert grid.max() >= 8 ** (width - 1)
    with torch.no_grad():
        pixels = pipe.decode_latents(grid)
    assert pixels.shape == (1, 3, 5, 8, 8) and pixels.isfinite().all()
