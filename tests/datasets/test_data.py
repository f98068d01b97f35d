"""Data sets by config: CIFAR-100 and ImageNet in their layouts, subsets, and what is said of wrong ones."""

import http.client
import os
import pickle
import shutil
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from deepkd_plugin.data import cifar100, get_dataset, get_test_set, imagenet, source
from deepkd_plugin.data.arrays import ArrayDataset, Training, choose
from deepkd_plugin.errors import UserError


def test_cifar100_in_torchvisions_layout(data_cfg, cifar_root):
    train, test, count, classes = get_dataset(data_cfg("cifar100", cifar_root))
    assert (count, classes, len(test.dataset)) == (300, 100, 100)
    image, target, index = next(iter(train))
    assert image.shape == (32, 3, 32, 32)
    assert target.dtype == index.dtype == torch.int64
    image, target = next(iter(test))
    assert image.shape == (50, 3, 32, 32)


def test_the_pixels_are_the_files_pixels(data_cfg, cifar_root):
    images, labels = cifar100.read_cifar100(cifar_root, "train")
    with open(cifar_root / "cifar-100-python" / "train", "rb") as file:
        content = pickle.load(file)
    assert labels.tolist() == content["fine_labels"] != content["coarse_labels"]
    red = content["data"][5].reshape(3, 32, 32)[0]
    assert np.array_equal(images[5, :, :, 0], red)
    _, test, _, _ = get_dataset(data_cfg("cifar100", cifar_root))
    normal, label = test.dataset[3]
    raw = test.dataset.images[3] / 255.0
    expected = (raw - np.array([0.5071, 0.4867, 0.4408])) / np.array([0.2675, 0.2565, 0.2761])
    assert np.allclose(normal.numpy(), expected.transpose(2, 0, 1), atol=1e-6)
    assert label == test.dataset.targets[3]


@pytest.mark.parametrize("below", ["", "cifar100"])
def test_cifar100_in_class_folders(tmp_path, below):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(100):
            folder = tmp_path / below / split / f"class_{label:02d}"
            folder.mkdir(parents=True)
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "0001.png")
    # none of these is of the set
    (folder / "._0001.png").write_bytes(b"of another system")
    (folder / ".previews").mkdir()
    (folder.parent / ".cache").mkdir()
    (folder / "about.txt").write_text("x")
    images, labels = cifar100.read_cifar100(tmp_path, "test")
    assert labels.tolist() == list(range(100))
    assert np.array_equal(images[99], pixels)
    Image.fromarray(pixels[:30]).save(tmp_path / below / "test" / "class_07" / "0002.png")
    with pytest.raises(UserError, match="0002.png: this image is 32 x 30; those of its data set must be 32 x 32"):
        cifar100.read_cifar100(tmp_path, "test")
    (tmp_path / below / "test" / "class_07" / "0002.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="0002.png: DATASET.ROOT has an image that cannot be read"):
        cifar100.read_cifar100(tmp_path, "test")
    (folder / "previews").mkdir()
    with pytest.raises(UserError, match="class_99/previews: is a folder; only images may be beside it"):
        cifar100.read_cifar100(tmp_path, "test")
    (tmp_path / below / "train" / "one_more").mkdir()
    with pytest.raises(UserError, match="must hold 100 class folders for cifar100, holds 101; 'one_more' may be none"):
        cifar100.read_cifar100(tmp_path, "train")


@pytest.fixture
def numbered(tmp_path):
    """Class folders 0 … 99 with one image each, of the class's brightness; returns the folder of the training part."""
    for split in ("train", "test"):
        for label in range(100):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            Image.new("L", (32, 32), label).save(folder / "a.png")
    return tmp_path / "train"


def test_classes_that_are_numbers_are_in_their_order(tmp_path, numbered):
    images, labels = cifar100.read_cifar100(tmp_path, "train")
    assert labels.tolist() == list(range(100)) == images[:, 0, 0, 0].tolist()


def test_a_class_that_only_one_split_has(tmp_path, numbered):
    """All labels behind it would be another class's."""
    (numbered / "5").rename(numbered / "100")
    for split, other in (("train", "test"), ("test", "train")):
        with pytest.raises(UserError, match=f"{split}: must have the classes of .*{other}; '") as caught:
            cifar100.read_cifar100(tmp_path, split)
        assert f"'100' is only in {numbered}" in str(caught.value)
        assert f"'5' is only in {tmp_path / 'test'}" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["b.PNG", "b.Jpg", "b.jpeg", "b.bmp", "b.ppm", "b.pgm", "b.tif", "b.TIFF", "b.webp", "b.gif"]
)
def test_images_in_every_common_format(tmp_path, numbered, name):
    Image.new("L", (32, 32), 40).save(numbered / "7" / name)
    images, labels = cifar100.read_cifar100(tmp_path, "train")
    assert labels.tolist() == sorted([*range(100), 7])
    assert abs(int(images[8].mean()) - 40) < 2


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.ppm"])
def test_images_of_16_bits_are_scaled(tmp_path, numbered, name):
    values = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    (numbered / "0" / "a.png").unlink()
    Image.fromarray(values).save(numbered / "0" / name)
    images, _ = cifar100.read_cifar100(tmp_path, "train")
    assert np.array_equal(images[0, :, :, 0], np.round(values / 257).astype(np.uint8))
    assert images[0, 0, 0].tolist() == [0, 0, 0]
    assert images[0, -1, -1].tolist() == [255, 255, 255]


