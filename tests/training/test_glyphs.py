import random

import numpy as np
import pytest
from PIL import Image, ImageFont

from par_diffusers.training.glyphs import (
    CLASSES,
    draw_glyph,
    keep_legible,
    load_glyphs,
    main,
    render_glyph,
    render_split,
)
from par_diffusers.training.images import ImageFolder


@pytest.fixture(scope="module")
def font_file(tmp_path_factory):
    """The font that Pillow carries, as a file."""
    file = tmp_path_factory.mktemp("fonts") / "font.ttf"
    file.write_bytes(ImageFont.load_default(12).font_bytes)
    return file


@pytest.fixture(scope="module")
def glyphs(font_file):
    return load_glyphs([font_file])


def test_a_font_gives_one_glyph_for_each_class_cut_to_its_ink(glyphs, font_file):
    ((_, drawn),) = glyphs.items()
    assert len(drawn) == len(CLASSES) == 36
    for glyph in drawn:
        assert glyph.getbbox() == (0, 0, *glyph.size)
    font = ImageFont.truetype(str(font_file), 128)
    assert draw_glyph(font, "W").width > 3 * draw_glyph(font, "I").width
    assert draw_glyph(font, " ") is None


def test_the_same_face_counts_once_and_unreadable_files_are_passed_over(glyphs, font_file, tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    assert load_glyphs([font_file, tmp_path / "broken.ttf", font_file]).keys() == glyphs.keys()


def test_fonts_that_lack_a_class_are_left_out(font_file):
    assert load_glyphs([font_file], CLASSES + "\u4e00") == {}


def test_symbols_and_hairlines_are_dropped(glyphs):
    ((_, drawn),) = glyphs.items()
    rng = np.random.default_rng(0)
    fonts = {(f"plain {i}", ""): [glyph.rotate(i + 1) for glyph in drawn] for i in range(5)}
    fonts["symbols", ""] = [Image.fromarray(rng.integers(0, 255, (64, 64), dtype="uint8")) for _ in drawn]
    fonts["hairline", ""] = [glyph.point(lambda value: value * 0.3) for glyph in drawn]
    kept = keep_legible(fonts, min_likeness=0.6, min_ink=0.2)
    assert {family for family, _ in kept} == {f"plain {i}" for i in range(5)}


def test_pictures_show_a_light_glyph_on_a_dark_background(glyphs):
    ((_, drawn),) = glyphs.items()
    rng = random.Random(0)
    for label in range(36):
        picture = render_glyph(drawn[label], 48, rng)
        assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8
        light = picture.astype(int).max(2)
        corners = np.array([light[0, 0], light[0, -1], light[-1, 0], light[-1, -1]])
        assert corners.max() < 160 < light.max()


def test_an_upright_bar_has_a_shape(glyphs):
    ((_, drawn),) = glyphs.items()
    bar = Image.new("L", (20, 100), 255)  # the "I" of many fonts without serifs
    fonts = {
        (f"plain {i}", ""): [bar if c == "I" else g for c, g in zip(CLASSES, drawn, strict=True)] for i in range(3)
    }
    assert keep_legible(fonts, min_likeness=0.7, min_ink=0.2).keys() == fonts.keys()


def test_splits_are_folders_of_classes_and_reproducible(glyphs, tmp_path):
    for name in ("first", "again"):
        assert render_split(glyphs, variants=2, image_size=24, rng=random.Random(3), folder=tmp_path / name) == 72
    files = sorted(file.relative_to(tmp_path / "first") for file in (tmp_path / "first").rglob("*.png"))
    assert len(files) == 72
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    images = ImageFolder(tmp_path / "first", 24)
    assert images.classes == sorted(CLASSES) and np.bincount(images.labels).tolist() == [2] * 36
    assert images[0, 0].shape == (3, 24, 24)


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="--output must be a new or empty folder"):
        main(["--output", str(tmp_path)])
