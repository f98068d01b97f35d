"""Tiny ImageNet (200 classes, 64 x 64 pixels) from its folders, with mdistiller's augmentation.

Files are read as they are asked for: decoding takes a worker about as long as the augmentation (0.2 ms each,
one core), while all images in memory are 1.3 GB, decoded anew by every run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision import transforms

from ..errors import UserError
from .folders import ImageFiles, class_folders

MEAN = (0.4802, 0.4481, 0.3975)
STD = (0.2302, 0.2265, 0.2262)
NUM_CLASSES = 200
SIZE = (64, 64)

AUGMENTATION = (transforms.RandomRotation(20), transforms.RandomHorizontalFlip())


def load_tiny_imagenet(root: str | Path, split: str, transform: Callable[[Any], Any]) -> ImageFiles:
    """The images of tiny-imagenet-200/{train,val} under `root`, as (transform(image), label).

    Images lie in <wnid>/ or <wnid>/images/; those of val may also lie in images/ with val_annotations.txt
    beside it, as in the official archive. Classes are numbered in alphabetical order of their wnid. Raises
    UserError where neither is there, a class is empty, classes are not 200 or an annotated image is missing.
    """
    folder = Path(root) / "tiny-imagenet-200" / split
    if not folder.is_dir():
        raise UserError(
            f"{folder}: DATASET.ROOT holds no Tiny ImageNet; there must be tiny-imagenet-200/{split}/<wnid>/*"
        )
    annotations = folder / "val_annotations.txt"
    if annotations.is_file() and (folder / "images").is_dir():
        return ImageFiles(*_annotated(annotations), transform, SIZE)
    return ImageFiles(*class_folders(folder, NUM_CLASSES, "tiny_imagenet"), transform, SIZE)


def _annotated(annotations: Path) -> tuple[list[str], list[int]]:
    """Paths and labels by the official file: a line for each image, its name and wnid before its box."""
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{annotations}: cannot be read ({error})") from None
    images = annotations.parent / "images"
    present = {path.name for path in images.iterdir()}
    names, wnids = [], []
    for number, line in enumerate(lines, 1):
        name, wnid, *_ = *line.split(), "", ""
        if not wnid:
            raise UserError(
                f"{annotations}: line {number} is {line!r}; it must be the name of an image and its wnid"
            )
        if name not in present:
            raise UserError(f"{annotations}: line {number} names {name}, which is not in {images}")
        names.append(name)
        wnids.append(wnid)
    classes = sorted(set(wnids))
    if len(classes) != NUM_CLASSES:
        raise UserError(f"{annotations}: must name {NUM_CLASSES} classes, names {len(classes)}")
    label = {wnid: number for number, wnid in enumerate(classes)}
    return [str(images / name) for name in names], [label[wnid] for wnid in wnids]
