import argparse
import json
import os
import pickle
import shutil
import sys
import zipfile

import pytest
import torch

import par_diffusers
from par_diffusers import PARForConditionalGeneration, PARPipeline, PARScheduler, convert_llamagen_checkpoint
from par_diffusers.conversion.convert_llamagen import PUBLISHED_SIZES, convert_vq, load_state_dict, read_labels


MODELS = ["par_c2i_4x", "par_c2i_16x", "llamagen_c2i"]
T2I = "llamagen_t2i"


def convert(reference, name, output, **kwargs):
    recorded = reference(name)
    options = {"image_size": 32, "num_attention_heads": 4} | kwargs
    return convert_llamagen_checkpoint(recorded.file, recorded.vq_file, output, **options)


@pytest.fixture(scope="module")
def converted(reference, tmp_path_factory):
    """name -> the folder of a converted reference checkpoint."""
    root = tmp_path_factory.mktemp("converted")
    return {name: convert(reference, name, root / name) for name in [*MODELS, T2I]}


def load(folder):
    """The pipeline of a folder."""
    index = json.loads((folder / "model_index.json").read_text())
    pipe = getattr(par_diffusers, index["_class_name"][1]).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def condition(recorded) -> dict:
    """The recorded condition as the call takes it: captions were recorded with their padding first."""
    if recorded.cond.ndim == 1:
        return {"class_labels": recorded.cond}
    lengths = recorded.cond_mask.sum(1).long().tolist()
    rolled = [features.roll(length, 0) for features, length in zip(recorded.cond, lengths, strict=True)]
    mask = torch.arange(recorded.cond.shape[1]) < torch.tensor(lengths)[:, None]
    return {"prompt_embeds": torch.stack(rolled), "prompt_attention_mask": mask}


def open_checkpoint(file):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True)


def rewrite(reference, name, file, change=lambda tensors: tensors, wrap=lambda tensors: {"model": tensors}):
    """The tensors of a reference checkpoint, changed and wrapped, in a new file."""
    torch.save(wrap(change(load_state_dict(reference(name).file))), file)
    return file


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_teacher_forced_logits_and_loss_equal_the_record(name, reference, converted):
    recorded = reference(name)
    pipe = PARPipeline.from_pretrained(converted[name])
    grid = recorded.tokens_raster.view(3, 8, 8)
    assert torch.equal(pipe.scheduler.order_tokens(grid), recorded.tokens_order)
    inputs = pipe.scheduler.model_inputs(grid, 96)
    output = pipe.transformer(class_labels=recorded.cond, labels=recorded.tokens_order, **inputs)
    assert (output.logits - recorded.train_logits).abs().max() < 1e-4
    assert (output.loss - recorded.train_loss).abs() < 1e-5
    null = pipe.transformer(class_labels=torch.full((3,), 10), **inputs).logits
    assert (null - recorded.train_logits_null).abs().max() < 1e-4


@pytest.mark.parametrize("name", [*MODELS, T2I])
def test_greedy_tokens_and_pixels_equal_the_record(name, reference, converted):
    recorded = reference(name)
    pipe = load(converted[name])
    for run in recorded.greedy:
        # the published quirk: decoding calls after the first token count from 0, guidance stops past the interval
        interval = (0, run["cfg_interval"] + 2) if run["cfg_interval"] >= 0 else None
        options = {"guidance_scale": run["cfg_scale"], "temperature": 0, "guidance_interval": interval}
        grid = pipe(**condition(recorded), output_type="latent", **options).images
        assert torch.equal(grid.flatten(1), run["tokens_raster"])
        assert torch.equal(pipe.scheduler.order_tokens(grid), run["tokens_order"])
        if "image" in run:
            pixels = pipe(**condition(recorded), output_type="pt", **options).images * 2 - 1
            assert (pixels - run["image"].float().clamp(-1, 1)).abs().max() < 1e-3


@torch.no_grad()
def test_tokenizer_equals_the_record(reference):
    recorded = reference("vq_f4")
    vqvae = convert_vq(recorded.file, sample_size=32)
    latents = vqvae.encode(recorded.pixels).latents
    assert torch.equal(vqvae.quantize(latents)[2][2].view(2, 8, 8), recorded.indices)
    decoded = vqvae.decode(recorded.indices, force_not_quantize=True, shape=(2, 8, 8, 8)).sample
    assert (decoded - recorded.decoded.float()).abs().max() < 1e-3
    quantized = vqvae.quantize.embedding(recorded.indices).permute(0, 3, 1, 2)
    assert (quantized - recorded.quantized.float()).abs().max() < 1e-3
    assert (vqvae(recorded.pixels).sample - decoded).abs().max() < 1e-4