def test_images_without_a_known_white_are_refused(tmp_path, numbered):
    (numbered / "3" / "a.png").unlink()
    Image.fromarray(np.zeros((32, 32), np.float32)).save(numbered / "3" / "a.tiff")
    with pytest.raises(UserError, match=r"3/a.tiff: DATASET.ROOT has an image that cannot be read \(it has 32 bits"):
        cifar100.read_cifar100(tmp_path, "train")


def test_folders_that_link_to_themselves(imagenet_folders, tmp_path):
    imagenet_folders(tmp_path, 1000)
    loop = tmp_path / "imagenet" / "train" / "n00000003" / "again"
    loop.symlink_to(loop.parent)
    with pytest.raises(UserError, match="n00000003/again: links to a folder that holds it"):
        imagenet.read_imagenet(tmp_path, "train")


def write(root, **change):
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    content = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 99]} | change
    (folder / "train").write_bytes(pickle.dumps(content))


def test_bad_cifar100_files(data_cfg, tmp_path):
    cases = {
        "label": ({"fine_labels": [0, 100]}, "label 100 of image 1 is outside the classes; .* 0 … 99"),
        "negative": ({"fine_labels": [-1, 5]}, "label -1 of image 0"),
        "length": ({"fine_labels": [1]}, r"labels are int64 of the shape \(1,\); .* shape \(2,\)"),
        "shape": ({"data": np.zeros((2, 100), np.uint8)}, "this file is not it"),
        "missing": ({"fine_labels": None}, "this file is not it"),
        "scaled": ({"data": np.zeros((2, 3072))}, "its images are float64 and its labels int64, not uint8"),
        "halves": ({"fine_labels": [0.5, 1.5]}, "its images are uint8 and its labels float64"),
        "empty": ({"data": np.zeros((0, 3072), np.uint8), "fine_labels": []}, "cifar100, train: has no image"),
    }
    for name, (change, expected) in cases.items():
        write(tmp_path / name, **change)
        with pytest.raises(UserError, match=f"{name}.*{expected}"):
            get_dataset(data_cfg("cifar100", tmp_path / name))
    with pytest.raises(UserError, match="DATASET.ROOT holds no CIFAR-100.*; DATASET.DOWNLOAD True fetches it"):
        cifar100.read_cifar100(tmp_path, "train")


@pytest.fixture
def fetched(monkeypatch, cifar_root):
    """torchvision's CIFAR100 without the network: the calls it got; it leaves what the archive would."""
    calls = []

    def fetch(root, download=False):
        calls.append((root, download))
        shutil.copytree(cifar_root, root, dirs_exist_ok=True)

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fetch)
    return calls


def test_a_download_is_asked_for_and_made_once(data_cfg, fetched, tmp_path):
    root = tmp_path / "new"
    with pytest.raises(UserError, match="DATASET.DOWNLOAD True fetches it"):
        get_dataset(data_cfg("cifar100", root))
    assert not root.exists()
    _, test, count, _ = get_dataset(data_cfg("cifar100", root, DOWNLOAD=True))
    assert (count, len(test.dataset)) == (300, 100)
    get_test_set(data_cfg("cifar100", root, DOWNLOAD=True))
    assert fetched == [(str(root), True)]


