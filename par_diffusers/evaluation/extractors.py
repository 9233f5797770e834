"""Networks whose features are compared."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from par_diffusers.assets import embedded_model
from par_diffusers.evaluation.judge import GlyphJudge
from par_diffusers.evaluation.sources import hash_file
from par_diffusers.sampling.sample import add_weights


JUDGE = "glyphs-judge"


@dataclass
class Extractor:
    """
    A network with a name.

    Attributes:
        name (`str`), sha256 (`str`): Of its file, or its weights.
        distance (`str`): What its Fréchet distance is called: `"fid"`, `"fvd"` or `"frechet_distance"`.
        run (`Callable`):
            Images uint8 (B, 3, H, W), or videos (B, 3, T, H, W), on the network's device -> features (B, D) and logits
            (B, classes), or `None` where the network does not classify.
        takes (`tuple[str, ...]`): `"images"`, `"videos"`, or both.
        image_size (`int` or `None`): The only side it takes.
        judges (`bool`): Whether its classes are those of the labels.
        classes (`str` or `None`): The characters it names, in the order of its logits; None: as the ids of the labels.
    """

    name: str
    sha256: str
    distance: str
    run: Callable[[torch.ByteTensor], tuple[torch.Tensor, torch.Tensor | None]]
    takes: tuple[str, ...] = ("images",)
    image_size: int | None = None
    judges: bool = False
    classes: str | None = None


def load_extractor(name: str, device: str | torch.device = "cpu") -> Extractor:
    """
    The network called `name`: the embedded `"glyphs-judge"`, or a TorchScript file.

    Of TorchScript files the networks of the field are known by the options of their `forward`: Inception as FID takes it
    (`return_features`, `no_output_bias`) and I3D as FVD takes it (`rescale`, `resize`, `return_features`). Any other is
    called with the images and returns features.
    """
    if name == JUDGE:
        return _judge(GlyphJudge.from_pretrained(embedded_model(JUDGE)).to(device), name)
    file = Path(name)
    if not file.is_file():
        raise ValueError(f"`extractor` must be a TorchScript file or {JUDGE!r}, there is no file {name}.")
    try:
        network = torch.jit.load(file, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"`extractor` must be a TorchScript file, {name} is not: {str(error).splitlines()[0]}"
        ) from None
    return _script(network, file)


def module_extractor(network: nn.Module, name: str) -> Extractor:
    """Any module as torchmetrics takes it: images uint8 (B, 3, H, W) -> features (B, D)."""
    if isinstance(network, GlyphJudge):
        return _judge(network, name)
    return Extractor(
        name, hash_weights(network), "frechet_distance", lambda images: (network(images).flatten(1), None)
    )


def hash_weights(network: nn.Module) -> str:
    """SHA-256 of names and values of all weights."""
    digest = hashlib.sha256()
    add_weights(digest, network)
    return digest.hexdigest()


def _judge(judge: GlyphJudge, name: str) -> Extractor:
    judge.eval()

    def run(images: torch.ByteTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a clip it sees the middle frame."""
        return judge(images if images.ndim == 4 else images[:, :, images.shape[2] // 2])

    return Extractor(
        name,
        hash_weights(judge),
        "frechet_distance",
        run,
        takes=("images", "videos"),
        image_size=judge.config.image_size,
        judges=True,
        classes=judge.config.classes,
    )


def _script(network: torch.jit.ScriptModule, file: Path) -> Extractor:
    options = {argument.name for argument in network.forward.schema.arguments}
    sha256 = hash_file(file)
    if {"return_features", "no_output_bias"} <= options:

        def inception(images: torch.ByteTensor) -> tuple[torch.Tensor, torch.Tensor]:
            # the score is defined without the bias of the last layer; log(0) would not have a softmax
            probabilities = network(images, no_output_bias=True)
            return network(images, return_features=True), probabilities.clamp(min=1e-30).log()

        return Extractor(file.name, sha256, "fid", inception)
    if {"rescale", "resize", "return_features"} <= options:

        def i3d(videos: torch.ByteTensor) -> tuple[torch.Tensor, None]:
            return network(videos.float(), rescale=True, resize=True, return_features=True), None

        return Extractor(file.name, sha256, "fvd", i3d, takes=("videos",))
    return Extractor(file.name, sha256, "frechet_distance", lambda images: (network(images).flatten(1), None))
