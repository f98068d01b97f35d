"""Configs and a small COCO-format set for the tests of detection sets."""

import json

import numpy as np
import pytest
from PIL import Image
from yacs.config import CfgNode


@pytest.fixture
def detection_cfg():
    """The part of a config that detection sets read: detection_cfg("coco", root, flip=0.5, HOLDOUT=0.1)."""

    def make(kind, root, flip=0.0, batch=4, **node):
        dataset = {
            "TYPE": kind,
            "ROOT": str(root),
            "NUM_WORKERS": 0,
            "HOLDOUT": 0.0,
            "TEST": {"BATCH_SIZE": 3},
        }
        return CfgNode(
            {"DATASET": dataset | node, "SOLVER": {"BATCH_SIZE": batch, "SEED": 0}, "DETECTION": {"FLIP": flip}}
        )

    return make


CATEGORIES = [{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "sign"}]
# id of the image: (width, height), its annotations as (category, bbox, crowd)
IMAGES = {
    30: ((40, 30), [(13, [1, 2, 10, 20], 0), (90, [5, 5, 8, 4.5], 0)]),
    4: ((32, 48), []),
    9: ((24, 24), [(1, [0, 0, 24, 24], 1)]),  # a crowd only
    12: ((50, 20), [(1, [-5, 3, 20, 40], 0), (90, [10, 10, 0, 5], 0), (13, [0, 0, 9, 9], 1)]),
    21: ((20, 20), [(90, [2, 3, 4, 5], 0)]),
}


@pytest.fixture
def coco_root(tmp_path):
    """A DATASET.ROOT with COCO's layout; both parts hold the five images above, image i of brightness i."""
    pytest.importorskip("pycocotools", reason="COCO-format sets need pycocotools")
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for part in ("train2017", "val2017"):
        folder = tmp_path / "coco" / part
        folder.mkdir()
        content = {"images": [], "annotations": [], "categories": CATEGORIES}
        for key, ((width, height), annotations) in IMAGES.items():
            name = f"{key:012d}.png"
            pixels = np.full((height, width, 3), key, np.uint8)
            pixels[:, 0] = 255  # the left edge, for the flip
            Image.fromarray(pixels).save(folder / name)
            content["images"].append({"id": key, "file_name": name, "width": width, "height": height})
            for category, bbox, crowd in annotations:
                number = len(content["annotations"]) + 1
                content["annotations"].append(
                    {
                        "id": number,
                        "image_id": key,
                        "category_id": category,
                        "bbox": bbox,
                        "area": 100.0 + number,
                        "iscrowd": crowd,
                        "segmentation": [],
                    }
                )
        (tmp_path / "coco" / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return tmp_path
