"""Data sets of image files, read one by one as they are asked for."""

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import io as torchvision_io
from torchvision.transforms.functional import pil_to_tensor

from ..errors import UserError, shown
from ..terminal import warn

SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""Of an image's file, in capitals or not."""

OTHERS = (".avif", ".cr2", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".psd", ".svg", ".tga")
"""Of files that people take for images too, and that not every PIL reads."""


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by the orientation that its camera noted."""


class ImageFiles(Dataset[tuple[Any, ...]]):
    """Images in files, with labels `targets` (N,): (transform(RGB image), label).

    size: (width, height) that every image must have; None for any. Raises UserError for an image of another
    size and for one that cannot be read.
    """

    convert: Callable[[Image.Image], Image.Image]
    """What makes RGB of an image that is open."""

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int],
        transform: Callable[[Any], Any] | None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.paths, self.targets, self.transform, self.size = paths, targets, transform, size
        self.convert = rgb

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.transform(self.image(index)), self.targets[index]

    def image(self, index: int) -> Image.Image:
        """Read an image, RGB."""
        return self._read(self.paths[index])

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """Decode some images, one after another: (n, H, W, 3) uint8, all of `size` (0.2 ms each at 64 x 64)."""
        width, height = self.size
        images = np.empty((len(indices), height, width, 3), np.uint8)
        for place, index in enumerate(indices):
            images[place] = self._read(self.paths[index])
        return images

    def opened(self, path: Any) -> Any:
        """Return what PIL's `open` takes for one of `paths`."""
        return path

    def named(self, path: Any) -> str:
        """Say which image one of `paths` is, for errors."""
        return f"{path}"

    def damaged(self) -> list[str]:
        """Name the images whose first bytes PIL cannot read: empty files, text, other kinds (0.1 ms each).

        What is cut off behind its header is found when it is decoded.
        """
        names = []
        for path in self.paths:
            try:
                with Image.open(self.opened(path)):
                    pass
            except Exception:  # a damaged image can raise nearly anything
                names.append(self.named(path))
        return names

    def _read(self, path: Any) -> Image.Image:
        try:
            with Image.open(self.opened(path)) as file:
                image = self.convert(file)
        except Exception as error:  # a damaged image can raise nearly anything
            raise UserError(
                f"{self.named(path)}: DATASET.ROOT has an image that cannot be read ({error}); "
                f"it must be a whole one, or be taken out of the folder"
            ) from None
        if self.size and image.size != self.size:
            raise UserError(
                f"{self.named(path)}: this image is {image.width} x {image.height}; those of its data set must be "
                f"{self.size[0]} x {self.size[1]}"
            )
        return image


class ImageTensors(ImageFiles):
    """The same for images of any size, as tensors (3, H, W) uint8.

    torchvision decodes a JPEG of one channel or three in less time than PIL, to the same pixels (both by
    libjpeg-turbo). PIL reads everything else, and says what is wrong with a file.
    """

    def __init__(self, paths: Sequence[str], targets: Sequence[int], transform: Callable[[Any], Any] | None) -> None:
        super().__init__(paths, targets, transform)
        # torchvision 0.29 says that it will go
        self.decodes = hasattr(torchvision_io, "decode_jpeg")
        if not self.decodes:
            warn("this torchvision has no decode_jpeg; PIL decodes the images, to the same pixels in more time")

    def image(self, index: int) -> Tensor:
        path = self.paths[index]
        with contextlib.suppress(Exception):  # of whatever fails, PIL's reader tells
            data = self.data(path)
            with Image.open(io.BytesIO(data)) as header:  # which also refuses a size that no photograph has
                plain = header.format == "JPEG" and header.mode in ("L", "RGB")
                plain = plain and (self.convert is rgb or orientation(header) == 1)
            if self.decodes and plain:
                return torchvision_io.decode_jpeg(
                    torch.frombuffer(data, dtype=torch.uint8), torchvision_io.ImageReadMode.RGB
                )
        return pil_to_tensor(self._read(path))

    def data(self, path: Any) -> bytearray:
        """Return the bytes of the image of one of `paths`."""
        with open(path, "rb") as file:
            return bytearray(file.read())


def rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB; PIL's own conversion would clip what has 16 bits a channel."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel, and nothing says which of them is white")
    return image.convert("RGB")


