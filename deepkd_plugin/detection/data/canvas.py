"""glyph_canvas: a small detection set that needs no download.

Glyphs of glyphs100 are strewn over canvases, with little overlap. The 20 classes are ten pairs that look alike (O and
Q, b and 6, Ш and Щ): finding a glyph is easy, telling it from its like is what a detector learns late.
docs/glyph_canvas.md shows them.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageFilter
from torchvision.transforms.functional import to_tensor

from ...data import glyphs
from ...data.arrays import ArrayDataset
from .samples import AnnotatedImages, Boxes
from .sources import DETECTION_SETS, DetectionSource

CLASSES: str = "OQCGb6B8ШЩZ2S5PRq9EF"
NUM_CLASSES = len(CLASSES)
"""Without background: labels are 1 … 20."""
COUNTS: dict[str, int] = {"train": 1500, "test": 500}
SIZE = 96

# Part of the cache's name: raise it with any change that alters a pixel or a box.
GENERATOR_VERSION = 1

SUPERSAMPLING = 2  # boxes are exact to half a pixel
EMPTY = 0.04  # share of canvases without a glyph
MOST = 5  # glyphs on a canvas
TRIES = 30  # places tried for a glyph before it is left out
OVERLAP = 0.1  # most that two glyphs' bounds share, of the smaller one's

# Ranges are uniform, and milder than those of glyphs100.
GLYPH_SIDE = (14.0, 36.0)  # pixels; longer side of the glyph before rotation
ASPECT = (0.85, 1.18)  # width over height, relative to the font's; the longer side stays what it is
ROTATION = 8.0  # degrees, either way
SHEAR = 0.1  # either way
BLUR = (0.0, 0.7)  # pixels; radius of the Gaussian
CONTRAST = (0.35, 0.75)  # difference of brightness between glyph and canvas
TEXTURE = (0.02, 0.08)  # standard deviation of the canvas's smooth pattern
NOISE = (0.01, 0.04)  # standard deviation of the pixel noise

_BLOCK = 100  # canvases in float at a time

Canvases = tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]


def render_glyph_canvas(split: str, count: int | None = None, seed: int = 0) -> Canvases:
    """Draw one split of glyph_canvas.

    Args:
        split: "train" or "test"; the two have independent random streams.
        count: canvases; 1,500 in train and 500 in test by default. Another number gives other canvases.
        seed: non-negative; the same seed gives the same canvases with the same versions of Pillow, matplotlib's
            fonts and numpy.

    Returns:
        images (N, 96, 96, 3) uint8, and for each its boxes (n, 4) float32, x1 y1 x2 y2 in pixels, tight around
        the glyph, and labels (n,) int64 from 1; n is 0 to 5.

    Raises:
        ValueError: `split` is neither, or `count` or `seed` is out of range.
    """
    if split not in COUNTS:
        raise ValueError(f"split must be one of {', '.join(COUNTS)}, not {split!r}")
    count = COUNTS[split] if count is None else count
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, list(COUNTS).index(split)]))
    masks, sides = glyphs.glyph_masks(CLASSES)
    images: list[np.ndarray] = []
    boxes: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for start in range(0, count, _BLOCK):
        n = min(_BLOCK, count - start)
        ground = rng.uniform(0.1, 0.9, (n, 1)) + rng.uniform(-glyphs.CHROMA, glyphs.CHROMA, (n, 3))
        canvases = ground[:, None, None] + glyphs.textures(rng, n, SIZE) * rng.uniform(*TEXTURE, (n, 1, 1, 1))
        for canvas, colour in zip(canvases, ground):
            its_boxes, its_labels = _draw(rng, canvas, colour, masks, sides)
            boxes.append(its_boxes)
            labels.append(its_labels)
        canvases += rng.normal(size=canvases.shape) * rng.uniform(*NOISE, (n, 1, 1, 1))
        images.append((np.clip(canvases, 0, 1) * 255).round().astype(np.uint8))
    return np.concatenate(images), boxes, labels


def _draw(
    rng: np.random.Generator, canvas: np.ndarray, ground: np.ndarray, masks: list[list[Image.Image]], sides: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Put glyphs on a float canvas (96, 96, 3), in place, and return their boxes and labels."""
    wanted = 0 if rng.random() < EMPTY else int(rng.integers(1, MOST + 1))
    taken = np.empty((0, 4))
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    for _ in range(wanted):
        kind, font = int(rng.integers(NUM_CLASSES)), int(rng.integers(len(glyphs.FONTS)))
        forward = _shape(rng, sides[kind, font])
        reach = np.abs(forward) @ sides[kind, font] / 2
        blur = float(rng.uniform(*BLUR))
        colour = glyphs.colours(rng, ground[None], CONTRAST)[0]
        centre = _place(rng, reach, taken)
        if centre is None:
            continue
        taken = np.concatenate([taken, [[*(centre - reach), *(centre + reach)]]])
        boxes.append(_paint(canvas, masks[kind][font], forward, centre, reach, blur, colour))
        labels.append(kind + 1)
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)


def _shape(rng: np.random.Generator, sides: np.ndarray) -> np.ndarray:
    """Draw a (2, 2) map from the atlas's pixels to the canvas's: size, aspect, shear, rotation."""
    stretch = float(np.exp(rng.uniform(*np.log(ASPECT)) / 2))
    size = np.array([stretch, 1 / stretch])
    size *= rng.uniform(*GLYPH_SIDE) / (sides * size).max()
    angle = np.radians(rng.uniform(-ROTATION, ROTATION))
    cos, sin = np.cos(angle), np.sin(angle)
    skew = np.array([[1.0, rng.uniform(-SHEAR, SHEAR)], [0.0, 1.0]])
    return np.array([[cos, -sin], [sin, cos]]) @ skew * size


