"""A data set that a user's function returns: DATASET.TYPE package.module:function."""

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from .. import extensions
from ..errors import UserError, shown
from .folders import ImageFiles, as_seen
from .own import OwnImages, check_names, holdout_needed, own_images
from .sources import FUNCTION, MADE

LOOKED_AT = 8
"""Images of a part that are read twice, to see whether they are the same both times."""


class Pairs(ImageFiles):
    """What a user's data set returns, as images (3, H, W) uint8. where: what it is, for errors.

    Raises UserError for an image that is no PIL image and no array of pixels, and for a label that is not the one in
    `targets`.
    """

    def __init__(self, pairs: Any, targets: Sequence[int], where: str) -> None:
        super().__init__(range(len(pairs)), targets, None)
        self.pairs, self.where = pairs, where

    def image(self, index: int) -> Tensor:
        image, label = pair(self.pairs, index, self.where)
        if label != self.targets[index]:
            raise UserError(
                f"{self.where}: image {index} has the label {label}, and {self.targets[index]} among its targets; the "
                f"two must be equal"
            )
        return pixels(image, f"{self.where}: image {index}")

    def fingerprinted(self) -> Iterator[bytes]:
        """Yield what tells these images from others."""
        for index in range(len(self)):
            image = self.image(index)
            yield f"{tuple(image.shape)}".encode() + image.numpy().tobytes()


class Part(NamedTuple):
    """A part of a data set: its images, their labels (N,), and the names of all classes, if they have any."""

    images: Pairs
    labels: np.ndarray
    names: list[str] | None


def from_function(cfg: Any) -> OwnImages:
    """Make the source of a function's data set: function(DATASET.ROOT, "train" or "test") -> Dataset or None.

    The Dataset's samples are (image, label): a PIL image, a tensor (1 or 3, H, W) or an array (H, W[, 3]) of uint8, or
    of floats from 0 to 1; a label from 0. It may have `classes`, their names. With None for "test", DATASET.HOLDOUT
    says what is tested on. Raises UserError if it is something else.
    """
    node = cfg.DATASET
    train = _part(node.TYPE, node.ROOT, "train")
    if train is None:
        raise UserError(f"DATASET.TYPE {node.TYPE}: returns None for 'train'; it must return a Dataset")
    count = len(train.names) if train.names else int(train.labels.max()) + 1

    def read(root: str, split: str) -> tuple[Pairs, np.ndarray]:
        part = _part(node.TYPE, root, split)
        if part is None:
            raise holdout_needed(f"DATASET.TYPE {node.TYPE}: returns None for 'test'")
        check_names(part.names, train.names, f"DATASET.TYPE {node.TYPE}, {split}")
        return part.images, part.labels

    return own_images(cfg, read, train.names, count, f"DATASET.TYPE {node.TYPE}")


@functools.cache
def _part(name: str, root: str, split: str) -> Part | None:
    """Call a user's function and look at what it returns; once in a process, for it may read all of a set."""
    where = f"DATASET.TYPE {name}"
    module, _, short = name.partition(":")
    try:
        function = operator.attrgetter(short)(extensions.bring(module, f"{where} names a function"))
    except AttributeError:
        raise UserError(f"{where}: the module {module} has no {short}; it must be {FUNCTION}") from None
    where = f"{where}, {split}"
    try:
        pairs = function(root, split)
        if pairs is None:
            return None
        count = len(pairs)
        operator.attrgetter("__getitem__")(type(pairs))
    except UserError:
        raise
    except Exception as error:  # anybody's function may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{where}: {short}({root!r}, {split!r}) returns no Dataset with a length ({reason})") from None
    if not count:
        raise UserError(f"{where}: is empty; there must be images")
    labels = _labels(pairs, count, where)
    names = getattr(pairs, "classes", None)
    if names is not None:
        names = [", ".join(one) if isinstance(one, tuple | list) else str(one) for one in names]
    images = Pairs(pairs, labels.tolist(), where)
    for index in np.linspace(0, count - 1, min(LOOKED_AT, count)).astype(int).tolist():
        if not torch.equal(images.image(index), images.image(index)):
            raise UserError(
                f"{where}: image {index} is another each time; it must be one image, for what is random is drawn by "
                f"seed and epoch, as INPUT says"
            )
    return Part(images, labels, names)


def _labels(pairs: Any, count: int, where: str) -> np.ndarray:
    """Return the labels (N,) of a data set: those that it lists as `targets`, else of each sample."""
    listed = getattr(pairs, "targets", None)
    if listed is not None and len(listed) == count:
        labels = np.asarray(listed)
        # a transform of labels may make others of these
        if labels.ndim == 1 and labels.dtype.kind in "iu" and pair(pairs, 0, where)[1] == labels[0]:
            return labels.astype(np.int64)
    print(f"data      {where}: reading {count:,} images for their labels (its attribute `targets` would list them)")
    return np.array([pair(pairs, index, where)[1] for index in range(count)], np.int64)


def pair(pairs: Any, index: int, where: str) -> tuple[Any, int]:
    """Return image and label of a sample; UserError if it is something else."""
    try:
        sample = pairs[index]
    except UserError:
        raise
    except Exception as error:  # anybody's data set may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{where}: image {index} cannot be read ({reason})") from None
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise UserError(f"{where}: sample {index} is a {type(sample).__name__}; it must be a pair (image, label)")
    try:
        return sample[0], operator.index(sample[1])
    except TypeError:
        raise UserError(
            f"{where}: sample {index} has the label {shown(sample[1])}; it must be a whole number, from 0"
        ) from None


def pixels(image: Any, where: str) -> Tensor:
    """Make (3, H, W) uint8 of what a data set may give as an image; UserError for what it may not."""
    if isinstance(image, Image.Image):
        try:
            return pil_to_tensor(as_seen(image))
        except Exception as error:  # a damaged image can raise nearly anything
            raise UserError(f"{where} cannot be read ({error})") from None
    if isinstance(image, np.ndarray):
        image = np.array(image)  # a copy, for some are of memory that may not be written
        image = torch.from_numpy(image if image.ndim == 3 else image[..., None]).permute(2, 0, 1)
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] in (1, 3) and image.numel():
        if image.is_floating_point() and image.min() >= 0 and image.max() <= 1:
            image = (255 * image.float()).round().byte()
        if image.dtype == torch.uint8:
            return image.expand(3, -1, -1).contiguous()
    of = type(image).__name__
    if isinstance(image, Tensor):
        span = f", from {image.min():.3g} to {image.max():.3g}" if image.numel() else ""
        of = f"tensor of the shape {tuple(image.shape)}, {image.dtype}{span}"
    raise UserError(
        f"{where} is a {of}; it must be a PIL image, or 1 or 3 channels of uint8, or of floats from 0 to 1 (INPUT "
        f"normalises them)"
    )


MADE[FUNCTION] = from_function