def test_captions_of_other_lengths_in_the_batch_change_nothing(reference, converted):
    inputs, pipe = condition(reference(T2I)), load(converted[T2I])
    for scale in (1.0, 7.5):
        options = {"guidance_scale": scale, "temperature": 0, "output_type": "latent"}
        together = pipe(**inputs, **options).images
        for number in range(3):
            one = {name: value[number : number + 1] for name, value in inputs.items()}
            assert torch.equal(pipe(**one, **options).images, together[number : number + 1])


def test_text_folder_has_the_published_defaults(converted):
    pipe = load(converted[T2I])
    config, plan = pipe.transformer.config, pipe.scheduler.config
    assert (config.condition, config.caption_length, config.caption_channels) == ("caption", 120, 24)
    assert (plan.guidance_scale, plan.top_k, plan.temperature, plan.prefix_length) == (7.5, 1000, 1.0, 120)
    assert pipe.text_encoder is None and pipe.tokenizer is None
    with pytest.raises(ValueError, match="this pipeline has none: load one, or give `prompt_embeds`"):
        pipe("a red fox")
    card = (converted[T2I] / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "120 features of 24" in card and "prompt_embeds=" in card


@pytest.fixture
def text_encoder(make_text_pipeline, tmp_path):
    """width -> the folder of a T5."""

    def save(width: int):
        pipe = make_text_pipeline(width=width)
        pipe.text_encoder.save_pretrained(tmp_path / f"t5-{width}")
        pipe.tokenizer.save_pretrained(tmp_path / f"t5-{width}")
        return tmp_path / f"t5-{width}"

    return save


def test_a_text_encoder_goes_into_the_folder(reference, text_encoder, tmp_path):
    folder = convert(reference, T2I, tmp_path / "out", text_encoder=text_encoder(24), guidance_scale=3.0)
    pipe = load(folder)
    assert pipe.scheduler.config.guidance_scale == 3.0 and pipe("three eight").images[0].size == (32, 32)
    embeds, mask, _, _ = pipe.encode_prompt("three eight")
    generator = torch.Generator()
    drawn = [
        pipe(**prompt, generator=generator.manual_seed(0), output_type="latent").images
        for prompt in ({"prompt": "three eight"}, {"prompt_embeds": embeds, "prompt_attention_mask": mask})
    ]
    assert torch.equal(*drawn)


def test_text_encoders_that_do_not_fit_are_refused(reference, text_encoder, tmp_path):
    for name, options, message in (
        (T2I, {"text_encoder": text_encoder(16)}, "text_encoder.*width 24.*has 16"),
        (T2I, {"text_encoder": tmp_path / "missing"}, "text_encoder.*missing.*not a T5"),
        (T2I, {"labels": tmp_path / "names"}, "`labels` goes with class-conditional models"),
        ("par_c2i_4x", {"text_encoder": tmp_path}, "`text_encoder` goes with text-conditional models"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(reference, name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folder_says_what_the_checkpoint_is(reference, converted):
    config = json.loads((converted["par_c2i_16x"] / "transformer" / "config.json").read_text())
    assert config["num_learnable_tokens"] == 15 and config["rope_unplaced"] == "zero"
    assert config["architectures"] == ["PARForConditionalGeneration"] and config["dtype"] == "float32"
    assert config["auto_map"]["AutoModel"] == "modeling_par.PARForConditionalGeneration"
    scheduler = PARScheduler.from_pretrained(converted["par_c2i_16x"], subfolder="scheduler")
    assert tuple(scheduler.config.grid_size) == (8, 8) and scheduler.config.num_parallel_tokens == 16
    assert PARScheduler.from_pretrained(converted["llamagen_c2i"], subfolder="scheduler").num_inference_steps == 64


@pytest.mark.parametrize("name", ["par_c2i_4x", T2I])
def test_streamed_folder_equals_one_that_save_pretrained_writes(name, converted, tmp_path):
    load(converted[name]).save_pretrained(tmp_path / "again")
    ours = {file.relative_to(converted[name]): file for file in converted[name].rglob("*")}
    theirs = {file.relative_to(tmp_path / "again"): file for file in (tmp_path / "again").rglob("*")}
    assert ours.keys() == theirs.keys()
    for name, file in ours.items():
        if file.suffix == ".json":
            assert json.loads(file.read_text()) == json.loads(theirs[name].read_text()), name
        elif file.is_file() and file.suffix != ".safetensors":
            assert file.read_bytes() == theirs[name].read_bytes(), name


def test_large_models_are_written_in_shards(reference, tmp_path, monkeypatch, converted):
    monkeypatch.setattr("par_diffusers.conversion.convert_llamagen.SHARD_SIZE", 100_000)
    folder = convert(reference, "par_c2i_4x", tmp_path / "sharded")
    assert len(list((folder / "transformer").glob("model-*.safetensors"))) > 3
    sharded = PARForConditionalGeneration.from_pretrained(folder / "transformer").state_dict()
    whole = PARForConditionalGeneration.from_pretrained(converted["par_c2i_4x"] / "transformer").state_dict()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: {"model": tensors, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "steps": 7,
                         "args": argparse.Namespace(lr=1e-4, gpt_model="tiny")},
        lambda tensors: {"module": tensors, "dp_world_size": 8},
        lambda tensors: {"state_dict": tensors},
        lambda tensors: tensors,
    ],
)  # fmt: skip
def test_all_published_wrappings_give_the_same_model(wrap, reference, tmp_path, converted):
    file = rewrite(reference, "par_c2i_4x", tmp_path / "wrapped.pt", wrap=wrap)
    folder = convert_llamagen_checkpoint(
        file, reference("par_c2i_4x").vq_file, tmp_path / "out", image_size=32, num_attention_heads=4
    )
    ours = (folder / "transformer" / "model.safetensors").read_bytes()
    assert ours == (converted["par_c2i_4x"] / "transformer" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.bfloat16])
def test_dtype_is_that_of_the_backbone(dtype, reference, tmp_path):
    folder = convert(reference, "par_c2i_4x", tmp_path / "half", dtype=dtype)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    pipe = PARPipeline.from_pretrained(folder)
    assert str(pipe.transformer.dtype).endswith(config["dtype"])
    assert pipe.vqvae.dtype == torch.float32


def test_values_too_large_for_the_dtype_are_refused(reference, tmp_path):
    file = rewrite(reference, "par_c2i_4x", tmp_path / "large.pt", change=with_value("norm.weight", poisoned(1e5)))
    with pytest.raises(ValueError, match="norm.weight.*not finite in float16"):
        convert_llamagen_checkpoint(
            file,
            reference("par_c2i_4x").vq_file,
            tmp_path / "out",
            image_size=32,
            num_attention_heads=4,
            dtype="float16",
        )


def test_labels_come_from_a_file_or_are_imagenets(reference, tmp_path):
    names = [f"name {i}" for i in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    folder = convert(reference, "par_c2i_4x", tmp_path / "out", labels=tmp_path / "names.txt")
    assert PARPipeline.from_pretrained(folder).get_label_ids(["name 7"]) == [7]
    (tmp_path / "names.json").write_text(json.dumps({str(i): name for i, name in enumerate(names)}))
    assert read_labels(tmp_path / "names.json", 10) == {str(i): name for i, name in enumerate(names)}
    imagenet = read_labels("imagenet", 1000)
    assert imagenet["207"] == "golden retriever" and imagenet["0"].startswith("tench")
    (tmp_path / "short.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="labels.*0 to 9.*got 2"):
        convert(reference, "par_c2i_4x", tmp_path / "no", labels=tmp_path / "short.txt")
    with pytest.raises(ValueError, match="labels.*missing.txt.*cannot be read"):
        convert(reference, "par_c2i_4x", tmp_path / "no", labels=tmp_path / "missing.txt")
    assert not (tmp_path / "no").exists()


def published_checkpoint(size, n):
    """The tensors of a published size on the meta device, few layers shown by name only."""
    (layers, width), (_, heads) = next((key, value) for key, value in PUBLISHED_SIZES.items() if value[0] == size)
    inner = 256 * -(-int(2 * 4 * width / 3) // 256)
    tensors = {
        "tok_embeddings.weight": (16384, width),
        "cls_embedding.embedding_table.weight": (1001, width),
        "output.weight": (16384, width),
        "norm.weight": (width,),
    }
    if n > 1:
        tensors["spe_tok_embeddings.special_embeddings.weight"] = (n - 1, width)
    for i in range(layers):
        tensors[f"layers.{i}.attention.wqkv.weight"] = (3 * width, width)
        tensors[f"layers.{i}.feed_forward.w1.weight"] = (inner, width)
    return {name: torch.empty(shape, device="meta") for name, shape in tensors.items()}, heads


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "XXXL", "1B", "3B", "7B"])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_heads_of_published_sizes_are_known(size, n):
    from par_diffusers.conversion.convert_llamagen import model_config

    tensors, heads = published_checkpoint(size, n)
    config = model_config(tensors)
    assert config.num_attention_heads == config.num_key_value_heads == heads
    assert config.num_learnable_tokens == n - 1 and config.num_classes == 1000 and config.vocab_size == 16384


class Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE_MARK"],)


@pytest.mark.parametrize("argument", ["checkpoint", "vq_checkpoint"])
@pytest.mark.parametrize("layout", ["zip", "legacy", "bare pickle", "pickle in a zip", "numpy"])
def test_hostile_pickles_are_refused_and_nothing_runs(argument, layout, reference, tmp_path, monkeypatch):
    mark = tmp_path / "executed"
    monkeypatch.setenv("HOSTILE_MARK", str(mark))
    file = tmp_path / "hostile.pt"
    content = {"model": {"tok_embeddings.weight": torch.zeros(2, 2)}, "args": Hostile()}
    if layout == "zip":
        torch.save(content, file)
    elif layout == "legacy":
        torch.save(content, file, _use_new_zipfile_serialization=False)
    elif layout == "bare pickle":
        file.write_bytes(pickle.dumps(content["args"]))
    elif layout == "pickle in a zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content["args"]))
            archive.writestr("archive/version", "3\n")
    else:
        torch.save({"model": {"tok_embeddings.weight": __import__("numpy").zeros(3)}}, file)
    arguments = {"checkpoint": reference("par_c2i_4x").file, "vq_checkpoint": reference("par_c2i_4x").vq_file}
    with pytest.raises(ValueError, match="hostile.pt"):
        convert_llamagen_checkpoint(
            **arguments | {argument: file}, output=tmp_path / "out", image_size=32, num_attention_heads=4
        )
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argument", ["checkpoint", "vq_checkpoint"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95, 0.9999])
def test_truncated_files_are_refused(argument, share, reference, tmp_path):
    arguments = {"checkpoint": reference("par_c2i_4x").file, "vq_checkpoint": reference("par_c2i_4x").vq_file}
    data = arguments[argument].read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="cut.pt.*(truncated|damaged)"):
        convert_llamagen_checkpoint(
            **arguments | {argument: tmp_path / "cut.pt"},
            output=tmp_path / "out",
            image_size=32,
            num_attention_heads=4,
        )
    assert list(tmp_path.iterdir()) == [tmp_path / "cut.pt"]


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_value(name, value):
    return lambda tensors: {**tensors, name: value(tensors.get(name))}


def poisoned(value):
    def poison(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return poison


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("model", without("norm.weight"), "misses norm.weight"),
        ("model", without("layers.1.feed_forward.w3.weight"), "misses layers.1.feed_forward.w3.weight"),
        ("model", without("output.weight"), "misses output.weight"),
        ("model", without("layers.0.attention.wqkv.weight"), "layers.0.attention.wqkv.weight"),
        ("model", without("cls_embedding.embedding_table.weight"), "cls_embedding.embedding_table.weight"),
        ("model", with_value("extra.weight", lambda _: torch.zeros(2)), "unknown extra.weight"),
        ("model", with_value("layers.1.attention.wo.weight", lambda t: t[:-1]), r"layers.1.attention.wo.weight.*\(64, 64\).*\(63, 64\)"),
        ("model", with_value("layers.2.attention.wqkv.weight", lambda t: t[:-1]), "layers.2.attention.wqkv.weight"),
        ("model", with_value("output.weight", lambda t: t[:-1]), "output.weight"),
        ("model", with_value("norm.weight", lambda t: t[None]), "norm.weight"),
        ("model", with_value("tok_embeddings.weight", lambda t: t[0]), "tok_embeddings.weight.*2 dimensions"),
        ("model", with_value("layers.1.attention.wo.weight", poisoned(float("nan"))), "layers.1.attention.wo.weight.*not finite"),
        ("model", with_value("tok_embeddings.weight", poisoned(float("inf"))), "tok_embeddings.weight.*not finite"),
        ("model", with_value("norm.weight", lambda t: t.long()), "norm.weight.*floating-point.*int64"),
        ("vq", without("quant_conv.bias"), "misses quant_conv.bias"),
        ("vq", without("encoder.conv_blocks.0.res.0.conv1.weight"), "encoder.conv_blocks.0.res.0.conv1.weight"),
        ("vq", with_value("extra", lambda _: torch.zeros(2)), "unknown extra"),
        ("vq", with_value("decoder.conv_out.weight", lambda t: t[:-1]), "decoder.conv_out.weight.*shape"),
        ("vq", with_value("decoder.mid.1.q.bias", poisoned(float("nan"))), "decoder.mid.1.q.bias.*not finite"),
        ("vq", with_value("quantize.embedding.weight", lambda t: t[:64]), "vq_checkpoint.*96.*got 64"),
    ],
)  # fmt: skip
def test_checkpoints_with_wrong_tensors_are_refused(source, change, message, reference, tmp_path):
    recorded = reference("par_c2i_4x")
    name = "par_c2i_4x" if source == "model" else "vq_f4"
    file = rewrite(reference, name, tmp_path / "changed.pt", change=change)
    files = [file, recorded.vq_file] if source == "model" else [recorded.file, file]
    with pytest.raises(ValueError, match=message):
        convert_llamagen_checkpoint(*files, tmp_path / "out", image_size=32, num_attention_heads=4)
    assert list(tmp_path.iterdir()) == [file]


