import hashlib
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from par_diffusers.evaluation.sources import open_source
from par_diffusers.sampling.sample import sample
from par_diffusers.settings import SamplingSettings


def read(source, batch_size=3) -> np.ndarray:
    batches = list(source.batches(batch_size))
    assert all(batch.dtype == torch.uint8 and len(batch) <= batch_size for batch in batches)
    return torch.cat(batches).movedim(1, -1).numpy()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_images_and_labels(save, make_images, tmp_path):
    images, labels = make_images(10, 6, 5), np.arange(10)
    save(tmp_path / "s.npz", images, labels)
    source = open_source(tmp_path / "s.npz")
    assert (source.kind, source.shape, source.is_video, source.statistics) == ("npz", (10, 6, 5, 3), False, None)
    assert (read(source) == images).all() and source.labels.tolist() == labels.tolist()
    assert source.sha256() == hashlib.sha256((tmp_path / "s.npz").read_bytes()).hexdigest()


def test_npz_of_videos(make_images, tmp_path):
    videos = make_images(4, 5, 6, 7)
    np.savez(tmp_path / "v.npz", videos)
    source = open_source(tmp_path / "v.npz")
    assert source.is_video and source.shape == (4, 5, 6, 7, 3) and source.labels is None
    assert (read(source) == videos).all()
    assert next(source.batches(2)).shape == (2, 3, 5, 6, 7)


def test_npz_of_statistics_with_and_without_images(make_images, tmp_path):
    moments = {"mu": np.zeros(4), "sigma": np.eye(4)}
    np.savez(tmp_path / "m.npz", **moments)
    source = open_source(tmp_path / "m.npz")
    assert (source.kind, len(source)) == ("statistics", 0) and source.moments[1].equal(torch.eye(4).double())
    np.savez(tmp_path / "both.npz", make_images(3, 4, 4), mu_s=np.ones(2), **moments)
    source = open_source(tmp_path / "both.npz")
    assert (source.kind, len(source)) == ("npz", 3) and set(source.statistics) == {"mu", "sigma", "mu_s"}


def test_a_file_is_not_read_into_memory(make_images, tmp_path):
    np.savez(tmp_path / "s.npz", make_images(400, 64, 64))
    source = open_source(tmp_path / "s.npz")
    tracemalloc.start()
    total = sum(batch.float().sum().item() for batch in source.batches(4))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 0 and peak < 1e6 < (tmp_path / "s.npz").stat().st_size / 4


def test_folder_that_sample_made(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    settings = SamplingSettings(model=tmp_path / "pipe", output=tmp_path / "out", num_samples=10, shard_size=4)
    folder = sample(settings)
    source, npz = open_source(folder), open_source(folder / "samples.npz")
    assert source.kind == "samples" and source.shape == npz.shape == (10, 8, 8, 3)
    assert (read(source) == read(npz)).all() and source.labels.equal(npz.labels)
    assert source.sha256() != npz.sha256()

    shard = folder / "samples-00002.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match="not finished: 8 of 10 samples"):
        open_source(folder)
    shard.write_bytes(data[:-5])
    with pytest.raises(ValueError, match="samples-00002.safetensors cannot be read"):
        open_source(folder)


def test_image_folders(make_images, write_folder):
    images = make_images(7, 6, 5)
    flat = open_source(write_folder(images, name="flat"))
    assert (flat.kind, flat.shape, flat.labels) == ("images", (7, 6, 5, 3), None) and (read(flat) == images).all()
    classes = open_source(write_folder(images, [0, 2, 0, 1, 1, 2, 2], name="classes"))
    assert classes.labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert (read(classes) == images[[0, 2, 3, 4, 1, 5, 6]]).all()
    cropped = open_source(flat.path, image_size=4)
    assert cropped.shape == (7, 4, 4, 3) and read(cropped).shape == cropped.shape


def test_a_folder_is_hashed_by_its_names_and_files(make_images, write_folder):
    folder = write_folder(make_images(3, 4, 4))
    files = sorted(folder.iterdir())
    lines = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    before = open_source(folder).sha256()
    assert before == hashlib.sha256(lines.encode()).hexdigest()
    files[0].rename(folder / "other.png")
    assert open_source(folder).sha256() != before


@pytest.mark.parametrize(
    "arrays, said",
    [
        (
            {"arr_0": np.zeros((2, 4, 4, 3), np.float32)},
            r"must be uint8 \(N, H, W, 3\).* it is float32 \(2, 4, 4, 3\)",
        ),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"it is uint8 \(2, 3, 4, 4\)"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "has no images"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, r"must hold `arr_0` .* it has \['images'\]"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"must hold `mu` \(D,\) and `sigma` \(D, D\)"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.arange(3)}, "a class id for each of 2 images"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.array([{}, {}])}, "not a readable .npz"),
    ],
    ids=range(7),
)
def test_bad_npz_files_are_named(arrays, said, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        open_source(tmp_path / "bad.npz")


def test_files_that_are_no_npz(tmp_path):
    for content in (b"", b"PK\x03\x04 torn", b"text"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ValueError, match="not a readable .npz"):
            open_source(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match="no file or folder"):
        open_source(tmp_path / "missing")


def test_bad_image_folders(make_images, write_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither images nor samples"):
        open_source(tmp_path / "empty")
    folder = write_folder(make_images(3, 6, 6))
    Image.new("RGB", (5, 6)).save(folder / "9.png")
    with pytest.raises(ValueError, match="of one size, 0000.png has 6 x 6 pixels and 9.png 5 x 6"):
        read(open_source(folder))
    (folder / "9.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="9.png cannot be read"):
        read(open_source(folder))
