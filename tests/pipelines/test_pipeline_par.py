"""What is particular to labels; the rest is in test_pipelines.py."""

import inspect

import pytest
import torch
from sampling_helpers import seeded, tokens
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from par_diffusers import PARPipeline


def test_call_signature_is_the_documented_one():
    parameters = inspect.signature(PARPipeline.__call__).parameters
    assert list(parameters)[1:] == [
        "class_labels", "num_inference_steps", "guidance_scale", "num_images_per_prompt", "temperature", "top_k", "top_p",
        "generator", "latents", "output_type", "return_dict", "callback_on_step_end",
        "callback_on_step_end_tensor_inputs", "guidance_schedule", "guidance_power", "guidance_interval",
        "decode_chunk_size", "height", "width",
    ]  # fmt: skip


def test_labels_may_be_ids_names_or_tensors(pipe):
    expected = tokens(pipe, [3], generator=seeded(0))
    for label in (
        3,
        "three",
        ["three"],
        torch.tensor([3]),
        torch.tensor(3),
        (3,),
        torch.tensor([3], dtype=torch.int32),
    ):
        assert torch.equal(tokens(pipe, label, generator=seeded(0)), expected)
    mixed = tokens(pipe, [3, "eight"], generator=seeded(0, 1))
    assert torch.equal(mixed, tokens(pipe, ["three", 8], generator=seeded(0, 1)))
    assert pipe.get_label_ids("three") == [3]
    assert pipe.get_label_ids(["three", "zero"]) == [3, 0]


def test_synonyms_name_a_class_and_shared_names_must_be_told_apart(make_pipeline):
    source = make_pipeline()
    names = {str(i): f"class {i}, crane" if i in (3, 5) else f"class {i}, alias {i}" for i in range(10)}
    pipe = PARPipeline(**source.components, id2label=names)
    assert pipe.get_label_ids(["class 3", "alias 4", "class 5, crane"]) == [3, 4, 5]
    with pytest.raises(ValueError, match=r"'crane' names the classes \[3, 5\]"):
        pipe("crane")


def test_pipeline_without_label_names_takes_ids(make_pipeline):
    pipe = PARPipeline(**make_pipeline().components)
    assert pipe(3).images[0].size == (8, 8)
    with pytest.raises(ValueError, match="'three' is not a label.*none, so give class ids"):
        pipe("three")


def test_decoding_reads_what_is_cached_without_masks_and_copies(pipe):
    seen = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, query.shape[2], key.shape[2], key.untyped_storage().data_ptr(), attention_mask))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("recording", recording)
    ALL_MASK_ATTENTION_FUNCTIONS.register("recording", sdpa_mask)
    generator = torch.Generator().manual_seed(0)
    expected = pipe([3], generator=generator.manual_seed(0), output_type="latent").images
    pipe.transformer.set_attn_implementation("recording")
    assert pipe([3], generator=generator.manual_seed(0), output_type="latent").images.equal(expected)
    layers = pipe.transformer.config.num_hidden_layers
    assert [(queries, keys) for layer, queries, keys, *_ in seen if layer == 0] == [
        (len(slots), slots.stop) for slots in pipe.scheduler.step_slots
    ]
    assert len({(layer, memory) for layer, _, _, memory, _ in seen}) == layers
    assert all(mask is None for *_, mask in seen)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("ten", "class_labels.*'ten' is not a label.*Labels: eight, five"),
        (["three", "ten"], "class_labels.*'ten'"),
        ([], "class_labels.*at least one"),
        (10, "class_labels.*0 to 9.*got 10"),
        ([-1], "class_labels.*0 to 9.*got -1"),
        (1.5, "class_labels.*got 1.5"),
        ([1.5], "class_labels.*got 1.5"),
        (None, "class_labels.*got None"),
        (True, "class_labels.*got True"),
        ({3}, "class_labels"),
        (torch.tensor([1.0]), "class_labels.*float32"),
        (torch.tensor([[1]]), r"class_labels.*\(1, 1\)"),
        (torch.tensor([], dtype=torch.long), "class_labels.*at least one"),
    ],
)
def test_bad_labels_are_refused_before_any_compute(pipe, labels, message, monkeypatch):
    def computed(*args, **kwargs):
        raise AssertionError("computed before the arguments were checked")

    monkeypatch.setattr(pipe.transformer, "forward", computed)
    with pytest.raises(ValueError, match=message):
        pipe(labels)
