"""CIFAR-100 from disk: torchvision's layout, or class folders of PNG files."""

from pathlib import Path

import numpy as np
from torchvision import datasets, transforms

from ..errors import UserError
from ..run import array_pickle
from .folders import ImageFiles, class_folders, names_of
from .sources import Source, register_dataset

NUM_CLASSES = 100


def read_cifar100(root: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the images (N, 32, 32, 3) uint8 and fine labels (N,) int64 of "train" or "test".

    Places under `root`: cifar-100-python/{train,test} as torchvision keeps it, else {train,test}/<class>/*.png (or
    another suffix of an image) with classes in alphabetical order (the official numbering) or, if their names are
    numbers, in that of the numbers, else the same below cifar100/. Raises UserError if the split is in none of them
    or cannot be read.
    """
    root = Path(root)
    place = _find(root, split)
    if place is None:
        other = _find_any(root)
        raise UserError(
            f"{root}: DATASET.ROOT holds no CIFAR-100; there must be cifar-100-python/{split} (torchvision's "
            f"layout) or {split}/<class>/*.png; "
            + (f"nothing is downloaded beside {other}" if other else "DATASET.DOWNLOAD True fetches it")
        )
    return _from_pickle(place) if place.is_file() else _from_folders(place)


def _find(root: Path, split: str) -> Path | None:
    """Find torchvision's file of a split, or the folder of its class folders."""
    if (root / "cifar-100-python" / split).is_file():
        return root / "cifar-100-python" / split
    return next((f for f in (root / split, root / "cifar100" / split) if f.is_dir()), None)


def _find_any(root: Path) -> Path | None:
    return _find(root, "train") or _find(root, "test")


def class_names(root: str | Path) -> list[str] | None:
    """Return the names of the fine classes: torchvision's file `meta` has them, or the class folders do."""
    place = _find_any(Path(root))
    if place is None or place.is_dir():
        return place and names_of(place)
    meta = place.with_name("meta")
    try:
        with open(meta, "rb") as file:
            return [str(name) for name in array_pickle.read(file)["fine_label_names"]]
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{meta}: must hold the names of CIFAR-100's classes ({type(error).__name__})") from None


def fetch_cifar100(root: str | Path) -> None:
    """Let torchvision download the archive (169 MB) into `root`, unless a split is there in any of its places.

    Raises UserError if it cannot be downloaded.
    """
    if _find_any(Path(root)):
        return
    try:
        # absolute, since torchvision reads ~ as the home folder and we do not
        datasets.CIFAR100(str(Path(root).absolute()), download=True)
    except Exception as error:  # sockets, HTTP, tar and torchvision's checks have no base class in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{root}: DATASET.DOWNLOAD is True and CIFAR-100 cannot be fetched ({reason}); put cifar-100-python/ or "
            f"{{train,test}}/<class>/*.png there"
        ) from None


def _from_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file:
            content = array_pickle.read(file)
        data, labels = np.asarray(content["data"]), np.asarray(content["fine_labels"])
        if data.dtype != np.uint8 or (labels.size and labels.dtype.kind not in "iu"):
            raise ValueError(f"its images are {data.dtype} and its labels {labels.dtype}, not uint8 and whole numbers")
        images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"{path}: DATASET.ROOT must hold CIFAR-100 in torchvision's layout, and this file is not it "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from None
    return np.ascontiguousarray(images), labels.astype(np.int64)


def _from_folders(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    beside = folder.with_name("test" if folder.name == "train" else "train")
    paths, labels = class_folders(folder, NUM_CLASSES, "cifar100", beside, nested=False)
    images = ImageFiles(paths, labels, None, (32, 32)).pixels(np.arange(len(paths)))
    return images, np.asarray(labels, dtype=np.int64)


register_dataset(
    "cifar100",
    Source(
        read_cifar100,
        num_classes=NUM_CLASSES,
        train=50_000,
        test=10_000,
        side=32,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        augmentation=(transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()),
        fetch=fetch_cifar100,
        class_names=class_names,
    ),
)
