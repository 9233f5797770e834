"""Compares generated images or clips with real ones, and says what exactly was compared."""

import json
from pathlib import Path

import numpy as np
import torch
import torchmetrics
from accelerate.utils import tqdm
from torch import nn

from par_diffusers._version import __version__
from par_diffusers.evaluation.extractors import Extractor, load_extractor, module_extractor
from par_diffusers.evaluation.metrics import frechet_distance, inception_score, precision_recall, statistics
from par_diffusers.evaluation.sources import Source, open_source
from par_diffusers.folders import publish, write_text
from par_diffusers.settings import EvaluationSettings


_NEIGHBORS = 3
# samples that the distances are quoted for: they fall with their number
_USUAL_COUNT = {"fid": 50000, "fvd": 10000, "frechet_distance": 50000}
# frames of a clip that FVD is quoted for
_USUAL_FRAMES = 16


def evaluate(settings: EvaluationSettings, network: nn.Module | None = None) -> dict:
    """
    Measures `settings.samples`, against `settings.reference` where there is one.

    Metrics: the Fréchet distance (FID with Inception's features, FVD with I3D's), the Inception score, improved precision
    and recall, and with the glyph judge the share of images, or of middle frames of clips, that it names as the first
    characters of their labels say. A reference that has `mu`
    and `sigma` is compared by them in the Fréchet distance, as in the ADM suite, and by its images in the rest.

    Args:
        settings (`EvaluationSettings`): See there.
        network (`torch.nn.Module`, *optional*):
            Feature extractor as torchmetrics takes it, images uint8 (B, 3, H, W) -> features (B, D); `settings.extractor`
            is then its name.

    Returns:
        `dict`: `metrics`, what was compared with what (names, SHA-256, counts, sizes), `warnings` and `versions`.

    Example:

    ```py
    >>> from par_diffusers.evaluation.evaluate import evaluate
    >>> from par_diffusers.settings import EvaluationSettings

    >>> settings = EvaluationSettings("samples", "inception-2015-12-05.pt", "VIRTUAL_imagenet256_labeled.npz")
    >>> evaluate(settings)["metrics"]["fid"]  # doctest: +SKIP
    ```
    """
    for name in ("output", "save_statistics"):
        file = getattr(settings, name)
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise ValueError(f"`{name}` must be a file in a folder that exists, got {file}.")
    device = settings.device or (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    )
    if network is None:
        extractor = load_extractor(settings.extractor, device)
    else:
        extractor = module_extractor(network.eval().to(device), settings.extractor)
    names = ("num_frames", "per_class", "frame_rate", "num_clips")
    part = {name: getattr(settings, name) for name in names}
    samples = open_source(settings.samples, settings.image_size, **part)
    reference = None
    if settings.reference is not None:
        side = settings.image_size
        if samples.is_video:
            part["num_frames"], side = samples.shape[1], side or samples.shape[2]
        reference = open_source(settings.reference, side, **part)
    metrics = _choose_metrics(settings, extractor, samples, reference, device)

    scores = {"inception-score", "accuracy"} & set(metrics)
    features, logits = _extract(extractor, samples, settings.batch_size, device, "samples", bool(scores))
    if settings.save_statistics is not None:
        _save_statistics(Path(settings.save_statistics), features, extractor)
    real = real_logits = None
    by_images = {"precision-recall", "accuracy"} | (
        {"frechet"} if reference and reference.statistics is None else set()
    )
    if reference and reference.shape and by_images & set(metrics):
        real, real_logits = _extract(
            extractor, reference, settings.batch_size, device, "reference", "accuracy" in metrics
        )
    result = {}
    if "frechet" in metrics:
        result[extractor.distance] = frechet_distance(features, reference.moments or real)
    if "inception-score" in metrics:
        result["inception_score"], result["inception_score_deviation"] = inception_score(logits)
    if "precision-recall" in metrics:
        result["precision"], result["recall"] = precision_recall(features.to(device), real.to(device), _NEIGHBORS)
    if "accuracy" in metrics:
        result["accuracy"] = _share_named(logits, samples, extractor)
        if reference and reference.labels is not None:
            result["reference_accuracy"] = _share_named(real_logits, reference, extractor)

    facts = {
        "metrics": result,
        "samples": samples.describe(),
        "reference": None if reference is None else reference.describe(),
        "extractor": {"name": extractor.name, "sha256": extractor.sha256, "num_features": features.shape[1]},
        "neighbors": _NEIGHBORS,
        "versions": {
            "par_diffusers": __version__,
            "torch": torch.__version__,
            "torchmetrics": torchmetrics.__version__,
        },
    }
    facts["warnings"] = _find_traps(facts, extractor, samples, reference)
    if settings.output is not None:
        write_text(Path(settings.output), json.dumps(facts, indent=1) + "\n")
    return facts


