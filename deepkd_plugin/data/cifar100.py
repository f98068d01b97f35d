"""CIFAR-100 from disk: torchvision's layout, or class folders of PNG files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets

from ..errors import UserError
from .arrays import check_labels

MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)
NUM_CLASSES = 100


def load_cifar100(root: str | Path, split: str, download: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and fine labels (N,) int64 of "train" or "test".

    Looked for under `root`: cifar-100-python/{train,test} as torchvision keeps it, else
    {train,test}/<class>/*.png with classes in alphabetical order (the official numbering), else the same
    below cifar100/. With `download`, torchvision fetches the archive (169 MB) where neither split is in any
    of these places. Raises UserError where the split is not there or cannot be fetched, and for labels
    outside the classes.
    """
    root = Path(root)
    if download and not (_find(root, "train") or _find(root, "test")):
        _fetch(root)
    found = _find(root, split)
    if found is None:
        other = _find(root, "train") or _find(root, "test")
        raise UserError(
            f"{root}: DATASET.ROOT holds no CIFAR-100; there must be cifar-100-python/{split} (torchvision's "
            f"layout) or {split}/<class>/*.png; "
            + (f"nothing is downloaded beside {other}" if other else "DATASET.DOWNLOAD True fetches it")
        )
    return _from_pickle(found) if found.is_file() else _from_folders(found)


def _find(root: Path, split: str) -> Path | None:
    """torchvision's file of a split, or the folder of its class folders."""
    if (root / "cifar-100-python" / split).is_file():
        return root / "cifar-100-python" / split
    return next((f for f in (root / split, root / "cifar100" / split) if f.is_dir()), None)


def _fetch(root: Path) -> None:
    try:
        # absolute, since torchvision reads ~ as the home folder and we do not
        datasets.CIFAR100(str(root.absolute()), download=True)
    except Exception as error:  # sockets, HTTP, tar and torchvision's checks have no base class in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{root}: DATASET.DOWNLOAD is True and CIFAR-100 cannot be fetched ({reason}); put cifar-100-python/ or "
            f"{{train,test}}/<class>/*.png there"
        ) from None


class _Plain(pickle.Unpickler):
    """Unpickles numpy arrays and plain values; anything else in the file is refused, not run."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self._ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _from_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file:
            held = _Plain(file, encoding="latin1").load()
        images = np.asarray(held["data"], dtype=np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.asarray(held["fine_labels"], dtype=np.int64)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"{path}: DATASET.ROOT must hold CIFAR-100 in torchvision's layout, and this file is not it "
            f"({type(error).__name__}: {error})"
        ) from None
    if len(images) != len(labels):
        raise UserError(f"{path}: DATASET.ROOT holds {len(images)} images but {len(labels)} labels")
    check_labels(labels, NUM_CLASSES, str(path))
    return np.ascontiguousarray(images), labels


def _from_folders(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    if len(classes) != NUM_CLASSES:
        raise UserError(
            f"{folder}: DATASET.ROOT must hold {NUM_CLASSES} class folders for cifar100, holds {len(classes)}"
        )
    images, labels = [], []
    for label, folder_of_class in enumerate(classes):
        files = sorted(folder_of_class.glob("*.png"))
        if not files:
            raise UserError(f"{folder_of_class}: DATASET.ROOT has a class folder without PNG files")
        for file in files:
            try:
                image = np.asarray(Image.open(file).convert("RGB"))
            except Exception as error:  # so can a damaged image
                raise UserError(f"{file}: DATASET.ROOT has an image that cannot be read ({error})") from None
            if image.shape != (32, 32, 3):
                raise UserError(
                    f"{file}: cifar100 images are 32 x 32, this one is {image.shape[1]} x {image.shape[0]}"
                )
            images.append(image)
            labels.append(label)
    return np.stack(images), np.asarray(labels, dtype=np.int64)
