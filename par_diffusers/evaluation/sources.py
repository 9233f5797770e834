"""
What can be compared: images or clips in an `.npz`, in a folder that `sample` made or in a folder of images or videos; saved
statistics.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from par_diffusers.sampling.sample import MANIFEST
from par_diffusers.training.images import IMAGE_SUFFIXES, UNREADABLE, VIDEO_SUFFIXES, list_files, make_views
from par_diffusers.training.videos import VideoFolder


@dataclass
class Source:
    """
    One side of a comparison.

    Attributes:
        path (`Path`): File or folder.
        kind (`str`): `"npz"`, `"samples"`, `"images"`, `"videos"` or `"statistics"`.
        stored (`tuple[int, ...]`): Of all images (N, H, W, 3), or clips (N, T, H, W, 3); empty for statistics alone.
        stored_labels (`torch.LongTensor` or `None`): Class ids (N,).
        names (`list[str]` or `None`): Of the classes, in the order of their ids.
        statistics (`dict[str, numpy.ndarray]` or `None`): `mu` (D,) and `sigma` (D, D) of the features of the whole set,
            and what else the file has, except images and labels.
        files (`list[Path]`): All that is read.
        videos (`VideoFolder` or `None`): The clips of a folder of videos.
        num_frames (`int` or `None`): First frames of each clip to compare, all without it.
        per_class (`int` or `None`): First images or clips of each class to compare, all without it.
    """

    path: Path
    kind: str
    stored: tuple[int, ...]
    files: list[Path]
    stored_labels: torch.LongTensor | None = None
    names: list[str] | None = None
    statistics: dict[str, np.ndarray] | None = None
    image_size: int | None = None
    videos: VideoFolder | None = None
    num_frames: int | None = None
    per_class: int | None = None

    def __post_init__(self):
        self.kept = torch.ones(self.stored[0] if self.stored else 0, dtype=torch.bool)
        if self.num_frames is not None and self.stored:
            if not self.is_video:
                raise ValueError(
                    f"{self.path} must hold clips, of which {self.num_frames} frames (`num_frames`) are compared; it "
                    "holds images."
                )
            if self.num_frames > self.stored[1]:
                raise ValueError(
                    f"`num_frames` must be at most the {self.stored[1]} of {self.path}, got {self.num_frames}."
                )
        if self.per_class is not None and self.stored:
            if self.stored_labels is None:
                raise ValueError(f"`per_class` needs the classes of the images, {self.path} does not say them.")
            for label in self.stored_labels.unique():
                self.kept[(self.stored_labels == label).nonzero().flatten()[self.per_class :]] = False

    def __len__(self) -> int:
        return int(self.kept.sum())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is compared."""
        if not self.stored:
            return ()
        return (len(self), *((self.num_frames or self.stored[1],) if self.is_video else ()), *self.stored[-3:])

    @property
    def labels(self) -> torch.LongTensor | None:
        return None if self.stored_labels is None else self.stored_labels[self.kept]

    @property
    def is_video(self) -> bool:
        return len(self.stored) == 5

    @property
    def moments(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and covariance of the features of the whole set, where the file has them."""
        return self.statistics and tuple(torch.from_numpy(self.statistics[name]) for name in ("mu", "sigma"))

    def batches(self, batch_size: int) -> Iterator[torch.ByteTensor]:
        """All images in order, uint8 (B, 3, H, W), or videos (B, 3, T, H, W); one batch in memory, of `samples` one shard."""
        read = {"npz": self._npz_batches, "samples": self._shard_batches, "images": self._file_batches}
        read |= {"videos": self._video_batches}
        start = 0
        for images in read[self.kind](batch_size):
            kept = self.kept[start : start + len(images)]
            start += len(images)
            images = images[kept].movedim(-1, 1)
            if len(images):
                yield images if self.num_frames is None else images[:, :, : self.num_frames]

    def _npz_batches(self, batch_size: int) -> Iterator[torch.ByteTensor]:
        per_image = int(np.prod(self.stored[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
            _read_header(stream)
            for start in range(0, self.stored[0], batch_size):
                count = min(batch_size, self.stored[0] - start)
                data = bytearray(stream.read(count * per_image))
                if len(data) < count * per_image:
                    raise ValueError(
                        f"{self.path} is cut short: its arr_0 ends inside image {start + len(data) // per_image}."
                    )
                yield torch.frombuffer(data, dtype=torch.uint8).view(count, *self.stored[1:])

    def _shard_batches(self, batch_size: int) -> Iterator[torch.ByteTensor]:
        for file in self.files:
            with safe_open(file, "pt") as tensors:
                yield from tensors.get_tensor("images").split(batch_size)

    def _file_batches(self, batch_size: int) -> Iterator[torch.ByteTensor]:
        for start in range(0, len(self.files), batch_size):
            yield torch.stack([self._load(file) for file in self.files[start : start + batch_size]])

    def _video_batches(self, batch_size: int) -> Iterator[torch.ByteTensor]:
        views = self.videos.num_views
        for start in range(0, self.stored[0], batch_size):
            places = range(start, min(start + batch_size, self.stored[0]))
            yield torch.stack([self.videos[divmod(place, views)] for place in places]).movedim(1, -1)

    def _load(self, file: Path) -> torch.ByteTensor:
        try:
            with Image.open(file) as image:
                image = image.convert("RGB")
        except UNREADABLE as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
        if self.image_size is not None:
            return make_views(image, self.image_size, "none")[0].movedim(0, -1)
        if (image.height, image.width) != self.stored[1:3]:
            raise ValueError(
                f"images must be of one size, {self.files[0].name} has {self.stored[2]} x {self.stored[1]} pixels and "
                f"{file.name} {image.width} x {image.height} (`image_size` crops them to one)."
            )
        return torch.from_numpy(np.array(image))

    def sha256(self) -> str:
        """Of a file its SHA-256; of a folder that of the names and SHA-256 of its files in order."""
        if self.path.is_file():
            return hash_file(self.path)
        lines = [f"{hash_file(file)}  {file.relative_to(self.path).as_posix()}\n" for file in self.files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def describe(self) -> dict:
        """The facts that a result stores."""
        facts = {"name": self.path.name, "kind": self.kind, "sha256": self.sha256(), "count": len(self)}
        if self.stored:
            facts["shape"] = list(self.shape[1:])
        if self.is_video:
            facts["stored_frames"] = self.stored[1]
        if self.videos is not None:
            facts |= {"frame_rate": self.videos.frame_rate, "clips_per_video": self.videos.num_clips}
        if self.per_class is not None:
            facts["per_class"] = self.per_class
        if self.statistics is not None:
            facts["statistics"] = sorted(self.statistics)
        return facts


def hash_file(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_source(
    path: str | Path,
    image_size: int | None = None,
    *,
    num_frames: int | None = None,
    per_class: int | None = None,
    frame_rate: float = 8.0,
    num_clips: int = 1,
) -> Source:
    """
    Opens `path`; raises `ValueError` for what is none of the kinds, empty, unfinished or not uint8.

    Args:
        path (`str` or `Path`):
            `.npz` file of the ADM suite (`arr_0` images uint8 (N, H, W, 3) or videos (N, T, H, W, 3), `arr_1` class ids;
            `mu` and `sigma` of features, with images or without), folder made by `sample`, or folder of images, flat or with
            a folder for each class, or of videos with a folder for each class.
        image_size (`int`, *optional*): Side of the centre crop of the images or videos of a folder.
        num_frames (`int`, *optional*): First frames of each clip to compare. Defaults to all, 17 of a folder of videos.
        per_class (`int`, *optional*): First images or clips of each class to compare. Defaults to all.
        frame_rate (`float`, defaults to 8), num_clips (`int`, defaults to 1):
            Of the clips of a folder of videos, see [`~par_diffusers.training.videos.VideoFolder`].
    """
    path = Path(path)
    part = {"num_frames": num_frames, "per_class": per_class}
    if path.is_file():
        return _open_npz(path, part)
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}.")
    if (path / MANIFEST).is_file():
        return _open_samples(path, part)
    if list_files(path, VIDEO_SUFFIXES):
        if image_size is None:
            raise ValueError(f"`image_size` must be given for videos, as {path} holds: the side they are cropped to.")
        videos = VideoFolder(path, image_size, num_frames or 17, frame_rate, num_clips)
        labels = torch.tensor(videos.labels).repeat_interleave(num_clips)
        stored = (len(videos) * num_clips, videos.num_frames, image_size, image_size, 3)
        files = [path / file for file in videos.files]
        return Source(path, "videos", stored, files, labels, videos.classes, videos=videos, **part)
    return _open_images(path, image_size, part)


def _open_npz(path: Path, part: dict) -> Source:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            shape, dtype, fortran = (), None, False
            if "arr_0" in names:
                with archive.open("arr_0.npy") as stream:
                    shape, fortran, dtype = _read_header(stream)
        with np.load(path, allow_pickle=False) as arrays:
            rest = {name: arrays[name] for name in names if name != "arr_0"}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from None
    labels = rest.pop("arr_1", None)
    statistics = rest if "mu" in rest and "sigma" in rest else None
    if statistics is None and dtype is None:
        raise ValueError(
            f"{path} must hold `arr_0` (images) or `mu` and `sigma` (statistics), it has {sorted(names)}."
        )
    if statistics is not None:
        width = rest["mu"].shape[-1] if rest["mu"].ndim == 1 else None
        if rest["sigma"].shape != (width, width):
            raise ValueError(
                f"{path} must hold `mu` (D,) and `sigma` (D, D), it has {rest['mu'].shape} and {rest['sigma'].shape}."
            )
    if dtype is not None and (dtype != np.uint8 or len(shape) not in (4, 5) or shape[-1] != 3 or fortran):
        raise ValueError(
            f"`arr_0` of {path} must be uint8 (N, H, W, 3), or videos (N, T, H, W, 3), it is {dtype} {shape}."
        )
    if dtype is not None and 0 in shape:
        raise ValueError(f"{path} has no images: `arr_0` is {shape}.")
    if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(f"`arr_1` of {path} must be a class id for each of {shape[0]} images, it is {labels.shape}.")
    labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    kind = "statistics" if dtype is None else "npz"
    return Source(path, kind, tuple(shape), [path], labels, statistics=statistics, **part)


def _read_header(stream) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of the .npy file that `stream` is at the beginning of; leaves it at the data."""
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    return read[np.lib.format.read_magic(stream)](stream)


def _open_samples(path: Path, part: dict) -> Source:
    files = sorted(path.glob("samples-*.safetensors"))
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    asked, names = manifest["settings"]["num_samples"], manifest.get("id2label")
    labels, shapes = [], set()
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                labels.append(tensors.get_tensor("labels"))
                shapes.add(tuple(tensors.get_slice("images").get_shape()[1:]))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
    found = sum(map(len, labels))
    if found != asked:
        raise ValueError(
            f"{path} is not finished: {found} of {asked} samples; the same `sample` command goes on with it."
        )
    (shape,) = shapes
    names = names and [names[str(label)] for label in range(len(names))]
    return Source(path, "samples", (found, *shape), files, torch.cat(labels), names, **part)


def _open_images(path: Path, image_size: int | None, part: dict) -> Source:
    files = list_files(path, IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds neither images nor samples.")
    folders = [file.relative_to(path).parts[0] for file in files if file.parent != path]
    labels = names = None
    if len(folders) == len(files):
        names = sorted(set(folders))
        ids = {name: number for number, name in enumerate(names)}
        labels = torch.tensor([ids[name] for name in folders])
    try:
        with Image.open(files[0]) as first:
            height, width = (first.height, first.width) if image_size is None else (image_size, image_size)
    except UNREADABLE as error:
        raise ValueError(f"{files[0]} cannot be read: {error}") from None
    return Source(path, "images", (len(files), height, width, 3), files, labels, names, image_size=image_size, **part)