def test_files_of_the_wrong_kind_are_named(reference, tmp_path):
    model, vq, t2i = reference("par_c2i_4x").file, reference("par_c2i_4x").vq_file, reference(T2I).file
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pt")
    torch.save({"steps": 3}, tmp_path / "empty.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    for files, message in (
        ((vq, vq), "checkpoint.*class-conditional model.*is a VQ tokenizer"),
        ((model, model), "vq_checkpoint.*VQ tokenizer.*is a class-conditional model"),
        ((t2i, t2i), "vq_checkpoint.*VQ tokenizer.*is a text-conditional model"),
        ((tmp_path / "other.pt", vq), "neither a PAR or LlamaGen model nor a VQ tokenizer"),
        ((tmp_path / "empty.pt", vq), "holds no model"),
        ((tmp_path / "list.pt", vq), "holds no model"),
        ((tmp_path / "missing.pt", vq), "missing.pt.*is not a file"),
        ((tmp_path, vq), "is not a file"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_llamagen_checkpoint(*files, tmp_path / "out", image_size=32, num_attention_heads=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_attention_heads": 5}, "num-attention-heads.*divide the width 64.*got 5"),
        ({"num_attention_heads": 0}, "num-attention-heads.*got 0"),
        ({"num_attention_heads": None}, "num-attention-heads.*must be given.*3 layers and width 64"),
        ({"image_size": 30}, "image-size.*multiple of 4.*got 30"),
        ({"image_size": 0}, "image-size"),
        ({"guidance_scale": float("nan")}, "^`guidance_scale` must be a finite number"),
        ({"guidance_scale": -1.0}, "^`guidance_scale`.*got -1.0"),
        ({"image_size": 36}, r"image-size.*36.*num_parallel_tokens.*9x9"),
        ({"dtype": "float64"}, "dtype.*float32, float16 or bfloat16.*'float64'"),
    ],
)
def test_bad_options_are_refused(arguments, message, reference, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(reference, "par_c2i_4x", tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_folders_are_replaced_only_on_request(reference, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(reference, "par_c2i_4x", out)  # empty: fine
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="output.*not empty.*--overwrite"):
        convert(reference, "par_c2i_4x", out)
    with pytest.raises(ValueError, match="image-size"):
        convert(reference, "par_c2i_4x", out, image_size=30, overwrite=True)
    assert (out / "mine.txt").read_text() == "keep"
    convert(reference, "llamagen_c2i", out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert PARScheduler.from_pretrained(out, subfolder="scheduler").config.num_parallel_tokens == 1
    assert list(tmp_path.iterdir()) == [out]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output.*is a file"):
        convert(reference, "par_c2i_4x", tmp_path / "file", overwrite=True)


def test_nothing_is_left_when_the_disk_fails_half_way(reference, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers.VQModel.save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(reference, "par_c2i_4x", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_files_are_not_touched(reference, tmp_path):
    copy = shutil.copy(reference("par_c2i_4x").file, tmp_path / "copy.pt")
    before = (os.stat(copy).st_mtime_ns, open(copy, "rb").read())
    convert_llamagen_checkpoint(
        copy, reference("par_c2i_4x").vq_file, tmp_path / "out", image_size=32, num_attention_heads=4
    )
    assert (os.stat(copy).st_mtime_ns, open(copy, "rb").read()) == before


def test_module_runs_as_a_command(reference, tmp_path):
    import subprocess

    recorded = reference("par_c2i_4x")
    command = [sys.executable, "-m", "par_diffusers.conversion.convert_llamagen", "--image-size", "32"]
    command += ["--checkpoint", recorded.file, "--vq-checkpoint", recorded.vq_file, "--output", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    *_, last = result.stderr.splitlines()  # libraries that are installed may have written above it
    assert "error: " in last and "--num-attention-heads" in last and "Traceback" not in result.stderr
    result = subprocess.run([*command, "--num-attention-heads", "4"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "8x8 tokens in 19 steps" in result.stdout
