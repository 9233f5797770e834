"""What is particular to prompts; the rest is in test_pipelines.py."""

import inspect

import pytest
import torch
from sampling_helpers import logits, seeded, tokens

from par_diffusers import PARTextToImagePipeline
from par_diffusers.pipelines.pipeline_par_text_to_image import left_pad


LONG = "nine eight seven six five four three two one zero"


@pytest.fixture
def pipe(make_text_pipeline):
    return make_text_pipeline()


def test_call_signature_is_the_documented_one():
    parameters = inspect.signature(PARTextToImagePipeline.__call__).parameters
    assert list(parameters)[1:] == [
        "prompt", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt", "num_images_per_prompt",
        "temperature", "top_k", "top_p", "generator", "latents", "prompt_embeds", "prompt_attention_mask",
        "negative_prompt_embeds", "negative_prompt_attention_mask", "output_type", "return_dict", "callback_on_step_end",
        "callback_on_step_end_tensor_inputs", "clean_caption", "guidance_schedule", "guidance_power", "guidance_interval",
        "decode_chunk_size",
    ]  # fmt: skip


def test_padding_moves_to_the_left_and_is_zeroed():
    features = torch.arange(1.0, 25).view(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    padded, left = left_pad(features, mask)
    assert left.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert padded[0, :2].eq(0).all() and padded[0, 2:].equal(features[0, :2])
    assert padded[1].equal(features[1]) and padded[2].eq(0).all()


def test_encode_prompt_gives_what_the_text_encoder_gives(pipe):
    embeds, mask, negative, negative_mask = pipe.encode_prompt(["Three ", "eight nine"], num_images_per_prompt=2)
    assert embeds.shape == (4, 6, 16) and negative is None and negative_mask is None
    assert mask.sum(1).tolist() == [2, 2, 3, 3]
    ids = torch.tensor([pipe.tokenizer("eight nine").input_ids])
    with torch.no_grad():
        expected = pipe.text_encoder(ids).last_hidden_state
    assert torch.allclose(embeds[2, :3], expected[0], atol=1e-5) and torch.equal(embeds[2], embeds[3])
    _, _, negative, negative_mask = pipe.encode_prompt(["three", "eight nine"], "one", 2)
    assert negative.shape == (4, 6, 16) and negative_mask.sum(1).tolist() == [2] * 4
    again = pipe.encode_prompt(prompt_embeds=embeds[::2], prompt_attention_mask=mask[::2], num_images_per_prompt=2)
    assert torch.equal(again[0], embeds) and torch.equal(again[1], mask)


def test_embeddings_draw_what_their_prompts_draw(pipe):
    embeds, mask, _, _ = pipe.encode_prompt(["three", "eight nine"])
    expected = tokens(pipe, ["three", "eight nine"], generator=seeded(0, 1))
    found = tokens(pipe, None, prompt_embeds=embeds, prompt_attention_mask=mask, generator=seeded(0, 1))
    assert torch.equal(found, expected)
    pipe.text_encoder = pipe.tokenizer = None
    assert torch.equal(
        tokens(pipe, None, prompt_embeds=embeds, prompt_attention_mask=mask, generator=seeded(0, 1)), expected
    )
    with pytest.raises(ValueError, match="`prompt` needs a text encoder.*prompt_embeds.*prompt_attention_mask"):
        pipe("three")


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_prompts_of_other_lengths_in_the_batch_change_nothing(guidance_scale, pipe):
    prompts = ["three", "eight nine one", "", LONG]
    grids = tokens(pipe, prompts, generator=seeded(0, 1, 2, 3), guidance_scale=guidance_scale)
    for number, prompt in enumerate(prompts):
        alone = tokens(pipe, [prompt], generator=seeded(number), guidance_scale=guidance_scale)
        assert torch.equal(grids[number : number + 1], alone)


def test_padding_is_never_seen(pipe):
    embeds, mask, _, _ = pipe.encode_prompt(["three"])
    changed = torch.where(mask[:, :, None] == 1, embeds, 1e4)
    pairs = [
        tokens(pipe, None, prompt_embeds=each, prompt_attention_mask=mask, generator=seeded(0), guidance_scale=3.0)
        for each in (embeds, changed)
    ]
    assert torch.equal(*pairs)


def test_a_prompt_without_a_token_draws(pipe):
    embeds, mask = torch.randn(1, 6, 16), torch.zeros(1, 6)
    image = pipe(prompt_embeds=embeds, prompt_attention_mask=mask, guidance_scale=2.0, output_type="pt").images
    assert image.isfinite().all()


def test_longer_text_is_cut_with_a_warning(pipe, caplog):
    cut = tokens(pipe, [LONG], generator=seeded(0))
    assert "truncated because the model takes 6 tokens: 'four three two one zero'" in caplog.text
    assert torch.equal(cut, tokens(pipe, ["nine eight seven six five"], generator=seeded(0)))
    assert caplog.text.count("truncated") == 1


def test_a_negative_prompt_takes_the_place_of_the_null_features(pipe):
    grid = tokens(pipe, ["three", "eight"], negative_prompt="one two", temperature=0, guidance_scale=3.0)
    cond, uncond = logits(pipe, ["three", "eight"], grid), logits(pipe, ["one two"] * 2, grid)
    assert torch.equal((uncond + 3.0 * (cond - uncond)).argmax(-1), pipe.scheduler.order_tokens(grid))
    assert not torch.equal(grid, tokens(pipe, ["three", "eight"], temperature=0, guidance_scale=3.0))
    embeds, mask, _, _ = pipe.encode_prompt("one two")
    negatives = {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask}
    assert torch.equal(grid, tokens(pipe, ["three", "eight"], **negatives, temperature=0, guidance_scale=3.0))
    plain = tokens(pipe, ["three"], guidance_scale=1.0, temperature=0)
    assert torch.equal(plain, tokens(pipe, ["three"], guidance_scale=1.0, temperature=0, negative_prompt="one"))


def test_null_features_have_the_padding_of_their_prompt(pipe):
    grid = tokens(pipe, ["three", "eight nine"], temperature=0, guidance_scale=3.0)
    cond, uncond = (logits(pipe, ["three", "eight nine"], grid, is_null) for is_null in (False, True))
    assert not torch.equal(uncond[0], uncond[1])
    assert torch.equal((uncond + 3.0 * (cond - uncond)).argmax(-1), pipe.scheduler.order_tokens(grid))


def test_captions_are_cleaned_on_request(pipe):
    text = "<b>Three</b> https://example.com/a.png eight"
    dirty, clean = (pipe.encode_prompt(text, clean_caption=clean) for clean in (False, True))
    expected = pipe.encode_prompt("three eight")
    assert torch.equal(clean[0], expected[0]) and torch.equal(clean[1], expected[1])
    assert not torch.equal(dirty[1], expected[1])


EMBEDS, MASK = torch.zeros(2, 6, 16), torch.ones(2, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "One of `prompt` and `prompt_embeds`.*neither"),
        ({"prompt": "one", "prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}, "got both"),
        ({"prompt": []}, "`prompt` must be text.*at least one"),
        ({"prompt": 3}, "`prompt` must be text.*got 3"),
        ({"prompt": ["one", None]}, "`prompt` must be text"),
        ({"prompt": "one", "negative_prompt": 3}, "`negative_prompt` must be text.*got 3"),
        ({"prompt": ["one", "two", "six"], "negative_prompt": ["one", "two"]}, "1 negative prompt or 3.*got 2"),
        ({"prompt_embeds": EMBEDS}, "`prompt_embeds` and `prompt_attention_mask` must be given together"),
        ({"prompt": "one", "prompt_attention_mask": MASK}, "must be given together"),
        ({"prompt_embeds": EMBEDS[..., :8], "prompt_attention_mask": MASK}, r"\(batch_size, 6, 16\).*\(2, 6, 8\)"),
        ({"prompt_embeds": EMBEDS[:, :5], "prompt_attention_mask": MASK[:, :5]}, r"prompt_embeds.*\(2, 5, 16\)"),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK[:1]}, r"prompt_attention_mask.*\(2, 6\).*\(1, 6\)"),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK * 2}, "1 for text and then 0"),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": torch.tensor([[0.0, 1, 1, 1, 1, 1]] * 2)}, "right-padded"),
        ({"prompt": "one", "negative_prompt_embeds": EMBEDS[:1]}, "negative_prompt_embeds.*given together"),
        (
            {
                "prompt": "one",
                "negative_prompt": "two",
                "negative_prompt_embeds": EMBEDS,
                "negative_prompt_attention_mask": MASK,
            },
            "cannot both be given",
        ),
    ],
)
def test_bad_prompts_are_refused_before_any_compute(pipe, arguments, message, monkeypatch):
    def computed(*args, **kwargs):
        raise AssertionError("computed before the arguments were checked")

    monkeypatch.setattr(pipe.transformer, "forward", computed)
    monkeypatch.setattr(pipe.text_encoder, "forward", computed)
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_a_text_encoder_of_another_width_is_refused(pipe, make_model):
    pipe.transformer = make_model(condition="caption", caption_length=6, caption_channels=24)
    with pytest.raises(ValueError, match=r"text_encoder.config.d_model.*must be 24.*got 16"):
        pipe("three")


def test_a_model_of_labels_is_refused(pipe, make_model):
    pipe.transformer = make_model()
    with pytest.raises(ValueError, match="condition.*must be 'caption'.*got 'class'"):
        pipe(prompt_embeds=torch.zeros(1, 120, 2048), prompt_attention_mask=torch.ones(1, 120))
