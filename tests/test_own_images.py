"""Runs on a user's own images: any networks, every way to have the teacher's logits, and what follows a run."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from deepkd_plugin import accuracy, launch, load_student
from deepkd_plugin.commands import cache, cli
from deepkd_plugin.commands import eval as evaluate
from deepkd_plugin.config.tree import add_deepkd_config
from deepkd_plugin.data import pairs
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import builtin, registry
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.students import formats
from deepkd_plugin.students.images import files_of, prepared
from deepkd_plugin.trainer import Trainer

ROOT = Path(__file__).parents[1]
CLASSES = 7


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """7 classes of small mixed images: 6 of each to train on, 3 to test on."""
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    kinds = (("jpg", "RGB"), ("png", "RGBA"), ("webp", "RGB"), ("png", "L"), ("jpeg", "CMYK"), ("gif", "P"))
    for split, count in (("train", 6), ("val", 3)):
        for label in range(CLASSES):
            folder = root / split / f"{10 * label}"
            folder.mkdir(parents=True)
            for number in range(count):
                suffix, mode = kinds[number % len(kinds)]
                pixels = rng.integers(0, 60, (*rng.integers(40, 90, 2), 3), np.uint8)
                pixels[:, :, 0] += 25 * label
                Image.fromarray(pixels).convert(mode).save(folder / f"{number}.{suffix}")
    return root


@pytest.fixture
def run(images, tmp_path, capsys):
    """Train: run("KEY", "VALUE", …, flags=()) -> (exit code, stdout, stderr); the folder is run.folder."""
    base = {
        "DATASET": {"TYPE": "folder", "ROOT": str(images), "NUM_WORKERS": 0},
        "DISTILLER": {"TYPE": "NONE", "STUDENT": "resnet8", "FOLD_TEACHER": False},
        "INPUT": {"SIZE": 32},
        "SOLVER": {"TRAINER": "base", "EPOCHS": 2, "BATCH_SIZE": 16, "LR": 0.01, "LR_DECAY_STAGES": []},
        "LOG": {"PREFIX": str(tmp_path / "output")},
        "EXPERIMENT": {"NAME": "run"},
    }
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(base))

    def train(*options, flags=()):
        code = launch.main(["--cfg", str(file), *flags, *options])
        return code, *capsys.readouterr()

    train.folder, train.file = tmp_path / "output" / "distill" / "run", str(file)
    return train


TAUGHT = ("DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "resnet8", "DISTILLER.ANY_TEACHER", "True")


@pytest.fixture
def teacher(run):
    """The file of a teacher that was trained on the images."""
    code, _, err = run("EXPERIMENT.NAME", "teacher")
    assert code == 0, err
    return str(run.folder.with_name("teacher") / "student_latest")


def test_a_teacher_and_its_student(run, teacher, images, capsys):
    taught = *TAUGHT, "DISTILLER.TEACHER_WEIGHTS", teacher
    code, out, err = run(*taught)
    assert code == 0, err
    assert "KD on folder, 42 images" in out
    resolved = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert resolved["INPUT"]["MEAN"] == [0.485, 0.456, 0.406]
    arguments = ["-m", "resnet8", "-c", str(run.folder / "student_latest"), "-d", "folder", "--root", str(images)]
    assert evaluate.main([*arguments, "INPUT.SIZE", "32"]) == 0
    out = capsys.readouterr().out
    last = read_metrics(run.folder)[-1]
    assert f"top-1 {last['test_acc']:.2f} %" in out
    assert "over 21 images" in out
    assert "input     32 x 32, mean [0.485, 0.456, 0.406]" in out


def test_a_run_that_goes_on_is_the_whole_one(run, teacher, monkeypatch):
    taught = *TAUGHT, "DISTILLER.TEACHER_WEIGHTS", teacher, "LOG.SAVE_CHECKPOINT_FREQ", "1", "SOLVER.TRAINER", "base"
    assert run(*taught, "EXPERIMENT.NAME", "whole")[0] == 0
    whole, epoch = Trainer.train_epoch, []

    def stop(self, *arguments):
        if epoch:
            raise KeyboardInterrupt
        epoch.append(1)
        return whole(self, *arguments)

    monkeypatch.setattr(Trainer, "train_epoch", stop)
    assert run(*taught, "EXPERIMENT.NAME", "parts")[0] == 130
    monkeypatch.setattr(Trainer, "train_epoch", whole)
    code, out, err = run(*taught, "EXPERIMENT.NAME", "parts", flags=("--resume",))
    assert (code, "epoch 1/" in out) == (0, False), err
    weights = [torch.load(run.folder.with_name(name) / "student_latest")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_stored_logits_and_filling_them(run, teacher, images, capsys, tmp_path):
    stored = "DISTILLER.TEACHER_LOGITS", "stored", "DISTILLER.LOGITS_VIEWS", "2"
    taught = *TAUGHT, "DISTILLER.TEACHER_WEIGHTS", teacher, "DISTILLER.LOGITS_DIR", str(tmp_path / "tables")
    assert cache.main(["fill", "--cfg", run.file, *taught, *stored]) == 0
    assert "42 images x 2 views x 7 classes" in capsys.readouterr().out
    code, _, err = run(*taught, *stored)
    assert code == 0, err
    code, _, err = run(*taught, "DISTILLER.TEACHER_LOGITS", "table", "EXPERIMENT.NAME", "other")
    assert code == 2
    assert "whose images have more views than can be counted, or 'stored'" in err


@pytest.mark.parametrize("method", ["MLKD", "CRLD"])
def test_methods_of_two_views(run, teacher, method):
    code, _, err = run(*TAUGHT, "DISTILLER.TEACHER_WEIGHTS", teacher, "DISTILLER.TYPE", method, "SOLVER.EPOCHS", "1",
                       "SOLVER.TRAINER", "DecoupledMomentumSGD", "SOLVER.DECOUPLED.LOSS_STREAMS",
                       "['loss_ce:tog', 'loss_kd:tcg', 'loss_cc:ncg', 'loss_bc:ncg']")  # fmt: skip
    assert code == 0, err


class Fixed(torch.nn.Sequential):
    """A network of a zoo that takes images of 32 pixels alone."""

    def __init__(self, num_classes):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, num_classes))


def test_the_zoos_networks_are_for_small_images(run, monkeypatch):
    monkeypatch.setitem(builtin.cifar_model_dict, "fixed", (Fixed, None))
    for name, size, words in (
        ("resnet8", "224", "it must be one of ResNet18"),
        ("resnet8", "64", "it must be one of ResNet18, MobileNetV2, ShuffleV2"),
        ("ResNet18", "224", "whose 1,000 classes are ImageNet's; for 7 classes it must be a library's"),
        ("fixed", "40", "the network 'fixed' cannot take an image of 40 x 40 pixels (RuntimeError"),
    ):
        code, _, err = run("DISTILLER.STUDENT", name, "INPUT.SIZE", size)
        assert (code, words in err) == (2, True), err
    assert run("DISTILLER.STUDENT", "ShuffleV2", "INPUT.SIZE", "64", "SOLVER.EPOCHS", "1")[0] == 0
    code, _, err = run("DATASET.PIPELINE", "device", "EXPERIMENT.NAME", "other")
    assert (code, "it must be 'workers' with DATASET.TYPE folder" in err) == (2, True), err


def test_a_missing_file_is_found_before_images_are_read(run, monkeypatch, tmp_path):
    monkeypatch.setattr(launch.data, "get_dataset", lambda cfg: pytest.fail("images were read"))
    for options, words in (
        (("DISTILLER.TEACHER_WEIGHTS", "none.pt"), "none.pt: no such file; DISTILLER.TEACHER_WEIGHTS must name"),
        ((), "DISTILLER.TEACHER_WEIGHTS names no file and the zoo has no weights of resnet8"),
        (
            ("DISTILLER.TEACHER", "torchvision:resnet18", "DISTILLER.STUDENT_WEIGHTS", "gone.pt"),
            "gone.pt: no such file; DISTILLER.STUDENT_WEIGHTS must name a checkpoint",
        ),
        (
            ("DISTILLER.TEACHER", "torchvision:resnet18", "DISTILLER.TEACHER_CLASSES", "names.txt"),
            "names.txt: DISTILLER.TEACHER_CLASSES must name a text file",
        ),
    ):
        code, _, err = run(*TAUGHT, *options)
        assert (code, words in err) == (2, True), err
        assert not run.folder.exists()


class Right(torch.nn.Module):
    """A teacher that is right about the first so many of images that are their own labels."""

    def __init__(self, right, classes):
        super().__init__()
        self.right, self.classes = right, classes
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, image):
        place, label = image[:, 0].long(), image[:, 1].long()
        guess = torch.where(place < self.right, label, (label + 1) % self.classes)
        return torch.nn.functional.one_hot(guess, self.classes).float(), {}


@pytest.mark.parametrize(
    ("right", "count", "classes", "outcome"),
    [
        (16, 20, 2, "80.00 % top-1 on 20 images, and 50.00 % is chance"),
        (18, 20, 2, ""),
        (10, 20, 2, "refused"),
        (9, 20, 2, "refused"),
        (510, 1000, 2, "refused"),
        (560, 1000, 2, ""),
        (30, 1000, 100, ""),
        (12, 990, 100, "refused"),
    ],
)
def test_a_teacher_of_few_test_images(right, count, classes, outcome, capsys):
    """80 % on 20 images of 2 classes is less than three standard errors above chance, and no reason to stop."""
    rows = [(torch.tensor([float(i), float(i % classes)]), i % classes) for i in range(count)]
    loader = torch.utils.data.DataLoader(rows, batch_size=100)
    cfg = builtin.CFG.clone()
    add_deepkd_config(cfg)
    cfg.SOLVER.CHANNELS_LAST = False
    distiller = torch.nn.Module()
    distiller.teacher = Right(right, classes)
    if outcome == "refused":
        with pytest.raises(UserError, match="is at chance on .* or DISTILLER.ANY_TEACHER be True to go on with it"):
            accuracy.measure_teacher(distiller, loader, cfg)
        cfg.DISTILLER.ANY_TEACHER = True
        outcome = "it is taken as it is, by DISTILLER.ANY_TEACHER"
    assert accuracy.measure_teacher(distiller, loader, cfg) == pytest.approx(100 * right / count)
    told = capsys.readouterr().err
    assert outcome in told
    assert bool(outcome) == bool(told)


PAIRS = (
    ("torchvision:resnet18", "torchvision:mobilenet_v3_small"),
    ("timm:resnet18", "timm:vit_tiny_patch16_224"),
    ("resnet8", "timm:mobilenetv3_small_050"),
    ("timm:vit_tiny_patch16_224", "resnet8"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("taught", "student"), PAIRS)
def test_any_two_networks(run, taught, student):
    """A teacher that is trained first on 7 classes of mixed images, then its student, on images of 32 pixels."""
    code, _, err = run("DISTILLER.STUDENT", taught, "EXPERIMENT.NAME", "teacher", "SOLVER.EPOCHS", "1")
    assert code == 0, err
    weights = str(run.folder.with_name("teacher") / "student_latest")
    options = "DISTILLER.TEACHER", taught, "DISTILLER.TEACHER_WEIGHTS", weights, "DISTILLER.STUDENT", student
    code, _, err = run(*TAUGHT, *options, "DISTILLER.TYPE", "DeepKD", "SOLVER.TRAINER", "DecoupledMomentumSGD",
                       "SOLVER.EPOCHS", "1", "DeepKD.MASK.TYPE", "none")  # fmt: skip
    assert code == 0, err


WHOLE = (
    ("torchvision:resnet18", "torchvision:mobilenet_v3_small"),
    ("timm:resnet10t", "timm:mobilenetv3_small_050"),
    ("timm:resnet10t", "timm:vit_tiny_patch16_224"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("taught", "student"), WHOLE)
def test_from_mixed_images_to_predictions_of_exported_files(images, tmp_path, taught, student, capsys):
    """`deepkd distill`, export to all formats, and predict, of 7 classes: every form of the student says the same."""
    for name in ("timm", "onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'pip install -e ".[networks,onnx]" brings {name}')
    words = ["--images", images, "--student", student, "--train-teacher", taught, "--out", tmp_path / "out"]
    words += ["--epochs", 1, "--batch", 14, "--size", 64, "SOLVER.LR", 0.01, "DATASET.NUM_WORKERS", 0]
    words += ["DISTILLER.ANY_TEACHER", True, "SOLVER.CHANNELS_LAST", False, "DISTILLER.FOLD_TEACHER", False]
    assert cli.main(["distill", *map(str, words)]) == 0, capsys.readouterr().err
    run = tmp_path / "out" / "deepkd"

    network = load_student(run)
    about = network.description
    assert (about.architecture, about.size) == (student, 64)
    assert about.class_names == tuple(str(10 * label) for label in range(CLASSES))
    files = files_of([images / "train"])
    batch = torch.stack([prepared(file, about) for file in files])
    assert batch.shape == (6 * CLASSES, 3, 64, 64)
    with torch.no_grad():
        logits = network(batch)

    def predicted(source, *flags):
        capsys.readouterr()
        assert cli.main(["predict", str(source), str(images / "train"), "--format", "json", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    told = predicted(run)
    assert [one["file"] for one in told] == [str(file) for file in files]
    assert [one["top"][0]["label"] for one in told] == logits.argmax(1).tolist()
    assert {len(one["top"]) for one in told} == {5}
    for to, suffix in formats.SUFFIXES.items():
        out = tmp_path / f"exported{suffix}"
        assert cli.main(["export", str(run), "--to", to, "--out", str(out)]) == 0, capsys.readouterr().err
        read, exported = formats.opened(out, trust=True)
        assert read == about
        with torch.no_grad():
            torch.testing.assert_close(exported(batch), logits, rtol=0, atol=1e-4)
        for ours, theirs in zip(told, predicted(out, "--trust"), strict=True):
            assert ours["file"] == theirs["file"]
            shares = [{top["class"]: top["probability"] for top in one["top"]} for one in (ours, theirs)]
            assert shares[0] == pytest.approx(shares[1], abs=1e-4)

    # by onnxruntime alone, as somebody without this package has it
    session = importlib.import_module("onnxruntime").InferenceSession(tmp_path / "exported.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list(about.class_names)
    alone = torch.from_numpy(session.run(["logits"], {"image": batch.numpy()})[0])
    torch.testing.assert_close(alone, logits, rtol=0, atol=1e-4)


def test_the_pages_config_and_its_function(images, tmp_path, monkeypatch):
    """configs/folder/deepkd.yaml has the keys of docs/images.md, and the page's function is a data set."""
    page = (ROOT / "docs/images.md").read_text(encoding="utf-8")
    options = ["DATASET.ROOT", str(images)]
    cfg, origin = launch.read_config(registry.BUILTIN, str(ROOT / "configs/folder/deepkd.yaml"), options)
    assert {path for path in origin if path.startswith("INPUT.")} == {f"INPUT.{key}" for key in cfg.INPUT}
    assert cfg.INPUT.MEAN == [0.485, 0.456, 0.406]
    for key in cfg.INPUT:
        assert f"`{key}`" in page or f"`INPUT.{key}`" in page
    ((name, code),) = re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(launch.data.pairs.extensions, "_contents", {})
    monkeypatch.setenv("DEEPKD_EXTENSIONS", "")
    options += [
        "DATASET.TYPE",
        f"{name}:load",
        "DATASET.NUM_WORKERS",
        "0",
        "DISTILLER.TYPE",
        "NONE",
        "INPUT.SIZE",
        "32",
    ]
    cfg, _ = launch.read_config(registry.BUILTIN, str(ROOT / "configs/folder/deepkd.yaml"), options)
    _, test, count, classes = launch.data.get_dataset(cfg)
    assert (count, len(test.dataset), classes) == (140, 70, 7)
    assert next(iter(test))[0].shape == (70, 3, 32, 32)
    sys.modules.pop(name, None)
    pairs._part.cache_clear()
