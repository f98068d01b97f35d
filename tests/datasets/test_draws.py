"""Order and augmentation as functions of (seed, epoch, image)."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from processes import as_process
from torchvision import transforms
from yacs.config import CfgNode

from deepkd_plugin.data import DATASETS, draws, get_dataset
from deepkd_plugin.data.arrays import Passes, passes
from deepkd_plugin.data.draws import Draw
from deepkd_plugin.data.resident import ResidentLoader, batchwise, count_numbers, draw, view_count, view_index
from deepkd_plugin.data.views import TrainingViews
from deepkd_plugin.distributed import sharding
from deepkd_plugin.errors import UserError


def splitmix(state):
    """SplitMix64's output for a state, as its authors give it."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_a_word_is_splitmix64s():
    assert splitmix(0) == 0xE220A8397B1DCDAF  # the first output of a generator that starts at 0
    assert draws.word(0) == splitmix(0)
    assert draws.word(5, 7) == splitmix(splitmix(5) ^ 7)


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1])
def test_many_at_once_are_one_by_one(seed):
    index = torch.tensor([0, 1, 49_999, 2**40])
    for stream in (draws.WEAK, draws.STRONG):
        made = draws.uniforms(seed, 12, index, stream, 3)
        assert made.tolist() == [draws.numbers(Draw(seed, 12, i), stream, 3) for i in index.tolist()]


def test_numbers_are_uniform_and_independent():
    index = torch.arange(20_000)
    columns = [
        draws.uniforms(seed, epoch, index, stream, 2)
        for seed, epoch, stream in ((0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1))
    ]
    table = torch.cat(columns, 1)
    assert table.min() >= 0
    assert table.max() < 1
    expected = torch.linspace(0, 1, 20_000, dtype=torch.float64)
    assert all((column.sort().values - expected).abs().max() < 0.015 for column in table.T)
    correlation = torch.corrcoef(table.T) - torch.eye(8)
    assert correlation.abs().max() < 0.035  # five standard errors
    lagged = torch.corrcoef(torch.stack([table[1:, 0], table[:-1, 0]]))[0, 1]
    assert abs(lagged) < 0.035


def test_an_order_is_a_permutation_of_its_epoch():
    index = torch.arange(1000)
    first, second = draws.order(0, 1, index), draws.order(0, 2, index)
    assert sorted(first.tolist()) == list(range(1000))
    assert not torch.equal(first, second)
    assert torch.equal(first, draws.order(0, 1, index))
    part = index[::3]
    kept = [place for place in first.tolist() if place % 3 == 0]
    assert part[draws.order(0, 1, part)].tolist() == kept


def test_global_generators_get_their_own_state_back():
    def state():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002

    def set_all():
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)

    set_all()
    expected = state()
    set_all()
    with draws.all_seeded(Draw(0, 1, 2), draws.WEAK):
        inside = state()
    assert state() == expected
    with draws.all_seeded(Draw(0, 1, 2), draws.WEAK):
        assert state() == inside
    with draws.all_seeded(Draw(0, 1, 2), draws.STRONG):
        assert all(a != b for a, b in zip(state(), inside))
    set_all()
    with draws.seeded(Draw(0, 1, 2), draws.WEAK):
        assert torch.rand(2).tolist() == inside[0]
    assert state() == expected


@pytest.mark.parametrize(("kind", "count"), [("cifar100", 162), ("glyphs100", 81), ("tiny_imagenet", None)])
def test_views_are_numbered(kind, count):
    source = DATASETS[kind]
    known = batchwise(source.augmentation, source.side, source.side)
    assert view_count(known) == count
    if count is None:
        return
    index = torch.arange(5000)
    views = view_index(known, 0, 3, index)
    assert torch.bincount(views, minlength=count).min() > 0
    assert views.max() < count
    # one number, one image
    numbers = draws.uniforms(0, 3, index, draws.WEAK, count_numbers(known))
    drawn = torch.stack(
        [part.reshape(-1, 5000)[row] for part in draw(known, numbers) for row in range(part.reshape(-1, 5000).shape[0])]
    )
    assert len({(int(v), *d) for v, d in zip(views, drawn.T.tolist())}) == count