def _choose_metrics(
    settings: EvaluationSettings, extractor: Extractor, samples: Source, reference: Source | None, device
) -> list[str]:
    """The metrics asked for, or all that can be; raises for what cannot be, before the features are made."""
    if not samples.shape:
        raise ValueError(f"`samples` must hold images, {samples.path} has statistics alone.")
    for side in (samples, reference):
        if side is not None and side.shape:
            _check_shape(extractor, side)
    if reference is not None and reference.shape and reference.is_video and not samples.is_video:
        raise ValueError(f"`reference` must hold images as {samples.path} does, {reference.path} holds clips.")
    with torch.inference_mode():
        features, logits = extractor.run(next(samples.batches(2)).to(device))
    width = features.shape[1]
    lacking = {
        "frechet": reference is None and "a `reference`",
        "inception-score": logits is None and f"class scores, which {extractor.name} does not give",
        "precision-recall": (reference is None or not reference.shape) and "a `reference` with images",
        "accuracy": not (extractor.judges and samples.labels is not None)
        and "the glyph judge as `extractor` and `samples` with labels",
    }
    for name in settings.metrics or ():
        if lacking[name]:
            raise ValueError(f"`metrics`: {name} needs {lacking[name]}.")
    chosen = list(settings.metrics or (name for name in lacking if not lacking[name]))
    if not chosen and settings.save_statistics is None:
        raise ValueError("`reference` must be given: without one there is nothing that this extractor can measure.")
    if "frechet" in chosen or settings.save_statistics is not None:
        by_images = [reference] if "frechet" in chosen and reference.statistics is None else []
        for side in [samples, *by_images]:
            if len(side) <= width:
                raise ValueError(
                    f"{side.path} must hold more images than the features have dimensions, {width}; it has {len(side)}."
                )
    if "frechet" in chosen and reference.statistics is not None:
        found = len(reference.statistics["mu"])
        if found != width:
            raise ValueError(
                f"`reference` must have statistics of the network asked for, {extractor.name} gives {width} features and "
                f"{reference.path} is of {found}."
            )
        made_with = str(reference.statistics.get("extractor", extractor.sha256))
        if made_with != extractor.sha256:
            raise ValueError(
                f"`reference` must have statistics of the network asked for, {extractor.name} "
                f"({extractor.sha256[:12]}), {reference.path} is of another ({made_with[:12]})."
            )
    for side in (samples, reference) if "precision-recall" in chosen else ():
        if len(side) <= _NEIGHBORS:
            raise ValueError(f"{side.path} must hold more than {_NEIGHBORS} images, it has {len(side)}.")
    return chosen


def _check_shape(extractor: Extractor, side: Source) -> None:
    kind = "videos" if side.is_video else "images"
    if kind not in extractor.takes:
        raise ValueError(
            f"`extractor` must be a network of {kind} for {side.path}, {extractor.name} is one of {extractor.takes[0]}."
        )
    if extractor.image_size is not None and set(side.shape[-3:-1]) != {extractor.image_size}:
        raise ValueError(
            f"{extractor.name} takes images of {extractor.image_size} pixels a side, {side.path} has "
            f"{side.shape[-2]} x {side.shape[-3]}."
        )


