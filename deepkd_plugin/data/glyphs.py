"""glyphs100: a data set shaped like CIFAR-100 that needs no download.

100 characters are drawn from the fonts that matplotlib ships, then distorted, coloured and degraded until
a small network takes long to learn them. Some classes resemble each other (b and 6, O and Q, Ш and Щ): that
likeness is what a teacher can pass on. docs/glyphs100.md shows them and says what the set is good for.
"""

import contextlib
import functools
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torchvision import transforms

from ..errors import UserError
from ..run.checkpoint import write_whole
from .sources import Source, register_dataset

# Left out: characters that equal another up to size, since size is random here (c o s u v w x z k p θ π φ ψ),
# or in some of the fonts (l, 0, 1, and the Greek and Cyrillic capitals that are drawn as Latin ones), and
# small Cyrillic letters, whose italics look like other letters.
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijmnqrty23456789ΓΔΘΛΞΠΣΦΨΩαβγδεζηλμξσωБДЖИЛЦЧШЩЫЭЮЯ#$%&@?+=±÷€£¥§¶«"
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
NUM_CLASSES = len(CHARACTERS)
PER_CLASS: dict[str, int] = {"train": 60, "test": 50}

# Part of the cache's name: raise it with any change that alters a pixel.
GENERATOR_VERSION = 1

SIZE = 32
SUPERSAMPLING = 2  # glyphs are drawn this much larger, then averaged down, so that edges are smooth
ATLAS_SIDE = 64  # pixels; side of a stored glyph's square
ATLAS_GLYPH = 56  # pixels; longer side of the glyph inside it

# The strength of the distortions. Ranges are uniform; measured accuracies depend on all of them.
GLYPH_SIDE = (18.0, 26.0)  # pixels; longer side of the glyph before rotation
ASPECT = (0.8, 1.25)  # width over height, relative to the font's
ROTATION = 13.0  # degrees, either way
SHEAR = 0.2  # either way
SHIFT = 3.5  # pixels; most that a glyph is off the centre, less where it would be cut off
BLUR = (0.0, 0.9)  # pixels; radius of the Gaussian
CONTRAST = (0.28, 0.72)  # difference of brightness between glyph and background; 1 is black on white
CHROMA = 0.18  # how far each channel's contrast strays from that, either way
TEXTURE = (0.02, 0.11)  # standard deviation of the smooth background texture
TEXTURE_CELLS = 5  # random values along each side of the texture
NOISE = (0.01, 0.055)  # standard deviation of the pixel noise
STROKES = 0.5  # share of images with a distracting stroke
STROKE_WIDTH = (1.0, 2.5)  # pixels


