"""The handmade set `tiny`: 6 training and 4 test images of 48 pixels, 5 classes; and the config of a run on it."""

import numpy as np
import torch

from deepkd_plugin.detection.data import DETECTION_SETS, DetectionSource
from deepkd_plugin.detection.data.samples import AnnotatedImages, Boxes

SIDE = 48
CLASSES = ("red", "green", "blue", "grey", "white")
TEACHER = STUDENT = "fasterrcnn_resnet8_fpn"

CONFIG = {
    "EXPERIMENT": {"PROJECT": "tiny", "NAME": "run"},
    "DATASET": {"TYPE": "tiny", "NUM_WORKERS": 0, "TEST": {"BATCH_SIZE": 4}},
    "DISTILLER": {"TYPE": "NONE", "TEACHER": TEACHER, "TEACHER_WEIGHTS": "", "STUDENT": STUDENT},
    "SOLVER": {
        "TRAINER": "DecoupledMomentumSGD",
        "BATCH_SIZE": 2,
        "EPOCHS": 2,
        "LR": 0.01,
        "LR_SCHEDULE": "cosine",
    },
    "DeepKD": {"BASE": "DKD", "TEMPERATURE": 1.0, "NCG_WEIGHT": 0.25},
    "DKD": {"T": 1.0, "WARMUP": 0, "BETA": 0.25},
    "KD": {"TEMPERATURE": 1},
    "DETECTION": {
        "MIN_SIZE": [SIDE],
        "MAX_SIZE": SIDE,
        "FLIP": 0.0,
        "PROPOSALS": 8,
        "RANKED_TRAIN": 30,
        "RANKED_TEST": 20,
        "KEPT_TRAIN": 16,
        "KEPT_TEST": 8,
        "WARMUP_ITERATIONS": 0,
    },
}


def squares(count, seed):
    """`count` images with a square each, the last one without."""
    rng = np.random.default_rng(seed)
    images, boxes, labels = [], [], []
    for i in range(count):
        image = torch.full((3, SIDE, SIDE), 0.3)
        if i < count - 1:
            label, side = i % len(CLASSES) + 1, int(rng.integers(14, 30))
            x, y = rng.integers(0, SIDE - side, 2)
            image[(label - 1) % 3, y : y + side, x : x + side] = 1.0
            boxes.append([x, y, x + side, y + side])
            labels.append(label)
        images.append((image, 0))
    offsets = np.array([*range(count), count - 1])
    annotations = Boxes(np.array(boxes, np.float32), np.array(labels), np.zeros(count - 1, bool), offsets)
    return AnnotatedImages(
        images, np.arange(count), np.full((count, 2), SIDE), annotations, CLASSES, train_on_empty=True
    )


def register(sets=DETECTION_SETS):
    """Add the set to those that are known."""
    parts = {"train": squares(6, 0), "test": squares(4, 1)}
    sets["tiny"] = DetectionSource(lambda root, split: parts[split], num_classes=5, train=6, test=4, size=(SIDE, SIDE))
