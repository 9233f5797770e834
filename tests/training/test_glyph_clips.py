import random

import numpy as np
import pytest
from PIL import ImageFont

from par_diffusers.training import glyph_clips
from par_diffusers.training.glyph_clips import MOTIONS, main, render_clip
from par_diffusers.training.glyphs import CLASSES, load_glyphs, render_glyph
from par_diffusers.training.videos import VideoFolder


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """The font that Pillow carries."""
    file = tmp_path_factory.mktemp("fonts") / "font.ttf"
    file.write_bytes(ImageFont.load_default(12).font_bytes)
    return load_glyphs([file])


def ink(clip: np.ndarray) -> np.ndarray:
    """Where the glyph is, (frames, H, W): it is lighter than any of the background."""
    light = clip.max(-1).astype(int)
    return light > (light[:, 0, 0].max() + light.max()) / 2


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_glyph_moves_as_its_class_says_and_stands_upright_in_the_middle(motion, glyphs):
    (drawn,) = glyphs.values()
    for seed in range(5):
        clip = render_clip(drawn[CLASSES.index("L")], motion, 48, 17, random.Random(seed))
        assert clip.shape == (17, 48, 48, 3) and clip.dtype == np.uint8
        shapes = ink(clip)
        areas = shapes.sum((1, 2))
        boxes = [np.argwhere(shape) for shape in shapes]
        places = [(box.min(0) + box.max(0)) / 2 for box in boxes]
        distance = np.linalg.norm(places[16] - places[0])
        rows, columns = np.nonzero(shapes[8])
        assert 28 < np.ptp(rows) < 40 and np.ptp(rows) > 1.2 * np.ptp(columns)  # a tall letter, whole
        assert (
            shapes[8, :, columns.min() : columns.min() + 5].sum() > shapes[8, :, -12:].sum()
        )  # its stem is on the left
        if motion == "grows":
            assert areas[16] > 3 * areas[0] and (np.diff(areas[::4]) > 0).all() and distance < 4
        elif motion == "moves":
            assert distance > 10 and abs(areas[16] - areas[0]) < 0.45 * areas[8]
        else:
            assert distance < 4 and np.ptp(np.nonzero(shapes[0])[1]) > 28  # it lies on its side
            assert abs(areas - areas[8]).max() < 0.3 * areas[8]


def test_colours_are_those_of_the_pictures(glyphs):
    (drawn,) = glyphs.values()
    picture = render_glyph(drawn[0], 48, random.Random(3))
    assert picture.shape == (48, 48, 3)
    corner = picture[0, 0].astype(int)
    assert corner.max() < 170 < picture.max()


def test_the_command_writes_folders_that_training_reads(glyphs, monkeypatch, tmp_path, capsys):
    def split(min_likeness, min_ink, rng):
        return 2, {"validation": glyphs, "train": glyphs}

    monkeypatch.setattr(glyph_clips, "split_fonts", split)
    words = ["--letters", "AP", "--image-size", "24", "--num-frames", "5", "--variants", "2"]
    main(["--output", str(tmp_path / "first"), *words])
    main(["--output", str(tmp_path / "second"), *words])
    assert "train: 12 clips from 1 of 2 fonts" in capsys.readouterr().out
    ours, theirs = (VideoFolder(tmp_path / name / "train", 24, 5, 8) for name in ("first", "second"))
    assert ours.classes == [f"{letter} {motion}" for letter in "AP" for motion in MOTIONS]
    assert all((ours[index, 0] == theirs[index, 0]).all() for index in range(12))
    assert not (ours[0, 0] == ours[1, 0]).all()
    with pytest.raises(ValueError, match="--output must be a new or empty folder"):
        main(["--output", str(tmp_path / "first")])
    with pytest.raises(ValueError, match="--letters must be some of ABC.*got 'a'"):
        main(["--output", str(tmp_path / "third"), "--letters", "a"])
