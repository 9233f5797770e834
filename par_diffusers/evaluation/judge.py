"""Judges generated glyphs: trains a small classifier on real glyphs and asks it to name generated ones.

python -m par_diffusers.evaluation.judge --data glyphs --model par_diffusers/assets/par-glyphs-4x
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from torch import nn

from par_diffusers.cli import one_line_errors
from par_diffusers.pipelines import PARPipeline
from par_diffusers.training.images import ImageFolder, to_pixels


def load_folder(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """All images of a folder of classes, uint8 (N, 3, H, W) at the size of the first, class ids (N,) and class names."""
    images = ImageFolder(folder, image_size=1)
    with Image.open(images.folder / images.files[0]) as first:
        images.image_size = min(first.size)
    pixels = torch.empty(len(images), 3, images.image_size, images.image_size, dtype=torch.uint8)
    for index in range(len(images)):
        pixels[index] = images[index, 0]
    return pixels, torch.tensor(images.labels), images.classes


def build_judge(num_classes: int) -> nn.Module:
    """A classifier of pixels in [-1, 1], (B, 3, H, W) -> (B, num_classes)."""
    widths = (3, 24, 48, 96)
    blocks = []
    for wide_in, wide_out in zip(widths, widths[1:], strict=False):
        blocks += [nn.Conv2d(wide_in, wide_out, 3, padding=1), nn.BatchNorm2d(wide_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.2), nn.LazyLinear(num_classes))


def train_judge(
    images: torch.Tensor, labels: torch.Tensor, *, steps: int = 1500, batch_size: int = 128, seed: int = 0
) -> nn.Module:
    """Trains the judge on `images`, uint8 (N, 3, H, W), and `labels`, class ids (N,)."""
    torch.manual_seed(seed)
    judge = build_judge(int(labels.max()) + 1)
    judge(to_pixels(images[:2]))  # gives the lazy layer its size
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch_size,))
        loss = F.cross_entropy(judge(to_pixels(images[chosen])), labels[chosen].long(), label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return judge.eval()


@torch.no_grad()
def accuracy(judge: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of `pixels`, [-1, 1] (N, 3, H, W), that the judge names as `labels`."""
    named = torch.cat([judge(batch).argmax(-1) for batch in pixels.split(256)])
    return (named == labels.long()).float().mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m par_diffusers.evaluation.judge", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder made by par_diffusers.training.glyphs")
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="pipeline folders to judge")
    parser.add_argument("--images-per-class", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, nargs="+", help="default: that of the folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    pixels, labels, classes = load_folder(args.data / "train")
    judge = train_judge(pixels, labels, seed=args.seed)
    pixels, labels, _ = load_folder(args.data / "validation")
    real = accuracy(judge, to_pixels(pixels), labels)
    print(f"real glyphs of held-out fonts: {real:.4f} of {len(labels)}", flush=True)
    labels = torch.arange(len(classes)).repeat_interleave(args.images_per_class)
    for folder in args.model:
        pipe = PARPipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        for scale in args.guidance_scale or [pipe.scheduler.config.guidance_scale]:
            generator = torch.Generator().manual_seed(args.seed)
            images = [
                pipe([classes[i] for i in batch], guidance_scale=scale, generator=generator, output_type="pt").images
                for batch in labels.split(120)
            ]
            share = accuracy(judge, torch.cat(images).float() * 2 - 1, labels)
            print(f"{folder} guidance {scale:g}: {share:.4f} of {len(labels)}, {share / real:.3f} of real", flush=True)


if __name__ == "__main__":
    with one_line_errors("python -m par_diffusers.evaluation.judge"):
        main()
