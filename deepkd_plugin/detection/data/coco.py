"""Detection sets in COCO's format, read by torchvision's data set and pycocotools."""

import contextlib
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.datasets import CocoDetection
from torchvision.transforms.functional import to_tensor

from ...data.folders import ImageFiles
from ...errors import UserError
from ..average_precision import import_pycocotools
from ..networks import COCO_IDS
from .samples import AnnotatedImages, Boxes
from .sources import DETECTION_SETS, DetectionSource

PARTS = {"train": "train2017", "test": "val2017"}


def load_coco(root: str | Path, split: str) -> AnnotatedImages:
    """Read coco/{train2017,val2017}/ under `root` with coco/annotations/instances_{train,val}2017.json.

    split: "train" or "test". Category ids become labels 1 … K in their order, and images keep the order of their
    ids. All boxes are kept, crowds too. Images without boxes are not trained on, as in detectron2
    (DATALOADER.FILTER_EMPTY_ANNOTATIONS). Raises UserError if a folder or file is missing, the file is damaged or
    not of this format, pycocotools is not installed, or, on reading it, an image is missing, damaged or of another
    size than the file says.
    """
    import_pycocotools()
    part = PARTS[split]
    folder = Path(root) / "coco" / part
    file = folder.parent / "annotations" / f"instances_{part}.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: DATASET.ROOT holds no COCO; there must be coco/{part}/ with its images")
    if not file.is_file():
        raise UserError(f"{file}: DATASET.ROOT lacks this file, with the boxes of coco/{part}/")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
            read = CocoDetection(str(folder), str(file))
    except Exception as error:  # what is no such file makes pycocotools raise more kinds than can be listed
        raise UserError(f"{file}: must be COCO's annotations in JSON ({_brief(error)})") from None
    categories = [read.coco.cats[key] for key in sorted(read.coco.cats)]
    if not categories or not read.ids:
        raise UserError(f"{file}: names {len(categories)} categories and {len(read.ids)} images; both are needed")
    try:
        images = [read.coco.imgs[key] for key in read.ids]
        paths = [str(folder / image["file_name"]) for image in images]
        sizes = np.array([(image["width"], image["height"]) for image in images], np.int64)
        ids = np.array(read.ids, np.int64)
        names = tuple(str(category["name"]) for category in categories)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{file}: an image must have a whole-numbered id, a file_name, a width and a height, a category a name "
            f"({_brief(error)})"
        ) from None
    boxes = _boxes(read.coco, read.ids, file)
    # `read` ends here: its objects, outlines among them, would be copied into every loader process
    return AnnotatedImages(_Sized(paths, sizes, file), ids, sizes, boxes, names, train_on_empty=False)


def _boxes(coco: Any, ids: list[int], file: Path) -> Boxes:
    labels_by_id = {key: label for label, key in enumerate(sorted(coco.cats), 1)}
    rows: list[tuple[float, ...]] = []
    offsets = [0]
    for key in ids:
        rows.extend(_row(annotation, labels_by_id, file) for annotation in coco.imgToAnns.get(key, ()))
        offsets.append(len(rows))
    table = np.array(rows, np.float64).reshape(-1, 6)
    table[:, 2:4] += table[:, :2]
    return Boxes(
        table[:, :4].astype(np.float32), table[:, 4].astype(np.int64), table[:, 5] > 0, np.array(offsets, np.int64)
    )


def _row(annotation: Mapping[str, Any], labels: Mapping[int, int], file: Path) -> tuple[float, ...]:
    """Return an annotation's x, y, width, height, label, crowd."""
    try:
        x, y, width, height = (float(value) for value in annotation["bbox"])
        row = x, y, width, height, labels[annotation["category_id"]], bool(annotation.get("iscrowd", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: annotation {annotation.get('id')} must have a bbox of 4 numbers and the category_id of one of "
            f"the {len(labels)} categories ({_brief(error)})"
        ) from None
    if not all(map(math.isfinite, row)):
        raise UserError(f"{file}: annotation {annotation.get('id')} has a bbox that is not finite")
    return row


class _Sized(ImageFiles):
    """place -> (image (3, H, W) in [0, 1], place), refused if it has another size than its boxes are for."""

    def __init__(self, paths: list[str], sizes: np.ndarray, file: Path) -> None:
        super().__init__(paths, range(len(paths)), to_tensor)
        self.sizes, self.file = sizes, file

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        image, _ = super().__getitem__(place)
        width, height = self.sizes[place].tolist()
        if image.shape[1:] != (height, width):
            raise UserError(
                f"{self.paths[place]}: this image is {image.shape[2]} x {image.shape[1]}; {self.file.name} "
                f"has it, and its boxes, as {width} x {height}"
            )
        return image, place


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


DETECTION_SETS.register(
    "coco",
    DetectionSource(load_coco, num_classes=len(COCO_IDS), train=117_266, test=5_000, size=(640, 480), pretrained=True),
)
