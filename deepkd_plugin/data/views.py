"""The weak and the strong view of an image, for methods that compare the two (MLKD, CRLD).

The strong view is the one of their releases: RandAugment as FixMatch has it, with two operations, then a grey
cut-out. All random numbers come from torch; the releases draw from `random` and `numpy.random`, and so the same
values in other orders.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from . import draws
from .draws import Draw
from .resident import count_numbers, known

DRAWN = 2
"""Operations drawn for an image."""

GREY = (125, 123, 114)
LARGEST_CUT = 0.5
"""Upper end of the cut-out's side, as a share of the width."""


class Operation(NamedTuple):
    """An operation on a PIL image, and the ends between which its strength is drawn uniformly."""

    low: float
    high: float
    apply: Callable[[Image.Image, float], Image.Image]


def _affine(
    image: Image.Image, shear: tuple[float, float] = (0.0, 0.0), shift: tuple[float, float] = (0.0, 0.0)
) -> Image.Image:
    """Give pixel (x, y) the value of (x + shear[0] y + shift[0], y + shear[1] x + shift[1]), black outside the image.

    PIL's coordinates, as the releases use them. torchvision moves the image instead of the place that is
    looked up (hence the sign), takes angles for shears, and shears about the centre unless told otherwise.
    Going through an angle moves a shear by 1e-16.
    """
    return F.affine(
        image,
        angle=0.0,
        translate=[-shift[0], -shift[1]],
        scale=1.0,
        shear=[math.degrees(math.atan(s)) for s in shear],
        center=[0.0, 0.0],
    )


OPERATIONS = {
    "autocontrast": Operation(0, 1, lambda image, _: F.autocontrast(image)),
    "brightness": Operation(0.05, 0.95, F.adjust_brightness),
    "colour": Operation(0.05, 0.95, F.adjust_saturation),
    "contrast": Operation(0.05, 0.95, F.adjust_contrast),
    "equalise": Operation(0, 1, lambda image, _: F.equalize(image)),
    "identity": Operation(0, 1, lambda image, _: image),
    "posterise": Operation(4, 8, lambda image, bits: F.posterize(image, int(bits))),
    "rotate": Operation(-30, 30, F.rotate),
    "sharpness": Operation(0.05, 0.95, F.adjust_sharpness),
    "shear_x": Operation(-0.3, 0.3, lambda image, v: _affine(image, shear=(v, 0.0))),
    "shear_y": Operation(-0.3, 0.3, lambda image, v: _affine(image, shear=(0.0, v))),
    "solarise": Operation(0, 256, F.solarize),
    "translate_x": Operation(-0.3, 0.3, lambda image, v: _affine(image, shift=(v * image.width, 0.0))),
    "translate_y": Operation(-0.3, 0.3, lambda image, v: _affine(image, shift=(0.0, v * image.height))),
}
"""FixMatch's list. Strengths are PIL's factors, bits (rounded down), degrees against the clock, pixels of x for
one of y, a threshold from which pixels are inverted, and shares of the side. Geometry takes the nearest pixel."""


