"""Small image sets held in memory, and the choice of a subset."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..distributed import sharding
from ..errors import UserError
from . import draws
from .draws import Draw, Views


class ArrayDataset(Dataset[tuple[Any, ...]]):
    """Images (N, H, W, 3) uint8 with labels `targets` (N,): (transform(PIL image), label)."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, transform: Callable[[Any], Any] | None) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.transform(self.image(index)), int(self.targets[index])

    def image(self, index: int) -> Image.Image:
        """Return an image, RGB."""
        return Image.fromarray(self.images[index])

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """Copy some images: (n, H, W, 3) uint8."""
        return self.images[indices]


class Passes(Sampler[tuple[int, int]]):
    """The order of training: (epoch, place) for each place of a pass, an order that depends on seed and epoch alone.

    Each pass is the epoch after the last; `set_epoch` says which is next, and how many of its images were passed before
    and are left out. chosen: of each place, the image's place among all training images of its set. views: which weak
    views its images have; by default new ones of `seed`.
    """

    def __init__(self, chosen: np.ndarray, seed: int, views: Views | None = None) -> None:
        self.chosen = torch.as_tensor(chosen)
        self.seed, self.views = seed, views or Views(seed)
        self.epoch = self.done = 0

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, done = self.begin()
        return ((epoch, place) for place in self.places(epoch)[done:].tolist())

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Make the next pass that of an epoch, counted from 1, without its first `done` images."""
        self.epoch, self.done = epoch - 1, done

    def begin(self) -> tuple[int, int]:
        """Begin a pass; returns its epoch, and how many of its images are left out."""
        self.epoch += 1
        done, self.done = self.done, 0
        return self.epoch, done

    def places(self, epoch: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the places in the order of an epoch: (N,) int64."""
        return draws.order(self.seed, epoch, self.chosen.to(device))


class Shares(Sampler[list[tuple[int, int]]]):
    """Of each batch of `size` in the order of `sampler`, the images of this process; chunk: those of a micro-batch."""

    def __init__(self, sampler: Passes, size: int, chunk: int) -> None:
        self.sampler, self.size, self.chunk = sampler, size, chunk

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(self.sampler)
        for first in range(0, len(order), self.size):
            batch = order[first : first + self.size]
            yield [batch[place] for place in sharding.own(len(batch), self.chunk)]


def passes(loader: Any) -> Passes | None:
    """Return the order of a training loader of data.get_dataset's; None for a loader of somebody else."""
    for holder in (getattr(loader, "batch_sampler", None), loader):
        sampler = getattr(holder, "sampler", None)
        if isinstance(sampler, Passes):
            return sampler
    return None


class Training(Dataset[tuple[Any, ...]]):
    """Training samples as mdistiller's: (what `make` makes of an image in an epoch, label, place).

    images: a whole set. chosen: the places in it that are trained on. make: (image, draws.Draw, the weak view's Draw)
    -> view or views. A sample is asked for by (epoch, place), or by its place alone for the views of epoch 0, which no
    pass has. views: as Passes has them.
    """

    def __init__(
        self,
        images: Any,
        chosen: np.ndarray,
        make: Callable[[Image.Image, Draw, Draw], Any],
        seed: int,
        views: Views | None = None,
    ) -> None:
        self.images, self.chosen, self.make, self.seed = images, chosen, make, seed
        self.views = views or Views(seed)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, ...]:
        place, draw = key[1] if isinstance(key, tuple) else key, self.draw(key)
        weak = Draw(self.views.seed, self.views.epoch(draw.epoch), draw.index)
        return self.make(self.images.image(draw.index), draw, weak), int(self.images.targets[draw.index]), place

    def draw(self, key: int | tuple[int, int]) -> Draw:
        """Return what the random numbers of a sample depend on."""
        epoch, place = key if isinstance(key, tuple) else (0, key)
        return Draw(self.seed, epoch, int(self.chosen[place]))


class Contrast(Dataset[tuple[Any, ...]]):
    """Training samples, followed by CRD's contrast indices: their place, then `count` of other classes.

    labels: (N,), of the samples in their order. relaxed: the first index is that of any sample of the same class. As
    in mdistiller, negatives are drawn without replacement from sets of CIFAR's size, with it from larger ones.
    """

    def __init__(self, dataset: Training, labels: np.ndarray, count: int, relaxed: bool) -> None:
        self.dataset, self.labels, self.count, self.relaxed = dataset, labels, count, relaxed
        self.order = np.argsort(labels, kind="stable")
        self.start, self.end = (np.searchsorted(labels[self.order], labels, side) for side in ("left", "right"))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, ...]:
        *sample, place = self.dataset[key]
        start, end = int(self.start[place]), int(self.end[place])
        others = len(self.order) - (end - start)
        with draws.seeded(self.dataset.draw(key), draws.CONTRAST):
            if self.count <= others <= 100_000:
                drawn = torch.randperm(others)[: self.count]
            else:
                drawn = torch.randint(others, (self.count,))
            own = int(self.order[int(torch.randint(start, end, ()))]) if self.relaxed else place
        drawn = (drawn + (drawn >= start) * (end - start)).numpy()  # skip the sample's own class
        return (*sample, place, np.concatenate([[own], self.order[drawn]]))


def choose(labels: np.ndarray, per_class: int, holdout: float) -> tuple[np.ndarray, np.ndarray]:
    """Choose indices to train on and indices to hold out, in the data's order.

    labels: (N,). Of every class the last `holdout` share is held out, and of what is left the first
    `per_class` images (0: all) are trained on. Raises UserError if one of the two would be empty although it is
    asked for.
    """
    train, kept_out = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        kept = len(members) - round(holdout * len(members))
        train.append(members[: min(kept, per_class) if per_class else kept])
        kept_out.append(members[kept:])
    chosen, out = np.sort(np.concatenate(train)), np.sort(np.concatenate(kept_out))
    if not len(chosen) or (holdout and not len(out)):
        raise UserError(
            f"DATASET.HOLDOUT is {holdout}, which leaves {len(chosen)} images to train on and {len(out)} held out of "
            f"{len(labels)}; both must be above 0"
        )
    return chosen, out
