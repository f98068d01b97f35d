"""Tiny ImageNet from folders of our own in both of its layouts, and what is said of wrong ones."""

import numpy as np
import pytest
import torch
from PIL import Image

from deepkd_plugin.data import get_dataset, get_test_set, source
from deepkd_plugin.data.tiny_imagenet import read_tiny_imagenet
from deepkd_plugin.errors import UserError

MEAN, STD = source("tiny_imagenet").mean, source("tiny_imagenet").std


def levels(images):
    """The brightness of each image, which the fixture made equal to its label."""
    return [round(float(images[i][0].mean())) for i in range(len(images))]


@pytest.fixture
def parts(data_cfg):
    """The training and the test set below a root, images as arrays."""

    def read(root):
        node = data_cfg("tiny_imagenet", root).DATASET
        return [source("tiny_imagenet").load(node, split, np.asarray) for split in ("train", "test")]

    return read


@pytest.mark.parametrize("layout", ["official", "folders"])
def test_both_layouts(tmp_path, tiny_folders, parts, layout):
    train, val = parts(tiny_folders(tmp_path, layout))
    assert (len(train), len(val)) == (400, 200)
    assert train.targets == sorted([*range(200), *range(200)])  # alphabetical order of the wnids
    assert sorted(val.targets) == list(range(200))
    assert levels(train) == train.targets
    assert levels(val) == val.targets
    image, label = val[5]
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert label == val.targets[5]


