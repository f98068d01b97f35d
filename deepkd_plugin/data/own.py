"""A user's own images: class folders, a function's data set, a folder of Hugging Face's `datasets`.

They come in any size and form. What they become is said by the config (INPUT), not by a registered data set, so a
source is made for each config.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ..errors import UserError, shown
from ..terminal import warn
from .arrays import choose
from .folders import as_seen, class_folders, folder_names, in_order, is_image
from .sources import MADE, Source, Transform

LOGITS_FOLDER = "teacher_logits"
"""Folder in DATASET.ROOT that tables of a teacher's logits are in by default."""

PARTS = ("val", "valid", "validation", "test")
"""Names of the part that is tested on, in the order in which they are looked for."""

OWN = ("INPUT.", "DATASET.TEST.SPLIT", "DATASET.COLUMNS")
"""Beginnings of the keys that say what such images become."""

SIDE = 224
"""Pixels of an image's side, unless INPUT.SIZE says otherwise."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels, which most libraries' networks are trained with."""

FEWEST, MOST = 2, 21_841
"""Classes that such a set may have."""

LONGEST = 20
"""Longer side over the shorter one up to which all of an image is resized in tests; of longer ones it is the middle."""


@dataclass(frozen=True)
class OwnImages(Source):
    """A source whose images are a user's; only reading it tells how many there are."""

    def images(self, cfg: Any) -> tuple[int, int]:
        node = cfg.DATASET
        chosen, out = choose(np.asarray(self.read(node.ROOT, "train")[1]), node.TRAIN_PER_CLASS, node.HOLDOUT)
        return len(chosen), len(out) or len(self.read(node.ROOT, "test")[1])

    def samples(self, images: Any, labels: np.ndarray, transform: Transform | None) -> Any:
        if isinstance(images, Dataset):
            samples: Any = copy.copy(images)
            samples.transform = transform
        else:
            samples = super().samples(images, labels, transform)
        samples.convert = as_seen
        return samples


class ShortSide(v2.Resize):
    """Resize an image's shorter side, as v2.Resize does; of a very long image the middle is cut out first.

    Of 100,000 x 1 pixels a Resize would make 25 million x 256. The square in the middle stays what it is.
    """

    takes_tensors = True

    def forward(self, image: Any) -> Any:
        height, width = v2.functional.get_size(image)
        most = LONGEST * min(height, width)
        if max(height, width) > most:
            image = v2.functional.center_crop(image, [min(height, most), min(width, most)])
        return super().forward(image)


def own_images(cfg: Any, read: Callable[[str, str], Any], names: list[str] | None, count: int, where: str) -> OwnImages:
    """Make the source of a config's own images; UserError if their classes are too few or too many.

    read: as Source.read. names: of the classes, if they have any; count: how many there are. where: what has them, for
    errors.
    """
    if not FEWEST <= count <= MOST:
        only = f", {shown(names[0])}" if names and count == 1 else ""
        raise UserError(
            f"{where}: has {count} {'class' if count == 1 else 'classes'}{only}; there must be {FEWEST} to {MOST:,}"
        )
    node = cfg.INPUT
    side = node.SIZE or SIDE
    square = v2.Resize((side, side))
    low_high = tuple(node.CROP_AREA)
    part = v2.RandomResizedCrop(side, scale=low_high) if low_high else square
    flip = (v2.RandomHorizontalFlip(node.FLIP),) if node.FLIP else ()
    # torchvision's own way from 256 to 224 pixels
    whole = not node.TEST_CROP
    middle = (square,) if whole else (ShortSide(round(side / node.TEST_CROP)), v2.CenterCrop(side))
    return OwnImages(
        read,
        num_classes=count,
        train=0,
        test=0,
        side=side,
        mean=tuple(node.MEAN) or MEAN,
        std=tuple(node.STD) or STD,
        augmentation=(part, *flip),
        resizing=middle,
        stored=(500, 375),
        small=False,
        zoo="cifar" if side < 48 else "tiny_imagenet" if side < 112 else "imagenet",
        class_names=(lambda _: names) if names else None,
    )


