"""Data sets of one's own: a reader function and what is known of it make a DATASET.TYPE."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from deepkd_plugin.data import DATASETS, Source, get_dataset, num_classes, register_dataset, source
from deepkd_plugin.errors import UserError

FACTS = {"num_classes": 7, "train": 70, "test": 35, "side": 48, "mean": (0.5,) * 3, "std": (0.25,) * 3}
CROP = transforms.RandomCrop(48, padding=4)


def read(root, split):
    """Images of one brightness, by their place."""
    labels = np.arange(70 if split == "train" else 35) % 7
    return np.full((len(labels), 48, 48, 3), labels[:, None, None, None] * 30 + 5, np.uint8), labels


@pytest.fixture
def dots():
    """Register a set "dots" for a test: dots(read, side=48, …)."""

    def register(reader=read, **facts):
        DATASETS.pop("dots", None)
        register_dataset("dots", Source(reader, **FACTS | facts))

    yield register
    DATASETS.pop("dots", None)


def complaint(call, *arguments, **named):
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_reader_is_a_data_set(dots, data_cfg):
    dots()
    assert num_classes(data_cfg("dots", "x")) == 7
    train, test, count, classes = get_dataset(data_cfg("dots", "x", TRAIN_PER_CLASS=4))
    assert (count, classes, len(test.dataset)) == (28, 7, 35)
    image, target, _ = next(iter(train))
    assert image.shape == (28, 3, 48, 48)
    brightness = (image * 0.25 + 0.5) * 255
    assert torch.allclose(brightness, (target * 30.0 + 5)[:, None, None, None].expand_as(brightness), atol=1e-3)


def test_the_device_makes_its_batches_too(dots, data_cfg):
    dots(augmentation=(CROP, transforms.RandomHorizontalFlip()))
    torch.manual_seed(0)
    train, test, *_ = get_dataset(data_cfg("dots", "x", PIPELINE="device"))
    assert next(iter(train))[0].shape == (32, 3, 48, 48)
    plain = get_dataset(data_cfg("dots", "x"))[1]
    assert torch.equal(next(iter(test))[0].cpu(), next(iter(plain))[0])
    dots(augmentation=(transforms.RandomGrayscale(),))
    line = complaint(get_dataset, data_cfg("dots", "x", PIPELINE="device"))
    assert line.startswith("config: DATASET.PIPELINE is 'device'; it must be 'workers' with RandomGrayscale")


def test_two_views_are_made_of_its_images(dots, data_cfg):
    dots(augmentation=(CROP,))
    images, *_ = next(iter(get_dataset(data_cfg("dots", "x", method="MLKD"))[0]))
    assert [view.shape for view in images] == [(32, 3, 48, 48)] * 2


def test_files_are_read_as_they_are_asked_for(dots, data_cfg, tmp_path):
    for i, side in enumerate((48, 48, 40)):
        Image.new("RGB", (side, side), (i, i, i)).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in (0, 1, 2)]
    dots(lambda root, split: (paths, [0, 1, 2]))
    _, test, *_ = get_dataset(data_cfg("dots", "x"))
    assert test.dataset[1][1] == 1
    line = complaint(test.dataset.__getitem__, 2)
    assert line == f"{paths[2]}: this image is 40 x 40; those of its data set must be 48 x 48"
    dots(lambda root, split: (paths, [0, 1, 2]), small=False, resizing=(transforms.Resize(48),))
    _, test, *_ = get_dataset(data_cfg("dots", "x"))
    assert test.dataset[2][0].shape == (3, 48, 48)


def absent(root, split):
    raise FileNotFoundError(2, "No such file", f"{root}/dots.npz")


def given(images=None, labels=None):
    good = read("x", "test")
    images, labels = (old if new is None else new for old, new in zip(good, (images, labels)))
    return lambda root, split: (images, labels)


IMAGES = "images are {} of the shape {}; they must be uint8 of the shape (N, 48, 48, 3)"
LABELS = "labels are {} of the shape {}; they must be integers of the shape (35,), one for each image"


@pytest.mark.parametrize(
    ("reader", "line"),
    [
        (given(np.zeros((35, 32, 32, 3), np.uint8)), IMAGES.format("uint8", (35, 32, 32, 3))),
        (given(np.zeros((35, 48, 48), np.uint8)), IMAGES.format("uint8", (35, 48, 48))),
        (given(np.zeros((35, 3, 48, 48), np.uint8)), IMAGES.format("uint8", (35, 3, 48, 48))),
        (given(np.zeros((35, 48, 48, 3))), IMAGES.format("float64", (35, 48, 48, 3))),
        (given(labels=np.zeros(34, int)), LABELS.format("int64", (34,))),
        (given(labels=np.zeros((35, 1), int)), LABELS.format("int64", (35, 1))),
        (given(labels=np.zeros(35)), LABELS.format("float64", (35,))),
        (
            given(labels=np.arange(35) % 8),
            "label 7 of image 7 is outside the classes; labels must be in 0 … 6",
        ),
        (
            given(labels=-np.ones(35, int)),
            "label -1 of image 0 is outside the classes; labels must be in 0 … 6",
        ),
    ],
)
def test_what_a_reader_must_give(dots, data_cfg, reader, line):
    dots(reader)
    assert complaint(get_dataset, data_cfg("dots", "there")) == f"DATASET.ROOT there: dots, train: {line}"


def test_a_reader_that_finds_nothing_is_one_line(dots, data_cfg):
    dots(absent)
    line = complaint(get_dataset, data_cfg("dots", "there"))
    assert line == "DATASET.ROOT there: dots cannot be read from it ([Errno 2] No such file: 'there/dots.npz')"


def test_names_are_unique_and_known(dots):
    dots()
    register_dataset("dots", source("dots"))  # a module may be imported again
    line = complaint(register_dataset, "dots", Source(read, **FACTS))
    assert line == "the data set 'dots' is registered already; another must have a name of its own"
    known = "cifar100, glyphs100, imagenet, tiny_imagenet, dots, folder, huggingface, package.module:function"
    assert complaint(source, "mnist") == f"DATASET.TYPE is 'mnist'; it must be one of {known}"
    line = complaint(register_dataset, "more", Source(read, **FACTS, zoo="zoo"))
    assert line == "the data set 'more' has the zoo 'zoo'; it must be one of cifar, tiny_imagenet, imagenet"
    line = complaint(register_dataset, "more", Source(read, **FACTS, zoo="imagenet"))
    assert line.startswith("the data set 'more' has 7 classes; with the zoo 'imagenet' it must have 1000")
    assert "more" not in DATASETS


def test_sets_say_which_networks_fit_and_whether_they_are_drawn():
    assert {name: one.zoo for name, one in DATASETS.items()} == {
        "cifar100": "cifar",
        "glyphs100": "cifar",
        "imagenet": "imagenet",
        "tiny_imagenet": "tiny_imagenet",
    }
    assert [name for name, one in DATASETS.items() if one.drawn] == ["glyphs100"]


@pytest.mark.parametrize(
    ("node", "train", "test", "steps"),
    [
        ({}, 6000, 5000, 188),
        ({"TRAIN_PER_CLASS": 2}, 200, 5000, 7),
        ({"HOLDOUT": 0.2}, 4800, 1200, 150),
        ({"HOLDOUT": 0.02, "TRAIN_PER_CLASS": 60}, 5900, 100, 185),
    ],
)
def test_images_and_steps_are_those_of_the_loaders(data_cfg, data_root, node, train, test, steps):
    cfg = data_cfg("glyphs100", data_root, **node)
    glyphs = source("glyphs100")
    assert (glyphs.images(cfg), glyphs.steps(cfg)) == ((train, test), steps)
    train_loader, test_loader, count, _ = get_dataset(cfg)
    assert (count, len(test_loader.dataset), len(train_loader)) == (train, test, steps)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", ["cifar100", "tiny_imagenet"])
def test_noise_has_the_form_of_the_loader_s_batches(data_cfg, cifar_root, tiny_root, kind, views):
    cfg = data_cfg(kind, {"cifar100": cifar_root, "tiny_imagenet": tiny_root}[kind], method=("KD", "MLKD")[views - 1])
    noise, batch = source(kind).noise(32, views), next(iter(get_dataset(cfg)[0]))

    def form(part):
        return [form(one) for one in part] if isinstance(part, list) else (part.shape, part.dtype)

    assert form(noise) == form(batch)
    assert 0 <= noise[1].min() <= noise[1].max() < source(kind).num_classes


def test_the_augmenter_makes_a_training_image():
    assert [view.shape for view in source("cifar100").augmenter(2)()] == [(3, 32, 32)] * 2
    assert source("imagenet").augmenter(1)().shape == (3, 224, 224)
