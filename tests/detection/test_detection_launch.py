import importlib.util
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from deepkd_plugin import device
from deepkd_plugin.commands import cli
from deepkd_plugin.config.shipped import find_config
from deepkd_plugin.detection import evaluate, launch
from deepkd_plugin.detection.data import DETECTION_SETS
from deepkd_plugin.errors import UserError
from deepkd_plugin.terminal import Stopped

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "detection").rglob("*.yaml"))


def test_what_the_terminal_shows(detect, any_teacher, capsys):
    code, out, err = detect("DeepKD")
    assert code == 0, err
    assert all(line.startswith("deepkd: warning: ") for line in err.splitlines())
    lines = out.splitlines()
    assert lines[0] == "tiny/run: DeepKD on tiny, 6 images, 2 epochs"
    assert lines[1].startswith("by        deepkd_plugin ")
    assert "; CPU, 1 thread" in lines[1]
    assert lines[2].startswith("teacher   fasterrcnn_resnet8_fpn AP ")
    assert lines[3].startswith("time      about ")
    assert [line.split()[:2] for line in lines[4:6]] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert all(" K " in line and " lr " in line for line in lines[4:6])
    assert lines[7].startswith("teacher   fasterrcnn_resnet8_fpn AP ")
    assert lines[8].startswith("student   fasterrcnn_resnet8_fpn: AP best ")
    assert " (epoch " in lines[8]
    assert ", last " in lines[8]
    assert lines[9].startswith("gain      not known: ")
    assert lines[10].startswith(f"files     {detect.folder}/ (")
    assert lines[11].startswith("next      python tools/eval_detection.py --cfg ")
    assert lines[12:] == []  # there is no other config beside
    assert evaluate.main(shlex.split(lines[11])[3:]) == 0
    assert "AP50" in capsys.readouterr().out
    assert "top-1" not in out
    for file in ("student_best", "student_latest", "metrics.jsonl", "config.yaml", "latest"):
        assert (detect.folder / file).exists()
    run = json.loads((detect.folder / "run.json").read_text())
    assert run["finished"]
    assert run["command"].startswith("python tools/train_detection.py --cfg ")
    assert run["teacher_acc"] == pytest.approx(float(lines[2].split()[3]), abs=0.01)
    assert yaml.safe_load((detect.folder / "config.yaml").read_text())["DETECTION"]["PROPOSALS"] == 8


