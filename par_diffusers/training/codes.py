"""Codes of an image set on disk: the shards that extract-codes writes, and LlamaGen's folders of .npy files."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from par_diffusers.training.tokenizers import ImageTokenizer


INDEX = "index.json"


class CodeDataset(Dataset):
    """
    Token grids with classes. Sample i under view v is `dataset[i, v]`: (codes, int64 (*grid_size), class id).

    Reads a folder of shards made by extract-codes, memory-mapped, or LlamaGen's layout: `codes/N.npy`, `labels/N.npy` (or
    `..._codes` and `..._labels`), where a file of codes is (1, views, tokens), (views, tokens) or (tokens,).

    Args:
        folder (`str` or `Path`): The folder.
        tokenizer (`ImageTokenizer` or `VideoTokenizer`):
            What the codes are to be decoded with. Shards of another one raise a `ValueError`.

    Attributes: `grid_size`, `num_views`, `classes` (`list[str]`, or None for LlamaGen's layout), `fingerprint` of the data,
    `frame_rate` (of clips), and `num_classes`, which class ids must be below (None: any).
    """

    def __init__(self, folder: str | Path, tokenizer: ImageTokenizer):
        self.folder = Path(folder)
        self.vocab_size = tokenizer.num_codes
        self.num_classes = self.frame_rate = None
        self._open = {}
        if (self.folder / INDEX).is_file():
            self._read_index(tokenizer)
        else:
            self._read_llamagen()

    def _read_index(self, tokenizer: ImageTokenizer) -> None:
        text = (self.folder / INDEX).read_text(encoding="utf-8")
        index = json.loads(text)
        ours = tokenizer.fingerprint
        if index["tokenizer"] != ours:
            raise ValueError(
                f"`data` must be codes of the tokenizer given, {self.folder} has those of {index['tokenizer']}, the "
                f"tokenizer is {ours}."
            )
        self.grid_size, self.num_views = tuple(index["grid_size"]), index["num_views"]
        self.classes, self.frame_rate = index["classes"], index.get("frame_rate")
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.shards = [self.folder / shard["file"] for shard in index["shards"]]
        self.ends = np.cumsum([shard["num_images"] for shard in index["shards"]])
        self.num_samples = int(self.ends[-1])

    def _read_llamagen(self) -> None:
        folders = {}
        for kind in ("codes", "labels"):
            found = [
                f
                for f in self.folder.glob(f"*{kind}")
                if f.is_dir() and (f.name == kind or f.name[: -len(kind)].endswith("_"))
            ]
            if len(found) != 1:
                raise ValueError(
                    f"`data` must be a folder of extract-codes (with {INDEX}) or in LlamaGen's layout (codes/N.npy and "
                    f"labels/N.npy), {self.folder} is neither."
                )
            folders[kind] = found[0]
        self.codes, self.labels = folders["codes"], folders["labels"]
        self.num_samples = sum(file.suffix == ".npy" for file in self.codes.iterdir())
        if not self.num_samples:
            raise ValueError(f"`data` must hold codes, {self.codes} has no .npy file.")
        first = self._load_npy(0)
        self.num_views, tokens = first.shape
        side = round(tokens**0.5)
        if side * side != tokens:
            raise ValueError(f"`data` must hold square grids, {self.codes} has {tokens} tokens an image.")
        self.grid_size, self.classes, self.shards = (side, side), None, None
        self.fingerprint = hashlib.sha256(first.tobytes() + str(self.num_samples).encode()).hexdigest()[:16]

    def _load_npy(self, index: int) -> np.ndarray:
        codes = np.load(self.codes / f"{index}.npy", allow_pickle=False)
        return codes.reshape(-1, codes.shape[-1]).astype(np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.LongTensor, int]:
        index, view = key
        if self.shards is None:
            codes = torch.from_numpy(self._load_npy(index)[view]).view(self.grid_size)
            label = int(np.load(self.labels / f"{index}.npy", allow_pickle=False).item())
            file = self.codes / f"{index}.npy"
        else:
            number = int(np.searchsorted(self.ends, index, side="right"))
            if number not in self._open:  # opened where it is read: workers of a DataLoader each open their own
                shard = safe_open(self.shards[number], "pt")
                self._open[number] = shard.get_slice("codes"), shard.get_tensor("labels")
            slices, labels = self._open[number]
            place = index - int(self.ends[number] - len(labels))
            codes, label, file = slices[place, view].to(torch.int64), int(labels[place]), self.shards[number]
        if not 0 <= int(codes.min()) <= int(codes.max()) < self.vocab_size:
            raise ValueError(
                f"`data` must hold codes of the tokenizer's {self.vocab_size}, {file} has {int(codes.min())} to "
                f"{int(codes.max())}."
            )
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise ValueError(f"`data` must hold the model's {self.num_classes} classes, {file} has class {label}.")
        return codes, label
