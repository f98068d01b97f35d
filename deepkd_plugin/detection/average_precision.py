"""Average precision as COCO defines it, computed by pycocotools."""

from __future__ import annotations

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
    """pycocotools with its modules `coco` and `cocoeval`. Raises UserError where it is not installed."""
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
    """AP (mean over IoU 0.50, 0.55 … 0.95), AP50 and AP75 in percent, means over the classes that have a box.

    Detections that match nothing but a crowd box, or overlap it, count neither for nor against.

    Args:
        detections: an image each, in the order of `truths`: "boxes" (n, 4) x1 y1 x2 y2 in pixels, "scores" (n,)
            and "labels" (n,) from 1 to num_classes; tensors on the CPU or arrays.
        truths: an image each: "boxes" and "labels" as above, and "iscrowd" (n,) where there are crowd boxes.
        num_classes: without background.

    Raises:
        ValueError: another number of images, labels outside the classes, values that are not finite, or no box to
            find.
        UserError: pycocotools is not installed.
    """
    pycocotools = import_pycocotools()
    if len(detections) != len(truths):
        raise ValueError(f"detections are of {len(detections)} images and truths of {len(truths)}")
    wanted = _annotations(truths, num_classes, "truths")
    if all(annotation["iscrowd"] for annotation in wanted):
        raise ValueError(f"truths of {len(truths)} images have no box to find, crowds aside")
    found = _annotations(detections, num_classes, "detections")
    # pycocotools reports its progress on stdout
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = pycocotools.cocoeval.COCOeval(
            _index(pycocotools, wanted, len(truths), num_classes),
            _index(pycocotools, found, len(truths), num_classes),
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
    """The boxes of all images as COCO's annotations; numbered from 1, since 0 means "no match" there."""
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
                f"{name} of image {number - 1} have labels {labels.min()} to {labels.max()}; they must lie in "
                f"1 … {num_classes}"
            )
        for (x1, y1, x2, y2), label, score, crowd in zip(boxes, labels, scores, crowds):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1)
                    * (y2 - y1),  # COCO splits objects by it into sizes, which are not asked for
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