def test_a_login_is_asked_for_before_images_are_read(detect, any_teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None, api=SimpleNamespace(api_key=None)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(launch, "get_detection_sets", lambda cfg: pytest.fail("images are read"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    code, out, err = detect("KD", "LOG.WANDB", "True")
    assert (code, out, "nobody is logged in" in err) == (2, "", True)


def test_a_student_of_a_run_is_a_teacher_of_another(detect, any_teacher, capsys):
    assert detect("NONE", name="teacher")[0] == 0
    assert cli.main(["export", str(detect.folder), "--to", "torch"]) == 2  # it has no description
    assert "its run trained a detector" in capsys.readouterr().err
    file = str(detect.folder / "student_latest")
    code, out, err = detect("KD", "DISTILLER.TEACHER_WEIGHTS", file)
    assert code == 0, err
    assert any(line.startswith("teacher   ") for line in out.splitlines())


def test_deterministic_algorithms_are_asked_for_before_cuda_starts(detect, monkeypatch):
    asked = []
    monkeypatch.setattr(device, "tune", asked.append)
    pick = device.pick
    monkeypatch.setattr(device, "pick", lambda: asked.append("device") or pick())
    assert detect("NONE", "SOLVER.DETERMINISTIC", "True", "SOLVER.EPOCHS", "1")[0] == 0
    assert asked[:2] == [True, "device"]


def test_a_folder_that_holds_a_run(detect):
    assert detect("NONE", "SOLVER.EPOCHS", "1")[0] == 0
    code, out, err = detect("NONE", "SOLVER.EPOCHS", "1")
    assert (code, out) == (2, "")  # before data and networks
    assert "holds a run already; go on with --resume, start again with --overwrite" in err
    assert detect("NONE", "SOLVER.EPOCHS", "1", flags=["--overwrite"])[0] == 0


def test_resuming_with_another_config_or_teacher(detect, any_teacher, detector):
    assert detect("KD", "SOLVER.EPOCHS", "1")[0] == 0
    code, _, err = detect("KD", "SOLVER.EPOCHS", "1", "DETECTION.PROPOSALS", "4", flags=["--resume"])
    assert code == 2
    assert "--resume needs the run's own config: DETECTION.PROPOSALS was 8, is 4" in err
    torch.save({"model": detector(8).state_dict()}, any_teacher)
    code, _, err = detect("KD", "SOLVER.EPOCHS", "1", flags=["--resume"])
    assert code == 2
    assert "--resume needs the run's own teacher" in err


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_is_read(file):
    cfg, _ = launch.read_config(str(file), ())
    assert cfg.EXPERIMENT.PROJECT
    assert cfg.DETECTION.MIN_SIZE


def test_there_are_configs_of_the_embedded_set():
    names = {path.stem for path in CONFIGS if "glyph_canvas" in str(path)}
    assert {"vanilla", "kd", "dkd", "deepkd", "deepkd_dkd"} <= names


# mistakes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("DETECTION.PROPOSAL", "8"),
            "unknown config key DETECTION.PROPOSAL; did you mean DETECTION.PROPOSALS",
        ),
        (("DATASET.TYPE", "glyphs100"), "DATASET.TYPE is 'glyphs100'; it must be one of glyph_canvas, coco"),
        (("DISTILLER.TYPE", "CRLD"), "DISTILLER.TYPE is 'CRLD'; it must be one of NONE, KD, DKD, DeepKD"),
        (("DISTILLER.STUDENT", "resnet8"), "DISTILLER.STUDENT is 'resnet8'; it must be one of fasterrcnn_"),
        (("DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "vgg13"), "DISTILLER.TEACHER is 'vgg13'; it must be"),
        (("SOLVER.TRAINER", "crd"), "SOLVER.TRAINER is 'crd'; it must be one of base, DecoupledMomentumSGD"),
        (
            ("DISTILLER.TYPE", "DeepKD", "DeepKD.BASE", "MLKD"),
            "DeepKD.BASE is 'MLKD'; it must be one of KD, DKD for detection",
        ),
        (
            ("DISTILLER.TYPE", "DeepKD", "DeepKD.BASE", "CRLD"),
            "DeepKD.BASE is 'CRLD'; it must be one of KD, DKD for detection",
        ),
        (
            ("SOLVER.EXECUTION", "compile"),
            "SOLVER.EXECUTION is 'compile'; it must be 'eager' for detection",
        ),
        (
            ("SOLVER.CHANNELS_LAST", "True"),
            "SOLVER.CHANNELS_LAST is True; it must be False for detection",
        ),
        (
            ("DISTILLER.TYPE", "DeepKD", "DeepKD.FEATURE", "AT"),
            "DeepKD.FEATURE is 'AT'; it must be 'none' for detection",
        ),
        (("SOLVER.WARMUP_EPOCHS", "1"), "SOLVER.WARMUP_EPOCHS is 1; it must be 0 for detection"),
        (
            ("DATASET.PIPELINE", "device"),
            "DATASET.PIPELINE is 'device'; it must be 'workers' for detection",
        ),
        (("DATASET.TRAIN_PER_CLASS", "5"), "DATASET.TRAIN_PER_CLASS is 5; it must be 0 for detection"),
        (
            ("DISTILLER.TYPE", "KD", "EXPERIMENT.LOGIT_STAND", "True"),
            "EXPERIMENT.LOGIT_STAND is True; it must be False for detection",
        ),
        (("EXPERIMENT.LOGIT_STAND", "True"), "EXPERIMENT.LOGIT_STAND is True; it must be False"),
        (("SOLVER.LR", "-1.0"), "SOLVER.LR is -1.0; it must be a number above 0"),
        (("SOLVER.BATCH_SIZE", "0"), "SOLVER.BATCH_SIZE is 0; it must be a whole number from 1 to 65,536"),
        (("SOLVER.DECOUPLED.DELTA.TOG", "0.2"), "SOLVER.DECOUPLED.DELTA.TOG is 0.2; it must be in"),
        (
            ("SOLVER.TRAINER", "base", "SOLVER.DECOUPLED.DELTA.TOG", "0.05"),
            "SOLVER.DECOUPLED.DELTA.TOG is 0.05; it must be 0.0 with SOLVER.TRAINER base",
        ),
    ],
)
def test_a_mistake_in_the_config_is_one_line(config_file, options, expected):
    with pytest.raises(UserError) as error:
        launch.read_config(str(config_file), options)
    message = str(error.value)
    assert message.startswith("command line: ")
    assert expected in message
    assert "\n" not in message
    if not expected.startswith("unknown"):  # and the same from a file
        tree = yaml.safe_load(config_file.read_text())
        for path, value in zip(options[::2], options[1::2]):
            node = tree
            *parents, leaf = path.split(".")
            for name in parents:
                node = node.setdefault(name, {})
            node[leaf] = yaml.safe_load(value)
        config_file.write_text(yaml.safe_dump(tree))
        with pytest.raises(UserError) as error:
            launch.read_config(str(config_file), ())
        assert str(error.value).startswith(f"{config_file}: {expected}")


def mistake(detect, method, *options, flags=()):
    """The one line that a mistake gets, with exit code 2 and nothing written."""
    code, _, err = detect(method, *options, flags=flags)
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if not line.startswith("deepkd: warning: ")]
    assert line.startswith("deepkd: error: ")
    assert not detect.folder.exists()
    return line.removeprefix("deepkd: error: ")


def test_mistakes_that_the_config_alone_does_not_show(detect, detector, any_teacher, tmp_path):
    line = mistake(detect, "KD", "DISTILLER.TEACHER_WEIGHTS", "")
    assert line.startswith("DISTILLER.TEACHER_WEIGHTS names no file")
    line = mistake(detect, "KD", "DISTILLER.TEACHER_WEIGHTS", "none.pt")
    assert line.startswith("none.pt: no such file; DISTILLER.TEACHER_WEIGHTS must name a checkpoint")
    line = mistake(detect, "NONE", "DETECTION.STUDENT_BACKBONE", "none.pt")
    assert line.startswith("none.pt: no such file; DETECTION.STUDENT_BACKBONE must name a checkpoint")
    line = mistake(detect, "KD", "DISTILLER.TEACHER", "fasterrcnn_resnet20_fpn")
    assert "DISTILLER.TEACHER_WEIGHTS holds another network than fasterrcnn_resnet20_fpn" in line
    line = mistake(detect, "DeepKD", "DeepKD.MASK.TYPE", "static", "DeepKD.MASK.K", "6")
    assert line.startswith("command line: DeepKD.MASK.K: K must be an integer from 1 to 5")
    line = mistake(detect, "DeepKD", "GSNR.MEASURE", "True")
    assert line.startswith("GSNR.EVERY x GSNR.WINDOW is 200 x 10 = 2000 iterations; it must be at most 6")
    line = mistake(detect, "NONE", "DATASET.HOLDOUT", "0.95")
    assert line.startswith("DATASET.HOLDOUT is 0.95, which leaves")


def test_a_teacher_that_finds_nothing(detect, detector, tmp_path):
    torch.save({"model": detector(7).state_dict()}, tmp_path / "teacher.pt")
    line = mistake(detect, "KD")
    expected = "command line: the teacher fasterrcnn_resnet8_fpn from DISTILLER.TEACHER_WEIGHTS finds nothing on tiny"
    assert line.startswith(expected)


def test_without_pycocotools(detect, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    line = mistake(detect, "NONE")
    assert line.startswith("pycocotools cannot be imported")
    assert line.endswith('pip install "deepkd_plugin[detection]"')


def test_exit_codes_of_the_command_line(config_file, capsys, monkeypatch):
    assert launch.main([]) == 2
    assert "command line: the following arguments are required: --cfg" in capsys.readouterr().err
    assert launch.main(["--cfg", "none.yaml"]) == 2
    assert "none.yaml: cannot be read as a config file" in capsys.readouterr().err
    assert launch.main(["--cfg", str(config_file), "SOLVER.LR"]) == 2
    assert "options come in pairs KEY VALUE" in capsys.readouterr().err
    assert launch.main(["--cfg", str(config_file), "--resume", "--overwrite"]) == 2
    with pytest.raises(SystemExit) as stopped:
        launch.main(["--help"])
    assert stopped.value.code == 0
    assert "detection/glyph_canvas/res20_res8/deepkd" in "".join(capsys.readouterr().out.split())
    assert Path(find_config(launch.EXAMPLE)).is_file()

    def interrupted(**words):
        raise Stopped("interrupted", 143)

    monkeypatch.setattr(launch, "train", interrupted)
    assert launch.main(["--cfg", str(config_file)]) == 143


def test_the_tool_is_main():
    tool = [sys.executable, str(ROOT / launch.TOOL), "--cfg", "none.yaml"]
    ended = subprocess.run(tool, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert ended.returncode == 2
    assert ended.stderr.startswith("deepkd: error: none.yaml: cannot be read")


def test_a_student_without_imagenet_weights_is_told_of_on_coco(detect, any_teacher, monkeypatch):
    monkeypatch.setitem(DETECTION_SETS, "coco", replace(DETECTION_SETS["coco"], read=DETECTION_SETS["tiny"].read))
    code, out, err = detect("NONE", "SOLVER.EPOCHS", "1", "DATASET.TYPE", "coco")
    assert code == 0, err
    assert any(line.endswith("DETECTION.STUDENT_BACKBONE names no file") for line in out.splitlines())


def test_mirrored_canvases_are_refused(detect):
    code, out, err = detect("NONE", "DATASET.TYPE", "glyph_canvas", "DETECTION.FLIP", "0.5")
    assert (code, out) == (2, "")
    assert "command line: DETECTION.FLIP is 0.5; it must be 0.0 for glyph_canvas: a mirrored b is a d" in err


def test_a_saved_student_is_tested_as_its_run_did(detect, config_file, capsys):
    assert detect("NONE", "SOLVER.EPOCHS", "1")[0] == 0
    (line,) = (json.loads(text) for text in (detect.folder / "metrics.jsonl").read_text().splitlines())
    words = [
        "--cfg",
        str(config_file),
        "--ckpt",
        str(detect.folder / "student_latest"),
        "DISTILLER.TYPE",
        "NONE",
    ]
    assert evaluate.main(words) == 0
    numbers = [f"{name} {line[f'test_{name.lower()}']:.2f} %" for name in ("AP", "AP50", "AP75")]
    assert f"fasterrcnn_resnet8_fpn on tiny: {', '.join(numbers)} over " in capsys.readouterr().out
    assert evaluate.main([*words, "--model", "yolo"]) == 2
    assert "command line: --model is 'yolo'; it must be one of fasterrcnn_" in capsys.readouterr().err
    assert evaluate.main(["--cfg", str(config_file), "--ckpt", "gone"]) == 2
    assert "gone: no such file; --ckpt must name a checkpoint" in capsys.readouterr().err