def training(data_cfg, root, epoch=1, **options):
    """Every training image's views in an epoch, by its place in the whole set."""
    batch = options.pop("BATCH_SIZE", 64)
    cfg = data_cfg("glyphs100", root, **options)
    cfg.SOLVER.BATCH_SIZE = batch
    loader, *_ = get_dataset(cfg)
    loader.sampler.set_epoch(epoch)
    torch.manual_seed(batch)  # must not matter
    images, order = {}, []
    chosen = loader.dataset.chosen
    for image, _, places in loader:
        views = image if isinstance(image, list) else [image]
        for i, place in enumerate(places.tolist()):
            images[int(chosen[place])] = [view[i].cpu() for view in views]
            order.append(int(chosen[place]))
    return images, order


CHANGES = (
    {"BATCH_SIZE": 17},
    {"NUM_WORKERS": 1},
    {"NUM_WORKERS": 3},
    {"method": "MLKD"},
    {"PIPELINE": "device"},
    {"HOLDOUT": 0.25},
)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_an_image_is_the_same_whatever_loads_it(data_cfg, data_root, change):
    few = {"TRAIN_PER_CLASS": 4} if "HOLDOUT" not in change else {}
    images, order = training(data_cfg, data_root, NUM_WORKERS=0, **few)
    others, other_order = training(data_cfg, data_root, **({"NUM_WORKERS": 0} | few | change))
    assert others.keys() <= images.keys()
    assert all(torch.equal(images[index][0], views[0]) for index, views in others.items())
    assert other_order == [index for index in order if index in others]


@pytest.mark.parametrize("method", ["KD", "MLKD"])
def test_the_next_epoch_is_another(data_cfg, data_root, method):
    few = {"TRAIN_PER_CLASS": 4, "method": method, "NUM_WORKERS": 0}
    images, order = training(data_cfg, data_root, **few)
    later, later_order = training(data_cfg, data_root, epoch=2, **few)
    assert order != later_order
    for view in range(len(images[0])):
        same = [torch.equal(images[index][view], later[index][view]) for index in images]
        assert sum(same) < 0.1 * len(same)


def test_passes_are_counted_where_nobody_sets_the_epoch(data_cfg, data_root):
    """Under mdistiller's own trainers."""
    loader, *_ = get_dataset(data_cfg("glyphs100", data_root, TRAIN_PER_CLASS=2, NUM_WORKERS=0))
    passes = [torch.cat([batch[2] for batch in loader]).tolist() for _ in range(2)]
    loader.sampler.set_epoch(1)
    again = torch.cat([batch[2] for batch in loader]).tolist()
    assert passes[0] == again != passes[1]


def test_distortions_that_draw_from_anywhere_are_repeatable():
    def jitter(image):
        drawn = torch.randint(9, ()).item() + np.random.randint(9) + random.randint(0, 9)  # noqa: NPY002
        return Image.fromarray(np.asarray(image) + np.uint8(drawn))

    image = Image.fromarray(np.full((8, 8, 3), 100, np.uint8))
    make = TrainingViews((jitter, transforms.RandomResizedCrop(8)), transforms.ToTensor(), True, (8, 8))
    first = make(image, Draw(0, 1, 5))
    torch.manual_seed(3)
    random.seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, make(image, Draw(0, 1, 5))))
    values = {make(image, Draw(0, 1, i))[0].mean().item() for i in range(40)}
    assert len(values) > 10


class Shifted(transforms.RandomHorizontalFlip):
    """A distortion of somebody's own that is torchvision's by its class."""

    def forward(self, image):
        return Image.fromarray(np.roll(np.asarray(image), int(torch.randint(1, 8, ())), 1))