def as_seen(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as people see it: upright, and on white where it is transparent."""
    image.load()  # which turns a TIFF itself
    turn = _TURNS.get(orientation(image))
    alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    if alpha and not image.mode.startswith("I"):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    else:
        image = rgb(image)
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """Return how an image's camera was held, as EXIF counts it; 1, upright, if that cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # what cameras and programs write there is not always EXIF
        return 1


def class_folders(
    folder: Path, num_classes: int | None, kind: str, beside: Path | None = None, nested: bool = True, ignored: str = ""
) -> tuple[list[str], list[int]]:
    """List paths and labels of the images below <class>/ in `folder`, classes in the order of `in_order`.

    num_classes: how many there must be; None for any number. kind: DATASET.TYPE, for errors. beside: the folder of the
    other split, which must have the same classes if it is there. nested: whether images may be in folders below the
    class's own. ignored: a folder that is no class. What is hidden or no image is left out.
    Raises UserError, with the path, if a class is empty, there are not `num_classes`, or a folder is where none
    belongs.
    """
    try:
        classes = in_order(folder_names(folder) - {ignored})
        there = folder_names(beside) if beside is not None and beside.is_dir() else None
        if num_classes is not None and len(classes) != num_classes:
            stray = [name for name in classes if (there and name not in there) or not _images(folder / name, True)]
            raise UserError(
                f"{folder}: DATASET.ROOT must hold {num_classes} class folders for {kind}, holds {len(classes)}"
                + (f"; {shown(stray[0])} may be none" if 0 < len(stray) < len(classes) else "")
            )
        if there is not None:
            check_classes(folder, classes, beside, there)
        paths: list[str] = []
        others: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            files = visible_files(folder / name, nested)
            images = [path for path in files if is_image(path)]
            others += [path for path in files if path.lower().endswith(OTHERS)]
            if not images:
                raise UserError(
                    f"{folder / name}: DATASET.ROOT has no image of this class of {kind}; there must be some, with a "
                    f"suffix of {', '.join(SUFFIXES)}"
                )
            paths += images
            labels += [label] * len(images)
    except OSError as error:
        raise UserError(f"{folder}: DATASET.ROOT is not {kind} ({error})") from None
    if others:
        more = f", as are {len(others) - 1} more" if others[1:] else ""
        warn(f"{others[0]}: is of a kind that is not read, and is left out{more}")
    return paths, labels


def in_order(names: Iterable[str]) -> list[str]:
    """Sort the names of classes, as their labels count them: as numbers if all are numbers, else as text."""
    names = list(names)
    numbers = all(name.isascii() and name.isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)


def names_of(folder: Path) -> list[str] | None:
    """List the classes whose folders are in a folder, in the order of their labels; None if it is not there."""
    return in_order(folder_names(folder)) if folder.is_dir() else None


def check_classes(here: Path, classes: Iterable[str], there: Path, others: Iterable[str]) -> None:
    """Raise UserError unless two splits have the same classes: one more would shift the labels behind it."""
    classes, others = set(classes), set(others)
    if classes != others:
        only = [
            f"{shown(in_order(names)[0])} is only in {place}"
            for names, place in ((classes - others, here), (others - classes, there))
            if names
        ]
        raise UserError(f"{here}: must have the classes of {there}; {', and '.join(only)}")


def folder_names(folder: Path) -> set[str]:
    """List the folders in a folder that are not hidden."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()}


def _images(folder: Path, nested: bool) -> list[str]:
    """List the images below a class's folder, by their folder and then by their name."""
    return [path for path in visible_files(folder, nested) if is_image(path)]


def visible_files(folder: Path, nested: bool = True) -> list[str]:
    """List the files below a folder that are not hidden, nor in a hidden one, by their folder and then by their name.

    Links are followed. Raises UserError for a folder that is there twice and, unless `nested`, for any; and OSError.
    """
    found: list[tuple[str, list[str]]] = []
    seen = set()

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if folders and not nested:
            raise UserError(f"{os.path.join(place, folders[0])}: is a folder; only images may be beside it")
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            raise UserError(f"{place}: links to a folder that holds it, or that is here already")
        seen.add((status.st_dev, status.st_ino))
        found.append((place, [name for name in files if not name.startswith(".")]))
    return [os.path.join(place, name) for place, names in sorted(found) for name in sorted(names)]


def is_image(path: str) -> bool:
    """Tell whether a file's name is that of an image."""
    return os.path.splitext(path)[1].lower() in SUFFIXES
