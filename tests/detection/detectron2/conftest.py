"""A COCO-format set of eight small images, and configs small enough for seconds on one core."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": "0",
    "MODEL.ROI_HEADS.NUM_CLASSES": "3",
    "TEACHER.MODEL.ROI_HEADS.NUM_CLASSES": "3",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "8",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "16",
    "TEACHER.MODEL.ROI_BOX_HEAD.FC_DIM": "16",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": "16",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "20",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "12",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "10",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "5",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
    "DATASETS.TRAIN": "('deepkd_tiny',)",
    "DATASETS.TEST": "('deepkd_tiny',)",
    "DATALOADER.NUM_WORKERS": "0",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.BASE_LR": "0.001",
    "SOLVER.MAX_ITER": "2",
    "SOLVER.STEPS": "(1,)",
    "SOLVER.WARMUP_ITERS": "1",
}

_THIN = {
    "FPN.OUT_CHANNELS": "16",
    "RESNETS.DEPTH": "50",
    "RESNETS.STEM_OUT_CHANNELS": "8",
    "RESNETS.RES2_OUT_CHANNELS": "16",
    "RESNETS.WIDTH_PER_GROUP": "4",
}
TINY = {f"{node}.{key}": value for node in ("MODEL", "TEACHER.MODEL") for key, value in _THIN.items()}
"""On top of SMALL for the pair R18-R101: thin networks. ReviewKD needs 256 channels."""


@pytest.fixture(scope="session")
def host(mdistiller_root):
    """mdistiller's detection branch, imported into detectron2; skips where either is missing."""
    pytest.importorskip("detectron2.engine", reason="detectron2 is not installed")
    if not (mdistiller_root / "detection/model/rcnn.py").is_file():
        pytest.skip(f"{mdistiller_root} has no detection branch")
    from deepkd_plugin.detection import detectron2

    return detectron2.require(mdistiller_root)


@pytest.fixture(scope="session")
def configs(tmp_path_factory, mdistiller_root, host):
    """The folder DeepKD/ as `deepkd apply` leaves it beside mdistiller's own configs."""
    folder = tmp_path_factory.mktemp("detection") / "configs"
    shutil.copytree(mdistiller_root / "detection/configs", folder)
    shutil.copytree(ROOT / "configs/detectron2", folder / "DeepKD", dirs_exist_ok=True)
    return folder / "DeepKD"


@pytest.fixture(scope="session")
def deepkd_tiny(tmp_path_factory, host):
    """The set deepkd_tiny: 64 x 64 pixels, one or two rectangles of three classes each, the last image empty."""
    from detectron2.data.datasets import register_coco_instances

    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for number in range(1, 9):
        pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        for _ in range(0 if number == 8 else 1 + number % 2):
            x, y, w, h = (int(v) for v in (*rng.integers(2, 30, 2), *rng.integers(16, 30, 2)))
            label = int(rng.integers(3))
            pixels[y : y + h, x : x + w, label] = 250
            boxes.append(
                {"id": len(boxes) + 1, "image_id": number, "category_id": label + 1, "bbox": [x, y, w, h]}
                | {"area": w * h, "iscrowd": 0, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            )
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
    categories = [{"id": i + 1, "name": f"thing {i}"} for i in range(3)]
    document = {"info": {}, "images": images, "annotations": boxes, "categories": categories}
    (folder / "tiny.json").write_text(json.dumps(document))
    register_coco_instances("deepkd_tiny", {}, str(folder / "tiny.json"), str(folder))
    return folder


@pytest.fixture
def options(tmp_path):
    """KEY VALUE pairs of a small run in tmp_path: options("KEY", "VALUE", …)."""

    def make(*pairs, thin=True):
        given = SMALL | (TINY if thin else {}) | {"OUTPUT_DIR": str(tmp_path / "run")}
        given |= dict(zip(pairs[::2], pairs[1::2]))
        return [part for pair in given.items() for part in pair]

    return make


@pytest.fixture
def small(host, configs, deepkd_tiny, options):
    """A checked config: small("DeepKD-R18-R101", "KEY", "VALUE", …)."""
    from deepkd_plugin.detection.detectron2 import config

    def make(name, *pairs):
        thin = "R18" in name and "Review" not in name
        cfg, origin = config.load(configs / f"{name}.yaml", options(*pairs, thin=thin))
        config.check(cfg, origin)
        cfg.freeze()
        return cfg

    return make


@pytest.fixture
def make_trainer(host, small):
    """A trainer that has loaded its weights, or resumed: make_trainer("DeepKD-R18-R101", …, resume=False)."""
    from detectron2.utils.env import seed_all_rng

    from deepkd_plugin.detection.detectron2.trainer import Trainer

    def make(name, *pairs, resume=False):
        cfg = small(name, *pairs)
        seed_all_rng(cfg.SEED)
        trainer = Trainer(cfg, "a test")
        trainer.resume_or_load(resume)
        return trainer

    return make
