"""What a command says should be run next runs as printed, from the same folder."""

import io
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from test_errands import FILES

from deepkd_plugin import terminal
from deepkd_plugin.commands import cli
from deepkd_plugin.terminal import spoken

ROOT = Path(__file__).parents[1]
SMALL = {
    "SOLVER": {"EPOCHS": 1, "LR": 0.05, "BATCH_SIZE": 16, "CHANNELS_LAST": False},
    "DATASET": {"TYPE": "folder", "NUM_WORKERS": 0, "HOLDOUT": 0.25},
    "INPUT": {"SIZE": 32},
}


def commands(out):
    """The commands that an output says should be next, in words."""
    lines = out.splitlines()
    first = max(number for number, line in enumerate(lines) if line.startswith("next      "))
    block = [lines[first], *(line for line in lines[first + 1 :] if line.startswith(" " * 10))]
    return [shlex.split(line[10:]) for line in block]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder without tools/, whose path needs quotes, with 24 images in it."""
    place = tmp_path / "my place; 数据"
    monkeypatch.chdir(images(place).parent)
    return place


def images(place):
    rng = np.random.default_rng(0)
    for name, light in (("dark ones", 60), ("light", 190)):
        folder = place / "my images" / name
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = rng.normal(light, 25, (36, 36, 3)).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return place / "my images"


def write(name, **sections):
    file = Path("my configs", f"{name}.yaml")
    file.parent.mkdir(exist_ok=True)
    merged = {key: SMALL.get(key, {}) | sections.get(key, {}) for key in SMALL.keys() | sections.keys()}
    file.write_text(yaml.safe_dump(merged | {"EXPERIMENT": {"PROJECT": "mine", "TAG": f"{name},32 x 32"}}))
    return str(file)


def deepkd(capsys, *words):
    """Run a command in this process; returns what should be next."""
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    assert code == 0, err
    return commands(out)


def follow(capsys, given):
    """Run commands of `deepkd`; returns what the last one says should be next."""
    for words in given:
        assert words[0] == "deepkd"
        code = cli.main(words[1:])
        out, err = capsys.readouterr()
        assert code == 0, err
    return commands(out) if "\nnext" in out else []


def test_teacher_and_students_on_own_images_kept_from_training(here, capsys):
    """The teacher's run names the student's, that one the student alone, and the last none, as all have been run."""
    own = ("DATASET.ROOT", "my images")
    teacher = write("a teacher", DISTILLER={"TYPE": "NONE", "STUDENT": "resnet14"})
    taught = {"TYPE": "KD", "TEACHER": "resnet14", "STUDENT": "resnet8"}
    taught["TEACHER_WEIGHTS"] = "output/mine/it's trained/student_best"
    write("kd", DISTILLER=taught)
    write("vanilla", DISTILLER={"TYPE": "NONE", "STUDENT": "resnet8"})
    write("other images", DATASET={"TYPE": "glyphs100"}, DISTILLER={"TYPE": "NONE", "STUDENT": "resnet8"})
    write("another", DISTILLER={"TYPE": "NONE", "STUDENT": "resnet20"})
    write("no teacher", DISTILLER=taught | {"TEACHER_WEIGHTS": "nowhere.pt"})
    Path("my configs/notes.yaml").write_text("- [")
    Path("my configs/list.yaml").write_text("[1]")
    tests, students = deepkd(
        capsys, "train", "--cfg", teacher, *own, "EXPERIMENT.NAME", "it's trained", "DISTILLER.ANY_TEACHER", "True"
    )
    assert students == ["deepkd", "train", "--cfg", "my configs/kd.yaml", *own, "DISTILLER.ANY_TEACHER", "True"]
    assert follow(capsys, [tests]) == []
    tests, alone = follow(capsys, [students])
    assert alone[3] == "my configs/vanilla.yaml"
    (tests,) = follow(capsys, [tests, alone])
    follow(capsys, [tests])


def test_a_module_that_only_a_sibling_names_is_not_imported(here, capsys, monkeypatch):
    Path("tiny_net.py").write_text(FILES["tiny"].split("register_network(")[0] + "\nopen('imported', 'a').write('.')\n")
    monkeypatch.syspath_prepend(".")
    alone = {"TYPE": "NONE", "STUDENT": "resnet8"}
    file = write("vanilla", DISTILLER=alone)
    write("kd", DISTILLER=alone | {"TYPE": "KD", "TEACHER": "tiny_net:Tiny", "TEACHER_WEIGHTS": file})
    assert len(deepkd(capsys, "train", "--cfg", file, "DATASET.ROOT", "my images")) == 1
    assert not Path("imported").exists()


def test_distill_and_init(here, capsys):
    words = ("--images", "my images", "--student", "resnet8", "--train-teacher", "resnet8", "--epochs", "1")
    more = ("DATASET.NUM_WORKERS", "0", "SOLVER.CHANNELS_LAST", "False", "DISTILLER.ANY_TEACHER", "True")
    both = deepkd(capsys, "init", *words, *more, "--out", "it's out")
    assert len(both) == 2
    follow(capsys, both)
    (predict,) = deepkd(capsys, "distill", *words, *more)
    assert follow(capsys, [predict]) == []


def test_a_terminal_of_ascii_and_names_of_others_need_no_traceback(here, monkeypatch):
    """From images to answers; what cannot be shown is a question mark, and the files have their names."""
    written = []
    for name in ("stdout", "stderr"):
        written.append(io.BytesIO())
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written[-1], encoding="ascii", write_through=True))
    Path("my images/dark ones").rename("my images/暗的 ×")
    words = ("--images", "my images", "--student", "resnet8", "--train-teacher", "resnet8", "--epochs", "1")
    words += ("DATASET.NUM_WORKERS", "0", "SOLVER.CHANNELS_LAST", "False", "DISTILLER.ANY_TEACHER", "True")
    run = "输出/deepkd"
    for command in (
        ("distill", *words, "--out", "输出", "--compare"),
        ("train", "--cfg", "输出/alone.yaml", "EXPERIMENT.NAME", "另一个"),
        ("eval", run),
        ("predict", run, "my images"),
        ("export", run, "--to", "torch"),
        ("configs", "folder"),
        ("keys",),
        ("networks", "resnet1"),
        ("doctor",),
    ):
        assert cli.main(list(command)) == 0, (command, written[1].getvalue())
    for command in (
        ("eval", "输出/no"),
        ("report", "输出"),
        ("train", "--cfg", "输出.yaml"),
        ("predict", run, "×.png"),
    ):
        assert cli.main(list(command)) == 2
    out, err = (one.getvalue() for one in written)
    assert b"Traceback" not in out + err
    assert b"?? ?" in out
    assert "暗的 ×" in Path(run, "eval_best.csv").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("start", [("-m", "deepkd_plugin", "train"), (str(ROOT / "tools/train.py"),)])
def test_as_processes_from_a_folder_without_a_checkout(here, monkeypatch, start):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write("vanilla", DISTILLER={"TYPE": "NONE", "STUDENT": "resnet8"})
    file = write("vanilla too", DISTILLER={"TYPE": "NONE", "STUDENT": "resnet8"})
    first = [sys.executable, *start, "--cfg", file, "DATASET.ROOT", "my images"]
    others = commands(subprocess.check_output(first, text=True))
    assert len(others) == 2
    for name, *words in others:
        how = ["-m", "deepkd_plugin"] if name == "deepkd" else []  # as an installation has it
        assert name in ("deepkd", "python", sys.executable)
        subprocess.run([sys.executable, *how, *words], check=True, capture_output=True)
    assert len(list(Path("output/mine").glob("*/run.json"))) == 2


@pytest.mark.parametrize(
    ("called", "folder", "tool", "expected"),
    [
        ("tools/train.py", ROOT, "tools/train.py", ["python", "tools/train.py"]),
        ("train.py", ROOT / "tools", "tools/train.py", ["python", "train.py"]),
        ("../tools/train.py", ROOT / "docs", "tools/eval_detection.py", ["python", "../tools/eval_detection.py"]),
        (str(ROOT / "tools/train.py"), "/", "tools/train.py", ["python", str(ROOT / "tools/train.py")]),
        ("/venv/bin/deepkd", ROOT, "tools/train.py", ["python", "tools/train.py"]),
        ("/venv/bin/deepkd", "/", "tools/train.py", ["deepkd", "train"]),
        ("/venv/bin/deepkd", "/", "tools/eval_detection.py", ["deepkd", "detect-eval"]),
        (terminal.__file__.replace("terminal", "__main__"), "/", "deepkd eval", ["py", "-m", "deepkd_plugin", "eval"]),
        ("mine.py", "/", "detection/train_net.py", ["python", "detection/train_net.py"]),
        ("mine.py", "/", "deepkd eval", ["deepkd", "eval"]),
    ],
)  # fmt: skip
def test_a_tool_is_named_as_it_can_be_called(monkeypatch, called, folder, tool, expected):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr(sys, "orig_argv", ["py"])
    monkeypatch.setattr(terminal.shutil, "which", lambda name: f"/venv/bin/{name}")
    assert spoken(tool) == expected


def test_a_command_that_is_not_on_the_path_is_named_as_it_was_called(monkeypatch):
    monkeypatch.setattr(sys, "argv", [".venv/bin/deepkd"])
    monkeypatch.setattr(terminal.shutil, "which", lambda name: None)
    assert spoken("deepkd eval") == [".venv/bin/deepkd", "eval"]


def test_scripts_of_another_project_are_not_taken_for_ours(tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/train.py").touch()
    monkeypatch.chdir(tmp_path)
    assert spoken("tools/train.py") == ["deepkd", "train"]
