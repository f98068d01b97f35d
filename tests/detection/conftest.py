"""A handmade detection set and whole runs on it, small enough for seconds on one core."""

import numpy as np
import pytest
import torch
import yaml

from deepkd_plugin.detection import launch, trainer
from deepkd_plugin.detection.data import DETECTION_SETS, DetectionSource
from deepkd_plugin.detection.data.samples import AnnotatedImages, Boxes
from deepkd_plugin.detection.networks import network

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


@pytest.fixture(autouse=True)
def tiny_set(monkeypatch):
    """The set `tiny`: 6 training and 4 test images of 48 pixels, 5 classes."""
    sets = {"train": squares(6, 0), "test": squares(4, 1)}
    tiny = DetectionSource(lambda root, split: sets[split], num_classes=5, train=6, test=4, size=(SIDE, SIDE))
    monkeypatch.setitem(DETECTION_SETS, "tiny", tiny)


@pytest.fixture
def momenta():
    """The options that give DeepKD's streams momenta of their own."""
    deltas = {"TOG": "0.05", "TCG": "-0.05", "NCG": "0.05"}
    return [word for stream, delta in deltas.items() for word in (f"SOLVER.DECOUPLED.DELTA.{stream}", delta)]


@pytest.fixture
def config_file(tmp_path):
    """The config of a run on `tiny`, as a file."""
    file = tmp_path / "method.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    return file


@pytest.fixture
def detection_config(config_file):
    """That config, checked, with options: detection_config("KEY", "VALUE", …)."""
    return lambda *options: launch.read_config(str(config_file), options)[0]


@pytest.fixture
def detector(detection_config):
    """An untrained detector of 48-pixel images: detector(seed)."""

    def make(seed, *options):
        torch.manual_seed(seed)
        return network(STUDENT, len(CLASSES), detection_config(*options).DETECTION)

    return make


@pytest.fixture
def any_teacher(monkeypatch, detector, tmp_path):
    """The file of an untrained teacher, which passes the test that a teacher has to pass."""
    monkeypatch.setattr(trainer, "LEAST_AP", 0.0)
    file = tmp_path / "teacher.pt"
    torch.save({"model": detector(7).state_dict()}, file)
    return file


@pytest.fixture
def detect(tmp_path, config_file, capsys):
    """Run tools/train_detection.py's main here: detect("KD", "KEY", "VALUE", …) -> (exit code, stdout, stderr)."""
    pytest.importorskip("pycocotools", reason="a whole run measures AP, by pycocotools")

    def run(method, *options, flags=(), name="run"):
        options = ("DISTILLER.TYPE", method, "EXPERIMENT.NAME", name, *options)
        if "DISTILLER.TEACHER_WEIGHTS" not in options and method != "NONE":
            options += ("DISTILLER.TEACHER_WEIGHTS", str(tmp_path / "teacher.pt"))
        run.folder = tmp_path / "output" / "tiny" / name
        words = ["--cfg", str(config_file), *flags, "LOG.PREFIX", str(tmp_path / "output"), *options]
        code = launch.main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def batch():
    """(images, targets) of two training images of `tiny`, the second without a box."""
    samples = squares(3, 2).training(np.array([0, 2]), 0.0, 0)
    images, targets = zip(*(samples[i] for i in range(2)))
    return list(images), list(targets)
