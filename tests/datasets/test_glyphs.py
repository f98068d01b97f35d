import errno
import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont

from deepkd_plugin.data import glyphs, source
from deepkd_plugin.data.glyphs import CHARACTERS, FONTS, glyph_masks, load_glyphs100, render_glyphs
from deepkd_plugin.errors import UserError


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(glyphs, "PER_CLASS", {"train": 3, "test": 2})


@pytest.fixture(scope="module")
def train():
    return render_glyphs("train")


def cache_files(root):
    return sorted((root / "glyphs100").iterdir())


def test_hundred_unique_characters():
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 100


@pytest.mark.parametrize("name", FONTS)
def test_every_font_has_every_character(name):
    font = TTFont(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf")
    names = font.getBestCmap()
    missing = [c for c in CHARACTERS if names.get(ord(c), ".notdef") == ".notdef"]
    assert missing == []


def test_no_drawn_glyph_is_the_missing_one():
    masks, _ = glyph_masks(CHARACTERS)
    missing, _ = glyph_masks("\uffff")  # a non-character: no font can have it
    for j in range(len(FONTS)):
        notdef = missing[0][j].tobytes()
        assert all(row[j].tobytes() != notdef for row in masks)


def test_characters_are_distinct_in_every_font():
    masks, _ = glyph_masks(CHARACTERS)
    ink = np.stack([[np.asarray(m, np.float32).ravel() / 255 for m in row] for row in masks])
    for j, name in enumerate(FONTS):
        x = ink[:, j]
        shared = x @ x.T
        own = np.diag(shared)
        overlap = shared / (own[:, None] + own[None] - shared)
        np.fill_diagonal(overlap, 0)
        i, k = np.unravel_index(overlap.argmax(), overlap.shape)
        # Bold italic Н-like and П-like capitals share 0.94 of their ink and are told apart with ease;
        # Greek and Latin A, had both been in, would share 1.
        assert overlap[i, k] < 0.96, f"{CHARACTERS[i]} and {CHARACTERS[k]} look the same in {name}"


def test_shapes_types_and_balance(train):
    for (images, labels), per_class in ((train, 60), (render_glyphs("test", per_class=2), 2)):
        assert images.shape == (100 * per_class, 32, 32, 3)
        assert images.dtype == np.uint8
        assert labels.shape == (100 * per_class,)
        assert labels.dtype == np.int64
        assert (np.bincount(labels, minlength=100) == per_class).all()
        assert labels[:100].tolist() == list(range(100))


def test_same_seed_same_images():
    first, second = (render_glyphs("train", per_class=2, seed=5) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_seeds_and_splits_differ():
    sets = [
        render_glyphs("train", per_class=2)[0],
        render_glyphs("train", per_class=2, seed=1)[0],
        render_glyphs("test", per_class=2)[0],
        render_glyphs("test", per_class=2, seed=1)[0],
    ]
    unique = {image.tobytes() for images in sets for image in images}
    assert len(unique) == sum(map(len, sets))


def test_mean_and_std_are_those_of_the_training_images(train):
    pixels = train[0] / 255
    # Another Pillow may move a few edge pixels by one level, which shows in the fifth digit.
    assert pytest.approx(pixels.mean((0, 1, 2)), abs=1.5e-4) == source("glyphs100").mean
    assert pytest.approx(pixels.std((0, 1, 2)), abs=1.5e-4) == source("glyphs100").std


def test_colour_says_nothing_about_the_class(train):
    images, labels = train
    colour = images.mean((1, 2))
    by_class = np.stack([colour[labels == i].mean(0) for i in range(100)])
    # Class means of 60 images scatter by sigma / sqrt(60) when colour and class are independent.
    assert by_class.std(0) == pytest.approx(colour.std(0) / np.sqrt(60), rel=0.35)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "val"}, "split must be one of train, test, not 'val'"),
        ({"split": "train", "per_class": 0}, "per_class must be at least 1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        render_glyphs(**kwargs)


def test_cache_hit_equals_render(small, tmp_path, monkeypatch):
    expected = render_glyphs("test", seed=3)
    drawn = load_glyphs100(tmp_path, "test", seed=3)
    assert len(cache_files(tmp_path)) == 1  # and no temporary file is left
    monkeypatch.setattr(glyphs, "render_glyphs", None)  # a second drawing would fail
    for images, labels in (drawn, load_glyphs100(str(tmp_path), "test", seed=3)):
        assert np.array_equal(images, expected[0])
        assert np.array_equal(labels, expected[1])
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)


def test_splits_seeds_sizes_and_versions_have_their_own_cache(small, tmp_path, monkeypatch):
    load_glyphs100(tmp_path, "train")
    load_glyphs100(tmp_path, "test")
    load_glyphs100(tmp_path, "train", seed=1)
    monkeypatch.setattr(glyphs, "PER_CLASS", {"train": 1, "test": 1})
    load_glyphs100(tmp_path, "train")
    monkeypatch.setattr(glyphs, "GENERATOR_VERSION", -1)
    load_glyphs100(tmp_path, "train")
    monkeypatch.setattr(glyphs.PIL, "__version__", "0")
    load_glyphs100(tmp_path, "train")
    monkeypatch.setattr(glyphs, "version", lambda package: f"{package}0")
    load_glyphs100(tmp_path, "train")
    assert len(cache_files(tmp_path)) == 7


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def pickle_inside(path):
    np.savez(path.open("wb"), images=np.array([{}], dtype=object), labels=np.zeros(1))


def wrong_shape(path):
    np.savez(path.open("wb"), images=np.zeros((1, 32, 32, 3), np.uint8), labels=np.zeros(1, np.int64))


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, empty, pickle_inside, wrong_shape])
def test_damaged_cache_is_drawn_again(small, tmp_path, damage):
    expected = load_glyphs100(tmp_path, "test")
    (path,) = cache_files(tmp_path)
    sound = path.read_bytes()
    damage(path)
    images, labels = load_glyphs100(tmp_path, "test")
    assert np.array_equal(images, expected[0])
    assert np.array_equal(labels, expected[1])
    assert len(path.read_bytes()) == len(sound)
    assert cache_files(tmp_path) == [path]


def test_unusable_root_is_one_line(small, tmp_path):
    root = tmp_path / "file"
    root.write_text("in the way")
    with pytest.raises(UserError) as caught:
        load_glyphs100(root, "train")
    message = str(caught.value)
    assert "\n" not in message
    assert str(root) in message
    assert "DATASET.ROOT" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_root_is_one_line(small, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"DATASET\.ROOT.*Permission denied"):
        load_glyphs100(tmp_path, "train")


def test_failed_write_leaves_no_file(small, tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"DATASET\.ROOT.*No space left on device"):
        load_glyphs100(tmp_path, "train")
    assert cache_files(tmp_path) == []
