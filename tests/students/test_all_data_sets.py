"""Students of every kind of data set: their files say what they are, and read images as the run's tests did."""

import json
import pickle
import sys

import numpy as np
import pytest
import safetensors
import torch
import yaml
from PIL import Image
from torch.nn.functional import cross_entropy

from deepkd_plugin import launch, load_student
from deepkd_plugin.commands import cli
from deepkd_plugin.data import arrow, pairs
from deepkd_plugin.data.glyphs import CHARACTERS, load_glyphs100
from deepkd_plugin.run.metrics import read_metrics

NAMES = ("ant", "bee", "cat")
NUMBERS = {"MEAN": [0.4, 0.5, 0.6], "STD": [0.2, 0.3, 0.25]}
FUNCTION = """
from pathlib import Path

from PIL import Image


class Pictures:
    classes = ["ant", "bee", "cat"]

    def __init__(self, folder):
        self.files = sorted(folder.glob("*/*"))
        self.targets = [self.classes.index(file.parent.name) for file in self.files]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return Image.open(self.files[index]), self.targets[index]


def load(root, split):
    return Pictures(Path(root) / ("train" if split == "train" else "val"))
"""


def drawn(rng, label, size):
    pixels = rng.integers(0, 120, (size[1], size[0], 3), np.uint8)
    pixels[..., label] += 100
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of every kind of image, a turned one, 16 bits, and lines of pixels."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(NAMES):
            folder = root / split / name
            folder.mkdir(parents=True)
            turned = Image.Exif()
            turned[0x0112] = 6
            drawn(rng, label, (70, 40)).save(folder / "a.jpg", exif=turned)
            drawn(rng, label, (33, 90)).convert("CMYK").save(folder / "b.jpeg")
            drawn(rng, label, (64, 48)).convert("L").save(folder / "c.jpg")
            drawn(rng, label, (50, 50)).convert("P").save(folder / "d.gif")
            layer = drawn(rng, label, (41, 57)).convert("RGBA")
            layer.putalpha(Image.linear_gradient("L").resize(layer.size))
            layer.save(folder / "e.webp", lossless=True)
            wide = rng.integers(0, 65536, (60, 45), np.uint16)
            Image.fromarray(wide).save(folder / "f.png")
            drawn(rng, label, (400, 6)).save(folder / "g.png")  # longer than what tests resize all of
            drawn(rng, label, (20, 25)).save(folder / "h.bmp")
    return root


def of_folder(root):
    """List the test images of class folders with their labels."""
    return [(Image.open(file), NAMES.index(file.parent.name)) for file in sorted((root / "val").glob("*/*"))]


def folder(root, tmp_path, monkeypatch):
    return {"TYPE": "folder", "ROOT": str(root)}, of_folder(root)


def function(root, tmp_path, monkeypatch):
    (tmp_path / "picture_set.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DEEPKD_EXTENSIONS", "")
    monkeypatch.setattr(pairs.extensions, "_contents", {})
    return {"TYPE": "picture_set:load", "ROOT": str(root)}, of_folder(root)


def huggingface(root, tmp_path, monkeypatch):
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    kinds = library.Features({"image": library.Image(), "label": library.ClassLabel(names=list(NAMES))})
    parts = {}
    for split in ("train", "val"):
        files = sorted((root / split).glob("*/*"))
        rows = {"image": [str(file) for file in files], "label": [NAMES.index(file.parent.name) for file in files]}
        parts[split] = library.Dataset.from_dict(rows, features=kinds)
    library.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    return {"TYPE": "huggingface", "ROOT": str(tmp_path / "saved")}, of_folder(root)


@pytest.fixture
def train(tmp_path, capsys):
    """Train a resnet8 for an epoch: train(node DATASET, node INPUT, …) -> the run's folder."""

    def run(dataset, given=None, *options):
        base = {
            "DATASET": dataset | {"NUM_WORKERS": 0},
            "DISTILLER": {"TYPE": "NONE", "STUDENT": "resnet8"},
            "SOLVER": {"TRAINER": "base", "EPOCHS": 1, "BATCH_SIZE": 60, "LR": 0.01, "LR_DECAY_STAGES": []},
            "LOG": {"PREFIX": str(tmp_path / "output")},
            "EXPERIMENT": {"PROJECT": "sets", "NAME": "run"},
        } | ({"INPUT": given} if given else {})
        (tmp_path / "set.yaml").write_text(yaml.safe_dump(base))
        assert launch.main(["--cfg", str(tmp_path / "set.yaml"), *options]) == 0, capsys.readouterr().err
        capsys.readouterr()
        return tmp_path / "output" / "sets" / "run"

    yield run
    pairs._part.cache_clear()
    arrow._loaded.cache_clear()
    sys.modules.pop("picture_set", None)


