"""What a data set says of itself, and the data sets by name."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from .. import device, extensions
from ..errors import UserError, shown
from ..terminal import nearest
from .arrays import ArrayDataset
from .draws import Draw
from .folders import ImageFiles, ImageTensors
from .views import TrainingViews, takes_tensors

Distortion = Callable[[Image.Image], Image.Image]
Transform = Callable[[Image.Image], Any]

ZOOS = {"cifar": None, "tiny_imagenet": None, "imagenet": 1000}
"""A host's dictionaries of networks, and how many classes these have; None: as many as a data set."""

TEST_PIXELS = 1000 * 32 * 32
"""Pixels of the small images that are tested at once on a GPU: 1,000 images of CIFAR."""


@dataclass(frozen=True)
class Facts:
    """A data set's reader, and what is known of any without reading it.

    read: (DATASET.ROOT, "train" or "test") -> that part of it. train, test: its numbers of images. drawn: whether the
    first run makes it on this machine.
    """

    read: Callable[[str, str], Any]
    _: KW_ONLY
    num_classes: int
    train: int
    test: int
    drawn: bool = False

    def images(self, cfg: Any) -> tuple[int, int]:
        """Count the images that a run trains on in an epoch, and those that it tests on."""
        raise NotImplementedError

    def steps(self, cfg: Any) -> int:
        """Count a run's steps in an epoch."""
        return math.ceil(self.images(cfg)[0] / cfg.SOLVER.BATCH_SIZE)

    def test_batch(self, cfg: Any) -> int:
        """Return how many images are tested at once."""
        return cfg.DATASET.TEST.BATCH_SIZE

    def noise(self, count: int, views: int = 1) -> Sequence[Any]:
        """Make a training batch of noise, images first, in the form of the set's loader."""
        raise NotImplementedError

    def augmenter(self, views: int) -> Callable[[], Any]:
        """Return what a loader does for a training image beside reading it; by default nothing."""
        return lambda: None


