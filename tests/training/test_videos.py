"""Clips from videos: reading, codes, tokenizers, training."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import COLOURS
from diffusers import AutoencoderVidTok
from launching import read_losses, read_metrics
from PIL import Image

from par_diffusers import PARVideoPipeline
from par_diffusers.settings import ExtractionSettings, TokenizerSettings, TrainingSettings
from par_diffusers.training.codes import CodeDataset
from par_diffusers.training.extract_codes import extract_codes
from par_diffusers.training.images import to_pixels
from par_diffusers.training.tokenizers import ImageTokenizer, VideoTokenizer, load_tokenizer
from par_diffusers.training.train import train
from par_diffusers.training.train_tokenizer import build_tokenizer, train_tokenizer
from par_diffusers.training.videos import VideoFolder, read_clip, write_clip


def counting(frames: int) -> np.ndarray:
    """Frames whose brightness is ten times their number."""
    return np.repeat(10 * np.arange(frames, dtype=np.uint8), 16 * 16 * 3).reshape(frames, 16, 16, 3)


def numbers(clip: list[Image.Image]) -> list[int]:
    return [round(float(np.asarray(frame).mean()) / 10) for frame in clip]


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "mov", "mpg", "webm"])
def test_frames_are_those_shown_at_their_times(suffix, tmp_path):
    file, rate = tmp_path / f"video.{suffix}", 25 if suffix == "mpg" else 12
    write_clip(file, counting(24), rate)
    assert numbers(read_clip(file, 5, 0, 0.0)) == [0, 1, 2, 3, 4]
    assert numbers(read_clip(file, 5, rate, 0.0)) == [0, 1, 2, 3, 4]
    assert numbers(read_clip(file, 5, rate / 3, 0.0)) == [0, 3, 6, 9, 12]
    assert numbers(read_clip(file, 5, rate * 2, 0.0)) == [0, 0, 1, 1, 2]
    assert numbers(read_clip(file, 5, rate / 2, 1.0)) == [15, 17, 19, 21, 23]
    assert numbers(read_clip(file, 5, 0, 1.0)) == [19, 20, 21, 22, 23]
    assert numbers(read_clip(file, 5, rate, 0.5)) in ([9, 10, 11, 12, 13], [10, 11, 12, 13, 14])


def test_a_short_video_holds_its_last_frame(tmp_path):
    write_clip(tmp_path / "video.mp4", counting(4), 8)
    for place in (0.0, 0.7):
        assert numbers(read_clip(tmp_path / "video.mp4", 7, 8, place)) == [0, 1, 2, 3, 3, 3, 3]
        assert numbers(read_clip(tmp_path / "video.mp4", 7, 0, place)) == [0, 1, 2, 3, 3, 3, 3]


def test_clips_begin_at_random_places_of_their_own(videos):
    folder = VideoFolder(videos, 16, num_frames=9, frame_rate=8, num_clips=3, augmentation="flip")
    assert folder.num_views == 6 and folder.classes == sorted(COLOURS) and len(folder) == 18
    views = folder.load(0)
    assert views.shape == (6, 3, 9, 16, 16) and views.dtype == torch.uint8
    assert torch.equal(views[3:], views[:3].flip(-1))
    assert all(torch.equal(folder[0, view], views[view]) for view in range(6))
    starts = [folder[index, view][:, 0].max().item() for index in range(18) for view in range(3)]
    assert len(set(starts)) > 15
    again = VideoFolder(videos, 16, num_frames=9, frame_rate=8, num_clips=3, seed=1)
    assert again.fingerprint != folder.fingerprint and not torch.equal(again.load(0), views[:3])


def test_videos_that_cannot_be_read_are_skipped_and_counted(videos, vidtok_folder, tmp_path, capsys):
    shutil.copytree(videos, tmp_path / "in")
    whole = (tmp_path / "in" / "red" / "0002.mp4").read_bytes()
    (tmp_path / "in" / "red" / "0002.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "green" / "no.avi").write_text("no video")
    (tmp_path / "in" / "blue" / "empty.webm").touch()
    settings = ExtractionSettings(tmp_path / "in", tmp_path / "out", vqvae=vidtok_folder, image_size=16, num_frames=9)
    extract_codes(settings)
    printed = capsys.readouterr().out
    assert "17 videos of 3 classes, 2 views of 3x4x4 tokens each" in printed
    assert "3 videos could not be read and were skipped: blue/empty.webm, green/no.avi, red/0002.mp4" in printed
    assert len(CodeDataset(tmp_path / "out", load_tokenizer(vidtok_folder))) == 17


def test_codes_are_those_of_the_clips(videos, clip_codes, vidtok_folder):
    tokenizer = load_tokenizer(vidtok_folder)
    dataset = CodeDataset(clip_codes, tokenizer)
    folder = VideoFolder(videos, 16, num_frames=9, frame_rate=8, num_clips=2, augmentation="flip")
    assert dataset.grid_size == (3, 4, 4) and dataset.num_views == 4 and dataset.frame_rate == 8
    for index in (0, 7, 17):
        codes = tokenizer.encode(to_pixels(folder.load(index)))
        assert all(torch.equal(dataset[index, view][0], codes[view]) for view in range(4))
        assert dataset[index, 0][1] == folder.labels[index]
    facts = json.loads((clip_codes / "index.json").read_text())
    assert (facts["num_frames"], facts["num_clips"], facts["seed"], facts["vocab_size"]) == (9, 2, 0, 64)


@torch.no_grad()
def test_the_tokenizer_is_causal_in_time_and_keeps_batches_apart(make_vidtok):
    tokenizer = VideoTokenizer(make_vidtok())
    pixels = torch.rand(3, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(pixels)
    assert codes.shape == (3, *tokenizer.grid_size(16, 9)) and codes.dtype == torch.long
    assert torch.equal(tokenizer.encode(pixels[1:2]), codes[1:2])
    for frame, first in ((8, 2), (5, 2), (4, 1), (1, 1), (0, 0)):
        changed = pixels.clone()
        changed[:, :, frame:] = -changed[:, :, frame:]
        different = (tokenizer.encode(changed) != codes).flatten(2).any(-1).any(0)
        assert not different[:first].any() and different[first]
    vectors = tokenizer.vectors()
    assert vectors.shape == (64, 2) and len(vectors.unique(dim=0)) == 64
    assert torch.allclose(vectors[codes].movedim(-1, 1), tokenizer.model.indices_to_latent(codes.int()))


def test_a_tokenizer_is_found_wherever_it_lies(make_video_pipeline, make_pipeline, tmp_path):
    pipe = make_video_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    mark = VideoTokenizer(pipe.vae).fingerprint
    assert (
        load_tokenizer(tmp_path / "pipe").fingerprint == load_tokenizer(tmp_path / "pipe" / "vae").fingerprint == mark
    )
    make_pipeline().save_pretrained(tmp_path / "images")
    assert isinstance(load_tokenizer(tmp_path / "images"), ImageTokenizer)
    pipe.vae.half().save_pretrained(tmp_path / "half")
    assert load_tokenizer(tmp_path / "half").fingerprint == mark
    AutoencoderVidTok(ch=8, ch_mult=[1, 1, 1]).save_pretrained(tmp_path / "kl")
    with pytest.raises(ValueError, match="regularizer 'fsq'.*'kl'"):
        load_tokenizer(tmp_path / "kl")
    with pytest.raises(ValueError, match="must be a VQModel or an AutoencoderVidTok"):
        load_tokenizer(tmp_path / "pipe" / "transformer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 16}, "`num_frames` must be 1 more than a multiple of 4 for this tokenizer, got 16"),
        ({"image_size": 18}, "`image_size` must be a multiple of 4"),
        ({"augmentation": "ten-crop"}, "`augmentation` must be 'none' or 'flip' for videos, got 'ten-crop'"),
        ({"data": "pictures"}, "must hold videos.*96 images, which take another tokenizer"),
        ({"vqvae": "images"}, "must hold images.*18 videos, which take another tokenizer"),
        ({"classes": "names"}, "must hold the classes asked for.*blue"),
    ],
)
def test_what_does_not_fit_is_named(changes, message, videos, pictures, vidtok_folder, vqvae_folder, tmp_path):
    (tmp_path / "names.txt").write_text("red\ngreen\n")
    places = {"pictures": pictures, "images": vqvae_folder, "names": tmp_path / "names.txt"}
    changes = {name: places.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    options = {"data": videos, "vqvae": vidtok_folder, "image_size": 16, "num_frames": 9} | changes
    with pytest.raises(ValueError, match=message):
        extract_codes(ExtractionSettings(output=tmp_path / "out", **options))


@pytest.fixture
def clips(tiny, clip_codes, vidtok_folder):
    return tiny | {"data": clip_codes, "vqvae": vidtok_folder, "num_attention_heads": 2, "hidden_size": 36}


def test_training_on_clips_leaves_a_pipeline_that_draws_them(clips, tmp_path, videos):
    options = {"max_train_steps": 60, "validation_data": clips["data"], "num_validation_images": 3, "top_k": 50}
    folder = train(
        TrainingSettings(**clips | options, output=tmp_path / "run", guidance_scale=1.5, validation_steps=60)
    )
    metrics = read_metrics(folder)
    assert metrics[-1]["validation_loss"] < metrics[0]["loss"] - 1
    assert np.array(metrics[-1]["validation_loss_per_token"]).shape == (12, 4)
    pipe = PARVideoPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.frame_rate == 8 and pipe.config.id2label == {"0": "blue", "1": "green", "2": "red"}
    assert (pipe.scheduler.config.guidance_scale, pipe.scheduler.config.top_k) == (1.5, 50)
    assert len(pipe("red").frames[0]) == 9 and pipe.num_timesteps == 15
    assert Image.open(folder / "samples" / "step-000060.png").size == (5 * 16, 3 * 16)
    assert Image.open(folder / "validation" / "step-000060.png").width > 200
    # the paper's (table 6), though a number of steps is given here
    echo = (folder / "training.yaml").read_text()
    assert "num_train_epochs: 3000" in echo and "lr_warmup_epochs: 150" in echo
    # and on, with another plan
    more = {name: clips[name] for name in clips if not name.startswith(("hidden", "inter", "num_hidden", "num_att"))}
    more |= {"model": folder, "num_parallel_tokens": 16, "max_train_steps": 3}
    again = PARVideoPipeline.from_pretrained(train(TrainingSettings(**more, output=tmp_path / "more")))
    assert again.scheduler.num_inference_steps == 18 and again.transformer.config.num_learnable_tokens == 15
    assert again.config.id2label == pipe.config.id2label


def test_an_interrupted_run_on_clips_goes_on_with_the_same_losses(clips, tmp_path):
    settings = TrainingSettings(**clips | {"max_train_steps": 8}, output=tmp_path / "run", checkpointing_steps=3)
    losses = read_losses(train(settings))
    train(
        TrainingSettings(**clips | {"max_train_steps": 8}, output=tmp_path / "run", checkpointing_steps=3),
        "checkpoint-6",
    )
    assert read_losses(tmp_path / "run") == losses


def test_images_and_clips_are_not_mixed_in_training(clips, tiny, make_pipeline, make_model, tmp_path):
    pipe = make_pipeline()
    pipe.transformer = make_model(vocab_size=64)
    pipe.save_pretrained(tmp_path / "images")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = {name: value for name, value in clips.items() if name not in sizes} | {"output": tmp_path / "run"}
    with pytest.raises(ValueError, match="codes of the tokenizer"):
        train(TrainingSettings(**given | {"vqvae": tiny["vqvae"]}))
    with pytest.raises(ValueError, match="`features` go with codes of images"):
        train(TrainingSettings(**given | {"features": "features"}))
    with pytest.raises(ValueError, match="`model` must be a PARVideoPipeline for these data.*is a PARPipeline"):
        train(TrainingSettings(**given | {"model": tmp_path / "images"}))


@pytest.fixture
def vidtok(videos):
    return {
        "data": videos,
        "validation_data": videos,
        "architecture": "AutoencoderVidTok",
        "image_size": 16,
        "num_frames": 9,
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 1,
        "codebook_size": 64,
        "global_batch_size": 6,
        "max_train_steps": 6,
        "lr_warmup_steps": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "mixed_precision": "no",
    }


def test_a_video_tokenizer_learns_to_reproduce_its_clips(vidtok, videos, tmp_path):
    settings = TokenizerSettings(**vidtok | {"learning_rate": 1e-3, "max_train_steps": 40}, output=tmp_path / "vidtok")
    folder = train_tokenizer(settings)
    metrics = read_metrics(folder)
    assert metrics[-1]["validation_l1"] < 0.5 * metrics[0]["l1"] and metrics[-1]["validation_codebook_usage"] > 0
    with Image.open(folder / "samples" / "step-000040.png") as picture:
        assert picture.size == (5 * 16, 16 * 16)  # eight clips above theirs, five frames each
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, VideoTokenizer) and tokenizer.num_codes == 64
    # the stock model reproduces the clips by itself, from codes alone
    media = VideoFolder(videos, 16, 9, 8)
    pixels = to_pixels(torch.stack([media[index, 0] for index in range(18)]))
    with torch.no_grad():
        decoded = tokenizer.model.decode(tokenizer.encode(pixels), decode_from_indices=True)
    assert (decoded - pixels).abs().mean() == pytest.approx(metrics[-1]["validation_l1"], abs=1e-3)


def test_an_interrupted_video_tokenizer_goes_on_with_the_same_losses(vidtok, tmp_path):
    settings = TokenizerSettings(**vidtok, output=tmp_path / "vidtok", checkpointing_steps=2)
    folder = train_tokenizer(settings)
    losses, weights = read_losses(folder), AutoencoderVidTok.from_pretrained(folder).state_dict()
    train_tokenizer(settings, resume="checkpoint-4")
    assert read_losses(folder) == losses
    again = AutoencoderVidTok.from_pretrained(folder).state_dict()
    assert all(weights[name].equal(again[name]) for name in weights)


def test_training_goes_on_with_longer_clips(vidtok, tmp_path):
    described = ("architecture", "block_out_channels", "layers_per_block", "codebook_size")
    short = train_tokenizer(TokenizerSettings(**vidtok | {"num_frames": 5}, output=tmp_path / "short"))
    further = {name: value for name, value in vidtok.items() if name not in described}
    folder = train_tokenizer(TokenizerSettings(**further, vqvae=short, output=tmp_path / "long"))
    assert AutoencoderVidTok.load_config(folder)["ch_mult"] == [1, 1, 2]
    assert read_losses(folder)[0] < read_losses(short)[0]
    with pytest.raises(ValueError, match="`architecture` must not be given together with `vqvae`"):
        build_tokenizer(TokenizerSettings(**vidtok, vqvae=short, output=tmp_path / "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 100}, "`codebook_size` must be a power of 8, got 100"),
        ({"block_out_channels": (8, 12)}, r"`block_out_channels` must be multiples of the first, got \(8, 12\)"),
        ({"num_frames": 10}, "`num_frames` must be 1 more than a multiple of 4"),
        ({"augmentation": "ten-crop"}, "`augmentation` must be 'none' or 'flip' for videos"),
    ],
)
def test_video_tokenizers_that_cannot_be_are_refused(changes, message, vidtok, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TokenizerSettings(**vidtok | changes, output=tmp_path / "vidtok"))


def test_names_of_ucf101_are_in_their_official_order(tmp_path, make_vidtok, make_model):
    from par_diffusers.conversion.convert_llamagen import read_labels

    names = read_labels("ucf101", 101)
    assert (names["0"], names["34"], names["35"], names["100"]) == (
        "ApplyEyeMakeup",
        "Hammering",
        "HammerThrow",
        "YoYo",
    )
    assert len(set(names.values())) == 101
    with pytest.raises(ValueError, match="classes 0 to 999"):
        read_labels("ucf101", 1000)


def test_the_losses_of_a_large_vocabulary_are_made_in_parts(make_model, monkeypatch):
    from par_diffusers.models import modeling_par

    model = make_model(vocab_size=512, token_dropout=0.0)
    labels = torch.randint(512, (3, 7), generator=torch.Generator().manual_seed(0))
    labels[1, 2] = -100
    inputs = {"class_labels": torch.tensor([1, 2, 3]), "input_ids": labels[:, :-1].clamp(min=0)}
    inputs["position_ids"] = torch.stack([torch.arange(7), torch.arange(7)], -1) - 1
    whole = model(**inputs, labels=labels)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    expected = torch.autograd.grad(whole.loss, model.parameters(), allow_unused=True)
    monkeypatch.setattr(modeling_par, "_MAX_LOGITS", 4 * 512)
    found = model(**inputs, labels=labels, skip_logits=True)
    assert found.logits is None and found.loss.shape == (3, 7) and found.loss[1, 2] == 0
    assert found.loss.sum().item() / 20 == pytest.approx(whole.loss.item(), rel=1e-6)
    gradients = torch.autograd.grad(found.loss.sum() / 20, model.parameters(), allow_unused=True)
    assert max(sizes) == 4 * 512 and len(sizes) == 12  # six parts, made again in the backward pass
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours is theirs is None or torch.allclose(ours, theirs, atol=1e-6)
    with pytest.raises(ValueError, match="`skip_logits` goes with `labels`"):
        model(**inputs, skip_logits=True)