@torch.inference_mode()
def _extract(
    extractor: Extractor, side: Source, batch_size: int, device, name: str, keep_logits: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features float32 (N, D) and, where they are kept, logits (N, classes) of all images, on the CPU."""
    features, logits, start = None, None, 0
    with tqdm(total=len(side), unit="images", desc=name) as bar:
        for images in side.batches(batch_size):
            found, scores = extractor.run(images.to(device))
            if features is None:
                features = torch.empty(len(side), found.shape[1])
                logits = torch.empty(len(side), scores.shape[1]) if keep_logits else None
            part = slice(start, start + len(images))
            features[part] = found.float()
            if not features[part].isfinite().all():
                raise ValueError(f"{extractor.name} must give finite features, of some of {side.path} it does not.")
            if keep_logits:
                logits[part] = scores.float()
            start = part.stop
            bar.update(len(images))
    return features, logits


def _share_named(logits: torch.Tensor, side: Source, extractor: Extractor) -> float:
    named, labels = logits.argmax(-1), side.labels
    if extractor.classes is not None and side.names is not None:
        unknown = sorted({name for name in side.names if name[0] not in extractor.classes})
        if unknown:
            raise ValueError(
                f"{side.path} must have labels that begin with a character of {extractor.name}, it has {unknown[0]!r}."
            )
        labels = torch.tensor([extractor.classes.index(name[0]) for name in side.names])[labels]
    return (named == labels).double().mean().item()


def _save_statistics(file: Path, features: torch.Tensor, extractor: Extractor) -> None:
    mean, covariance = statistics(features)
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "wb") as stream:
        np.savez(stream, mu=mean.numpy(), sigma=covariance.numpy(), extractor=extractor.sha256, count=len(features))
    publish(partial, file)


def _find_traps(facts: dict, extractor: Extractor, samples: Source, reference: Source | None) -> list[str]:
    """What makes the figures other than those they will be compared with."""
    traps = []
    usual = _USUAL_COUNT[extractor.distance]
    if extractor.distance in facts["metrics"] and len(samples) < usual:
        traps.append(
            f"{len(samples)} samples: the Fréchet distance falls with their number, published ones are of {usual}."
        )
    if extractor.distance == "fvd" and samples.shape[1] != _USUAL_FRAMES:
        traps.append(
            f"{samples.shape[1]} frames: FVD is mostly of {_USUAL_FRAMES} (--num-frames {_USUAL_FRAMES}), of 17 the first."
        )
    if reference is None:
        return traps
    if facts["samples"]["sha256"] == facts["reference"]["sha256"]:
        traps.append("samples and reference are the same.")
    if reference.shape and samples.shape[1:] != reference.shape[1:]:
        sizes = [" x ".join(map(str, side.shape[1:-1])) for side in (samples, reference)]
        traps.append(f"samples are of {sizes[0]} pixels, the reference of {sizes[1]}: resizing changes the features.")
    if reference.kind == "samples":
        traps.append("the reference was made by `sample`: these are no real images.")
    if reference.statistics is not None and "extractor" not in reference.statistics:
        traps.append(
            f"mu and sigma of {reference.path.name} do not say which network made them (those of the ADM suite: Inception)."
        )
    if extractor.distance == "fid" and reference.statistics is None:
        traps.append(
            f"{reference.path.name} has no mu and sigma: those of its {len(reference)} images are used, where the ADM files "
            "have those of the whole training set."
        )
    if samples.labels is not None and reference.labels is not None:
        ours, theirs = (len(side.labels.unique()) for side in (samples, reference))
        if ours != theirs:
            traps.append(f"samples are of {ours} classes, the reference is of {theirs}.")
    return traps


def describe_result(facts: dict) -> str:
    """A result as lines of text."""
    lines = [f"{name.replace('_', ' ')}: {value:.4f}" for name, value in facts["metrics"].items()]
    for side in ("samples", "reference"):
        if facts[side] is not None:
            shape = " x ".join(map(str, facts[side].get("shape", ["mu and sigma"])[:-1] or ["mu and sigma"]))
            lines.append(
                f"{side}: {facts[side]['name']}, {facts[side]['count']} of {shape}{_choices(facts[side])}, "
                f"{facts[side]['sha256'][:16]}"
            )
    lines.append(f"extractor: {facts['extractor']['name']}, {facts['extractor']['sha256'][:16]}")
    return "\n".join([*lines, *(f"warning: {line}" for line in facts["warnings"])])


def _choices(side: dict) -> str:
    """Which part of its images or clips was compared."""
    choices = []
    if side.get("stored_frames", 0) > side.get("shape", [0])[0]:
        choices.append(f"first {side['shape'][0]} of {side['stored_frames']} frames")
    if "frame_rate" in side:
        rate = f"{side['frame_rate']:g} frames a second" if side["frame_rate"] else "all frames"
        choices += [rate, f"{side['clips_per_video']} clips of each video"]
    if "per_class" in side:
        choices.append(f"{side['per_class']} of each class")
    return f" ({', '.join(choices)})" if choices else ""
