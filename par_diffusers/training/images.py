"""Image folders, and the views of an image that training sees (paper, section 5; the crops are ADM's and LlamaGen's)."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset


NUM_VIEWS = {"none": 1, "flip": 2, "ten-crop": 10}
VIDEO_SUFFIXES = set(".avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .ts .webm .wmv".split())
IMAGE_SUFFIXES = set(Image.registered_extensions()) - VIDEO_SUFFIXES
# what Pillow raises for a file that is cut short, not an image, or broken inside
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of `image`, `size` pixels a side: halved by box filters while that is possible, then bicubic (ADM)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def make_views(image: Image.Image, image_size: int, augmentation: str, crop_range: float = 1.1) -> torch.Tensor:
    """
    Views of an RGB image, uint8 (views, 3, image_size, image_size).

    - `"none"`: the centre crop.
    - `"flip"`: the centre crop and its mirror image.
    - `"ten-crop"`: of a centre crop of `image_size * crop_range` pixels the four corners (upper left, upper right, lower
      left, lower right) and the centre, then the same of its mirror image.
    """
    size = int(image_size * crop_range) if augmentation == "ten-crop" else image_size
    pixels = torch.from_numpy(np.array(center_crop(image, size))).permute(2, 0, 1)
    if augmentation == "none":
        return pixels[None]
    both = torch.stack([pixels, pixels.flip(-1)])
    if augmentation == "flip":
        return both
    end, middle = size - image_size, round((size - image_size) / 2)
    corners = ((0, 0), (0, end), (end, 0), (end, end), (middle, middle))
    crops = [both[..., top : top + image_size, left : left + image_size] for top, left in corners]
    return torch.stack(crops, dim=1).flatten(0, 1)


def list_files(folder: Path, suffixes: set[str]) -> list[Path]:
    """All files in `folder` and its folders that end in one of `suffixes`, by their names, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes)


class MediaFolder(Dataset):
    """
    Files with classes, sorted by name: `folder/class name/.../file`, or flat with `metadata.csv` (or `metadata.jsonl`)
    that has the columns `file_name` and `label`, or `text` for captions (then every caption is a class). Sample i has
    `num_views` views, `load(i)`; `dataset[i, v]` is one of them.

    Args:
        folder (`str` or `Path`): The folder.
        classes (`list[str]`, *optional*): Class names in the order of their ids. Defaults to those found, sorted.

    Attributes: `files` (`list[str]`, relative to the folder), `labels` (`list[int]`), `classes` (`list[str]`).
    """

    kind, suffixes = "images", IMAGE_SUFFIXES
    other, other_suffixes = "videos", VIDEO_SUFFIXES

    def __init__(self, folder: str | Path, classes: list[str] | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"`data` must be a folder of {self.kind}, got {folder}.")
        named = _read_metadata(self.folder)
        if named is None:
            files = [file.relative_to(self.folder) for file in list_files(self.folder, self.suffixes)]
            named = [(file.as_posix(), file.parts[0]) for file in files if len(file.parts) > 1]
        if not named:
            others = len(list_files(self.folder, self.other_suffixes))
            raise ValueError(
                f"`data` must hold {self.kind}, in a folder for each class or listed in metadata.csv with file_name and "
                f"label; found none in {folder}"
                + (f", but {others} {self.other}, which take another tokenizer." if others else ".")
            )
        named.sort()
        found = sorted({name for _, name in named})
        unknown = [name for name in found if classes is not None and name not in classes]
        if unknown:
            raise ValueError(
                f"`data` must hold the classes asked for, {folder} has {len(unknown)} others: {', '.join(unknown[:5])}"
                f"{', ...' if len(unknown) > 5 else ''}."
            )
        self.classes = found if classes is None else list(classes)
        ids = {name: i for i, name in enumerate(self.classes)}
        self.files = [file for file, _ in named]
        self.labels = [ids[name] for _, name in named]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """Of the names of the files and of what is made of them."""
        return hashlib.sha256("\n".join([repr(self.view), *self.classes, *self.files]).encode()).hexdigest()[:16]

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        index, view = key
        try:
            return self.load(index, view)
        except UNREADABLE as error:
            raise ValueError(f"{self.folder / self.files[index]} cannot be read: {error}") from None


class ImageFolder(MediaFolder):
    """
    A [`MediaFolder`] of images.

    Args:
        folder (`str` or `Path`), classes (`list[str]`, *optional*): See there.
        image_size (`int`): Pixels of a side.
        augmentation (`str`), crop_range (`float`): See `make_views`.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int,
        augmentation: str = "none",
        crop_range: float = 1.1,
        classes: list[str] | None = None,
    ):
        self.image_size, self.augmentation, self.crop_range = image_size, augmentation, crop_range
        super().__init__(folder, classes)

    @property
    def view(self) -> tuple:
        return (self.image_size, self.augmentation, self.crop_range)

    @property
    def num_views(self) -> int:
        return NUM_VIEWS[self.augmentation]

    def load(self, index: int, view: int | None = None) -> torch.Tensor:
        """
        All views of an image, uint8 (views, 3, image_size, image_size), or one of them; raises one of `UNREADABLE` where
        the file is broken.
        """
        with Image.open(self.folder / self.files[index]) as image:
            views = make_views(image.convert("RGB"), self.image_size, self.augmentation, self.crop_range)
        return views if view is None else views[view]


def _read_metadata(folder: Path) -> list[tuple[str, str]] | None:
    """(file name, label) of a flat folder, or None where it has no list of labels."""
    if (folder / "metadata.csv").is_file():
        with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        name = "metadata.csv"
    elif (folder / "metadata.jsonl").is_file():
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        name = "metadata.jsonl"
    else:
        return None
    column = "text" if rows and "text" in rows[0] and "label" not in rows[0] else "label"
    if not all(row.get("file_name") and row.get(column) not in (None, "") for row in rows):
        raise ValueError(f"{folder / name} must give `file_name` and `label` (or `text`) for every image.")
    missing = [row["file_name"] for row in rows if not (folder / row["file_name"]).is_file()]
    if missing:
        raise ValueError(f"{folder / name} names {len(missing)} files that are not there: {missing[0]}, ...")
    return [(row["file_name"], str(row[column])) for row in rows]


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
