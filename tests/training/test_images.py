import json

import numpy as np
import pytest
import torch
from PIL import Image

from par_diffusers.training.images import ImageFolder, center_crop, make_views, to_pixels


def ramp(width: int, height: int) -> Image.Image:
    """Red grows with the column, green with the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(40, 40), (97, 41), (64, 200), (20, 33)])
def test_centre_crop_is_the_central_square(size):
    crop = np.asarray(center_crop(ramp(*size), 32)).astype(float)
    assert crop.shape == (32, 32, 3)
    # as much is cut left as right, and the shorter side is whole
    for axis, channel in ((0, 0), (1, 1)):
        values = crop[..., channel].mean(1 - (1 - axis))
        spread = 255 * min(size) / size[axis]
        assert abs(values[0] + values[-1] - 255) < 12
        assert abs((values[-1] - values[0]) - spread) < 18


def test_an_image_of_the_right_size_is_left_as_it_is():
    image = ramp(48, 48)
    assert np.array_equal(np.asarray(center_crop(image, 48)), np.asarray(image))
    assert torch.equal(make_views(image, 48, "none")[0].permute(1, 2, 0), torch.from_numpy(np.array(image)))


def test_flip_adds_the_mirror_image():
    first, second = make_views(ramp(30, 30), 30, "flip")
    assert torch.equal(second, first.flip(-1)) and not torch.equal(first, second)


def test_ten_crops_are_corners_and_centre_and_those_of_the_mirror_image():
    views = make_views(ramp(44, 44), 40, "ten-crop", crop_range=1.1)
    assert views.shape == (10, 3, 40, 40)
    whole = torch.from_numpy(np.array(ramp(44, 44))).permute(2, 0, 1)
    corners = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]
    for index, (top, left) in enumerate(corners):
        assert torch.equal(views[index], whole[:, top : top + 40, left : left + 40])
        assert torch.equal(views[5 + index], whole.flip(-1)[:, top : top + 40, left : left + 40])


def test_pixels_span_minus_one_to_one():
    assert to_pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_a_folder_of_classes_is_read_in_the_order_of_names(pictures):
    images = ImageFolder(pictures, 16)
    assert images.classes == ["blue", "green", "red"] and len(images) == 96
    assert images.files == sorted(images.files) and images.labels == sorted(images.labels)
    brightest = torch.stack([images[i, 0].float().mean((1, 2)) for i in range(96)]).argmax(1)
    assert torch.equal(2 - brightest, torch.tensor(images.labels))


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_flat_folder_is_read_by_its_list_of_labels(name, tmp_path):
    for number in range(3):
        ramp(20, 20).save(tmp_path / f"{number}.png")
    rows = [("0.png", "cat"), ("1.png", "ant"), ("2.png", "cat")]
    if name == "metadata.csv":
        text = "file_name,label\n" + "".join(f"{file},{label}\n" for file, label in rows)
    else:
        text = "".join(json.dumps({"file_name": file, "label": label}) + "\n" for file, label in rows)
    (tmp_path / name).write_text(text)
    images = ImageFolder(tmp_path, 16)
    assert images.classes == ["ant", "cat"] and images.labels == [1, 0, 1] and images.num_views == 1


def test_class_ids_follow_the_list_of_classes_where_one_is_given(pictures):
    images = ImageFolder(pictures, 16, classes=["red", "white", "green", "blue"])
    assert images.classes == ["red", "white", "green", "blue"] and set(images.labels) == {0, 2, 3}


def test_data_errors_say_what_is_wrong(pictures, tmp_path):
    with pytest.raises(ValueError, match="`data` must be a folder of images"):
        ImageFolder(tmp_path / "nowhere", 16)
    with pytest.raises(ValueError, match="`data` must hold images.*found none"):
        ImageFolder(tmp_path, 16)
    with pytest.raises(ValueError, match="has 2 others: green, red"):
        ImageFolder(pictures, 16, classes=["blue"])
    (tmp_path / "metadata.csv").write_text("file_name,label\nmissing.png,cat\n")
    with pytest.raises(ValueError, match="names 1 files that are not there: missing.png"):
        ImageFolder(tmp_path, 16)
    (tmp_path / "metadata.csv").write_text("file,class\n1.png,cat\n")
    with pytest.raises(ValueError, match="must give `file_name` and `label`"):
        ImageFolder(tmp_path, 16)


def test_a_broken_image_is_named(tmp_path, make_pictures):
    make_pictures(tmp_path, 3)
    (tmp_path / "red" / "0002.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="0002.png cannot be read"):
        ImageFolder(tmp_path, 16)[2, 0]
