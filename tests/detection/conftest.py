"""A handmade detection set and whole runs on it, small enough for seconds on one core."""

import numpy as np
import pytest
import torch
import yaml
from small_detectors import CLASSES, CONFIG, STUDENT, register, squares

from deepkd_plugin.detection import launch, trainer
from deepkd_plugin.detection.data import DETECTION_SETS
from deepkd_plugin.detection.networks import network


@pytest.fixture(autouse=True)
def tiny_set(monkeypatch):
    """The set `tiny`, known as long as a test runs."""
    sets = {}
    register(sets)
    monkeypatch.setitem(DETECTION_SETS, "tiny", sets["tiny"])


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
