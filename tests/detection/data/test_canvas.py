import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepkd_plugin.data import glyphs
from deepkd_plugin.detection.data import canvas
from deepkd_plugin.detection.data.canvas import (
    CLASSES,
    NUM_CLASSES,
    SIZE,
    load_glyph_canvas,
    render_glyph_canvas,
)
from deepkd_plugin.errors import UserError


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(canvas, "COUNTS", {"train": 6, "test": 4})


@pytest.fixture(scope="module")
def drawn():
    return render_glyph_canvas("test", count=400)


def same(first, second):
    return all(np.array_equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_twenty_classes_of_glyphs100():
    assert len(CLASSES) == len(set(CLASSES)) == NUM_CLASSES == 20
    assert set(CLASSES) <= set(glyphs.CHARACTERS)


def test_shapes_types_and_ranges(drawn):
    images, boxes, labels = drawn
    assert (images.shape, images.dtype) == ((400, SIZE, SIZE, 3), np.uint8)
    assert len(boxes) == len(labels) == 400
    counts = [len(of) for of in labels]
    assert set(counts) == {0, 1, 2, 3, 4, 5}
    assert 4 <= counts.count(0) <= 40
    for box, label in zip(boxes, labels):
        assert (box.shape, box.dtype, label.dtype) == ((len(label), 4), np.float32, np.int64)
    flat = np.concatenate(boxes)
    assert flat.min() >= 0
    assert flat.max() <= SIZE
    longer = (flat[:, 2:] - flat[:, :2]).max(1)
    assert (flat[:, 2:] > flat[:, :2]).all()
    assert longer.min() >= 12  # a slanted side may shrink by a pixel or two, and grow by its slant
    assert longer.max() <= 46
    assert set(np.concatenate(labels).tolist()) == set(range(1, 21))


def test_glyphs_hardly_overlap(drawn):
    for box in drawn[1]:
        area = (box[:, 2:] - box[:, :2]).prod(1)
        for i in range(len(box)):
            low, high = np.maximum(box[i, :2], box[:i, :2]), np.minimum(box[i, 2:], box[:i, 2:])
            shared = np.clip(high - low, 0, None).prod(1)
            # placed by bounds that are a little wider than the boxes
            assert (shared <= 0.25 * np.minimum(area[i], area[:i])).all()


def test_boxes_are_tight_around_the_pixels(monkeypatch):
    """Without texture, noise and blur, what differs from the ground is the glyph."""
    for name in ("TEXTURE", "NOISE", "BLUR"):
        monkeypatch.setattr(canvas, name, (0.0, 0.0))
    monkeypatch.setattr(canvas, "MOST", 1)
    monkeypatch.setattr(canvas, "CONTRAST", (0.6, 0.8))
    images, boxes, labels = render_glyph_canvas("train", count=60)
    checked = 0
    for image, box, label in zip(images, boxes, labels):
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        ink = np.abs(image.astype(int) - np.median(corners, 0)).max(-1)
        if not len(label):
            assert ink.max() == 0
            continue
        ys, xs = np.nonzero(ink > ink.max() * 0.3)
        bounds = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        assert np.abs(box[0] - bounds).max() <= 1.0
        checked += 1
    assert checked > 40


def test_a_label_is_the_class_of_the_glyph_in_its_box(monkeypatch):
    """Large upright glyphs, cut out by their boxes, match their own class's mask best."""
    monkeypatch.setattr(canvas, "MOST", 1)
    monkeypatch.setattr(canvas, "GLYPH_SIDE", (40.0, 44.0))
    for name in ("ROTATION", "SHEAR"):
        monkeypatch.setattr(canvas, name, 0.0)
    monkeypatch.setattr(canvas, "NOISE", (0.0, 0.0))
    monkeypatch.setattr(canvas, "TEXTURE", (0.0, 0.0))
    monkeypatch.setattr(glyphs, "FONTS", glyphs.FONTS[:1])
    monkeypatch.setattr(canvas.glyphs, "CHROMA", 0.0)
    masks, _ = glyphs.glyph_masks(CLASSES)

    def shape(image):
        image = image.crop(image.point(lambda value: 255 * (value > 127)).getbbox())
        return np.asarray(image.resize((24, 24)), float).ravel() / 255

    templates = np.stack([shape(row[0]) for row in masks])
    images, boxes, labels = render_glyph_canvas("train", count=60)
    right = total = 0
    for image, box, label in zip(images, boxes, labels):
        if not len(label):
            continue
        grey = image.mean(-1)
        ink = np.abs(grey - np.median(grey))
        x1, y1, x2, y2 = np.round(box[0]).astype(int)
        cut = Image.fromarray((ink / ink.max() * 255)[y1:y2, x1:x2].astype(np.uint8))
        guess = np.abs(templates - np.asarray(cut.resize((24, 24)), float).ravel() / 255).mean(1).argmin()
        right += CLASSES[guess] == CLASSES[label[0] - 1]
        total += 1
    assert right / total > 0.9


def test_same_seed_same_canvases_and_splits_and_seeds_differ():
    assert same(render_glyph_canvas("train", 5, seed=3), render_glyph_canvas("train", 5, seed=3))
    sets = [render_glyph_canvas(split, 5, seed=seed)[0] for split in ("train", "test") for seed in (0, 1)]
    unique = {image.tobytes() for images in sets for image in images}
    assert len(unique) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("val",), "split must be one of train, test, not 'val'"),
        (("train", 0), "count must be at least 1, not 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        render_glyph_canvas(*arguments)


def files(root):
    return sorted((root / "glyph_canvas").iterdir())


def test_cache_hit_equals_render(small, tmp_path, monkeypatch):
    expected = render_glyph_canvas("train", seed=3)
    assert same(load_glyph_canvas(tmp_path, "train", seed=3), expected)
    assert len(files(tmp_path)) == 1  # and no temporary file is left
    monkeypatch.setattr(canvas, "render_glyph_canvas", None)  # a second drawing would fail
    held = load_glyph_canvas(str(tmp_path), "train", seed=3)
    assert same(held, expected)
    assert [box.dtype for box in held[1]] == [np.float32] * 6


def test_splits_seeds_sizes_and_versions_have_their_own_cache(small, tmp_path, monkeypatch):
    load_glyph_canvas(tmp_path, "train")
    load_glyph_canvas(tmp_path, "test")
    load_glyph_canvas(tmp_path, "train", seed=1)
    monkeypatch.setattr(canvas, "COUNTS", {"train": 2, "test": 2})
    load_glyph_canvas(tmp_path, "train")
    monkeypatch.setattr(canvas, "GENERATOR_VERSION", -1)
    load_glyph_canvas(tmp_path, "train")
    monkeypatch.setattr(glyphs, "GENERATOR_VERSION", -1)
    load_glyph_canvas(tmp_path, "train")
    monkeypatch.setattr(canvas.PIL, "__version__", "0")
    load_glyph_canvas(tmp_path, "train")
    monkeypatch.setattr(canvas, "version", lambda package: f"{package}0")
    load_glyph_canvas(tmp_path, "train")
    assert len(files(tmp_path)) == 8


def rewrite(path, **changed):
    with np.load(path) as held:
        arrays = dict(held)
    np.savez(path, **arrays | changed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(b""),
        lambda path: rewrite(path, boxes=np.array([{}], dtype=object)),
        lambda path: rewrite(path, images=np.zeros((4, 8, 8, 3), np.uint8)),
        lambda path: rewrite(path, offsets=np.array([0, 1, 2, 3, 99])),
        lambda path: rewrite(path, offsets=np.array([0, 99, 2, 1, len(np.load(path)["labels"])])),
        lambda path: rewrite(path, labels=np.zeros(1, np.int64)),
    ],
)
def test_damaged_cache_is_drawn_again(small, tmp_path, monkeypatch, damage):
    expected = load_glyph_canvas(tmp_path, "test")
    (path,) = files(tmp_path)
    damage(path)
    assert same(load_glyph_canvas(tmp_path, "test"), expected)
    monkeypatch.setattr(canvas, "render_glyph_canvas", None)  # a second drawing would fail
    assert same(load_glyph_canvas(tmp_path, "test"), expected)
    assert files(tmp_path) == [path]


def test_unusable_root_is_one_line(small, tmp_path):
    root = tmp_path / "file"
    root.write_text("in the way")
    with pytest.raises(UserError, match=r"DATASET\.ROOT: cannot write glyph_canvas to") as caught:
        load_glyph_canvas(root, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_root_is_one_line(small, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"DATASET\.ROOT.*Permission denied"):
        load_glyph_canvas(tmp_path, "train")


def test_the_picture_of_the_docs(tmp_path):
    script = Path(__file__).parents[3] / "benchmarks" / "canvas_sheet.py"
    runpy.run_path(str(script))["main"](str(tmp_path / "sheet.png"))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (1152, 768)