@functools.cache
def glyph_masks(characters: str, fonts: tuple[str, ...] = FONTS) -> tuple[list[list[Image.Image]], np.ndarray]:
    """Draw characters in some of FONTS: masks[character][font], and the glyphs' (width, height) in a mask's pixels.

    A mask is an "L" image of ATLAS_SIDE x ATLAS_SIDE with the glyph in its middle; the sizes are float64
    (characters, fonts, 2).
    """
    # Not imported at the top: reading the cache needs no fonts, and matplotlib takes longer to import than
    # the cache to read.
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    # The basic layout engine is in every build of Pillow; Raqm is not, and could place glyphs differently.
    layout = ImageFont.Layout.BASIC
    loaded = [ImageFont.truetype(folder / f"{name}.ttf", 96, layout_engine=layout) for name in fonts]
    masks: list[list[Image.Image]] = []
    sides = np.empty((len(characters), len(fonts), 2))
    for i, char in enumerate(characters):
        masks.append([])
        for j, font in enumerate(loaded):
            canvas = Image.new("L", (256, 256))
            ImageDraw.Draw(canvas).text((64, 64), char, fill=255, font=font)
            glyph = canvas.crop(canvas.getbbox())
            ratio = ATLAS_GLYPH / max(glyph.size)
            width, height = (max(1, round(side * ratio)) for side in glyph.size)
            square = Image.new("L", (ATLAS_SIDE, ATLAS_SIDE))
            square.paste(
                glyph.resize((width, height), Image.Resampling.BOX),
                ((ATLAS_SIDE - width) // 2, (ATLAS_SIDE - height) // 2),
            )
            masks[-1].append(square)
            sides[i, j] = width, height
    return masks, sides


def _placements(rng: np.random.Generator, glyph_sides: np.ndarray) -> np.ndarray:
    """Draw size, aspect, rotation, shear and position, the glyph kept inside the image.

    glyph_sides: (N, 2), width and height in the atlas. Returns the coefficients from output to atlas coordinates that
    `Image.transform` takes, (N, 6) float64.
    """
    n = len(glyph_sides)
    scale = rng.uniform(*GLYPH_SIDE, n) / ATLAS_GLYPH
    stretch = np.exp(rng.uniform(*np.log(ASPECT), n) / 2)
    angle = np.radians(rng.uniform(-ROTATION, ROTATION, n))
    shear = rng.uniform(-SHEAR, SHEAR, n)
    cos, sin = np.cos(angle), np.sin(angle)
    rotate = np.stack([cos, -sin, sin, cos], axis=1).reshape(n, 2, 2)
    ones, zeros = np.ones(n), np.zeros(n)
    skew = np.stack([ones, shear, zeros, ones], axis=1).reshape(n, 2, 2)
    size = np.stack([scale * stretch, scale / stretch], axis=1)[:, None, :]
    forward = (rotate @ skew) * size

    reach = (np.abs(forward) @ glyph_sides[:, :, None])[:, :, 0] / 2
    room = np.clip(SIZE / 2 - reach, 0.0, SHIFT)
    centre = SIZE / 2 + rng.uniform(-1, 1, (n, 2)) * room

    inverse = np.linalg.inv(forward)
    offset = ATLAS_SIDE / 2 - (inverse @ centre[:, :, None])[:, :, 0]
    return np.concatenate([inverse / SUPERSAMPLING, offset[:, :, None]], axis=2).reshape(n, 6)


def _stroke(points: np.ndarray, width: float) -> Image.Image:
    """Draw one straight stroke between two points (in pixels, flat x y x y), as a supersampled mask."""
    mask = Image.new("L", (SIZE * SUPERSAMPLING,) * 2)
    ImageDraw.Draw(mask).line(list(points * SUPERSAMPLING), fill=255, width=round(width * SUPERSAMPLING))
    return mask


def colours(rng: np.random.Generator, base: np.ndarray, contrasts: tuple[float, float] = CONTRAST) -> np.ndarray:
    """Draw colours (N, 3), each lighter or darker than its `base` (N, 3) by a contrast; 1 is black on white."""
    n = len(base)
    contrast = rng.uniform(*contrasts, n) * rng.choice([-1.0, 1.0], n)
    # The sign is turned where there is no room for it, else the contrast would be cut off at black or white.
    brightness = base.mean(axis=1)
    contrast = np.where((brightness + contrast > 1) | (brightness + contrast < 0), -contrast, contrast)
    return base + contrast[:, None] + rng.uniform(-CHROMA, CHROMA, (n, 3))


def textures(rng: np.random.Generator, n: int, side: int) -> np.ndarray:
    """Draw smooth random patterns (n, side, side, 3) float64: TEXTURE_CELLS² normal values, spread over the image."""
    # bilinear weights that spread the coarse grid
    position = (np.arange(side) + 0.5) / side * (TEXTURE_CELLS - 1)
    spread = np.maximum(1 - np.abs(position[:, None] - np.arange(TEXTURE_CELLS)), 0)
    grid = rng.normal(size=(n, TEXTURE_CELLS, TEXTURE_CELLS, 3))
    return np.einsum("yj,njkc,xk->nyxc", spread, grid, spread, optimize=True)


def render_glyphs(split: str, per_class: int | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw one split of glyphs100: images (N, 32, 32, 3) uint8 and labels (N,) int64; image i is of class i % 100.

    split: "train" or "test"; the two have independent random streams. per_class: 60 in train and 50 in test by
    default; another number gives other images. seed: the same gives the same images with the same versions of Pillow,
    matplotlib's fonts and numpy. Raises ValueError if one of them is out of range.
    """
    if split not in PER_CLASS:
        raise ValueError(f"split must be one of {', '.join(PER_CLASS)}, not {split!r}")
    per_class = PER_CLASS[split] if per_class is None else per_class
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, not {per_class}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, list(PER_CLASS).index(split)]))
    masks, sides = glyph_masks(CHARACTERS)
    # In blocks, each of one image per class: whole splits of float images would take hundreds of MB.
    blocks = [_render_block(rng, masks, sides) for _ in range(per_class)]
    return np.concatenate(blocks), np.tile(np.arange(len(CHARACTERS), dtype=np.int64), per_class)


def _render_block(rng: np.random.Generator, masks: list[list[Image.Image]], sides: np.ndarray) -> np.ndarray:
    """Draw one image of each class: uint8 (100, 32, 32, 3)."""
    n = len(CHARACTERS)
    fonts = rng.integers(len(FONTS), size=n)
    placements = _placements(rng, sides[np.arange(n), fonts])
    blurs = rng.uniform(*BLUR, n)
    has_stroke = rng.random(n) < STROKES
    ends = rng.uniform(0, SIZE, (n, 4))
    widths = rng.uniform(*STROKE_WIDTH, n)

    glyph = np.empty((n, SIZE, SIZE, 1), np.float32)
    stroke = np.zeros((n, SIZE, SIZE, 1), np.float32)
    for i in range(n):
        mask = masks[i][fonts[i]].transform(
            (SIZE * SUPERSAMPLING,) * 2, Image.Transform.AFFINE, placements[i].tolist(), Image.Resampling.BILINEAR
        )
        blur = ImageFilter.GaussianBlur(float(blurs[i]) * SUPERSAMPLING)
        glyph[i, :, :, 0] = mask.filter(blur).reduce(SUPERSAMPLING)
        if has_stroke[i]:
            stroke[i, :, :, 0] = _stroke(ends[i], widths[i]).filter(blur).reduce(SUPERSAMPLING)
    glyph /= 255
    stroke /= 255

    texture = textures(rng, n, SIZE)
    ground = rng.uniform(0.1, 0.9, (n, 1)) + rng.uniform(-CHROMA, CHROMA, (n, 3))
    image = ground[:, None, None] + texture * rng.uniform(*TEXTURE, (n, 1, 1, 1))
    for mask, colour in ((stroke, colours(rng, ground)), (glyph, colours(rng, ground))):
        image = image + mask * (colour[:, None, None] - image)
    image += rng.normal(size=image.shape) * rng.uniform(*NOISE, (n, 1, 1, 1))
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def load_glyphs100(root: str | Path, split: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Read one split from the cache under `root`, or draw it and leave it there; arrays and errors of render_glyphs.

    The cache is `<root>/glyphs100/<split>-<key>.npz`, about 18 MB for train and 15 MB for test. The key
    names all that the pixels depend on, so another version never reads a stale file. A file that cannot be
    read is drawn again. Raises UserError if the cache cannot be written.
    """
    if split not in PER_CLASS:
        raise ValueError(f"split must be one of {', '.join(PER_CLASS)}, not {split!r}")
    key = f"s{seed}-n{PER_CLASS[split]}-g{GENERATOR_VERSION}-pillow{PIL.__version__}-mpl{version('matplotlib')}"
    count = PER_CLASS[split] * len(CHARACTERS)

    def fits(images: np.ndarray, labels: np.ndarray) -> bool:
        same = images.shape == (count, SIZE, SIZE, 3) and labels.shape == (count,)
        return same and images.dtype == np.uint8 and labels.dtype == np.int64

    path = Path(root) / "glyphs100" / f"{split}-{key}.npz"
    arrays = drawn_once(
        path, fits, lambda: dict(zip(("images", "labels"), render_glyphs(split, seed=seed), strict=True))
    )
    return arrays["images"], arrays["labels"]


def drawn_once(
    path: Path, fits: Callable[..., bool], draw: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Read the arrays in the file `path`, or draw them and leave them there.

    fits: says of the arrays, given by name, whether they are whole. A file that cannot be read or does not fit is drawn
    again. Raises UserError if it cannot be written; the file's folder, under DATASET.ROOT, has the data set's name.
    """
    # damaged bytes make zipfile, zlib and numpy raise more kinds of exceptions than can be listed
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
        if fits(**arrays):
            return arrays
    arrays = draw()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: np.savez(file, **arrays))
    except OSError as error:
        raise UserError(
            f"DATASET.ROOT: cannot write {path.parent.name} to {path.parent} ({error.strerror}); name another"
        ) from error
    return arrays


register_dataset(
    "glyphs100",
    Source(
        load_glyphs100,
        num_classes=NUM_CLASSES,
        train=NUM_CLASSES * PER_CLASS["train"],
        test=NUM_CLASSES * PER_CLASS["test"],
        side=SIZE,
        # of the training images of seed 0
        mean=(0.5009, 0.5017, 0.5007),
        std=(0.26, 0.2593, 0.2592),
        # a mirrored glyph is another glyph (b and d), so there is no flip
        augmentation=(transforms.RandomCrop(SIZE, padding=4),),
        drawn=True,
        class_names=lambda root: CHARACTERS,
    ),
)
