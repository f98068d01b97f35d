"""What the node AUGMENT and smoothed labels do: functions of the seed, the epoch and the image, or the step."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from processes import as_process

from deepkd_plugin import config, data
from deepkd_plugin.data import augment
from deepkd_plugin.data.draws import Draw
from deepkd_plugin.distillers.terms import classes
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import registry
from deepkd_plugin.launch import read_config

CONFIG = "DATASET: {TYPE: cifar100}\nDISTILLER: {TYPE: KD, TEACHER: resnet56, STUDENT: resnet20}\n"


@pytest.fixture
def settle(tmp_path):
    """A checked config with options, and where its values came from."""

    def read(*options):
        file = tmp_path / "some.yaml"
        file.write_text(CONFIG)
        return read_config(registry.BUILTIN, file, list(map(str, options)))[0]

    return read


def mixing(settle, *options):
    return augment.make_mixing(settle(*options))


def batch(count, classes=100):
    """Images whose pixels say which image they are of, and the labels."""
    values = torch.arange(count, dtype=torch.float32)
    return values[:, None, None, None].expand(count, 3, 32, 32).clone(), torch.arange(count) % classes


def test_by_default_nothing_is_changed(settle):
    assert mixing(settle) is None
    assert mixing(settle, "AUGMENT.MIXUP", 0.8, "AUGMENT.MIX_PROBABILITY", 0.0) is None
    cfg = settle()
    assert data.training_source(cfg) is data.source("cifar100")


def test_smoothed_labels_are_pytorchs(settle):
    images, labels = batch(4)
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    image, soft = mixing(settle, "SOLVER.LABEL_SMOOTHING", 0.1)(images, labels, 1, 1, range(4))
    assert torch.equal(image, images)
    assert torch.equal(classes(soft), labels)
    ours = torch.nn.functional.cross_entropy(logits, soft)
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)


def test_mixup_mixes_neighbours_with_their_labels(settle):
    images, labels = batch(6)
    mix = mixing(settle, "AUGMENT.MIXUP", 0.8)
    image, soft = mix(images, labels, 1, 1, range(6))
    share = soft[0, 0].item()
    assert 0 < share < 1
    for i, j in ((0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)):
        torch.testing.assert_close(image[i], share * images[i] + (1 - share) * images[j])
        expected = torch.zeros(100)
        expected[i], expected[j] = share, 1 - share
        torch.testing.assert_close(soft[i], expected)
    # the target class is the larger of the two
    assert classes(soft).tolist() == ([0, 1, 2, 3, 4, 5] if share > 0.5 else [1, 0, 3, 2, 5, 4])
    assert torch.equal(images, batch(6)[0])


def test_cutmix_cuts_a_box_whose_area_the_labels_have(settle):
    images, labels = batch(4)
    mix = mixing(settle, "AUGMENT.CUTMIX", 1.0)
    shares = []
    for step in range(1, 12):
        image, soft = mix(images, labels, 1, step, range(4))
        cut = image[0, 0] == 1
        assert set(image[0].unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(image[1, 0] == 0, cut)
        assert torch.equal(image[3, 0] == 2, cut)
        assert soft[0, 1].item() == pytest.approx(cut.float().mean().item(), abs=1e-6)
        shares.append(soft[0, 1].item())
    assert min(shares) < 0.3 < max(shares)


def test_a_batch_is_a_function_of_seed_epoch_and_step(settle):
    images, labels = batch(4)
    options = ("AUGMENT.MIXUP", 0.8, "AUGMENT.CUTMIX", 1.0)

    def made(seed=0, epoch=1, step=1):
        return mixing(settle, *options, "SOLVER.SEED", seed)(images, labels, epoch, step, range(4))

    torch.manual_seed(1)
    first = made()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = made()
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(2).get_state())
    assert not torch.equal(state, torch.get_rng_state())
    for other in (made(seed=1), made(epoch=2), made(step=2)):
        assert not torch.equal(other[1], first[1])


def test_both_kinds_and_their_shares(settle):
    images, labels = batch(2)

    def kinds(*options):
        mix = mixing(settle, "AUGMENT.MIXUP", 0.8, "AUGMENT.CUTMIX", 1.0, *options)
        made = [mix(images, labels, 1, step, range(2))[0] for step in range(1, 201)]
        plain = sum(torch.equal(image, images) for image in made)
        cut = sum(set(image.unique().tolist()) == {0.0, 1.0} for image in made)
        return plain, cut - plain

    assert kinds("AUGMENT.CUTMIX_SHARE", 0.0) == (0, 0)
    plain, cut = kinds("AUGMENT.MIX_PROBABILITY", 0.5)
    assert 70 < plain < 130
    assert 25 < cut < 80


def test_two_views_are_mixed_alike(settle):
    images, labels = batch(4)
    mix = mixing(settle, "AUGMENT.CUTMIX", 1.0)
    views, _ = mix([images, 10 * images], labels, 1, 3, range(4))
    assert torch.equal(10 * views[0], views[1])
    assert torch.equal(views[0], mix(images, labels, 1, 3, range(4))[0])


@pytest.mark.parametrize(("size", "chunk"), [(1, 8), (2, 8), (2, 4), (4, 8)])
def test_processes_mix_as_one_does(settle, size, chunk):
    """A whole batch's pairs are within a process; what an epoch's last batch splits stays as it is."""
    mix = mixing(settle, "AUGMENT.MIXUP", 0.8)
    images, labels = batch(8)
    whole, soft = mix(images, labels, 1, 1, range(8))
    each = chunk // size
    for rank in range(size):
        places = [first + rank * each + i for first in range(0, 8, chunk) for i in range(each)]
        image, target = mix(images[places], labels[places], 1, 1, places)
        assert torch.equal(image, whole[places])
        assert torch.equal(target, soft[places])
    image, target = mix(images[1:4], labels[1:4], 1, 1, [1, 2, 3])
    assert torch.equal(image[0], images[1])
    assert torch.equal(image[1:], whole[2:4])
    assert target[0].argmax() == 1
    assert target[0].max() == 1


def test_a_lone_image_stays_as_it_is(settle):
    images, labels = batch(3)
    image, soft = mixing(settle, "AUGMENT.MIXUP", 0.8)(images, labels, 1, 1, range(3))
    assert torch.equal(image[2], images[2])
    assert soft[2].max() == 1


def photo(side=32):
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize("asked", [("AUGMENT.RANDAUGMENT", "rand-m9-mstd0.5-inc1"), ("AUGMENT.ERASING", 1.0)])
def test_an_image_is_a_function_of_seed_epoch_and_image(settle, asked):
    pytest.importorskip("timm")
    make = data.training_source(settle(*asked)).training_views(1)
    plain = data.training_source(settle()).training_views(1)
    image = photo()
    first = make(image, Draw(0, 1, 0))
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    assert torch.equal(make(image, Draw(0, 1, 0)), first)
    assert (torch.rand(1), np.random.rand(), random.random()) == before  # noqa: NPY002
    for draw in (Draw(1, 1, 0), Draw(0, 2, 0), Draw(0, 1, 1)):
        assert not torch.equal(make(image, draw), first)
    if asked[0] == "AUGMENT.ERASING":
        # the crop and flip of the same draw, with noise in one rectangle of 2 to 33 % of the pixels
        erased = (first != plain(image, Draw(0, 1, 0))).any(0)
        rows, columns = erased.any(1).sum().item(), erased.any(0).sum().item()
        assert erased.sum().item() == rows * columns
        assert 0.015 < rows * columns / 1024 < 0.35
        assert first[:, erased].std() == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("notation", ["rand-m10-inc1", "rand-m10", "rand-m0", "rand-m10-p1.0-tweights-n3"])
def test_every_operation_takes_its_ends(settle, notation):
    """timm posterises to 0 bits at the highest level, which Pillow 13 does not do."""
    pytest.importorskip("timm")
    made = augment.rand_augment(notation, data.source("cifar100"))
    image = photo()
    for operation in made.ops:
        operation.prob = 1.0
        assert operation(image).size == image.size
    if notation == "rand-m10-inc1":
        (posterise,) = (operation for operation in made.ops if operation.name == "PosterizeIncreasing")
        assert posterise(image).getextrema() == ((0, 0),) * 3


def test_workers_and_resuming_give_the_same_images(settle, monkeypatch):
    pytest.importorskip("timm")
    drawn = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    facts = {"num_classes": 100, "train": 20, "test": 20, "side": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    dots = data.Source(lambda root, split: (drawn, np.arange(20)), **facts)
    monkeypatch.setitem(data.DATASETS, "dots", dots)
    asked = ("AUGMENT.RANDAUGMENT", "rand-m9-mstd0.5-inc1", "AUGMENT.ERASING", 0.5, "DATASET.TYPE", "dots")
    runs = []
    for workers in (0, 2):
        loader = data.get_dataset(settle(*asked, "DATASET.NUM_WORKERS", workers, "SOLVER.BATCH_SIZE", 8))[0]
        loader.sampler.set_epoch(3)
        runs.append([part for batch in loader for part in batch])
    loader.sampler.set_epoch(3, done=8)
    resumed = [part for batch in loader for part in batch]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][3:], resumed, strict=True))


def test_large_images_with_erasing_are_normalised_first(settle):
    data_set = data.training_source(settle("DATASET.TYPE", "imagenet", "AUGMENT.ERASING", 1.0, *networks("ResNet18")))
    assert not data_set.in_bytes
    assert data.source("imagenet").in_bytes
    view = data_set.training_views(1)(photo(300), Draw(0, 1, 0))
    assert view.shape == (3, 224, 224)
    assert view.dtype == torch.float32


def networks(name):
    return ("DISTILLER.STUDENT", name, "DISTILLER.TEACHER", name)


TWO = ("DISTILLER.TYPE", "MLKD")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("AUGMENT.MIXUP", 0.8, "DISTILLER.TYPE", "CRD"),
            "MIXUP is 0.8; it must be 0.0 with DISTILLER.TYPE CRD",
        ),
        (("SOLVER.LABEL_SMOOTHING", 0.1, "DISTILLER.TYPE", "RKD"), "LABEL_SMOOTHING is 0.1; it must be 0.0 with"),
        (
            ("AUGMENT.CUTMIX", 1, "DISTILLER.TEACHER_LOGITS", "table"),
            "LOGITS is 'table'; it must be 'compute' with",
        ),
        (("AUGMENT.ERASING", 0.1, "DISTILLER.TEACHER_LOGITS", "stored"), "'compute' with AUGMENT.ERASING: such images"),
        (
            ("AUGMENT.ERASING", 0.1, *TWO),
            "ERASING is 0.1; it must be 0.0 with DISTILLER.TYPE MLKD: a method of",
        ),
        (
            ("AUGMENT.RANDAUGMENT", "rand-m9", *TWO),
            "AUGMENT is 'rand-m9'; it must be '' with DISTILLER.TYPE",
        ),
        (("AUGMENT.RANDAUGMENT", "auto"), "AUGMENT.RANDAUGMENT is 'auto'; it must be timm's notation"),
        (("AUGMENT.RANDAUGMENT", "rand-m9-tnone"), "it must be timm's notation"),  # timm would take its default set
        (("AUGMENT.MIXUP", -1.0), "AUGMENT.MIXUP is -1.0; it must be a number from 0 on"),
        (
            ("AUGMENT.ERASING", 0.1, "DATASET.PIPELINE", "device"),
            "is 'device'; it must be 'workers' with AUGMENT",
        ),
        (("SOLVER.LABEL_SMOOTHING", 1.0), r"LABEL_SMOOTHING is 1.0; it must be a number in \[0, 1\)"),
        (
            ("SOLVER.ADAMW.BETA2", 0.99),
            "BETA2 is 0.99; it must be 0.999 with SOLVER.TRAINER base, which",
        ),
        (
            ("SOLVER.TRAINER", "DecoupledAdamW", "SOLVER.DECOUPLED.DAMPENING", "ema"),
            "is 'ema'; it must be 'variant' with SOLVER.TRAINER DecoupledAdamW, which does not read it; Decoupled",
        ),
        (
            ("SOLVER.TYPE", "AdamW"),
            r"it must be SGD \(SOLVER.TRAINER DecoupledAdamW brings AdamW",
        ),
    ],
)
def test_what_is_refused(settle, monkeypatch, options, message):
    for name in ("CRD", "RKD"):  # mdistiller's, which know no such labels
        monkeypatch.setitem(registry.BUILTIN.distillers, name, object)
    with pytest.raises(UserError, match=message):
        settle(*options)


def test_pairs_must_fit_into_processes(settle, monkeypatch):
    as_process(monkeypatch, 0, 4)
    settle("AUGMENT.MIXUP", 0.8, "SOLVER.BATCH_SIZE", 64)
    with pytest.raises(UserError, match="BATCH_SIZE is 60; it must be a multiple of 8 with AUGMENT.MIXUP"):
        settle("AUGMENT.MIXUP", 0.8, "SOLVER.BATCH_SIZE", 60)


def test_without_timm_its_augmentation_is_refused(settle, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="RANDAUGMENT is 'rand-m9'; it must be no text, for timm is not installed"):
        settle("AUGMENT.RANDAUGMENT", "rand-m9")
    assert config.get(settle(), "AUGMENT.RANDAUGMENT") == ""