@dataclass(frozen=True)
class Source(Facts):
    """A data set of labelled images, and how an image becomes a tensor.

    read: (DATASET.ROOT, "train" or "test") -> images (N, H, W, 3) uint8, or the paths of N files; labels (N,) from 0.
    side: pixels of an image's side as it enters a network. stored: width and height of an average image before that, if
    they are others. mean, std: of the channels, for pixels in [0, 1]. augmentation, resizing: what a PIL image goes
    through in training and in tests. small: whether all images have `side` already and fit on a device together; what
    DATASET.PIPELINE device can augment is in resident.py. What large ones go through is done to their bytes, without
    PIL, if it is all of transforms.v2 as views.py's takes_tensors has it. erasing: probability that a rectangle of a
    training image becomes noise. zoo: the networks that take such images, one of ZOOS. fetch: downloads the set into a
    folder that does not have it yet. class_names: DATASET.ROOT -> the names of its classes in the order of their
    labels; None if they are not known there.
    """

    _: KW_ONLY
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: tuple[Distortion, ...] = ()
    resizing: tuple[Distortion, ...] = ()
    stored: tuple[int, int] | None = None
    small: bool = True
    erasing: float = 0.0
    zoo: str = "cifar"
    fetch: Callable[[str], None] | None = None
    class_names: Callable[[str], Sequence[str] | None] | None = None

    def load(self, node: Any, split: str, transform: Transform | None = None) -> ArrayDataset | ImageFiles:
        """Read a part of the set, "train" or "test", as samples (transform(image), label).

        node: the config node DATASET. Raises UserError if the part is not there or not what it should be.
        """
        try:
            if node.DOWNLOAD and self.fetch:
                self.fetch(node.ROOT)
            images, labels = self.read(node.ROOT, split)
        except OSError as error:
            raise UserError(f"DATASET.ROOT {node.ROOT}: {node.TYPE} cannot be read from it ({error})") from None
        labels = np.asarray(labels)
        name = f"DATASET.ROOT {node.ROOT}: {node.TYPE}, {split}"
        if not len(images):
            raise UserError(f"{name}: has no image; it must have some")
        if isinstance(images, np.ndarray):
            wanted = (self.side, self.side, 3)
            if images.ndim != 4 or images.shape[1:] != wanted or images.dtype != np.uint8:
                raise UserError(
                    f"{name}: images are {images.dtype} of the shape {images.shape}; they must be uint8 of the shape "
                    f"(N, {self.side}, {self.side}, 3)"
                )
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise UserError(
                f"{name}: labels are {labels.dtype} of the shape {labels.shape}; they must be integers of the shape "
                f"({len(images)},), one for each image"
            )
        bad = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if bad.size:
            raise UserError(
                f"{name}: label {labels[bad[0]]} of image {bad[0]} is outside the classes; labels must be in "
                f"0 … {self.num_classes - 1}"
            )
        return self.samples(images, labels, transform)

    def samples(self, images: Any, labels: np.ndarray, transform: Transform | None) -> ArrayDataset | ImageFiles:
        """Make samples of what `read` gave, once it is checked."""
        if isinstance(images, np.ndarray):
            return ArrayDataset(images, labels.astype(np.int64), transform)
        if self.in_bytes:
            return ImageTensors(images, labels.tolist(), transform)
        size = (self.side, self.side) if self.small else None
        return ImageFiles(images, labels.tolist(), transform, size)

    def images(self, cfg: Any) -> tuple[int, int]:
        """Count the images that a run trains on in an epoch, and those that it tests on."""
        node, classes = cfg.DATASET, self.num_classes
        kept_out = classes * round(node.HOLDOUT * (self.train // classes))
        train = self.train - kept_out
        if node.TRAIN_PER_CLASS:
            train = min(train, node.TRAIN_PER_CLASS * classes)
        return train, kept_out or self.test

    def test_batch(self, cfg: Any) -> int:
        """Return how many images are tested at once: of small ones on a GPU as many as keep it busy, if not more."""
        wanted = cfg.DATASET.TEST.BATCH_SIZE
        busy = self.small and device.pick().type == "cuda"
        return max(wanted, TEST_PIXELS // self.side**2) if busy else wanted

    def noise(self, count: int, views: int = 1) -> list[Any]:
        """Make a training batch of noise: image, or both views, target and index."""
        images = [torch.randn(count, 3, self.side, self.side) for _ in range(views)]
        target = torch.randint(self.num_classes, (count,))
        return [images if views > 1 else images[0], target, torch.arange(count)]

    def augmenter(self, views: int) -> Callable[[], Any]:
        """Return what makes the views of an image of noise."""
        width, height = self.stored or (self.side, self.side)
        pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8)
        image = pixels.permute(2, 0, 1) if self.in_bytes else Image.fromarray(pixels.numpy())
        make = self.training_views(views)
        return lambda: make(image, Draw(0, 1, 0))

    @property
    def in_bytes(self) -> bool:
        """Whether samples are uint8 (3, H, W), for a NormalisingLoader: large images whose distortions take tensors.

        Erasing does not: its noise is that of normalised pixels.
        """
        return not (self.small or self.erasing) and all(map(takes_tensors, (*self.augmentation, *self.resizing)))

    def training_views(self, views: int) -> TrainingViews:
        """Return what makes a tensor of an image and a Draw, or [weak view, strong view] if `views` is 2."""
        size = (self.side, self.side) if self.small else None
        return TrainingViews(self.augmentation, self._tensor(), views > 1, size, self.erasing)

    def test_transform(self) -> Callable[[Any], Tensor]:
        """Return what makes a tensor of an image, with nothing at random."""
        return self._tensor(*self.resizing)

    def _tensor(self, *distortions: Distortion) -> Callable[[Any], Tensor]:
        floats = transforms.ToTensor(), transforms.Normalize(self.mean, self.std)
        end = (v2.PILToTensor(),) if self.in_bytes else floats
        return transforms.Compose([*distortions, *end])


S = TypeVar("S", bound=Facts)


class Sources(dict[str, S], Generic[S]):
    """Data sets by DATASET.TYPE; asking for an unknown one is a UserError that lists those there are."""

    def __init__(self, purpose: str = "") -> None:
        super().__init__()
        self.purpose = purpose

    def __missing__(self, name: str) -> S:
        raise UserError(
            f"DATASET.TYPE is {shown(name)}; {self.purpose}it must be one of {', '.join(self)}{nearest(name, self)}"
        )

    def register(self, name: str, source: S) -> None:
        """Add a data set; UserError if its name is taken."""
        if self.get(name, source) is not source:
            raise UserError(f"the data set {name!r} is registered already; another must have a name of its own")
        extensions.remember(source.read)
        self[name] = source


DATASETS: Sources[Source] = Sources()
"""Those of labelled images, in the order in which they were registered."""

MADE: dict[str, Callable[[Any], Source]] = {}
"""DATASET.TYPE -> what makes its source for a config, if that says what the images are."""

FUNCTION = "package.module:function"
"""What a DATASET.TYPE looks like that names a user's function."""


def register_dataset(name: str, source: Source) -> None:
    """Make a data set known as DATASET.TYPE; UserError if the name is taken or there are no networks for it.

    In a module of your own (DEEPKD_EXTENSIONS)::

        def read(root, split):
            file = np.load(f"{root}/dots_{split}.npz")
            return file["images"], file["labels"]

        register_dataset("dots", Source(read, num_classes=7, train=700, test=70, side=48, mean=MEAN, std=STD))
    """
    if source.zoo not in ZOOS:
        raise UserError(f"the data set {name!r} has the zoo {source.zoo!r}; it must be one of {', '.join(ZOOS)}")
    if ZOOS[source.zoo] not in (None, source.num_classes):
        raise UserError(
            f"the data set {name!r} has {source.num_classes} classes; with the zoo {source.zoo!r} it must have "
            f"{ZOOS[source.zoo]}, as its networks do"
        )
    DATASETS.register(name, source)


def source(of: Any) -> Source:
    """Return the data set of a config, or that of a registered name; UserError if there is none.

    A `Source` is returned as it is.
    """
    if isinstance(of, Source):
        return of
    name = of if isinstance(of, str) else of.DATASET.TYPE
    make = None if isinstance(of, str) or name in DATASETS else maker(name)
    if make is None and name not in DATASETS:
        raise UserError(
            f"DATASET.TYPE is {shown(name)}; it must be one of {', '.join(names())}{nearest(name, names())}"
        )
    return DATASETS[name] if make is None else make(of)


def names() -> tuple[str, ...]:
    """Return the values of DATASET.TYPE, and what one looks like that names a function."""
    return (*DATASETS, *MADE)


def knows(name: str) -> bool:
    """Tell whether there is a data set of a DATASET.TYPE."""
    return name in DATASETS or maker(name) is not None


def maker(name: str) -> Callable[[Any], Source] | None:
    """Return what makes the source of a DATASET.TYPE for a config; None for one that is registered, or for none."""
    return MADE.get(FUNCTION if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name) else name)