def test_a_root_with_a_tilde_is_the_one_that_is_read(fetched, tmp_path, monkeypatch):
    """Other parts of the program do not expand it, so torchvision must not either."""
    monkeypatch.chdir(tmp_path)
    cifar100.fetch_cifar100("~")
    assert fetched == [(str(tmp_path / "~"), True)]


@pytest.mark.parametrize("there", ["cifar-100-python/train", "train/", "cifar100/train/"])
@pytest.mark.parametrize("asked", ["train", "test"])
def test_nothing_is_downloaded_beside_what_is_there(data_cfg, fetched, tmp_path, there, asked):
    """A layout that is damaged or lacks the other split is the user's to mend: no download writes into it."""
    path = tmp_path / there
    path.parent.mkdir(exist_ok=True)
    if there.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(b"")
    expected = f"nothing is downloaded beside {path}" if asked == "test" else str(path)
    with pytest.raises(UserError, match=expected):
        source("cifar100").load(data_cfg("cifar100", tmp_path, DOWNLOAD=True).DATASET, asked)
    assert fetched == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.URLError("no route to host"), "<urlopen error no route to host>"),
        (RuntimeError("File not found\nor corrupted."), "File not found or corrupted."),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (http.client.IncompleteRead(b"x", 9), "IncompleteRead"),
        (EOFError(), "EOFError"),
    ],
)
def test_a_download_that_fails_is_one_line(data_cfg, tmp_path, monkeypatch, error, reason):
    def fail(root, download):
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail)
    with pytest.raises(UserError, match=f"DATASET.DOWNLOAD is True .*{reason}") as caught:
        get_dataset(data_cfg("cifar100", tmp_path, DOWNLOAD=True))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_cifar100_file_is_not_run(tmp_path):
    write(tmp_path, extra=Payload(tmp_path / "ran"))
    with pytest.raises(UserError, match="this file is not it"):
        cifar100.read_cifar100(tmp_path, "train")
    assert not (tmp_path / "ran").exists()


def test_choosing_a_subset_and_a_holdout():
    labels = np.array([0, 1] * 10)
    train, held = choose(labels, 0, 0.2)
    assert len(held) == 4
    assert labels[held].tolist() == [0, 1, 0, 1]
    assert held.tolist() == [16, 17, 18, 19]
    assert set(train) | set(held) == set(range(20))
    some, same_held = choose(labels, 3, 0.2)
    assert some.tolist() == [0, 1, 2, 3, 4, 5]
    assert same_held.tolist() == held.tolist()
    everything, none = choose(labels, 0, 0.0)
    assert len(everything) == 20
    assert len(none) == 0


def test_a_holdout_comes_from_the_training_images_unaugmented(data_cfg, cifar_root):
    train, test, count, _ = get_dataset(data_cfg("cifar100", cifar_root, HOLDOUT=0.34))
    assert (count, len(test.dataset)) == (200, 100)
    images, _ = cifar100.read_cifar100(cifar_root, "train")
    used = {train.dataset.images.images[i].tobytes() for i in train.dataset.chosen}
    held = {test.dataset.dataset.images[i].tobytes() for i in test.dataset.indices}
    assert used | held == {image.tobytes() for image in images}
    assert not held & used
    assert torch.equal(test.dataset[0][0], test.dataset[0][0])


@pytest.mark.parametrize(
    ("holdout", "left"),
    [(0.995, "0 images to train on and 300 held"), (0.01, "300 images to train on and 0 held")],
)
def test_a_holdout_that_leaves_nothing(data_cfg, cifar_root, holdout, left):
    with pytest.raises(UserError, match=f"DATASET.HOLDOUT is {holdout}, which leaves {left}"):
        get_dataset(data_cfg("cifar100", cifar_root, HOLDOUT=holdout))


def test_testing_does_not_need_the_training_images(data_cfg, tmp_path, cifar_root):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "test").write_bytes((cifar_root / "cifar-100-python" / "test").read_bytes())
    loader, classes = get_test_set(data_cfg("cifar100", tmp_path))
    assert (len(loader.dataset), classes) == (100, 100)


