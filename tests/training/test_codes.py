import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import VQModel
from launching import finish, start
from PIL import Image
from safetensors.torch import load_file, save_file

from par_diffusers.settings import ExtractionSettings
from par_diffusers.training.codes import CodeDataset
from par_diffusers.training.extract_codes import extract_codes
from par_diffusers.training.images import ImageFolder, to_pixels
from par_diffusers.training.tokenizers import ImageTokenizer, load_tokenizer


def everything(folder, tokenizer) -> tuple[torch.Tensor, list[int]]:
    """(images, views, h, w) and labels."""
    dataset = CodeDataset(folder, tokenizer)
    codes = [torch.stack([dataset[i, v][0] for v in range(dataset.num_views)]) for i in range(len(dataset))]
    return torch.stack(codes), [dataset[i, 0][1] for i in range(len(dataset))]


@torch.no_grad()
def test_codes_are_the_nearest_of_the_codebook(make_vqvae):
    vqvae = make_vqvae()
    pixels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = ImageTokenizer(vqvae).encode(pixels)
    assert codes.shape == (5, 8, 8) and codes.dtype == torch.long
    latents = vqvae.encode(pixels).latents
    distances = (latents[:, None] - vqvae.quantize.embedding.weight[None, :, :, None, None]).square().sum(2)
    assert torch.equal(codes, distances.argmin(1))


@pytest.mark.parametrize("augmentation, views", [("none", 1), ("flip", 2), ("ten-crop", 10)])
def test_shards_hold_every_view_of_every_image(augmentation, views, pictures, vqvae_folder, tmp_path):
    settings = ExtractionSettings(
        pictures, tmp_path, vqvae=vqvae_folder, image_size=16, augmentation=augmentation, shard_size=50, batch_size=7
    )
    extract_codes(settings)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "codes-00000.safetensors",
        "codes-00001.safetensors",
        "index.json",
    ]
    tokenizer, images = load_tokenizer(vqvae_folder), ImageFolder(pictures, 16, augmentation)
    codes, labels = everything(tmp_path, tokenizer)
    assert codes.shape == (96, views, 8, 8) and labels == images.labels
    for index in (0, 49, 50, 95):
        assert torch.equal(codes[index], tokenizer.encode(to_pixels(images.load(index))))
    assert load_file(tmp_path / "codes-00000.safetensors")["codes"].dtype == torch.uint16
    assert json.loads((tmp_path / "index.json").read_text())["classes"] == ["blue", "green", "red"]


def test_an_extraction_goes_on_where_it_was_interrupted(codes, pictures, vqvae_folder, tmp_path):
    shutil.copytree(codes, tmp_path / "out")
    (tmp_path / "out" / "index.json").unlink()
    (tmp_path / "out" / "codes-00001.safetensors").unlink()
    (tmp_path / "out" / ".codes-00001.safetensors.partial").write_bytes(b"half a shard")
    kept = (tmp_path / "out" / "codes-00000.safetensors").stat().st_mtime_ns
    extract_codes(ExtractionSettings(pictures, tmp_path / "out", vqvae=vqvae_folder, image_size=16, shard_size=40))
    assert (tmp_path / "out" / "codes-00000.safetensors").stat().st_mtime_ns == kept
    for file in codes.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


def test_two_processes_write_what_one_writes(codes, pictures, vqvae_folder, tmp_path):
    values = {"data": pictures, "vqvae": vqvae_folder, "output": tmp_path / "out", "image_size": 16, "shard_size": 40}
    printed = finish(start("extract-codes", values, processes=2))
    assert "96 images of 3 classes, 2 views of 8x8 tokens each, 3 shards" in printed
    ours, theirs = (everything(folder, load_tokenizer(vqvae_folder)) for folder in (tmp_path / "out", codes))
    assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]
    # a process each for the shards: both have encoded
    assert printed.count("encoding") >= 1 and "56/56" in printed


