import numpy as np
import pytest
import torch
from PIL import Image


def random_images(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, *shape, 3); images differ in brightness, so that their features do."""
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 200, (count, *(1,) * len(shape), 3))
    return (level + rng.integers(0, 56, (count, *shape, 3))).astype(np.uint8)


@pytest.fixture
def make_images():
    return random_images


@pytest.fixture
def write_folder(tmp_path):
    """Images as PNG files, in folders of classes where there are labels."""

    def write(images: np.ndarray, labels=None, name: str = "pictures"):
        folder = tmp_path / name
        for number, image in enumerate(images):
            file = folder / ("" if labels is None else f"class {labels[number]}") / f"{number:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
        return folder

    return write


class Inception(torch.nn.Module):
    """Called as Inception's TorchScript file is, with 6 features and 5 classes."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(6, 5)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        assert img.dtype == torch.uint8
        pixels = img.float() / 255
        features = torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1)
        if return_features:
            return features
        scores = features @ self.mix.weight.T
        if not no_output_bias:
            scores = scores + self.mix.bias
        return scores.softmax(1)


class I3D(torch.nn.Module):
    """Called as I3D's TorchScript file is, with 4 features."""

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features and x.dim() == 5
        x = x / 127.5 - 1
        motion = (x[:, :, 1:] - x[:, :, :-1]).abs().mean((1, 2, 3, 4))
        return torch.cat([x.mean((2, 3, 4)), motion[:, None]], 1)


class Means(torch.nn.Module):
    """Any network: 3 features."""

    def forward(self, images):
        return images.float().mean((2, 3), keepdim=True)


@pytest.fixture
def scripts(tmp_path):
    """name -> a TorchScript file."""

    def save(name: str):
        torch.manual_seed(0)
        file = tmp_path / f"{name}.pt"
        torch.jit.script({"inception": Inception, "i3d": I3D, "means": Means}[name]()).save(file)
        return file

    return save
