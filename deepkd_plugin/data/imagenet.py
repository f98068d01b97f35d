"""ImageNet-1K from class folders, with mdistiller's augmentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision import transforms
from torchvision.datasets import ImageFolder

from ..errors import UserError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
NUM_CLASSES = 1000


def load_imagenet(root: str | Path, split: str, augment: bool) -> ImageFolder:
    """The images of imagenet/{train,val}/<class>/* under `root`, as (image, label).

    augment: random resized crop and flip instead of resize and centre crop. Raises UserError where the folder
    is missing, has an empty class or another number of classes than 1000.
    """
    folder = Path(root) / "imagenet" / split
    if not folder.is_dir():
        raise UserError(f"{folder}: DATASET.ROOT holds no ImageNet; there must be imagenet/{split}/<class>/*")
    try:
        dataset = ImageFolder(str(folder), _transform(augment))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: DATASET.ROOT is not ImageNet ({error})") from None
    if len(dataset.classes) != NUM_CLASSES:
        raise UserError(
            f"{folder}: DATASET.ROOT must hold {NUM_CLASSES} class folders for imagenet, holds "
            f"{len(dataset.classes)}"
        )
    return dataset


def _transform(augment: bool) -> Callable[[Any], Any]:
    end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    if augment:
        return transforms.Compose(
            [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *end]
        )
    return transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *end])
