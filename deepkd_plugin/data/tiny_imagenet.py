"""Tiny ImageNet (200 classes, 64 x 64 pixels) from its folders, with mdistiller's augmentation.

Files are read as they are asked for: decoding takes a worker about as long as the augmentation (0.2 ms each,
one core), while all images in memory are 1.3 GB, decoded anew by every run.
"""

from pathlib import Path

from torchvision import transforms

from ..errors import UserError, shown
from .folders import check_classes, class_folders, folder_names, in_order, names_of
from .sources import Source, register_dataset

NUM_CLASSES = 200
ANNOTATIONS = "val_annotations.txt"


def read_tiny_imagenet(root: str | Path, split: str) -> tuple[list[str], list[int]]:
    """List the files of tiny-imagenet-200/{train,val} under `root`, and their labels.

    Images are in <wnid>/ or <wnid>/images/; those of val may also be in images/ with val_annotations.txt beside it,
    as in the official archive. Classes are numbered in the alphabetical order of their wnid. Raises UserError if
    neither is there, a class is empty, there are not 200 classes, those of the other split are others or an annotated
    image is missing.
    """
    part = "train" if split == "train" else "val"
    folder = Path(root) / "tiny-imagenet-200" / part
    if not folder.is_dir():
        raise UserError(
            f"{folder}: DATASET.ROOT holds no Tiny ImageNet; there must be tiny-imagenet-200/{part}/<wnid>/*"
        )
    beside = folder.with_name("val" if part == "train" else "train")
    if _is_annotated(folder):
        return _annotated(folder / ANNOTATIONS, beside)
    return class_folders(folder, NUM_CLASSES, "tiny_imagenet", None if _is_annotated(beside) else beside)


def _is_annotated(folder: Path) -> bool:
    return (folder / ANNOTATIONS).is_file() and (folder / "images").is_dir()


def _annotated(annotations: Path, train: Path) -> tuple[list[str], list[int]]:
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
            raise UserError(
                f"{annotations}: line {number} is {shown(line)}; it must be the name of an image and its wnid"
            )
        if name not in present:
            raise UserError(f"{annotations}: line {number} names {name}, which is not in {images}")
        names.append(name)
        wnids.append(wnid)
    classes = in_order(set(wnids))
    if len(classes) != NUM_CLASSES:
        raise UserError(f"{annotations}: must name {NUM_CLASSES} classes, names {len(classes)}")
    if train.is_dir():
        check_classes(annotations, classes, train, folder_names(train))
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
        class_names=lambda root: names_of(Path(root) / "tiny-imagenet-200" / "train"),
    ),
)
