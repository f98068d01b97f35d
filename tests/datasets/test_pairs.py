"""Data sets that users' functions return, and folders of Hugging Face's `datasets`."""

import builtins
import json
import sys
import types

import numpy as np
import pytest
import torch
from made import config, refused
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset

from deepkd_plugin import extensions
from deepkd_plugin.data import arrow, get_dataset, pairs, source

RED = Image.new("RGB", (40, 30), (255, 0, 0))


class Few(Dataset):
    """Images of a kind, labels 0, 1, 2, 0, …"""

    def __init__(self, image=RED, count=6, classes=None, label=lambda i: i % 3):
        self.make, self.count, self.label = image if callable(image) else lambda i: image, count, label
        if classes:
            self.classes = classes

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        return self.make(index), self.label(index)


@pytest.fixture
def function(monkeypatch, tmp_path_factory):
    """Put functions into a module of a user's own: function(load) -> its DATASET.TYPE."""
    module = types.ModuleType("flowers")
    file = tmp_path_factory.mktemp("mine") / "flowers.py"
    file.write_text("")
    module.__file__ = str(file)
    monkeypatch.setitem(sys.modules, "flowers", module)
    monkeypatch.setattr(extensions, "_contents", {})
    monkeypatch.setenv(extensions.VARIABLE, "")

    def add(load):
        pairs._part.cache_clear()
        module.load = load if callable(load) else lambda root, split: load
        return "flowers:load"

    yield add
    pairs._part.cache_clear()


def of(kind, **keys):
    return config("", DATASET__TYPE=kind, **keys)


def test_a_function_is_called_with_root_and_part(function):
    asked = []

    def load(root, split):
        asked.append((root, split))
        return Few(count=6 if split == "train" else 3, classes=["a", ("b", "bee"), "c"])

    cfg = of(function(load), DATASET__ROOT="somewhere")
    train, test, count, classes = get_dataset(cfg)
    assert asked == [("somewhere", "train"), ("somewhere", "test")]
    assert (count, len(test.dataset), classes) == (6, 3, 3)
    assert source(cfg).class_names("") == ["a", "b, bee", "c"]
    image, target, index = next(iter(train))
    assert image.shape == (6, 3, 32, 32)
    assert target.tolist() == [int(i) % 3 for i in index]


@pytest.mark.parametrize(
    "image",
    [
        RED,
        RED.convert("RGBA"),
        np.asarray(RED),
        torch.from_numpy(np.array(RED)).permute(2, 0, 1),
        torch.from_numpy(np.array(RED)).permute(2, 0, 1) / 255,
    ],
)
def test_images_in_any_form(function, image):
    train = get_dataset(of(function(Few(image))))[0].dataset
    expected = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 30, 40)
    assert torch.equal(train.images.image(0), expected)


@pytest.mark.parametrize("image", [np.full((5, 7), 9, np.uint8), torch.full((1, 5, 7), 9, dtype=torch.uint8)])
def test_grey_arrays(function, image):
    assert torch.equal(
        get_dataset(of(function(Few(image))))[0].dataset.images.image(0), torch.full((3, 5, 7), 9).byte()
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "returns None for 'train'; it must return a Dataset"),
        (3, "returns no Dataset with a length (TypeError"),
        (iter([]), "returns no Dataset with a length"),
        (Few(count=0), "is empty; there must be images"),
        (Few(torch.randn(3, 5, 7)), "is a tensor of the shape (3, 5, 7), torch.float32, from -"),
        (Few(torch.zeros(5, 7, 3)), "is a tensor of the shape (5, 7, 3)"),
        (Few("a.png"), "is a str; it must be a PIL image"),
        (Few(label=lambda i: "cat"), "has the label 'cat'; it must be a whole number, from 0"),
        (Few(label=lambda i: torch.tensor([0.0, 1.0])), "it must be a whole number, from 0"),
        (Few(label=lambda i: i - 1), "label -1 of image 0 is outside the classes"),
        (Few(label=lambda i: 0), "has 1 class; there must be 2 to 21,841"),
        (Few(classes=["a", "b"]), "label 2 of image 2 is outside the classes"),
        (Few(lambda i: torch.rand(3, 4, 4)), "is another each time; it must be one image"),
        (Few(lambda i: 1 / 0), "image 0 cannot be read (ZeroDivisionError"),
        ([(RED, 0, 1)] * 3, "sample 0 is a tuple; it must be a pair (image, label)"),
    ],
)
def test_what_a_function_must_return(function, given, words):
    refused(lambda: list(get_dataset(of(function(given)))[0]), "flowers:load", words)


def test_labels_are_listed_or_read(function, capsys):
    class Listed(Few):
        targets = (0, 1, 2, 0, 1, 2)

    get_dataset(of(function(Listed())))
    assert "reading" not in capsys.readouterr().out
    get_dataset(of(function(ConcatDataset([Few(), Few()]))))
    assert "reading 12 images for their labels" in capsys.readouterr().out

    class Other(Few):
        targets = (0, 2, 2, 0, 1, 2)

    refused(lambda: list(get_dataset(of(function(Other())))[0]), "image 1 has the label 1, and 2 among its targets")


def test_parts_of_a_function(function):
    refused(
        lambda: get_dataset(of(function(lambda root, split: Few() if split == "train" else None))), "HOLDOUT must be"
    )
    kind = function(lambda root, split: Few(count=9) if split == "train" else None)
    assert get_dataset(of(kind, DATASET__HOLDOUT=0.4))[2] == 6
    kind = function(lambda root, split: Few(classes=["a", "b", "c"] if split == "train" else ["a", "c", "b"]))
    refused(lambda: get_dataset(of(kind)), "flowers:load, test: class 1 is 'c', and 'b' in training")