@pytest.mark.parametrize(
    "distortion",
    [
        transforms.RandomCrop(8),
        transforms.RandomCrop(8, padding=(4, 2)),
        transforms.RandomCrop(8, padding=4, fill=99),
        transforms.RandomCrop(8, padding=4, padding_mode="reflect"),
        transforms.RandomCrop(6, padding=4),
        transforms.RandomRotation(30, fill=200),
        transforms.RandomRotation(30, center=(0, 0)),
        transforms.RandomRotation(30, expand=True),
        transforms.RandomRotation(30, interpolation=transforms.InterpolationMode.BILINEAR),
        Shifted(),
    ],
    ids=repr,
)
def test_a_distortion_that_is_not_quite_a_known_one_is_run_itself(distortion):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
    make = TrainingViews((distortion,), transforms.PILToTensor(), False, (8, 8))
    for index in range(5):
        with draws.all_seeded(Draw(0, 1, index), draws.WEAK):
            expected = transforms.PILToTensor()(distortion(image))
        assert torch.equal(make(image, Draw(0, 1, index)), expected)
    with pytest.raises(UserError, match="it must be 'workers' with "):
        batchwise((distortion,), 8, 8)


@pytest.mark.parametrize("seed", [0, 1])
def test_known_distortions_in_any_order_are_the_same_in_both_pipelines(seed):
    crop, flip, turn = transforms.RandomCrop(8, 3), transforms.RandomHorizontalFlip(), transforms.RandomRotation(40)
    images = np.random.default_rng(0).integers(1, 255, (50, 8, 8, 3), np.uint8)
    pixels, labels = torch.from_numpy(images), torch.zeros(50, dtype=torch.int64)
    for some in itertools.permutations((crop, flip, turn)):
        make = TrainingViews(some, transforms.PILToTensor(), False, (8, 8))
        loader = ResidentLoader(None, pixels, labels, 50, (0.0,) * 3, (1.0,) * 3, some, Passes(np.arange(50), seed))
        loader.normalise = lambda image: image
        ((made, _, places),) = loader
        expected = [make(Image.fromarray(images[place]), Draw(seed, 1, place)) for place in places.tolist()]
        assert torch.equal(made, torch.stack(expected))


def test_contrasts_are_an_images_own(data_cfg, data_root):
    def made(batch, workers):
        cfg = data_cfg("glyphs100", data_root, method="CRD", TRAIN_PER_CLASS=2, NUM_WORKERS=workers)
        cfg.SOLVER.BATCH_SIZE = batch
        cfg.CRD = CfgNode({"MODE": "relax", "NCE": {"K": 16}})
        loader, *_ = get_dataset(cfg)
        return {int(place): row.tolist() for _, _, places, rows in loader for place, row in zip(places, rows)}

    assert made(64, 0) == made(7, 2)


@pytest.mark.parametrize("pipeline", ["workers", "device"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_processes_share_the_batches_of_one(data_cfg, data_root, monkeypatch, pipeline, accumulate):
    """So they do with an epoch that goes on inside, and with the test images, of which each is tested once."""
    cfg = data_cfg("glyphs100", data_root, PIPELINE=pipeline, TRAIN_PER_CLASS=4, HOLDOUT=0.05, NUM_WORKERS=0)
    cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.ACCUMULATE = 64, accumulate
    whole, tested, *_ = get_dataset(cfg)
    passes(whole).set_epoch(2)
    images = {int(i): image for batch in whole for image, i in zip(batch[0], batch[2])}
    order = [batch[2].tolist() for batch in list(whole)[3:]]  # of epoch 3
    chunk, seen, labels = -(-64 // accumulate), [], []
    for rank in range(3):
        as_process(monkeypatch, rank, 3)
        part, test, *_ = get_dataset(cfg)
        assert len(part) == len(whole)
        passes(part).set_epoch(3, 3 * 64)
        assert [batch[2].tolist() for batch in part] == [
            [batch[place] for place in sharding.own(len(batch), chunk)] for batch in order
        ]
        passes(part).set_epoch(2)
        for batch in part:
            seen += batch[2].tolist()
            assert all(torch.equal(image, images[int(i)]) for image, i in zip(batch[0], batch[2]))
        labels += [label for batch in test for label in batch[1].tolist()]
        assert len(test.dataset) == len(tested.dataset)
    assert sorted(seen) == sorted(images)
    assert sorted(labels) == sorted(label for batch in tested for label in batch[1].tolist())
