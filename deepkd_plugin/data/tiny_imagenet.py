"""Tiny ImageNet (200 classes, 64 x 64 pixels) from its folders, with mdistiller's augmentation.

Files are read as they are asked for: decoding takes a worker about as long as the augmentation (0.2 ms each,
one core), while all images in memory are 1.3 GB, decoded anew by every run.
"""

from pathlib import Path

from torchvision import transforms

from ..errors import UserError
from .folders import class_folders
from .sources import Source, register_dataset

NUM_CLASSES = 200


def read_tiny_imagenet(root: str | Path, split: str) -> tuple[list[str], list[int]]:
    """List the files of tiny-imagenet-200/{train,val} under `root`, and their labels.

    Images are in <wnid>/ or <wnid>/images/; those of val may also be in images/ with val_annotations.txt beside it,
    as in the official archive. Classes are numbered in the alphabetical order of their wnid. Raises UserError if
    neither is there, a class is empty, there are not 200 classes or an annotated image is missing.
    """
    part = "train" if split == "train" else "val"
    folder = Path(root) / "tiny-imagenet-200" / part
    if not folder.is_dir():
        raise UserError(
            f"{folder}: DATASET.ROOT holds no Tiny ImageNet; there must be tiny-imagenet-200/{part}/<wnid>/*"
        )
    annotations = folder / "val_annotations.txt"
    if annotations.is_file() and (folder / "images").is_dir():
        return _annotated(annotations)
    return class_folders(folder, NUM_CLASSES, "tiny_imagenet")


def _annotated(annotations: Path) -> tuple[list[str], list[int]]:
    """Read paths and labels from the official file: a line for each image, its name and wnid before its box."""
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
            raise UserError(f"{annotations}: line {number} is {line!r}; it must be the name of an image and its wnid")
        if name not in present:
            raise UserError(f"{annotations}: line {number} names {name}, which is not in {images}")
        names.append(name)
        wnids.append(wnid)
    classes = sorted(set(wnids))
    if len(classes) != NUM_CLASSES:
        raise UserError(f"{annotations}: must name {NUM_CLASSES} classes, names {len(classes)}")
    label = {wnid: number for number, wnid in enumerate(classes)}
    return [str(images / name) for name in names], [label[wnid] for wnid in wnids]


register_dataset(
    "tiny_imagenet",
    Source(
        read_tiny_imagenet,
        num_classes=NUM_CLASSES,
        train=100_000,
        test=10_000,
        side=64,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2302, 0.2265, 0.2262),
        augmentation=(transforms.RandomRotation(20), transforms.RandomHorizontalFlip()),
        zoo="tiny_imagenet",
    ),
)
