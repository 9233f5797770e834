"""Features of captions on disk, as extract-features writes them."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open

from par_diffusers.training.codes import INDEX


def captions_fingerprint(captions: list[str]) -> str:
    return hashlib.sha256("\n".join(captions).encode()).hexdigest()[:16]


class CaptionFeatures:
    """
    Features of captions, memory-mapped. Caption i is `features[i]`, float32 (tokens, channels).

    Args:
        folder (`str` or `Path`): A folder made by extract-features.
        captions (`list[str]`): The captions that they must be of.

    Attributes: `max_length`, `channels`, `fingerprint`.
    """

    def __init__(self, folder: str | Path, captions: list[str] | None):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"`features` must be a folder made by extract-features, {folder} has no {INDEX}.")
        text = (self.folder / INDEX).read_text(encoding="utf-8")
        index = json.loads(text)
        if captions is None or index.get("captions") != captions_fingerprint(captions):
            raise ValueError(f"`features` must be of the captions of `data`, {folder} has those of others.")
        self.max_length, self.channels = index["max_length"], index["channels"]
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._shard_size = index["shard_size"]
        self._shards = [self.folder / shard["file"] for shard in index["shards"]]
        self._open = {}

    def __getitem__(self, index: int) -> torch.Tensor:
        number, place = divmod(index, self._shard_size)
        if number not in self._open:  # opened where it is read: workers of a DataLoader each open their own
            shard = safe_open(self._shards[number], "pt")
            self._open[number] = shard.get_slice("features"), [0, *shard.get_tensor("ends").tolist()]
        features, ends = self._open[number]
        return features[ends[place] : ends[place + 1]].float()

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded features (B, max_length, channels) and their mask (B, max_length)."""
        features = torch.zeros(len(indices), self.max_length, self.channels)
        mask = torch.zeros(len(indices), self.max_length, dtype=torch.long)
        for row, index in enumerate(indices):
            found = self[index]
            features[row, : len(found)] = found
            mask[row, : len(found)] = 1
        return features, mask
