"""ImageNet-1K from class folders, with mdistiller's augmentation."""

from pathlib import Path

from torchvision.transforms import v2

from ..errors import UserError
from .folders import class_folders, names_of
from .sources import Source, register_dataset

NUM_CLASSES = 1000


def read_imagenet(root: str | Path, split: str) -> tuple[list[str], list[int]]:
    """List the files imagenet/{train,val}/<class>/* under `root`, and their labels.

    Raises UserError if the folder is missing, has an empty class, another number of classes than 1000 or others than
    the other split.
    """
    part = "train" if split == "train" else "val"
    folder = Path(root) / "imagenet" / part
    if not folder.is_dir():
        raise UserError(f"{folder}: DATASET.ROOT holds no ImageNet; there must be imagenet/{part}/<class>/*")
    return class_folders(folder, NUM_CLASSES, "imagenet", folder.with_name("val" if part == "train" else "train"))


register_dataset(
    "imagenet",
    Source(
        read_imagenet,
        num_classes=NUM_CLASSES,
        train=1_281_167,
        test=50_000,
        side=224,
        stored=(500, 375),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augmentation=(v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()),
        resizing=(v2.Resize(256), v2.CenterCrop(224)),
        small=False,
        zoo="imagenet",
        class_names=lambda root: names_of(Path(root) / "imagenet" / "train"),
    ),
)
