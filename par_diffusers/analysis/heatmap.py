"""Pictures of a value for each token of a grid."""

import math

import torch
from PIL import Image, ImageDraw, ImageFont


def draw_heatmap(values: torch.Tensor, cell: int = 28) -> Image.Image:
    """
    `values`, (h, w) or (frames, h, w), as coloured cells, light for the smallest to dark for the largest, white for NaN, with a
    scale.

    Example:

    ```py
    >>> import torch
    >>> from par_diffusers.analysis.heatmap import draw_heatmap

    >>> draw_heatmap(torch.rand(12, 12)).save("heatmap.png")  # doctest: +SKIP
    ```
    """
    planes = values.reshape(-1, *values.shape[-2:]).tolist()
    known = values[~values.isnan()]
    low, high = known.min().item(), known.max().item()
    height, width = values.shape[-2:]
    gap, scale = 12, 34
    columns = math.ceil(math.sqrt(len(planes)))
    rows = math.ceil(len(planes) / columns)
    size = (gap + columns * (width * cell + gap), gap + rows * (height * cell + gap) + scale)
    size = (max(size[0], 220), size[1])
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    for number, plane in enumerate(planes):
        left = gap + number % columns * (width * cell + gap)
        top = gap + number // columns * (height * cell + gap)
        for row, line in enumerate(plane):
            for column, value in enumerate(line):
                corner = (left + column * cell, top + row * cell)
                draw.rectangle((*corner, corner[0] + cell - 1, corner[1] + cell - 1), fill=_shade(value, low, high))
    top = size[1] - scale
    for step in range(100):
        box = (gap + step, top, gap + step + 1, top + 12)
        draw.rectangle(box, fill=_shade(low + (high - low) * step / 99, low, high))
    draw.text((gap, top + 15), f"{low:.3g} to {high:.3g}", fill="black", font=font)
    return image


def _shade(value: float, low: float, high: float) -> tuple[int, int, int]:
    if math.isnan(value):
        return 255, 255, 255
    share = (value - low) / (high - low) if high > low else 0.0
    light, dark = (253, 243, 222), (120, 20, 60)
    return tuple(round(a + (b - a) * share) for a, b in zip(light, dark, strict=True))