def _place(rng: np.random.Generator, reach: np.ndarray, taken: np.ndarray) -> np.ndarray | None:
    """Draw a centre for bounds of half sides `reach`, inside the canvas and beside the bounds `taken` (n, 4)."""
    for _ in range(TRIES):
        centre = rng.uniform(reach, SIZE - reach)
        low, high = centre - reach, centre + reach
        shared = np.clip(np.minimum(taken[:, 2:], high) - np.maximum(taken[:, :2], low), 0, None).prod(1)
        smaller = np.minimum((taken[:, 2:] - taken[:, :2]).prod(1), (high - low).prod())
        if (shared <= OVERLAP * smaller).all():
            return centre
    return None


def _paint(
    canvas: np.ndarray,
    mask: Image.Image,
    forward: np.ndarray,
    centre: np.ndarray,
    reach: np.ndarray,
    blur: float,
    colour: np.ndarray,
) -> np.ndarray:
    """Paint one glyph in place, and return its bounds x1 y1 x2 y2, before the blur."""
    low = np.maximum(np.floor(centre - reach) - 2, 0).astype(int)
    high = np.minimum(np.ceil(centre + reach) + 2, SIZE).astype(int)
    inverse = np.linalg.inv(forward)
    offset = glyphs.ATLAS_SIDE / 2 - inverse @ (centre - low)
    drawn = mask.transform(
        tuple((high - low) * SUPERSAMPLING),
        Image.Transform.AFFINE,
        np.concatenate([inverse / SUPERSAMPLING, offset[:, None]], 1).ravel().tolist(),
        Image.Resampling.BILINEAR,
    )
    bounds = np.array(drawn.point(lambda value: 255 * (value > 127)).getbbox()) / SUPERSAMPLING
    ink = drawn.filter(ImageFilter.GaussianBlur(blur * SUPERSAMPLING)).reduce(SUPERSAMPLING)
    patch = canvas[low[1] : high[1], low[0] : high[0]]
    patch += np.asarray(ink, np.float64)[:, :, None] / 255 * (colour - patch)
    return bounds + np.tile(low, 2)


def load_glyph_canvas(root: str | Path, split: str, seed: int = 0) -> Canvases:
    """Read one split from the cache under `root`, or draw it and leave it there.

    The cache is `<root>/glyph_canvas/<split>-<key>.npz`, about 42 MB for train and 14 MB for test. The key names
    all that pixels and boxes depend on; a file that cannot be read is drawn again.

    Args:
        root: folder of data sets (DATASET.ROOT); made if it is missing.
        split: "train" or "test".
        seed: as in `render_glyph_canvas`.

    Returns:
        images, boxes and labels, as `render_glyph_canvas` gives them.

    Raises:
        ValueError: as in `render_glyph_canvas`.
        UserError: the cache cannot be written under `root`.
    """
    if split not in COUNTS:
        raise ValueError(f"split must be one of {', '.join(COUNTS)}, not {split!r}")
    versions = f"g{glyphs.GENERATOR_VERSION}.{GENERATOR_VERSION}-pillow{PIL.__version__}-mpl{version('matplotlib')}"
    count = COUNTS[split]

    def fits(images: np.ndarray, boxes: np.ndarray, labels: np.ndarray, offsets: np.ndarray) -> bool:
        return (
            (images.shape, images.dtype) == ((count, SIZE, SIZE, 3), np.uint8)
            and (boxes.shape, boxes.dtype) == ((len(labels), 4), np.float32)
            and (labels.shape, labels.dtype) == ((len(boxes),), np.int64)
            and (offsets.shape, offsets.dtype) == ((count + 1,), np.int64)
            and (offsets[0], offsets[-1]) == (0, len(boxes))
            and bool((np.diff(offsets) >= 0).all())
        )

    def draw() -> dict[str, np.ndarray]:
        images, boxes, labels = render_glyph_canvas(split, seed=seed)
        offsets = np.cumsum([0, *map(len, labels)])
        arrays = {"boxes": np.concatenate(boxes), "labels": np.concatenate(labels), "offsets": offsets}
        return {"images": images} | arrays

    path = Path(root) / "glyph_canvas" / f"{split}-s{seed}-n{count}-{versions}.npz"
    arrays = glyphs.drawn_once(path, fits, draw)
    boxes, labels = (np.split(arrays[name], arrays["offsets"][1:-1]) for name in ("boxes", "labels"))
    return arrays["images"], boxes, labels


def _annotated(root: str, split: str) -> AnnotatedImages:
    pixels, boxes, labels = load_glyph_canvas(root, split)
    places = np.arange(len(pixels))
    flat = np.concatenate(labels)
    offsets = np.cumsum([0, *map(len, labels)])
    all_boxes = Boxes(np.concatenate(boxes), flat, np.zeros(len(flat), bool), offsets)
    images = ArrayDataset(pixels, places, to_tensor)
    sizes = np.full((len(pixels), 2), SIZE)
    return AnnotatedImages(images, places, sizes, all_boxes, tuple(CLASSES), train_on_empty=True)


DETECTION_SETS.register(
    "glyph_canvas",
    DetectionSource(
        _annotated, num_classes=NUM_CLASSES, **COUNTS, size=(SIZE, SIZE), drawn=True, no_mirror="a mirrored b is a d"
    ),
)