def test_batches(data_cfg, tiny_root):
    train, test, count, classes = get_dataset(data_cfg("tiny_imagenet", tiny_root))
    assert (count, classes, len(test.dataset)) == (800, 200, 200)
    image, target, index = next(iter(train))
    assert image.shape == (32, 3, 64, 64)
    assert torch.equal(target, index // 4)
    image, target = next(iter(test))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    brightness = (image * std + mean) * 255
    assert (brightness - target[:, None, None, None]).abs().max() < 1.01


def test_workers_read_the_same_images(data_cfg, tiny_root):
    loaders = [get_test_set(data_cfg("tiny_imagenet", tiny_root, NUM_WORKERS=workers))[0] for workers in (0, 2)]
    for (image, target), (other, other_target) in zip(*loaders):
        assert torch.equal(image, other)
        assert torch.equal(target, other_target)


def test_training_rotates_and_flips_and_tests_do_neither(tmp_path, tiny_folders, data_cfg):
    root = tiny_folders(tmp_path, "folders", count=1)
    half = np.full((64, 64, 3), 250, np.uint8)
    half[:, :32] = 60
    for split, name in (("train", "n00000000_0.JPEG"), ("val", "half.JPEG")):
        folder = root / "tiny-imagenet-200" / split / "n00000000"
        for file in folder.iterdir():
            file.unlink()
        Image.fromarray(half).save(folder / name, quality=95)
    train, test, *_ = get_dataset(data_cfg("tiny_imagenet", root))
    drawn = torch.stack([train.dataset[epoch, 0][0][0] for epoch in range(200)])
    black = drawn.min()
    assert black == pytest.approx(-MEAN[0] / STD[0])  # corners that turned in
    flipped = drawn[:, 32, :8].mean(1) > drawn[:, 32, -8:].mean(1)
    assert 70 < flipped.sum() < 130
    turned = (drawn[:, 0] == black).sum(1)  # black pixels of the top row
    assert turned.max() > 15
    assert (turned < 3).sum() < 40
    assert torch.equal(test.dataset[0][0], test.dataset[0][0])
    assert test.dataset[0][0][0, 0].min() > black + 0.5


def test_subsets_and_holdouts(data_cfg, tiny_root):
    node = {"TRAIN_PER_CLASS": 2, "HOLDOUT": 0.25}
    train, test, count, _ = get_dataset(data_cfg("tiny_imagenet", tiny_root, **node))
    assert (count, len(test.dataset)) == (400, 200)
    used = [train.dataset.images.paths[i] for i in train.dataset.chosen]
    held = [test.dataset.dataset.paths[i] for i in test.dataset.indices]
    assert [path[-7:] for path in used] == ["_0.JPEG", "_1.JPEG"] * 200  # of each class the first two
    assert [path[-7:] for path in held] == ["_3.JPEG"] * 200  # and the last quarter
    assert [test.dataset[i][1] for i in (0, 7, 199)] == [0, 7, 199]
    assert [train.dataset[i][1:] for i in (0, 7, 399)] == [(0, 0), (3, 7), (199, 399)]


def test_testing_does_not_need_the_training_images(tmp_path, tiny_folders, data_cfg):
    root = tiny_folders(tmp_path)
    (root / "tiny-imagenet-200" / "train").rename(tmp_path / "away")
    loader, classes = get_test_set(data_cfg("tiny_imagenet", root))
    assert (len(loader.dataset), classes) == (200, 200)
    with pytest.raises(UserError, match=r"train: DATASET.ROOT holds no Tiny ImageNet; .*/train/<wnid>/\*"):
        get_dataset(data_cfg("tiny_imagenet", root))


def test_other_numbers_of_classes(tmp_path, tiny_folders):
    root = tiny_folders(tmp_path, classes=3)
    with pytest.raises(UserError, match="train: DATASET.ROOT must hold 200 class folders .*, holds 3"):
        read_tiny_imagenet(root, "train")
    with pytest.raises(UserError, match="val_annotations.txt: must name 200 classes, names 3"):
        read_tiny_imagenet(root, "test")
    (root / "tiny-imagenet-200" / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match="val: DATASET.ROOT must hold 200 class folders .*, holds 1"):
        read_tiny_imagenet(root, "test")


def test_bad_annotations(tmp_path, tiny_folders):
    file = tiny_folders(tmp_path, count=1) / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    sound = file.read_text()
    for text, expected in (
        (sound + "val_7.JPEG\n", "line 201 is 'val_7.JPEG'; it must be the name of an image and its wnid"),
        ("\n" + sound, "line 1 is ''"),
        (sound.replace("val_7.", "val_x."), r"line 8 names val_x.JPEG, which is not in .*/val/images"),
        ("", "must name 200 classes, names 0"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"val_annotations.txt: {expected}"):
            read_tiny_imagenet(tmp_path, "test")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="val_annotations.txt: cannot be read"):
        read_tiny_imagenet(tmp_path, "test")


def test_bad_images(tmp_path, tiny_folders, parts):
    root = tiny_folders(tmp_path, count=1)
    images, val = parts(root)
    folder = root / "tiny-imagenet-200" / "train" / "n00000007" / "images"
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for content in (b"", b"broken", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="_0.JPEG: DATASET.ROOT has an image that cannot be read") as caught:
            images[7]
        assert "\n" not in str(caught.value)
    Image.new("RGB", (64, 63)).save(file)
    with pytest.raises(UserError, match="_0.JPEG: this image is 64 x 63; .* must be 64 x 64"):
        images[7]
    Image.new("RGB", (32, 64)).save(root / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG")
    with pytest.raises(UserError, match="val_0.JPEG: this image is 32 x 64; .* must be 64 x 64"):
        val[0]
    file.unlink()
    with pytest.raises(UserError, match=r"n00000007: DATASET.ROOT has no image of this class of tiny_imagenet"):
        read_tiny_imagenet(root, "train")


@pytest.mark.parametrize("layout", ["official", "folders"])
def test_a_class_that_only_one_split_has(tmp_path, tiny_folders, layout):
    top = tiny_folders(tmp_path, layout, count=1) / "tiny-imagenet-200"
    (top / "train" / "n00000005").rename(top / "train" / "n99")
    with pytest.raises(UserError, match=r"val.*: must have the classes of .*/train; 'n00000005' is only in .*'n99' is"):
        read_tiny_imagenet(tmp_path, "test")