def test_modules_and_functions_that_are_not_there(function):
    function(Few())
    refused(
        lambda: source(of("flowers:nothing")), "the module flowers has no nothing; it must be package.module:function"
    )
    refused(lambda: source(of("no_such_module:load")), "cannot be imported (ModuleNotFoundError")


# Hugging Face's datasets


@pytest.fixture
def saved(tmp_path):
    """Write a folder: saved({"train": 6, "test": 3}, names=["b", "a"]) -> it."""
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()

    def write(parts=None, names=("b", "a", "c"), alone=False, **columns):
        kinds = library.Features(
            {"image": library.Image(), "label": library.ClassLabel(names=list(names)), "page": library.Value("string")}
        )
        made = {}
        for part, count in (parts or {"train": 6, "test": 3}).items():
            rows = {
                "image": [Image.new("RGBA", (30 + i, 20), (40 * i, 0, 0, 255)) for i in range(count)],
                "label": [i % 3 for i in range(count)],
                "page": [f"p{i % 3}" for i in range(count)],
            }
            made[part] = library.Dataset.from_dict(rows, features=kinds)
            for name, values in columns.items():
                made[part] = made[part].add_column(name, values[:count])
        arrow._loaded.cache_clear()
        place = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        (made["train"] if alone else library.DatasetDict(made)).save_to_disk(str(place))
        return place

    yield write
    arrow._loaded.cache_clear()


def hugging(root, **keys):
    return config(root, DATASET__TYPE="huggingface", **keys)


def test_a_saved_folder(saved):
    cfg = hugging(saved())
    train, test, count, classes = get_dataset(cfg)
    assert (count, len(test.dataset), classes) == (6, 3, 3)
    assert source(cfg).class_names("") == ["b", "a", "c"]
    assert train.dataset.images.targets == [0, 1, 2, 0, 1, 2]
    image = train.dataset.images.image(2)
    assert image.shape == (3, 20, 32)
    assert image[:, 0, 0].tolist() == [80, 0, 0]
    assert next(iter(test))[0].shape == (3, 3, 32, 32)


def test_parts_of_a_saved_folder(saved):
    cfg = hugging(saved({"train": 6, "test": 3, "validation": 4}))
    assert len(get_dataset(cfg)[1].dataset) == 4
    cfg.DATASET.TEST.SPLIT = "test"
    assert len(get_dataset(cfg)[1].dataset) == 3
    cfg.DATASET.TEST.SPLIT = "more"
    refused(lambda: source(cfg), "has the parts train, test, validation; there must be train, and more")
    alone = saved({"train": 9}, alone=True)
    refused(lambda: get_dataset(hugging(alone)), "has the part train alone; DATASET.HOLDOUT must be")
    assert get_dataset(hugging(alone, DATASET__HOLDOUT=0.4))[2] == 6


def test_columns_of_a_saved_folder(saved):
    folder = saved(number=[0, 1, 0, 1, 0, 1])
    cfg = hugging(folder, DATASET__COLUMNS=["image", "number"])
    assert get_dataset(cfg)[3] == 2
    assert source(cfg).class_names is None
    cfg.DATASET.COLUMNS = ["image", "page"]
    assert source(cfg).class_names("") == ["p0", "p1", "p2"]
    assert get_dataset(cfg)[0].dataset.images.targets == [0, 1, 2, 0, 1, 2]
    cfg.DATASET.COLUMNS = ["image", "none"]
    refused(
        lambda: source(cfg), "the columns image (Image), label (ClassLabel), page (Value), number (Value)", "COLUMNS"
    )
    cfg.DATASET.COLUMNS = ["page", "label"]
    refused(lambda: source(cfg), "the column page is Value; that of images must be Image")


def test_labels_that_are_none(saved):
    folder = saved(half=[0.5] * 6)
    refused(
        lambda: source(hugging(folder, DATASET__COLUMNS=["image", "half"])), "the column half has 0.5; it must have"
    )


def test_a_row_that_cannot_be_read_is_named(saved):
    folder = saved()
    images = get_dataset(hugging(folder))[0].dataset.images
    images.column = [{"image": {"bytes": b"none", "path": None}}] * 3 + [{"image": None}]
    for row in (1, 3):
        refused(
            lambda row=row: images.image(row), f"{folder}, train, row {row}: DATASET.ROOT has an image that cannot be"
        )


def test_folders_that_nobody_saved(tmp_path):
    pytest.importorskip("datasets")
    words = f"{tmp_path}: DATASET.ROOT must be a folder that save_to_disk of Hugging Face's datasets wrote"
    refused(lambda: source(hugging(tmp_path)), words)
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    refused(lambda: source(hugging(tmp_path)), words)


def test_without_the_library(monkeypatch, tmp_path):
    load = builtins.__import__

    def none(name, *args, **options):
        if name.startswith("datasets"):
            raise ImportError("none")
        return load(name, *args, **options)

    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(builtins, "__import__", none)
    refused(lambda: source(hugging(tmp_path)), "datasets cannot be imported", 'pip install -e ".[datasets]"')


def test_tables_of_logits_tell_images_apart(function, saved):
    """The fingerprint of a table that is stored is of the images, wherever they are."""
    from deepkd_plugin.teacher_logits.tables import _fingerprint_with_labels as fingerprint

    def images(cfg):
        return get_dataset(cfg)[0].dataset.images

    ours = [images(of(function(Few(image)))) for image in (RED, RED, RED.rotate(90, expand=True))]
    assert fingerprint(ours[0]) == fingerprint(ours[1]) != fingerprint(ours[2])
    folder = saved()
    assert fingerprint(images(hugging(folder))) == fingerprint(images(hugging(folder)))
    assert fingerprint(images(hugging(folder))) != fingerprint(images(hugging(saved({"train": 5, "test": 3}))))
