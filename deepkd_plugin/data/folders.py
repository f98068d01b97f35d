"""Data sets of image files, read one by one as they are asked for."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from ..errors import UserError


class ImageFiles(Dataset[tuple[Any, ...]]):
    """Images in files, with labels `targets` (N,): (transform(RGB image), label).

    size: (width, height) that every image must have; None for any. Raises UserError for an image of another
    size and for one that cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int],
        transform: Callable[[Any], Any] | None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.paths, self.targets, self.transform, self.size = paths, targets, transform, size

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.transform(self._read(self.paths[index])), self.targets[index]

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """Decode some images, one after another: (n, H, W, 3) uint8, all of `size` (0.2 ms each at 64 x 64)."""
        width, height = self.size
        images = np.empty((len(indices), height, width, 3), np.uint8)
        for place, index in enumerate(indices):
            images[place] = self._read(self.paths[index])
        return images

    def _read(self, path: str) -> Image.Image:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except Exception as error:  # a damaged image can raise nearly anything
            raise UserError(f"{path}: DATASET.ROOT has an image that cannot be read ({error})") from None
        if self.size and image.size != self.size:
            raise UserError(
                f"{path}: this image is {image.width} x {image.height}; those of its data set must be "
                f"{self.size[0]} x {self.size[1]}"
            )
        return image


def class_folders(
    folder: Path, num_classes: int, kind: str, valid: Callable[[str], bool] | None = None
) -> tuple[list[str], list[int]]:
    """List paths and labels of <class>/**/<image> below `folder`, classes in alphabetical order.

    kind: DATASET.TYPE, for errors. valid: which paths are images of the set; by default by their endings. Raises
    UserError if a class is empty or there are not `num_classes`.
    """
    try:
        classes = sum(entry.is_dir() for entry in folder.iterdir())
        if classes != num_classes:
            raise UserError(f"{folder}: DATASET.ROOT must hold {num_classes} class folders for {kind}, holds {classes}")
        images = ImageFolder(str(folder), is_valid_file=valid)
    except OSError as error:
        raise UserError(f"{folder}: DATASET.ROOT is not {kind} ({error})") from None
    return [path for path, _ in images.samples], images.targets