def test_images_that_cannot_be_read_are_counted_and_left_out(make_pictures, vqvae_folder, tmp_path, capsys):
    make_pictures(tmp_path / "in", 9)
    whole = (tmp_path / "in" / "red" / "0005.png").read_bytes()
    (tmp_path / "in" / "red" / "0005.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "blue" / "0000.png").write_bytes(b"not a picture")
    (tmp_path / "in" / "blue" / "0003.png").write_bytes(b"")
    extract_codes(ExtractionSettings(tmp_path / "in", tmp_path / "out", vqvae=vqvae_folder, image_size=16))
    printed = capsys.readouterr().out
    assert "6 images of 3 classes" in printed
    assert "3 images could not be read and were skipped: blue/0000.png, blue/0003.png, red/0005.png" in printed
    codes, labels = everything(tmp_path / "out", load_tokenizer(vqvae_folder))
    images = ImageFolder(tmp_path / "in", 16)
    readable = [
        i for i, file in enumerate(images.files) if file not in ("blue/0000.png", "blue/0003.png", "red/0005.png")
    ]
    assert labels == [images.labels[i] for i in readable]
    for place, index in enumerate(readable):
        assert torch.equal(codes[place, :1], load_tokenizer(vqvae_folder).encode(to_pixels(images.load(index))))


def test_other_settings_do_not_mix_with_shards_that_are_there(codes, pictures, vqvae_folder, tmp_path):
    shutil.copytree(codes, tmp_path / "out")
    same = {"data": pictures, "output": tmp_path / "out", "vqvae": vqvae_folder, "image_size": 16, "shard_size": 40}
    with pytest.raises(ValueError, match="differs in augmentation, num_views"):
        extract_codes(ExtractionSettings(**same | {"augmentation": "ten-crop"}))
    with pytest.raises(ValueError, match="differs in image_size, grid_size"):
        extract_codes(ExtractionSettings(**same | {"image_size": 32}))


def test_extraction_refuses_what_cannot_work(pictures, vqvae_folder, tmp_path):
    same = {"data": pictures, "output": tmp_path / "out", "vqvae": vqvae_folder, "image_size": 16}
    with pytest.raises(ValueError, match="`image_size` must be a multiple of 2 for this tokenizer, got 17"):
        extract_codes(ExtractionSettings(**same | {"image_size": 17}))
    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    with pytest.raises(ValueError, match="has 1 others: blue"):
        extract_codes(ExtractionSettings(**same, classes=tmp_path / "classes.txt"))
    for number in range(2):
        (tmp_path / "broken" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "broken" / "cat" / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="must hold files that can be read, none of 2 can"):
        extract_codes(ExtractionSettings(**same | {"data": tmp_path / "broken"}))


def test_class_ids_of_validation_data_follow_the_list(pictures, vqvae_folder, tmp_path):
    (tmp_path / "classes.json").write_text('["red", "white", "blue", "green"]')
    same = {"data": pictures, "vqvae": vqvae_folder, "image_size": 16, "classes": tmp_path / "classes.json"}
    extract_codes(ExtractionSettings(**same, output=tmp_path / "out"))
    dataset = CodeDataset(tmp_path / "out", load_tokenizer(vqvae_folder))
    assert dataset.classes == ["red", "white", "blue", "green"]
    assert dataset[0, 0][1] == 2 and dataset[95, 0][1] == 0


def write_llamagen(folder, codes: np.ndarray, labels: list[int], prefix: str = "") -> None:
    """LlamaGen's layout: a file an image, codes (1, views, tokens), labels (1,)."""
    for kind in ("codes", "labels"):
        (folder / f"{prefix}{kind}").mkdir(parents=True)
    for number, (grid, label) in enumerate(zip(codes, labels, strict=True)):
        np.save(folder / f"{prefix}codes" / f"{number}.npy", grid[None])
        np.save(folder / f"{prefix}labels" / f"{number}.npy", np.array([label]))


@pytest.mark.parametrize("prefix", ["", "imagenet384_"])
def test_llamagens_layout_is_read(prefix, make_vqvae, tmp_path):
    codes = np.random.default_rng(0).integers(0, 32, (12, 10, 16))
    labels = list(range(12))
    write_llamagen(tmp_path, codes, labels, prefix)
    dataset = CodeDataset(tmp_path, ImageTokenizer(make_vqvae()))
    assert (len(dataset), dataset.num_views, dataset.grid_size, dataset.classes) == (12, 10, (4, 4), None)
    for index, view in ((0, 0), (11, 9), (10, 3)):
        grid, label = dataset[index, view]
        assert grid.dtype == torch.long and grid.flatten().tolist() == codes[index, view].tolist()
        assert label == labels[index]


def test_a_single_view_in_llamagens_layout_is_read(make_vqvae, tmp_path):
    write_llamagen(tmp_path, np.arange(32).reshape(2, 16), [3, 4])
    dataset = CodeDataset(tmp_path, ImageTokenizer(make_vqvae()))
    assert dataset.num_views == 1 and dataset[1, 0][0].flatten().tolist() == list(range(16, 32))


def test_codes_outside_the_vocabulary_are_named(make_vqvae, tmp_path):
    write_llamagen(tmp_path, np.full((2, 1, 16), 32), [0, 1])
    with pytest.raises(ValueError, match="codes of the tokenizer's 32, .*1.npy has 32 to 32"):
        CodeDataset(tmp_path, ImageTokenizer(make_vqvae()))[1, 0]


def test_a_folder_of_neither_kind_is_refused(make_vqvae, tmp_path):
    with pytest.raises(ValueError, match="`data` must be a folder of extract-codes"):
        CodeDataset(tmp_path, ImageTokenizer(make_vqvae()))
    write_llamagen(tmp_path, np.zeros((2, 1, 15), int), [0, 1])
    with pytest.raises(ValueError, match="square grids.*15 tokens"):
        CodeDataset(tmp_path, ImageTokenizer(make_vqvae()))


def test_shards_of_another_tokenizer_are_refused(codes, make_vqvae):
    other = ImageTokenizer(make_vqvae(seed=1))
    with pytest.raises(ValueError, match=f"`data` must be codes of the tokenizer given.*is {other.fingerprint}"):
        CodeDataset(codes, other)


def test_the_fingerprint_is_that_of_the_codes(make_vqvae, tmp_path):
    vqvae = make_vqvae()
    tokenizer = ImageTokenizer(vqvae)
    mark = tokenizer.fingerprint
    vqvae.half().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == mark  # saved in half precision
    vqvae.decoder.conv_out.bias.data += 1
    assert tokenizer.fingerprint == mark  # another decoder for the same codes
    vqvae.quantize.embedding.weight.data[3] *= -1
    assert tokenizer.fingerprint != mark


def test_the_tokenizer_of_a_pipeline_is_found(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer.model, VQModel) and tokenizer.fingerprint == ImageTokenizer(pipe.vqvae).fingerprint


def test_shards_are_read_without_loading_them(codes, vqvae_folder, tmp_path):
    # a shard far larger than what is read from it, with a hole where nobody looks
    index = json.loads((codes / "index.json").read_text())
    big = torch.zeros(20000, 2, 8, 8, dtype=torch.uint16)
    big[19999, 1, 7, 7] = 31
    save_file({"codes": big, "labels": torch.arange(20000, dtype=torch.int32)}, tmp_path / "codes-00000.safetensors")
    index["shards"] = [{"file": "codes-00000.safetensors", "num_images": 20000}]
    (tmp_path / "index.json").write_text(json.dumps(index))
    grid, label = CodeDataset(tmp_path, load_tokenizer(vqvae_folder))[19999, 1]
    assert int(grid[7, 7]) == 31 and int(grid.sum()) == 31 and label == 19999


def test_photographs_of_any_shape_and_mode_are_encoded(vqvae_folder, tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.new("L", (40, 25), 100).save(tmp_path / "in" / "a" / "grey.jpg")
    Image.new("RGBA", (20, 90), (10, 200, 30, 128)).save(tmp_path / "in" / "a" / "alpha.png")
    Image.new("P", (16, 16)).save(tmp_path / "in" / "a" / "palette.gif")
    extract_codes(ExtractionSettings(tmp_path / "in", tmp_path / "out", vqvae=vqvae_folder, image_size=16))
    assert len(CodeDataset(tmp_path / "out", load_tokenizer(vqvae_folder))) == 3
