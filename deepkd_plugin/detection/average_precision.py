"""Average precision as COCO defines it, computed by pycocotools."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import UserError

DETECTIONS_PER_IMAGE = 100
"""The best-scored detections that count, of each image and class (COCO's largest `maxDets`)."""


def import_pycocotools() -> ModuleType:
    """Import pycocotools with its modules `coco` and `cocoeval`. Raises UserError if it is not installed."""
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
    except ImportError as error:
        raise UserError(
            f"pycocotools cannot be imported ({error}); it reads COCO-format sets and measures AP: "
            f'pip install "deepkd_plugin[detection]"'
        ) from None
    return pycocotools


def average_precision(
    detections: Sequence[Mapping[str, Any]], truths: Sequence[Mapping[str, Any]], num_classes: int
) -> dict[str, float]:
    """Compute AP (mean over IoU 0.50, 0.55 … 0.95), AP50 and AP75 in percent, means over the classes that have a box.

    A detection that matches or overlaps only a crowd box counts neither for nor against.

    Args:
        detections: one mapping an image, in the order of `truths`: "boxes" (n, 4) x1 y1 x2 y2 in pixels, "scores"
            (n,) and "labels" (n,) from 1 to num_classes; tensors on the CPU or arrays.
        truths: one mapping an image: "boxes" and "labels" as above, and "iscrowd" (n,) if there are crowd boxes.
        num_classes: without the background.

    Raises:
        ValueError: if the numbers of images differ, labels are outside the classes, values are not finite, or there is
            no box to find.
        UserError: if pycocotools is not installed.
    """
    pycocotools = import_pycocotools()
    if len(detections) != len(truths):
        raise ValueError(f"detections are of {len(detections)} images and truths of {len(truths)}")
    true_boxes = _annotations(truths, num_classes, "truths")
    if all(annotation["iscrowd"] for annotation in true_boxes):
        raise ValueError(f"truths of {len(truths)} images have no box to find, crowds aside")
    detected_boxes = _annotations(detections, num_classes, "detections")
    # pycocotools prints its progress
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = pycocotools.cocoeval.COCOeval(
            _index(pycocotools, true_boxes, len(truths), num_classes),
            _index(pycocotools, detected_boxes, len(truths), num_classes),
            "bbox",
        )
        parameters = evaluation.params
        parameters.areaRng, parameters.areaRngLbl = [[0, 1e10]], ["all"]
        parameters.maxDets = [DETECTIONS_PER_IMAGE]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (IoU, recall, class, 1, 1); -1 for a class without boxes
    thresholds = parameters.iouThrs

    def mean(chosen: np.ndarray) -> float:
        return 100 * float(chosen[chosen > -1].mean())

    return {
        "AP": mean(precision),
        "AP50": mean(precision[np.isclose(thresholds, 0.5)]),
        "AP75": mean(precision[np.isclose(thresholds, 0.75)]),
    }


def _annotations(images: Sequence[Mapping[str, Any]], num_classes: int, name: str) -> list[dict[str, Any]]:
    """Return the boxes of all images as COCO's annotations, numbered from 1, because 0 means "no match" there."""
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        boxes = np.asarray(image["boxes"], np.float64).reshape(-1, 4)
        labels = np.asarray(image["labels"]).reshape(-1)
        crowds = np.asarray(image.get("iscrowd", np.zeros(len(labels)))).reshape(-1)
        scores = np.asarray(image.get("scores", np.ones(len(labels))), np.float64).reshape(-1)
        if not len(boxes) == len(labels) == len(crowds) == len(scores):
            raise ValueError(
                f"{name} of image {number - 1}: {len(boxes)} boxes, {len(labels)} labels, {len(scores)} scores"
            )
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError(f"{name} of image {number - 1} have boxes or scores that are not finite")
        if len(labels) and not 1 <= labels.min() <= labels.max() <= num_classes:
            raise ValueError(
                f"{name} of image {number - 1} have labels {labels.min()} to {labels.max()}; they must be in "
                f"1 … {num_classes}"
            )
        for (x1, y1, x2, y2), label, score, crowd in zip(boxes, labels, scores, crowds):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "score": score,
                    "iscrowd": int(crowd),
                }
            )
    return annotations


def _index(pycocotools: ModuleType, annotations: list[dict[str, Any]], images: int, num_classes: int) -> Any:
    index = pycocotools.coco.COCO()
    index.dataset = {
        "images": [{"id": number} for number in range(1, images + 1)],
        "categories": [{"id": label} for label in range(1, num_classes + 1)],
        "annotations": annotations,
    }
    index.createIndex()
    return index
