"""Renders the glyph clips: coloured letters that move, turn or grow on coloured gradients, from the fonts of a machine.

A class is a letter and what it does, "A moves". In the middle frame every letter is upright, whole and near the middle, as in
the pictures of `par_diffusers.training.glyphs`, so that their judge can name it.

    python -m par_diffusers.training.glyph_clips --output glyph-clips
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image

from par_diffusers.cli import check_installed, one_line_errors
from par_diffusers.training.glyphs import CLASSES, draw_colours, split_fonts
from par_diffusers.training.videos import write_clip


MOTIONS = ("grows", "moves", "turns")
FRAME_RATE = 8
_FINER = 4  # glyphs are drawn at so many times the resolution


def draw_ink(
    glyph: Image.Image, image_size: int, height: float, angle: float, centre: tuple[float, float]
) -> np.ndarray:
    """Coverage of each pixel, (image_size, image_size), by a glyph of this longer side in pixels, turned by `angle`."""
    scale = max(glyph.size) / (height * _FINER)
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    x, y = (place * _FINER for place in centre)
    left = glyph.width / 2 - cosine * x - sine * y
    top = glyph.height / 2 + sine * x - cosine * y
    side = image_size * _FINER
    ink = glyph.transform(
        (side, side), Image.Transform.AFFINE, (cosine, sine, left, -sine, cosine, top), Image.Resampling.BICUBIC
    )
    return np.asarray(ink.resize((image_size, image_size), Image.Resampling.BOX)) / 255


def render_clip(glyph: Image.Image, motion: str, image_size: int, num_frames: int, rng: random.Random) -> np.ndarray:
    """One clip, uint8 (num_frames, image_size, image_size, 3)."""
    background, paint = draw_colours(image_size, rng)
    height = image_size * rng.uniform(0.66, 0.76)
    shift = image_size / 32
    middle = [image_size / 2 + rng.uniform(-shift, shift) for _ in range(2)]
    direction, side = rng.uniform(0, 2 * math.pi), rng.choice((-1, 1))
    frames = []
    for time in np.linspace(-1, 1, num_frames):
        size, angle, centre = height, 0.0, middle
        if motion == "grows":
            size = height * (1 + 0.4 * time)
        elif motion == "turns":
            angle = side * time * math.pi / 2
        else:
            step = 0.17 * image_size * time
            centre = (middle[0] + step * math.cos(direction), middle[1] + step * math.sin(direction))
        ink = draw_ink(glyph, image_size, size, angle, centre)[..., None]
        frames.append(background + (paint - background) * ink)
    return np.round(np.stack(frames) * 255).astype(np.uint8)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m par_diffusers.training.glyph_clips", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make, with train/ and validation/")
    parser.add_argument("--image-size", type=int, default=48, help="pixels of a side (default: %(default)s)")
    parser.add_argument("--num-frames", type=int, default=17, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--letters", default="ACEGHKPRSX", help="letters and digits (default: %(default)s)")
    parser.add_argument(
        "--variants", type=int, default=1, help="clips of each class of each font (default: %(default)s)"
    )
    parser.add_argument(
        "--min-likeness", type=float, default=0.7, help="see glyphs.keep_legible (default: %(default)s)"
    )
    parser.add_argument("--min-ink", type=float, default=0.3, help="see glyphs.keep_legible (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    check_installed("av", "video")
    unknown = sorted(set(args.letters) - set(CLASSES))
    if unknown or not args.letters:
        raise ValueError(f"--letters must be some of {CLASSES}, got {args.letters!r}.")
    if args.output.exists() and any(args.output.iterdir()):
        raise ValueError(f"--output must be a new or empty folder, {args.output} has files.")

    rng = random.Random(args.seed)
    num_fonts, splits = split_fonts(args.min_likeness, args.min_ink, rng)
    for split, fonts in splits.items():
        number = 0
        for letter in sorted(set(args.letters)):
            for motion in MOTIONS:
                folder = args.output / split / f"{letter} {motion}"
                folder.mkdir(parents=True)
                for font in sorted(fonts):
                    glyph = fonts[font][CLASSES.index(letter)]
                    for _ in range(args.variants):
                        clip = render_clip(glyph, motion, args.image_size, args.num_frames, rng)
                        write_clip(folder / f"{number:06}.mp4", clip, FRAME_RATE)
                        number += 1
        print(f"{split}: {number} clips from {len(fonts)} of {num_fonts} fonts", flush=True)


if __name__ == "__main__":
    with one_line_errors("python -m par_diffusers.training.glyph_clips"):
        main()
