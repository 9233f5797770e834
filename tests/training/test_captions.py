"""From pictures with captions to a model that draws them."""

import csv
import json
import shutil

import pytest
import torch
from conftest import COLOURS
from launching import finish, start
from safetensors.torch import load_file

from par_diffusers import PARTextToImagePipeline
from par_diffusers.pipelines.pipeline_par_text_to_image import left_pad
from par_diffusers.settings import ExtractionSettings, FeatureSettings, TrainingSettings
from par_diffusers.training.codes import CodeDataset
from par_diffusers.training.extract_codes import extract_codes
from par_diffusers.training.extract_features import extract_features
from par_diffusers.training.features import CaptionFeatures
from par_diffusers.training.tokenizers import load_tokenizer
from par_diffusers.training.train import train


CAPTIONS = ["one", "two three", "four five six", "seven eight", "nine zero one", "three"]


@pytest.fixture(scope="module")
def data(make_pictures, make_text_pipeline, vqvae_folder, tmp_path_factory):
    """Six pictures with a caption each, as codes and as features of a T5."""
    root = tmp_path_factory.mktemp("captions")
    make_pictures(root / "by-class", 6)
    (root / "pictures").mkdir()
    files = sorted((root / "by-class").rglob("*.png"))
    assert {file.parent.name for file in files} == set(COLOURS)
    with open(root / "pictures" / "metadata.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file_name", "text"])
        for file, caption in zip(files, CAPTIONS, strict=True):
            shutil.copy(file, root / "pictures" / file.name)
            writer.writerow([file.name, caption])
    pipe = make_text_pipeline()
    for name in ("text_encoder", "tokenizer"):
        getattr(pipe, name).save_pretrained(root / "t5")
    options = {"vqvae": vqvae_folder, "image_size": 16, "augmentation": "none"}
    extract_codes(ExtractionSettings(root / "pictures", root / "codes", **options))
    options = {"text_encoder": root / "t5", "max_length": 6, "shard_size": 4, "batch_size": 3}
    extract_features(FeatureSettings(root / "codes", root / "features", **options))
    return root, pipe, options


def test_features_are_those_of_the_text_encoder_without_padding(data):
    root, pipe, _ = data
    captions = json.loads((root / "codes" / "index.json").read_text())["classes"]
    assert captions == sorted(CAPTIONS)
    features = CaptionFeatures(root / "features", captions)
    assert (features.max_length, features.channels) == (6, 16)
    for number, caption in enumerate(captions):
        embeds, mask, _, _ = pipe.encode_prompt(caption)
        assert torch.allclose(features[number], embeds[0, : mask.sum()], atol=1e-5)
    found, mask = features.batch([5, 0, 4])
    embeds, expected, _, _ = pipe.encode_prompt([captions[5], captions[0], captions[4]])
    assert torch.equal(mask, expected) and torch.allclose(found, embeds * mask[..., None], atol=1e-5)
    shard = load_file(root / "features" / "features-00000.safetensors")
    assert shard["ends"].shape == (4,) and len(shard["features"]) == shard["ends"][-1]


def test_extraction_of_features_goes_on_where_it_was(data, tmp_path):
    root, _, options = data
    shutil.copytree(root / "features", tmp_path / "features")
    whole = {file.name: file.read_bytes() for file in (tmp_path / "features").glob("*")}
    (tmp_path / "features" / "features-00001.safetensors").unlink()
    (tmp_path / "features" / "index.json").unlink()
    (tmp_path / "features" / ".features-00001.safetensors.partial").write_bytes(b"torn")
    kept = (tmp_path / "features" / "features-00000.safetensors").stat().st_mtime_ns
    extract_features(FeatureSettings(root / "codes", tmp_path / "features", **options))
    assert {file.name: file.read_bytes() for file in (tmp_path / "features").glob("*")} == whole
    assert (tmp_path / "features" / "features-00000.safetensors").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="same settings.*differs in max_length"):
        extract_features(FeatureSettings(root / "codes", tmp_path / "features", **options | {"max_length": 5}))


def test_two_processes_write_what_one_writes(data, tmp_path):
    root, _, options = data
    values = {"data": root / "codes", "output": tmp_path / "features"} | options | {"shard_size": 2}
    printed = finish(start("extract-features", values, processes=2))
    assert "6 captions, 3 shards; 6 now" in printed
    alone = extract_features(FeatureSettings(**values | {"output": tmp_path / "alone"}))
    written = {file.name: file.read_bytes() for file in (tmp_path / "features").glob("*")}
    assert written == {file.name: file.read_bytes() for file in alone.glob("*")} and len(written) == 4


def test_captions_may_come_from_a_file(data, tmp_path):
    root, _, options = data
    (tmp_path / "captions.txt").write_text("\n".join(sorted(CAPTIONS)) + "\n")
    extract_features(FeatureSettings(tmp_path / "captions.txt", tmp_path / "features", **options))
    for name in ("features-00000.safetensors", "features-00001.safetensors", "index.json"):
        assert (tmp_path / "features" / name).read_bytes() == (root / "features" / name).read_bytes()