class StrongAugment:
    """The strong view's distortions: RGB image in, RGB image of the same size out.

    Two of OPERATIONS, drawn with replacement, each with its own strength, then `cut_out` with a uniform share
    of 0 … 0.5 at a uniform place. On a PIL image torchvision's functions are PIL's, so for equal draws the
    result is the releases', pixel by pixel.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        operations = list(OPERATIONS.values())
        drawn = torch.randint(len(operations), (DRAWN,)).tolist()
        *strengths, share, x, y = torch.rand(DRAWN + 3).tolist()
        for index, strength in zip(drawn, strengths):
            low, high, apply = operations[index]
            image = apply(image, low + (high - low) * strength)
        # The releases' numpy.random.uniform(width) runs from the width down to 1, not to 0
        centre = (image.width + (1 - image.width) * x, image.height + (1 - image.height) * y)
        return cut_out(image, LARGEST_CUT * share, centre)


def cut_out(image: Image.Image, share: float, centre: tuple[float, float]) -> Image.Image:
    """Copy an RGB image and put a grey square in it; the image itself if `share` is 0.

    share: the square's side in widths of the image. centre: (x, y) in pixels. The releases' geometry: the
    square starts half a side before the centre, or at the edge, ends a whole side later, or at the edge, and
    covers every pixel that it touches.
    """
    if share <= 0:
        return image
    side = share * image.width
    left, top = (int(max(0.0, c - side / 2)) for c in centre)
    right, bottom = (min(end, int(start + side) + 1) for end, start in zip(image.size, (left, top)))
    covered = image.copy()
    covered.paste(GREY, (left, top, right, bottom))
    return covered


def takes_tensors(distortion: Any) -> bool:
    """Tell whether a distortion does to tensors (3, H, W) uint8 what it does to PIL images, drawing from torch alone.

    Those of transforms.v2 that move pixels or take means of them. A resized pixel may differ by one level of 255.
    """
    kinds = (v2.RandomResizedCrop, v2.RandomHorizontalFlip, v2.Resize, v2.CenterCrop)
    if type(distortion) not in kinds and not getattr(distortion, "takes_tensors", False):
        return False
    mode = getattr(distortion, "interpolation", InterpolationMode.BILINEAR)
    bilinear = getattr(mode, "value", mode) == InterpolationMode.BILINEAR.value  # torchvision 0.29 keeps its text
    return bilinear and getattr(distortion, "antialias", True) is True


class TrainingViews:
    """The tensor of an image in training, or [weak view, strong view] of it, as a `Draw` says.

    weak: torchvision's distortions, or any other callables from image to image. tensor: makes a tensor of an image.
    two: whether there is a strong view. A second `Draw` is the weak view's, if it has one of its own. size: height and
    width, if all images have the same. Distortions that resident.py knows are made of its numbers, so both pipelines
    give the same pixels. Others, and the strong view's, draw from the global generators in a state of their own. If all
    weak ones are such that `takes_tensors`, an image may be a tensor. erasing: probability of torchvision's random
    erasing of a lone view, with noise of mean 0 and deviation 1, as timm's "pixel" has it.
    """

    def __init__(
        self,
        weak: Sequence[Callable[[Any], Any]],
        tensor: Callable[[Any], Tensor],
        two: bool,
        size: tuple[int, int] | None,
        erasing: float = 0.0,
    ) -> None:
        self.weak, self.tensor, self.two = weak, tensor, two
        made = [known(distortion, *size) for distortion in weak] if size else [None]
        self.known = None if None in made else [one for one in made if one is not None]
        self.strong = StrongAugment()
        self.as_pil = v2.ToPILImage()
        self.erase = v2.RandomErasing(erasing, value="random") if erasing else None
        torch_alone = self.known is not None or all(takes_tensors(distortion) for distortion in weak)
        self.seeded = draws.seeded if torch_alone else draws.all_seeded

    def __call__(self, image: Image.Image | Tensor, draw: Draw, weak_draw: Draw | None = None) -> Tensor | list[Tensor]:
        first = weak_draw or draw
        with contextlib.nullcontext() if self.known is not None else self.seeded(first, draws.WEAK):
            weak = self.tensor(self._distort(image, first, draws.WEAK))
        if not self.two:
            if self.erase is not None:
                with draws.seeded(first, draws.ERASE):
                    return self.erase(weak)
            return weak
        with self.seeded(draw, draws.STRONG):
            return [weak, self.tensor(self.strong(self.as_pil(self._distort(image, draw, draws.STRONG))))]

    def _distort(self, image: Any, draw: Draw, stream: int) -> Any:
        if self.known is None:
            for distortion in self.weak:
                image = distortion(image)
            return image
        numbers = draws.numbers(draw, stream, count_numbers(self.known))
        for one in self.known:
            image = one.apply(image, numbers[: one.numbers])
            numbers = numbers[one.numbers :]
        return image
