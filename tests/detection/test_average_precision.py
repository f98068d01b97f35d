import contextlib
import io
import sys

import numpy as np
import pytest
import torch

from deepkd_plugin.detection.average_precision import average_precision
from deepkd_plugin.errors import UserError

A, B = [10.0, 10.0, 30.0, 30.0], [50.0, 50.0, 90.0, 80.0]
FAR = [0.0, 90.0, 5.0, 95.0]


@pytest.fixture
def pycocotools():
    return pytest.importorskip("pycocotools", reason="AP needs pycocotools")


def truth(boxes, labels, crowd=None):
    target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}
    return target if crowd is None else target | {"iscrowd": torch.tensor(crowd)}


def found(boxes, labels, scores=None):
    scores = [1.0] * len(labels) if scores is None else scores
    return truth(boxes, labels) | {"scores": torch.tensor(scores)}


NOTHING = found([], [])


@pytest.mark.parametrize(
    ("detections", "truths", "expected"),
    [
        pytest.param(
            [found([A, B], [1, 2]), NOTHING],
            [truth([A, B], [1, 2]), truth([], [])],
            (100, 100, 100),
            id="all",
        ),
        # one of two boxes: precision 1 at the recalls 0 … 0.5, 51 of 101 points
        pytest.param([found([A], [1])], [truth([A, B], [1, 1])], (5100 / 101,) * 3, id="half of a class"),
        pytest.param([found([A], [1])], [truth([A, B], [1, 2])], (50, 50, 50), id="one of two classes"),
        # the wrong box first: precision 1/2 at every recall
        pytest.param([found([FAR, A], [1, 1], [0.9, 0.8])], [truth([A], [1])], (50, 50, 50), id="a wrong one first"),
        pytest.param([found([FAR, A], [1, 1], [0.8, 0.9])], [truth([A], [1])], (100, 100, 100), id="a wrong one last"),
        pytest.param([found([A], [1]), found([B], [1])], [truth([B], [1]), truth([A], [1])], (0, 0, 0), id="swapped"),
        pytest.param([found([A], [2])], [truth([A], [1])], (0, 0, 0), id="another class"),
        pytest.param([NOTHING], [truth([A], [1])], (0, 0, 0), id="nothing found"),
        # IoU 20 * 14 / 20 * 20 = 0.7: right at 0.50, 0.55, 0.60, 0.65 (0.70 is rounding's) and not at 0.75
        pytest.param([found([[10, 10, 30, 23.9]], [1])], [truth([A], [1])], (40, 100, 0), id="IoU 0.695"),
        pytest.param([found([A, A], [1, 1], [0.9, 0.8])], [truth([A, B], [1, 1])], (5100 / 101,) * 3, id="found twice"),
        # detections inside a crowd box are neither right nor wrong
        pytest.param(
            [found([[52, 52, 60, 60], A], [1, 1], [0.9, 0.8])],
            [truth([A, B], [1, 1], [0, 1])],
            (100, 100, 100),
            id="crowd",
        ),
        pytest.param(
            [found([A], [1]), found([B], [1], [2.0])],
            [truth([A], [1]), truth([], [])],
            (50, 50, 50),
            id="found in an empty image",
        ),
    ],
)
def test_small_cases_by_hand(pycocotools, detections, truths, expected):
    measured = average_precision(detections, truths, 3)
    assert list(measured) == ["AP", "AP50", "AP75"]
    assert list(measured.values()) == pytest.approx(expected, abs=1e-6)


def test_a_hundred_detections_of_an_image_count(pycocotools):
    wrong = [FAR] * 100
    scores = [0.9] * 100 + [0.5]
    assert average_precision([found([*wrong, A], [1] * 101, scores)], [truth([A], [1])], 1)["AP"] == 0
    scores[0] = 0.1  # the right one is among the hundred now
    assert average_precision([found([*wrong, A], [1] * 101, scores)], [truth([A], [1])], 1)["AP"] == pytest.approx(1)


def test_against_pycocotools_own_summary(pycocotools, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    truths, detections, annotations, results = [], [], [], []
    for image in range(12):
        n = int(rng.integers(0, 6))
        low = rng.uniform(0, 100, (n, 2))
        boxes = np.concatenate([low, low + rng.uniform(5, 150, (n, 2))], 1).astype(np.float32)
        labels, crowd = rng.integers(1, 4, n), (rng.random(n) < 0.2).astype(int)
        truths.append({"boxes": boxes, "labels": labels, "iscrowd": crowd})
        moved = np.repeat(boxes, 2, 0) + rng.normal(0, 4, (2 * n, 4)).astype(np.float32)
        guessed = np.where(rng.random(2 * n) < 0.8, labels.repeat(2), 1)
        scores = rng.random(2 * n)
        detections.append({"boxes": moved, "labels": guessed, "scores": scores})
        for box, label, one in zip(boxes.astype(float), labels, crowd):
            place = {"image_id": image + 7, "bbox": [*box[:2], *(box[2:] - box[:2])], "iscrowd": int(one)}
            annotations.append(place | {"id": len(annotations) + 1, "category_id": int(label), "area": 1.0})
        for box, label, score in zip(moved.astype(float), guessed, scores):
            place = {"image_id": image + 7, "bbox": [*box[:2], *(box[2:] - box[:2])]}
            results.append(place | {"category_id": int(label), "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO()
        theirs.dataset = {
            "images": [{"id": image + 7} for image in range(12)],
            "categories": [{"id": label} for label in (1, 2, 3, 4)],
            "annotations": annotations,
        }
        theirs.createIndex()
        evaluation = COCOeval(theirs, theirs.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    measured = average_precision(detections, truths, 4)
    assert list(measured.values()) == pytest.approx(100 * evaluation.stats[:3], abs=1e-9)
    assert 5 < measured["AP"] < 95
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("detections", "truths", "message"),
    [
        ([NOTHING], [truth([], [])], "truths of 1 images have no box to find"),
        ([NOTHING], [truth([A], [1], [1])], "have no box to find, crowds aside"),
        ([], [truth([A], [1])], "detections are of 0 images and truths of 1"),
        ([found([A], [0])], [truth([A], [1])], r"detections of image 0 have labels 0 to 0; .* 1 … 3"),
        ([NOTHING], [truth([A], [4])], "truths of image 0 have labels 4 to 4"),
        ([found([A], [1], [float("nan")])], [truth([A], [1])], "detections of image 0 .* not finite"),
        ([found([A, B], [1])], [truth([A], [1])], "detections of image 0: 2 boxes, 1 labels"),
    ],
)
def test_what_cannot_be_measured(pycocotools, detections, truths, message):
    with pytest.raises(ValueError, match=message):
        average_precision(detections, truths, 3)


def test_without_pycocotools_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r'pip install "deepkd_plugin\[detection\]"') as caught:
        average_precision([NOTHING], [truth([A], [1])], 1)
    assert "\n" not in str(caught.value)
