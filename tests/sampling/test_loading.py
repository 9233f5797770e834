import pytest
import torch
from diffusers import DiffusionPipeline

from par_diffusers.sampling.loading import load_pipeline
from par_diffusers.settings import LoadingSettings


@pytest.fixture
def folder(make_pipeline, tmp_path):
    make_pipeline(hidden_size=64).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def load(folder, **settings):
    pipe = load_pipeline(folder, LoadingSettings(**settings), "cpu", batch_size=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def logits(pipe):
    grid = torch.randint(32, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    return pipe.transformer(class_labels=torch.tensor([3, 8]), **pipe.scheduler.model_inputs(grid, 32)).logits.float()


def test_int8_weights_have_a_scale_a_row_and_leave_activations_alone(folder):
    plain, quantized = load(folder), load(folder, quantization="int8")
    error = (logits(quantized) - logits(plain)).std() / logits(plain).std()
    assert 1e-4 < error < 0.03
    for (name, layer), other in zip(plain.transformer.named_modules(), quantized.transformer.modules(), strict=True):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            codes = other.weight.qdata
            scale = layer.weight.abs().amax(1, keepdim=True) / 127.5
            assert codes.dtype == torch.int8
            assert (codes * other.weight.scale - layer.weight).abs().le(0.51 * scale).all(), name
            inputs = torch.randn(5, layer.in_features)
            with torch.no_grad():
                assert torch.allclose(other(inputs), inputs @ (codes * other.weight.scale).T, atol=1e-4)


def test_a_quantized_pipeline_is_saved_and_loaded_as_it_is(folder, tmp_path):
    pipe = load(folder, quantization="int8", dtype="bfloat16")
    pipe.save_pretrained(tmp_path / "int8")
    with torch.no_grad():
        expected = logits(pipe)
    again = load(tmp_path / "int8", dtype="bfloat16")
    assert again.transformer.is_quantized and torch.equal(logits(again), expected)
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "int8", trust_remote_code=True), DiffusionPipeline)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_pipelines_draw_as_before(dtype, folder):
    pipes = [load(folder, dtype=dtype, mode=mode) for mode in ("eager", "packed")]
    assert not any(isinstance(module, torch.nn.Linear) for module in pipes[1].transformer.modules())
    tolerance = 1e-5 if dtype == "float32" else 0.05
    assert (logits(pipes[0]) - logits(pipes[1])).abs().max() <= tolerance * logits(pipes[0]).abs().max()
