"""Renders the glyph data set: coloured letters and digits on coloured gradients, from the fonts installed on a machine.

Fonts are only rendered: no outline, bitmap or name table of a font enters the data set, whose pictures are ours to give
away. The split into training and validation is by font *family*, so that a validation glyph comes from a face that was
never seen, not from the bold cut of one that was.

    python -m par_diffusers.training.glyphs --output glyphs
"""

import argparse
import random
import string
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from par_diffusers.cli import one_line_errors


CLASSES = string.ascii_uppercase + string.digits
_MASTER = 128  # pixels of the em square that glyphs are drawn at before they are scaled down
_BOX, _MARGIN = 32, 2  # side of the box in which glyphs of different fonts are compared, and its empty margin


def find_font_files() -> list[Path]:
    """Scalable font files known to fontconfig (`fc-list`), sorted by name."""
    listed = subprocess.run(["fc-list", ":scalable=true", "file"], capture_output=True, text=True, check=True).stdout
    files = {Path(line.strip().rstrip(":").strip()) for line in listed.splitlines() if line.strip()}
    return sorted(file for file in files if file.suffix.lower() in (".ttf", ".otf", ".ttc", ".pfb"))


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """`character` as an "L" image cut to its ink, or None where the font leaves it blank."""
    left, top, right, bottom = font.getbbox(character)
    if right <= left or bottom <= top:
        return None
    mask = font.getmask(character, mode="L")
    image = Image.frombytes("L", mask.size, bytes(mask))
    box = image.getbbox()
    return image.crop(box) if box else None


def load_glyphs(files: list[Path], classes: str = CLASSES) -> dict[tuple[str, str], list[Image.Image]]:
    """(family, style) -> one glyph a class, for the fonts that have them all and draw each as its own shape.

    The same face packaged twice (another format, another foundry's copy of the file) counts once.
    """
    glyphs = {}
    for file in files:
        try:
            font = ImageFont.truetype(str(file), _MASTER)
            name = tuple(part or "" for part in font.getname())
            if name in glyphs:
                continue
            drawn = [draw_glyph(font, character) for character in classes]
            missing = draw_glyph(font, "\u0378")  # an unassigned code point: what the font draws for a glyph it lacks
        except (OSError, ValueError, SyntaxError):
            continue  # fontconfig lists it, FreeType cannot scale it
        if any(glyph is None for glyph in drawn) or (missing and any(g.tobytes() == missing.tobytes() for g in drawn)):
            continue
        if len({glyph.tobytes() for glyph in drawn}) == len(classes):
            glyphs[name] = drawn
    return glyphs


def keep_legible(
    glyphs: dict[tuple[str, str], list[Image.Image]], min_likeness: float, min_ink: float
) -> dict[tuple[str, str], list[Image.Image]]:
    """Drops symbol, ornamental and hairline fonts.

    Each glyph is stretched onto one square box with a margin (an upright "I" fills its box: without the margin it would
    have no shape). `likeness` is the mean, over classes, of the correlation between a font's box and the average box of
    all fonts: letters that share nothing with everybody else's are symbols or ornament. No class may have less than
    half of it. `ink` is the mean coverage of the box inside the margin.
    """
    names = sorted(glyphs)
    inner = _BOX - 2 * _MARGIN
    boxes = np.stack(
        [[np.asarray(glyph.resize((inner, inner), Image.BOX), np.float32) / 255 for glyph in glyphs[n]] for n in names]
    )
    ink = boxes.mean((1, 2, 3))
    boxes = np.pad(boxes, ((0, 0), (0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN))).reshape(len(names), -1, _BOX**2)
    centred = boxes - boxes.mean(2, keepdims=True)
    centred /= np.linalg.norm(centred, axis=2, keepdims=True) + 1e-6
    average = centred.mean(0)
    average /= np.linalg.norm(average, axis=1, keepdims=True)
    likeness = (centred * average).sum(2)
    keep = (likeness.mean(1) >= min_likeness) & (likeness.min(1) >= min_likeness / 2) & (ink >= min_ink)
    return {name: glyphs[name] for name, kept in zip(names, keep, strict=True) if kept}


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    sector = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    return value - value * saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1)