def check_files(run, wanted):
    """Every file of a student has contiguous tensors and says these things."""
    for name in ("student_best", "student_latest"):
        with safetensors.safe_open(run / f"{name}.safetensors", "pt") as file:
            about, tensors = file.metadata(), [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        of_torch = torch.load(run / name, weights_only=True)
        assert all(tensor.is_contiguous() for tensor in (*tensors, *of_torch["model"].values()))
        for said in (about, of_torch["description"]):
            assert said["architecture"] == "resnet8"
            assert {key: json.loads(said[key]) for key in wanted} == wanted


def check_images(run, samples):
    """The student that is loaded has, on images as they are prepared for it, the loss and accuracy of the run's test.

    samples: PIL images and their labels.
    """
    student = load_student(run)
    batch = torch.stack([student.description.prepare(image) for image, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    with torch.no_grad():
        logits = torch.cat([student(part) for part in batch.split(64)])
    (tested,) = read_metrics(run)
    assert cross_entropy(logits, labels).item() == pytest.approx(tested["test_loss"], rel=1e-5)
    assert 100 * (logits.argmax(1) == labels).double().mean().item() == pytest.approx(tested["test_acc"])


@pytest.mark.parametrize("make", [folder, function, huggingface])
def test_a_user_s_own_images(make, pictures, train, tmp_path, monkeypatch):
    dataset, samples = make(pictures, tmp_path, monkeypatch)
    run = train(dataset, {"SIZE": 32, **NUMBERS})
    wanted = {"class_names": list(NAMES), "num_classes": 3, "size": 32, "resize": 37}  # 32 / 0.875, the shorter side
    check_files(run, wanted | {"mean": NUMBERS["MEAN"], "std": NUMBERS["STD"]})
    check_images(run, samples)


@pytest.mark.parametrize(
    ("given", "options", "resize"),
    [
        ({"TEST_CROP": 0.5}, [], 64),
        ({"TEST_CROP": 1.0}, [], 32),
        ({"TEST_CROP": 0.0}, [], [32, 32]),
        ({}, ["AUGMENT.ERASING", "0.5"], 37),  # by PIL in training
    ],
    ids=["half", "all of the shorter side", "squeezed", "erasing"],
)
def test_predict_and_eval_see_the_images_of_the_run_s_test(given, options, resize, pictures, train, tmp_path, capsys):
    run = train({"TYPE": "folder", "ROOT": str(pictures)}, {"SIZE": 32, **given}, *options)
    samples = of_folder(pictures)
    check_files(run, {"resize": resize})
    check_images(run, samples)
    (tested,) = read_metrics(run)
    assert cli.main(["eval", str(run)]) == 0
    told = capsys.readouterr().out
    assert f"top-1 {tested['test_acc']:.2f} %" in told
    assert f"loss {tested['test_loss']:.4f} over {len(samples)} images" in told
    assert cli.main(["predict", str(run), str(pictures / "val"), "--format", "json", "--top", "1"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    right = [one["top"][0]["label"] == label for one, (_, label) in zip(predicted, samples, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(tested["test_acc"])


def test_glyphs100(train, data_root):
    run = train({"TYPE": "glyphs100", "ROOT": str(data_root), "TRAIN_PER_CLASS": 1})
    wanted = {"class_names": list(CHARACTERS), "num_classes": 100, "size": 32, "resize": 32}
    check_files(run, wanted | {"mean": [0.5009, 0.5017, 0.5007], "std": [0.26, 0.2593, 0.2592]})
    images, labels = load_glyphs100(data_root, "test")
    check_images(run, [(Image.fromarray(pixels), label) for pixels, label in zip(images, labels.tolist())])


def test_cifar100(train, cifar_root, data_root, tmp_path):
    root = tmp_path / "cifar"
    (root / "cifar-100-python").mkdir(parents=True)
    for split in ("train", "test"):
        (root / "cifar-100-python" / split).symlink_to(cifar_root / "cifar-100-python" / split)
    names = [f"class {label}" for label in range(100)]
    (root / "cifar-100-python" / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, 2))
    run = train({"TYPE": "cifar100", "ROOT": str(root)})
    wanted = {"class_names": names, "num_classes": 100, "size": 32, "resize": 32}
    check_files(run, wanted | {"mean": [0.5071, 0.4867, 0.4408], "std": [0.2675, 0.2565, 0.2761]})
    images, labels = load_glyphs100(data_root, "test")  # which the fixture put there, 100 of them
    check_images(run, [(Image.fromarray(pixels), label) for pixels, label in zip(images[:100], labels[:100].tolist())])
