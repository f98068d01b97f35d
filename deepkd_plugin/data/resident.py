"""Small image sets that are kept on the device, where whole batches are distorted and normalised.

A set takes a byte for each channel of a pixel: CIFAR-100 150 MB for training and 30 MB for tests, glyphs100
18 and 15 MB, Tiny ImageNet 1.2 GB and 120 MB. Draws are distributed as torchvision's are, and for equal draws
the pixels are equal: a distortion only says which pixel of its image each pixel comes from, in PIL's own
arithmetic, so a batch is one gather. No operation waits for the device.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import functional as F

from ..distributed import process_group, sharding
from ..errors import UserError
from . import draws
from .arrays import Passes
from .normalise import Normalise


class Batchwise(Protocol):
    """A distortion of images of one size, as a look-up: where each pixel comes from.

    numbers: how many numbers in [0, 1) it draws for an image. ways: how many images it can make of one; None if there
    is no end to them.
    """

    numbers: ClassVar[int]

    @property
    def ways(self) -> int | None: ...

    def draw(self, numbers: Tensor) -> Tensor:
        """Turn numbers (B, `numbers`) in [0, 1) into what is random about B images: (…, B)."""

    def way(self, drawn: Tensor) -> Tensor:
        """Number what was drawn, (…, B), from 0 to `ways` − 1: (B,) int64."""

    def apply(self, image: Image.Image, numbers: Sequence[float]) -> Image.Image:
        """Do to one PIL image what `draw` and `origin` do to a batch."""

    def origin(self, y: Tensor, x: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row and column that pixel (y, x) is taken from; outside the image it is black.

        y, x: int64, of shapes that broadcast to (B, H, W). drawn: (…, B, 1, 1).
        """


