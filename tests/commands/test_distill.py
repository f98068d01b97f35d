"""From a folder of images to a taught student, in one command."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from deepkd_plugin.commands.cli import main
from deepkd_plugin.hosts.registry import find_host
from deepkd_plugin.launch import read_config
from deepkd_plugin.trainer import Trainer

NETWORKS = ("--student", "resnet8", "--train-teacher", "resnet14")
SHORT = ("--epochs", "2", "--batch", "16", "DATASET.NUM_WORKERS", "0", "SOLVER.CHANNELS_LAST", "False")


@pytest.fixture
def images(tmp_path):
    """Two classes that a network learns in a few steps: bright images and dark ones."""
    rng = np.random.default_rng(0)
    for name, light in (("dark", 60), ("light", 190)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(30):
            size = rng.integers(33, 60, 2)
            pixels = rng.normal(light, 25, (*size, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path / "images"


def errors(capsys):
    """Return what stderr has beside warnings, each of which comes once in a process."""
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("deepkd: warning: ")]


def distil(images, *words, command="distill", networks=NETWORKS):
    return main([command, "--images", str(images), *networks, "--out", str(images.parent / "out"), *SHORT, *words])


def test_one_command_trains_teacher_and_student_and_says_what_was_gained(images, capsys):
    assert distil(images, "--compare") == 0
    out = capsys.readouterr().out
    assert "images    2 classes, 48 to train on, 12 to test on, in" in out
    assert "teacher   resnet14, trained first" in out
    assert "runs      3 of 2 epochs, about " in out
    assert "configs   teacher.yaml, deepkd.yaml, alone.yaml in" in out
    results = {}
    for name in ("teacher", "deepkd", "alone"):
        folder = images.parent / "out" / name
        run = json.loads((folder / "run.json").read_text())
        assert run["finished"]
        results[name] = run["result"]
        assert (folder / "student_best.safetensors").is_file()
    gain = results["deepkd"]["last"] - results["alone"]["last"]
    assert f"gain      {gain:+.2f} points in the last epoch" in out
    # the same call finds everything done
    assert distil(images, "--compare") == 0
    assert capsys.readouterr().out.count("finished before") == 3


@pytest.mark.parametrize(("stopped", "kept"), [(1, 0), (2, 1), (3, 0)])
def test_the_same_call_goes_on_after_an_interruption(images, stopped, kept, capsys, monkeypatch):
    """In the first epoch of a run, when there is nothing to go on from, and later."""
    whole, epochs = Trainer.train_epoch, []

    def stop(self, *arguments):
        epochs.append(1)
        if len(epochs) == stopped:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(Trainer, "train_epoch", stop)
    assert distil(images) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"deepkd: or go on with all runs: deepkd distill --images {images} ")
    assert distil(images) == 0
    assert len(epochs) == 5  # two runs of two epochs, and one that was begun twice
    assert ("teacher: finished before" in capsys.readouterr().out) == (stopped == 3)
    resumed = json.loads((images.parent / "out/teacher/run.json").read_text()).get("resumed", [])
    assert len(resumed) == kept


def test_its_configs_are_those_of_training_with_a_comment_for_each_key(images, capsys):
    assert distil(images, "--compare", "SOLVER.LR", "0.02", command="init") == 0
    out = capsys.readouterr().out
    cfgs = {}
    for name in ("teacher", "deepkd", "alone"):
        file = images.parent / "out" / f"{name}.yaml"
        assert str(file) in out
        cfgs[name] = read_config(find_host(), str(file), [])[0]
        assert cfgs[name].SOLVER.LR == 0.02
        assert cfgs[name].INPUT.SIZE == 32
        assert cfgs[name].DATASET.HOLDOUT == 0.2
    assert not (images.parent / "out/deepkd").exists()
    assert cfgs["teacher"].DISTILLER.STUDENT == cfgs["deepkd"].DISTILLER.TEACHER == "resnet14"
    assert cfgs["alone"].DISTILLER.TYPE == cfgs["teacher"].DISTILLER.TYPE == "NONE"
    assert cfgs["alone"].INPUT == cfgs["deepkd"].INPUT
    assert cfgs["deepkd"].SOLVER.DECOUPLED.DELTA.TCG == -0.075
    text = (images.parent / "out/deepkd.yaml").read_text()
    assert "    TYPE: dynamic # top-K mask on the non-target classes" in text
    assert yaml.safe_load(text)["SOLVER"]["EPOCHS"] == 2


@pytest.mark.parametrize("method", ["kd", "dkd", "deepkd_dkd"])
def test_other_methods(images, method, capsys):
    assert distil(images, "--method", method, command="init") == 0
    cfg = read_config(find_host(), str(images.parent / "out" / f"{method}.yaml"), [])[0]
    assert {"kd": "KD", "dkd": "DKD"}.get(method, "DeepKD") == cfg.DISTILLER.TYPE
    assert ("DecoupledMomentumSGD" if method == "deepkd_dkd" else "base") == cfg.SOLVER.TRAINER


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "nkd"), "invalid choice: 'nkd'"),
        (("--teacher-weights", "t.pt"), "--teacher-weights goes with --teacher"),
        (("DISTILLER.STUDENT", "resnet9"), "command line: DISTILLER.STUDENT is 'resnet9'"),
        (("--student", "resnet9"), "error: command line: --student is 'resnet9'"),
        (("--holdout", "1.5"), "error: command line: --holdout is 1.5"),
        (("SOLVER.LR", "-1"), "SOLVER.LR is -1"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(images, words, message, capsys):
    assert distil(images, *words) == 2
    (line,) = errors(capsys)
    assert message in line
    assert not (images.parent / "out").exists()


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (("--train-teacher", "resnet9"), "command line: --train-teacher is 'resnet9'"),
        (("--teacher", "resnet14"), "--teacher-weights names no file and the zoo has no weights of resnet14"),
        (("--teacher", "resnet9", "--teacher-weights", "t"), "command line: --teacher is 'resnet9'"),
        (
            ("--teacher", "resnet14", "--teacher-weights", "nowhere.pt"),
            "no such file; --teacher-weights must",
        ),
    ],
)
def test_a_mistake_in_a_teacher_names_the_flag_that_was_typed(images, networks, message, capsys):
    assert distil(images, networks=("--student", "resnet8", *networks)) == 2
    (line,) = errors(capsys)
    assert message in line
    assert "DISTILLER" not in line
    assert not (images.parent / "out").exists()


@pytest.mark.parametrize("command", ["distill", "init"])
def test_damaged_images_are_all_named_before_anything_is_written(images, command, capsys):
    for i in range(12):
        (images / "light" / f"{i:02}.png").write_text("<html>")
    assert distil(images, command=command) == 2
    (line,) = errors(capsys)
    assert "--images has 12 images that cannot be read: light/00.png, " in line
    assert "light/09.png and 2 more; they must be whole" in line
    assert not (images.parent / "out").exists()


def test_a_login_is_asked_for_before_the_first_run(images, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None, api=SimpleNamespace(api_key=None)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert distil(images, "LOG.WANDB", "True") == 2
    assert "nobody is logged in" in capsys.readouterr().err
    assert not (images.parent / "out").exists()


def test_a_folder_that_is_none(tmp_path, capsys):
    assert distil(tmp_path / "nowhere") == 2
    assert "--images is" in capsys.readouterr().err


def test_another_plan_in_the_same_folder_is_refused(images, capsys):
    assert distil(images, command="init") == 0
    before = (images.parent / "out/deepkd.yaml").read_bytes()
    assert distil(images, "SOLVER.LR", "0.01", command="init") == 2
    assert "is of another plan" in capsys.readouterr().err
    assert (images.parent / "out/deepkd.yaml").read_bytes() == before
    assert distil(images, "SOLVER.LR", "0.01", "--overwrite", command="init") == 0