def test_a_model_that_knows_its_captions_by_heart_draws_them(data, vqvae_folder, tmp_path):
    root, pipe, _ = data
    settings = TrainingSettings(
        root / "codes", tmp_path / "run", vqvae=vqvae_folder, features=root / "features", hidden_size=64,
        intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, token_dropout=0.0, residual_dropout=0.0,
        attention_dropout=0.0, condition_dropout=0.1, global_batch_size=6, learning_rate=3e-3, lr_warmup_steps=20,
        max_train_steps=700, num_parallel_tokens=4, validation_data=root / "codes",
        validation_features=root / "features", validation_steps=700, num_validation_images=4, seed=1,
    )  # fmt: skip
    train(settings)
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["validation_loss"] < 0.1
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1
    trained = PARTextToImagePipeline.from_pretrained(
        tmp_path / "run", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
    )
    assert trained.scheduler.config.num_parallel_tokens == 4
    dataset = CodeDataset(root / "codes", load_tokenizer(vqvae_folder))
    codes = torch.stack([dataset[number, 0][0] for number in range(6)])
    captions = [dataset.classes[dataset[number, 0][1]] for number in range(6)]
    for scale in (1.0, 1.5):
        drawn = trained(captions, temperature=0, guidance_scale=scale, output_type="latent").images
        assert (drawn == codes).float().mean() > 0.99
    swapped = trained(captions[::-1], temperature=0, guidance_scale=1.0, output_type="latent").images
    assert (swapped == codes).float().mean() < 0.9


def test_training_goes_on_from_a_caption_model_with_another_plan(data, vqvae_folder, tmp_path):
    root, pipe, _ = data
    pipe.vqvae = load_tokenizer(vqvae_folder).model
    pipe.save_pretrained(tmp_path / "start")
    settings = {
        "data": root / "codes", "model": tmp_path / "start", "vqvae": vqvae_folder, "features": root / "features",
        "global_batch_size": 6, "max_train_steps": 1, "num_validation_images": 0, "num_parallel_tokens": 16,
    }  # fmt: skip
    train(TrainingSettings(output=tmp_path / "run", **settings))
    trained = PARTextToImagePipeline.from_pretrained(tmp_path / "run")
    assert trained.scheduler.config.prefix_length == 6 and trained.scheduler.num_inference_steps == 16 + 3
    assert trained.transformer.config.num_learnable_tokens == 15 and trained.text_encoder is None


def test_features_that_do_not_fit_are_refused(data, vqvae_folder, make_text_pipeline, tmp_path):
    root, pipe, options = data
    (tmp_path / "others.txt").write_text("one\ntwo\n")
    extract_features(FeatureSettings(tmp_path / "others.txt", tmp_path / "others", **options))
    wide = make_text_pipeline(width=24)
    wide.vqvae = load_tokenizer(vqvae_folder).model
    wide.save_pretrained(tmp_path / "wide")
    given = {"data": root / "codes", "vqvae": vqvae_folder, "output": tmp_path / "run", "global_batch_size": 6}
    for more, message in (
        ({"features": tmp_path / "others"}, "`features` must be of the captions of `data`"),
        ({"features": root / "codes"}, "`features` must be of the captions|extract-features"),
        ({"features": tmp_path}, "`features` must be a folder made by extract-features"),
        ({"features": root / "features", "validation_data": root / "codes"}, "`validation_features` must be given"),
        ({"features": root / "features", "model": tmp_path / "wide"}, "`features` must be 6 of width 24.*6 of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            train(TrainingSettings(**given | more))
    for bad, message in (
        ({"data": tmp_path}, "cannot be read"),
        ({"text_encoder": tmp_path}, "`text_encoder`.*not a T5"),
    ):
        with pytest.raises(ValueError, match=message):
            extract_features(FeatureSettings(**{"data": root / "codes", "output": tmp_path / "out"} | options | bad))


def test_null_captions_are_learned_with_the_padding_of_their_caption(data):
    root, pipe, _ = data
    features = CaptionFeatures(root / "features", sorted(CAPTIONS))
    embeds, mask = left_pad(*features.batch([0, 1]))
    model = pipe.transformer.train()
    model.model.embed_condition.condition_dropout = 1.0
    grid = torch.randint(32, (2, 4, 4))
    inputs = pipe.scheduler.model_inputs(grid, 32)
    dropped = model(encoder_hidden_states=embeds, attention_mask=mask, **inputs).logits
    model.eval()
    null = model(encoder_hidden_states=embeds, attention_mask=mask, null_condition=torch.ones(2).bool(), **inputs)
    assert torch.equal(dropped, null.logits)
