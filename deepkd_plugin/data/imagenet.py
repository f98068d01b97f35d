"""ImageNet-1K from class folders, with mdistiller's augmentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision import transforms

from ..errors import UserError
from .folders import ImageFiles, class_folders

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
NUM_CLASSES = 1000

AUGMENTATION = (transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip())
RESIZING = (transforms.Resize(256), transforms.CenterCrop(224))


def load_imagenet(root: str | Path, split: str, transform: Callable[[Any], Any]) -> ImageFiles:
    """The images of imagenet/{train,val}/<class>/* under `root`, as (transform(image), label).

    Raises UserError where the folder is missing, has an empty class or another number of classes than 1000.
    """
    folder = Path(root) / "imagenet" / split
    if not folder.is_dir():
        raise UserError(f"{folder}: DATASET.ROOT holds no ImageNet; there must be imagenet/{split}/<class>/*")
    return ImageFiles(*class_folders(folder, NUM_CLASSES, "imagenet"), transform)