def folder(cfg: Any) -> OwnImages:
    """Make the source of DATASET.TYPE folder: ROOT/train and ROOT/val with class folders, or class folders in ROOT."""
    node = cfg.DATASET
    train, test = layout(node)
    first = train or test
    names = in_order(_class_names(first, first == Path(node.ROOT)))

    def read(root: str, split: str) -> tuple[list[str], list[int]]:
        here, beside = (train, test) if split == "train" else (test, train)
        if here is None and split == "train":
            raise UserError(f"{root}: DATASET.ROOT has no train; there must be train/<class>/*")
        if here is None:
            raise holdout_needed(f"{root}: DATASET.ROOT has train/, and none of {', '.join(PARTS)}")
        _warn(here, split, node)
        return class_folders(here, None, "folder", beside, ignored=LOGITS_FOLDER)

    return own_images(cfg, read, names, len(names), f"{first}: DATASET.ROOT")


def layout(node: Any) -> tuple[Path | None, Path | None]:
    """Return the folders with the class folders of training and of tests; None for one that is not there.

    node: the config node DATASET. Raises UserError if DATASET.ROOT holds neither these nor classes.
    """
    root, asked = Path(node.ROOT), node.TEST.SPLIT
    try:
        present = _class_names(root, True)
        parts = [name for name in present & {"train", *PARTS, asked} if folder_names(root / name)]
    except OSError as error:
        raise UserError(f"{root}: DATASET.ROOT must be a folder of class folders ({error.strerror})") from None
    if asked and asked not in parts:
        raise UserError(f"{root / asked}: DATASET.TEST.SPLIT names this folder; it must be there, with class folders")
    tests = [asked] if asked else [name for name in PARTS if name in parts]
    if "train" in parts or tests:
        others = sorted(present - {*parts, *PARTS})
        if not tests and others:
            raise UserError(
                f"{root}: DATASET.ROOT has train/ with folders in it, and {others[0]}/; beside images to train on "
                f"there must be {', '.join(PARTS[:-1])} or {PARTS[-1]}, and beside a class no train/ with folders in it"
            )
        return root / "train" if "train" in parts else None, root / tests[0] if tests else None
    if not present:
        raise UserError(
            f"{root}: DATASET.ROOT has no folders; there must be train/<class>/* and val/<class>/*, or <class>/*"
        )
    if present <= {"train", *PARTS}:
        name = sorted(present)[0]
        raise UserError(f"{root / name}: DATASET.ROOT has no class folders there; there must be {name}/<class>/*")
    if not node.HOLDOUT:
        raise holdout_needed(f"{root}: DATASET.ROOT has class folders alone, no train/<class>/* and val/<class>/*")
    return root, None


def _class_names(folder: Path, top: bool) -> set[str]:
    return folder_names(folder) - ({LOGITS_FOLDER} if top else set())


def holdout_needed(found: str) -> UserError:
    """Make the error for a data set without a part to test on. found: what there is instead."""
    return UserError(f"{found}; DATASET.HOLDOUT must be the share of each class to test on, for example 0.2")


def check_names(names: Sequence[str] | None, others: Sequence[str] | None, where: str) -> None:
    """Raise UserError if a part of a set has other names for its classes, or another order, than training has."""
    if names is None or others is None or names == others:
        return
    place = next((i for i, pair in enumerate(zip(names, others)) if pair[0] != pair[1]), min(len(names), len(others)))
    theirs, ours = (shown(one[place]) if place < len(one) else "none" for one in (names, others))
    raise UserError(f"{where}: class {place} is {theirs}, and {ours} in training; the classes must be the same")


def _warn(folder: Path, split: str, node: Any) -> None:
    """Warn of images beside the class folders, which are in no class, and of a choice between two parts to test on."""
    with os.scandir(folder) as entries:
        files = [entry.path for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    loose = sorted(filter(is_image, files))
    if loose:
        warn(f"{loose[0]}: is in no class's folder and is left out, as are {len(loose) - 1} others beside it")
    there = [name for name in PARTS if (part := folder.with_name(name)).is_dir() and folder_names(part)]
    if split == "test" and len(there) > 1 and not node.TEST.SPLIT:
        warn(f"{folder}: is tested on, and {' and '.join(there[1:])} not; DATASET.TEST.SPLIT can name another")


MADE["folder"] = folder