def render_glyph(glyph: Image.Image, image_size: int, rng: random.Random) -> np.ndarray:
    """One picture, uint8 (image_size, image_size, 3): a light glyph on a dark linear gradient of two near hues."""
    limit = image_size * rng.uniform(0.72, 0.86)
    scale = min(limit / glyph.height, limit / glyph.width)
    size = max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))
    ink = np.zeros((image_size, image_size, 1))
    shift = image_size // 24
    left = (image_size - size[0]) // 2 + rng.randint(-shift, shift)
    top = (image_size - size[1]) // 2 + rng.randint(-shift, shift)
    ink[top : top + size[1], left : left + size[0], 0] = np.asarray(glyph.resize(size, Image.BOX)) / 255

    background, paint = draw_colours(image_size, rng)
    return np.round((background + (paint - background) * ink) * 255).astype(np.uint8)


def draw_colours(image_size: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """A dark linear gradient of two near hues, (image_size, image_size, 3), and a light colour (3,), in [0, 1]."""
    hue = rng.random()
    start = _hsv(hue, rng.uniform(0.65, 0.95), rng.uniform(0.2, 0.6))
    end = _hsv((hue + rng.uniform(-0.15, 0.15)) % 1, rng.uniform(0.65, 0.95), rng.uniform(0.2, 0.6))
    paint = _hsv(rng.random(), rng.uniform(0.05, 0.45), rng.uniform(0.92, 1.0))
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, image_size), np.linspace(-0.5, 0.5, image_size))
    ramp = (x * np.cos(angle) + y * np.sin(angle)) / (abs(np.cos(angle)) + abs(np.sin(angle))) + 0.5
    return start + (end - start) * ramp[..., None], paint


def split_fonts(
    min_likeness: float, min_ink: float, rng: random.Random
) -> tuple[int, dict[str, dict[tuple[str, str], list[Image.Image]]]]:
    """How many fonts there are, and the legible ones, as `load_glyphs` has them: `"validation"`, a tenth, and `"train"`."""
    everything = load_glyphs(find_font_files())
    fonts = keep_legible(everything, min_likeness, min_ink) if everything else {}
    if len({family for family, _ in fonts}) < 2:
        raise ValueError(
            f"`fc-list` must know legible fonts of two families or more, found {len(everything)} fonts, {len(fonts)} of "
            "them legible; install some (on Debian: packages fonts-*)."
        )
    families = defaultdict(dict)
    for (family, style), drawn in fonts.items():
        families[family][family, style] = drawn
    order = sorted(families)
    rng.shuffle(order)
    splits = {"validation": {}, "train": {}}
    for family in order:
        held_out = len(splits["validation"]) < len(fonts) / 10
        splits["validation" if held_out else "train"].update(families[family])
    return len(everything), splits


def render_split(
    fonts: dict[tuple[str, str], list[Image.Image]], variants: int, image_size: int, rng: random.Random, folder: Path
) -> int:
    """Every glyph of every font `variants` times, as `folder/class/number.png`; returns how many."""
    jobs = [(label, font) for label in range(len(CLASSES)) for font in sorted(fonts) for _ in range(variants)]
    for label in CLASSES:
        (folder / label).mkdir(parents=True)
    for number, (label, font) in enumerate(jobs):
        picture = render_glyph(fonts[font][label], image_size, rng)
        Image.fromarray(picture).save(folder / CLASSES[label] / f"{number:06}.png")
    return len(jobs)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m par_diffusers.training.glyphs", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make, with train/ and validation/")
    parser.add_argument("--image-size", type=int, default=48, help="pixels of a side (default: %(default)s)")
    parser.add_argument(
        "--variants", type=int, default=5, help="pictures of each glyph of each font (default: %(default)s)"
    )
    parser.add_argument("--min-likeness", type=float, default=0.7, help="see keep_legible (default: %(default)s)")
    parser.add_argument("--min-ink", type=float, default=0.3, help="see keep_legible (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.output.exists() and any(args.output.iterdir()):
        raise ValueError(f"--output must be a new or empty folder, {args.output} has files.")

    rng = random.Random(args.seed)
    num_fonts, splits = split_fonts(args.min_likeness, args.min_ink, rng)
    for split, chosen in splits.items():
        count = render_split(chosen, args.variants, args.image_size, rng, args.output / split)
        print(f"{split}: {count} pictures from {len(chosen)} of {num_fonts} fonts", flush=True)


if __name__ == "__main__":
    with one_line_errors("python -m par_diffusers.training.glyphs"):
        main()
