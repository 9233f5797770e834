"""The glyph judge: a small classifier of letters and digits, the feature extractor that ships with the package.

python -m par_diffusers.evaluation.judge --data glyphs --output glyphs-judge
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from torch import nn

from par_diffusers.cli import one_line_errors
from par_diffusers.training.images import ImageFolder, to_pixels


class GlyphJudge(ModelMixin, ConfigMixin):
    """
    A classifier of small images, uint8 (B, 3, image_size, image_size).

    Args:
        image_size (`int`, defaults to 48): Pixels of a side, a multiple of 16.
        num_classes (`int`, defaults to 36): Classes, in the order of their names.
        num_features (`int`, defaults to 128): Width of the features.
        classes (`str`, *optional*): The character of each class, where classes are characters.

    Example:

    ```py
    >>> import torch
    >>> from par_diffusers import embedded_model
    >>> from par_diffusers.evaluation.judge import GlyphJudge

    >>> judge = GlyphJudge.from_pretrained(embedded_model("glyphs-judge"))
    >>> features, logits = judge(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    >>> features.shape, logits.shape
    (torch.Size([1, 128]), torch.Size([1, 36]))
    ```
    """

    @register_to_config
    def __init__(
        self, image_size: int = 48, num_classes: int = 36, num_features: int = 128, classes: str | None = None
    ):
        super().__init__()
        widths, blocks = (3, 24, 48, 96, 128), []
        for wide_in, wide_out in zip(widths, widths[1:], strict=False):
            blocks += [
                nn.Conv2d(wide_in, wide_out, 3, padding=1),
                nn.BatchNorm2d(wide_out),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.blocks = nn.Sequential(
            *blocks, nn.Flatten(), nn.Linear(widths[-1] * (image_size // 16) ** 2, num_features)
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: torch.ByteTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, num_features) and logits (B, num_classes)."""
        features = F.relu(self.blocks(to_pixels(images)))
        return features, self.head(self.dropout(features))


def load_folder(folder: Path) -> tuple[torch.ByteTensor, torch.LongTensor, list[str]]:
    """All images of a folder of classes, uint8 (N, 3, H, W) at the size of the first, class ids (N,) and class names."""
    images = ImageFolder(folder, image_size=1)
    with Image.open(images.folder / images.files[0]) as first:
        images.image_size = min(first.size)
    pixels = torch.empty(len(images), 3, images.image_size, images.image_size, dtype=torch.uint8)
    for index in range(len(images)):
        pixels[index] = images[index, 0]
    return pixels, torch.tensor(images.labels), images.classes


def train_judge(
    images: torch.ByteTensor,
    labels: torch.LongTensor,
    classes: str | None = None,
    *,
    steps: int = 2000,
    batch_size: int = 128,
    seed: int = 0,
) -> GlyphJudge:
    """Trains a judge on `images`, uint8 (N, 3, H, H), and `labels`, class ids (N,) of the characters `classes`."""
    torch.manual_seed(seed)
    judge = GlyphJudge(images.shape[-1], int(labels.max()) + 1, classes=classes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    judge.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch_size,))
        loss = F.cross_entropy(judge(images[chosen])[1], labels[chosen], label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return judge.eval()


@torch.no_grad()
def accuracy(judge: GlyphJudge, images: torch.ByteTensor, labels: torch.LongTensor) -> float:
    """Share of `images`, uint8 (N, 3, H, W), that the judge names as `labels`."""
    named = torch.cat([judge(batch)[1].argmax(-1) for batch in images.split(256)])
    return (named == labels).float().mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m par_diffusers.evaluation.judge", description="Trains the glyph judge and measures it."
    )
    parser.add_argument("--data", type=Path, required=True, help="folder made by par_diffusers.training.glyphs")
    parser.add_argument("--output", type=Path, required=True, help="folder of the judge, in half precision")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    images, labels, classes = load_folder(args.data / "train")
    # measured as it is saved
    characters = "".join(classes) if set(map(len, classes)) == {1} else None
    judge = train_judge(images, labels, characters, seed=args.seed).half()
    judge.save_pretrained(args.output)
    images, labels, _ = load_folder(args.data / "validation")
    print(f"glyphs of held-out fonts: {accuracy(judge.float(), images, labels):.4f} of {len(labels)}")


if __name__ == "__main__":
    with one_line_errors("python -m par_diffusers.evaluation.judge"):
        main()