@dataclass(frozen=True)
class Crop:
    """A window of the image's size from the image with `padding` black pixels on each side of it."""

    padding: int
    numbers = 2

    @property
    def ways(self) -> int:
        return (2 * self.padding + 1) ** 2

    def draw(self, numbers: Tensor) -> Tensor:
        return (numbers * (2 * self.padding + 1)).long().T - self.padding

    def way(self, drawn: Tensor) -> Tensor:
        return (drawn[0] + self.padding) * (2 * self.padding + 1) + drawn[1] + self.padding

    def apply(self, image: Image.Image, numbers: Sequence[float]) -> Image.Image:
        top, left = (int(number * (2 * self.padding + 1)) - self.padding for number in numbers)
        return F.crop(image, top, left, image.height, image.width)

    def origin(self, y: Tensor, x: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        return y + drawn[0], x + drawn[1]


@dataclass(frozen=True)
class Flip:
    """A mirror image, left for right, with probability `p`."""

    p: float
    width: int
    numbers = 1

    @property
    def ways(self) -> int:
        return 2

    def draw(self, numbers: Tensor) -> Tensor:
        return numbers[:, 0] < self.p

    def way(self, drawn: Tensor) -> Tensor:
        return drawn.long()

    def apply(self, image: Image.Image, numbers: Sequence[float]) -> Image.Image:
        return F.hflip(image) if numbers[0] < self.p else image

    def origin(self, y: Tensor, x: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        return y, torch.where(drawn, self.width - 1 - x, x)


@dataclass(frozen=True)
class Rotation:
    """A turn about the centre by `low` … `high` degrees against the clock, to the nearest pixel.

    PIL's arithmetic: the affine map and a pixel's centre in 16.16 fixed point. (torchvision's own rotation of
    tensors takes another pixel here and there.)
    """

    low: float
    high: float
    height: int
    width: int
    numbers = 1

    @property
    def ways(self) -> None:
        return None

    def draw(self, numbers: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * numbers[:, 0]

    def way(self, drawn: Tensor) -> Tensor:
        raise NotImplementedError("there is no end to the angles")

    def apply(self, image: Image.Image, numbers: Sequence[float]) -> Image.Image:
        return F.rotate(image, self.low + (self.high - self.low) * numbers[0])

    def origin(self, y: Tensor, x: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.deg2rad(drawn.double())
        cos, sin = angle.cos(), angle.sin()
        # from the centre to the centre of the first pixel
        up, left = 0.5 - self.height / 2, 0.5 - self.width / 2
        first_x = _fixed(self.width / 2 + cos * left - sin * up)
        first_y = _fixed(self.height / 2 + sin * left + cos * up)
        across, down = _fixed(cos), _fixed(sin)
        return (first_y + down * x + across * y) >> 16, (first_x + across * x - down * y) >> 16


def _fixed(value: Tensor) -> Tensor:
    """Convert to 16.16 fixed point, rounding half up as PIL does."""
    return torch.floor(value * 65536 + 0.5).to(torch.int64)


def known(distortion: Any, height: int, width: int) -> Batchwise | None:
    """Return what one of torchvision's distortions does to images of this size; None if it is not known here.

    Only those that are made here as they are: a subclass, another fill, padding or interpolation is not known.
    """
    options, kind = vars(distortion) if hasattr(distortion, "__dict__") else {}, type(distortion)
    if any(options.get(name, usual) != usual for name, usual in _USUAL.items()):
        return None
    if kind is transforms.RandomCrop and (*distortion.size,) == (height, width) and type(distortion.padding) is int:
        return Crop(distortion.padding)
    if kind is transforms.RandomHorizontalFlip:
        return Flip(distortion.p, width)
    if kind is transforms.RandomRotation:
        return Rotation(*distortion.degrees, height, width)
    return None


_USUAL = {
    "fill": 0,
    "padding_mode": "constant",
    "interpolation": transforms.InterpolationMode.NEAREST,
    "expand": False,
    "center": None,
}
"""torchvision's options that are made here with these values alone, their defaults."""


def batchwise(distortions: Sequence[Any], height: int, width: int) -> list[Batchwise]:
    """Return what torchvision's distortions do to images of this size; UserError if one is not known here."""
    made = []
    for distortion in distortions:
        one = known(distortion, height, width)
        if one is None:
            raise UserError(
                f"config: DATASET.PIPELINE is 'device'; it must be 'workers' with {distortion}, which is not made on a "
                f"device for images of {width} x {height}"
            )
        made.append(one)
    return made


def draw(distortions: Sequence[Batchwise], numbers: Tensor) -> list[Tensor]:
    """Turn the numbers (B, n) of B images into what each distortion draws: (…, B) each."""
    parts = numbers.split([distortion.numbers for distortion in distortions], dim=1)
    return [distortion.draw(part) for distortion, part in zip(distortions, parts)]


def count_numbers(distortions: Sequence[Batchwise]) -> int:
    """Return how many numbers an image needs for its distortions."""
    return sum(distortion.numbers for distortion in distortions)


def view_count(distortions: Sequence[Batchwise]) -> int | None:
    """Return how many weak views an image has; None if there is no end to them."""
    ways = [distortion.ways for distortion in distortions]
    return None if None in ways else math.prod(way for way in ways if way is not None)


def view_index(distortions: Sequence[Batchwise], seed: int, epoch: int, index: Tensor) -> Tensor:
    """Return which of its `view_count` weak views each image has in an epoch: (B,) int64.

    index: the images' places (B,) among all training images of their set.
    """
    drawn = draw(distortions, draws.uniforms(seed, epoch, index, draws.WEAK, count_numbers(distortions)))
    view = torch.zeros_like(index)
    for distortion, of_image in zip(distortions, drawn):
        view = view * distortion.ways + distortion.way(of_image)
    return view


class ResidentLoader:
    """Batches of a data set whose images are on a device; used like a DataLoader.

    Training batches are (image, target, index), in the order of the sampler, with the distortions of its epoch.
    Test batches are (image, target), in the data's order. The last batch may be smaller. Images are float32
    (B, C, H, W), targets and indices int64 (B,), all on the device.
    """

    def __init__(
        self,
        dataset: Dataset,
        images: Tensor,
        targets: Tensor,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        distortions: Sequence[Any] = (),
        sampler: Passes | None = None,
    ) -> None:
        """Take the images and labels of `dataset`, which gives single samples as the worker pipeline does.

        images: (N, H, W, C) uint8. targets: (N,) int64. Both on the device, and in the data set's order.
        mean, std: of the channels. distortions: torchvision's, in their order. sampler: of training batches; None
        for test batches.
        """
        self.dataset, self.batch_size = dataset, batch_size
        self.images = images.permute(0, 3, 1, 2).contiguous()
        self.targets = targets
        self.normalise = Normalise(mean, std, images.device)
        self.distortions = batchwise(distortions, *images.shape[1:3])
        self.sampler = sampler
        self.chunk = batch_size
        """Images in a micro-batch, of which each of several processes has a part."""
        self.only_draw = False
        """Whether training batches are {"index", "target", "drawn"}, of which `make` makes the images elsewhere."""

    def __len__(self) -> int:
        return -(-len(self.targets) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        if self.sampler is None:
            return ((self.normalise(self.images[part]), self.targets[part]) for part in self._parts(len(self.targets)))
        return self._training_batches(self.sampler)

    def make(self, index: Tensor, drawn: Sequence[Tensor]) -> Tensor:
        """Return the images (B, C, H, W) of a training batch of places (B,) and draws (…, B)."""
        return self.normalise(self.distort(index, drawn))

    def distort(self, index: Tensor, drawn: Sequence[Tensor]) -> Tensor:
        """Take images by their places (B,) and distort them by draws (…, B): (B, C, H, W) uint8."""
        images = self.images[index]
        height, width = images.shape[2:]
        y = torch.arange(height, device=index.device)[:, None].expand(len(index), height, 1)
        x = torch.arange(width, device=index.device).expand(len(index), 1, width)
        inside = torch.ones((len(index), 1, 1), dtype=torch.bool, device=index.device)
        # backwards, for a pixel of the result comes from the last distortion's input, and so on
        for distortion, draw in zip(reversed(self.distortions), reversed(drawn)):
            y, x = distortion.origin(y, x, draw[..., None, None])
            inside = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        place = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        place = place.flatten(1)[:, None].expand(-1, images.shape[1], -1)
        return images.flatten(2).gather(2, place).view_as(images) * inside[:, None]

    def _training_batches(self, sampler: Passes) -> Iterator[Any]:
        epoch, done = sampler.begin()
        places = sampler.places(epoch, self.images.device)[done:]
        chosen, needed = sampler.chosen.to(self.images.device)[places], count_numbers(self.distortions)
        drawn_from = sampler.views.seed, sampler.views.epoch(epoch)
        # of all batches at once: on a GPU a batch's own would take as long to start as some of its layers
        of_pass = draw(self.distortions, draws.uniforms(*drawn_from, chosen, draws.WEAK, needed))
        for part in self._parts(len(places)):
            if process_group.size() > 1:
                part = part.start + torch.tensor(sharding.own(part.stop - part.start, self.chunk)).to(places.device)
            index = places[part]
            target, drawn = self.targets[index], [one[..., part] for one in of_pass]
            if self.only_draw:
                yield {"index": index, "target": target, "drawn": drawn}
            else:
                yield self.make(index, drawn), target, index

    def _parts(self, count: int) -> Iterator[slice]:
        """Cut an order into batches, as slices."""
        return (slice(i, min(i + self.batch_size, count)) for i in range(0, count, self.batch_size))