def test_indices_are_places_in_the_training_set(data_cfg, imagenet_folders, cifar_root, tmp_path):
    """CRD's memory is indexed by them: 0 … number of training images − 1, also for a subset."""
    for kind, root in (("cifar100", cifar_root), ("imagenet", imagenet_folders(tmp_path, 1000))):
        train, _, count, _ = get_dataset(data_cfg(kind, root, TRAIN_PER_CLASS=1))
        assert count == len(train.dataset)
        assert [train.dataset[i][2] for i in (0, 7, count - 1)] == [0, 7, count - 1]


def test_augmentation_crops_and_flips_and_tests_do_neither():
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[0, :, :8] = 255
    plainly = replace(source("cifar100"), mean=(0.0,) * 3, std=(1.0,) * 3)
    train, test = plainly.training_views(1), plainly.test_transform()
    data = Training(ArrayDataset(image, np.array([3]), None), np.arange(1), train, 0)
    drawn = torch.stack([data[epoch, 0][0] for epoch in range(1, 61)])
    bright_left = drawn[:, 0, 16, :8].mean(1) > drawn[:, 0, 16, -8:].mean(1)
    assert 15 < bright_left.sum() < 45  # flipped about half the time
    assert len({d.sum().item() for d in drawn}) > 3  # shifted by the crop
    plain = ArrayDataset(image, np.array([3]), test)
    assert torch.equal(plain[0][0], torch.from_numpy(image[0] / 255.0).permute(2, 0, 1).float())
    assert plain[0][1] == 3


def test_imagenet_from_class_folders(data_cfg, imagenet_folders, tmp_path):
    train, test, count, classes = get_dataset(data_cfg("imagenet", imagenet_folders(tmp_path, 1000)))
    assert (count, classes) == (1000, 1000)
    image, _, index = train.dataset[999]
    assert image.shape == (3, 224, 224)
    assert index == 999
    image, target = test.dataset[7]
    assert image.shape == (3, 224, 224)
    assert target == 7
    (tmp_path / "imagenet" / "val" / "n00000003" / "a.jpeg").unlink()
    with pytest.raises(UserError, match=r"n00000003: DATASET.ROOT has no image of this class of imagenet; .*\.jpeg"):
        get_dataset(data_cfg("imagenet", tmp_path))
    test.dataset.paths[3] = str(tmp_path / "no.jpeg")
    with pytest.raises(UserError, match="no.jpeg: DATASET.ROOT has an image that cannot be read"):
        test.dataset[3]


def test_imagenet_needs_a_thousand_classes(imagenet_folders, tmp_path):
    with pytest.raises(UserError, match="must hold 1000 class folders for imagenet, holds 3"):
        imagenet.read_imagenet(imagenet_folders(tmp_path, 3), "train")
    with pytest.raises(UserError, match="DATASET.ROOT holds no ImageNet"):
        imagenet.read_imagenet(tmp_path / "none", "test")


def test_an_unknown_data_set_lists_what_there_is(data_cfg):
    with pytest.raises(
        UserError,
        match="DATASET.TYPE is 'mnist'; it must be one of cifar100, glyphs100, imagenet, tiny_imagenet",
    ):
        get_dataset(data_cfg("mnist", "x"))


@pytest.mark.skipif(not os.environ.get("CIFAR100_ROOT"), reason="CIFAR100_ROOT does not name a folder with CIFAR-100")
@pytest.mark.slow
def test_real_cifar100():
    """The official numbering and pixels: class sizes, per-channel statistics, and what mdistiller normalises by."""
    images, labels = cifar100.read_cifar100(Path(os.environ["CIFAR100_ROOT"]), "test")
    assert images.shape == (10_000, 32, 32, 3)
    assert np.bincount(labels).tolist() == [100] * 100
    mean = images.reshape(-1, 3).mean(0) / 255
    std = images.reshape(-1, 3).std(0) / 255
    # what the training images have, which differ by less
    assert np.allclose(mean, source("cifar100").mean, atol=2e-3)
    assert np.allclose(std, source("cifar100").std, atol=5e-3)
