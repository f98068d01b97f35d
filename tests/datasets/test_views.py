"""The strong view against PIL's own functions, its random draws, and two views in every data set's batches."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision import transforms

from deepkd_plugin import data
from deepkd_plugin.data import DATASETS, get_dataset, get_test_set, views
from deepkd_plugin.data.draws import Draw
from deepkd_plugin.data.views import OPERATIONS, Operation, StrongAugment, TrainingViews, cut_out

AFFINE = Image.Transform.AFFINE
GREY = (125, 123, 114)
PIL_SAYS = {
    "autocontrast": (0, 1, lambda image, v: ImageOps.autocontrast(image)),
    "brightness": (0.05, 0.95, lambda image, v: ImageEnhance.Brightness(image).enhance(v)),
    "colour": (0.05, 0.95, lambda image, v: ImageEnhance.Color(image).enhance(v)),
    "contrast": (0.05, 0.95, lambda image, v: ImageEnhance.Contrast(image).enhance(v)),
    "equalise": (0, 1, lambda image, v: ImageOps.equalize(image)),
    "identity": (0, 1, lambda image, v: image),
    "posterise": (4, 8, lambda image, v: image.point(lambda p: p & (0xFF << (8 - int(v))))),
    "rotate": (-30, 30, lambda image, v: image.rotate(v, Image.Resampling.NEAREST, fillcolor=(0, 0, 0))),
    "sharpness": (0.05, 0.95, lambda image, v: ImageEnhance.Sharpness(image).enhance(v)),
    "shear_x": (-0.3, 0.3, lambda image, v: image.transform(image.size, AFFINE, (1, v, 0, 0, 1, 0))),
    "shear_y": (-0.3, 0.3, lambda image, v: image.transform(image.size, AFFINE, (1, 0, 0, v, 1, 0))),
    "solarise": (0, 256, lambda image, v: image.point(lambda p: p if p < v else 255 - p)),
    "translate_x": (
        -0.3,
        0.3,
        lambda image, v: image.transform(image.size, AFFINE, (1, 0, v * image.width, 0, 1, 0)),
    ),
    "translate_y": (
        -0.3,
        0.3,
        lambda image, v: image.transform(image.size, AFFINE, (1, 0, 0, 0, 1, v * image.height)),
    ),
}
"""Low and high end of the strength, and the operation by PIL alone."""


def picture(width, height, seed=0):
    """A coarse coloured pattern with noise, in 40 … 209, so that contrast and histograms leave room."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, float) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray((40 + noisy.clip(0, 255) * 0.66).astype(np.uint8))


def pixels(image):
    return np.asarray(image)


def ecdf_distance(values, low, high):
    """Kolmogorov and Smirnov's distance between values and the uniform distribution on [low, high]."""
    ranks = (np.sort(values) - low) / (high - low)
    assert ranks[0] >= 0
    assert ranks[-1] <= 1
    steps = np.arange(len(values) + 1) / len(values)
    return max((steps[1:] - ranks).max(), (ranks - steps[:-1]).max())


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (45, 30), (224, 224)], ids=str)
@pytest.mark.parametrize("name", PIL_SAYS)
def test_every_operation_is_pils(name, size):
    low, high, oracle = PIL_SAYS[name]
    image = picture(*size)
    before = pixels(image).copy()
    strengths = [low, high, *np.random.default_rng(1).uniform(low, high, 30).tolist()]
    changed = 0
    for strength in strengths:
        ours = OPERATIONS[name].apply(image, strength)
        assert np.array_equal(pixels(ours), pixels(oracle(image, strength))), strength
        assert (ours.mode, ours.size) == ("RGB", size)
        changed += not np.array_equal(pixels(ours), before)
    assert changed > 20 or name == "identity"
    assert np.array_equal(pixels(image), before)  # the weak view is made from the same image


def test_the_list_and_its_strengths():
    assert {name: (op.low, op.high) for name, op in OPERATIONS.items()} == {
        name: (low, high) for name, (low, high, _) in PIL_SAYS.items()
    }


def test_a_shear_and_a_translation_by_hand():
    """Where a pixel goes, without PIL: positive values look further right and down, so the image moves left and up."""
    image = Image.new("RGB", (20, 20))
    image.putpixel((10, 10), (255, 0, 0))
    lit = {
        name: np.argwhere(pixels(OPERATIONS[name].apply(image, 0.2))[..., 0]).tolist()
        for name in ("translate_x", "translate_y", "shear_x", "shear_y")
    }
    assert lit["translate_x"] == [[10, 6]]  # 0.2 of the width is 4 pixels
    assert lit["translate_y"] == [[6, 10]]
    assert lit["shear_x"] == [[10, 8]]  # 0.2 of 10 rows below the origin is 2 pixels
    assert lit["shear_y"] == [[8, 10]]


@pytest.fixture
def drawn(monkeypatch):
    """What 7,000 calls draw on a 40 x 20 image: names and strengths of the pairs, cut-outs' shares and centres."""
    pairs, cuts = [], []

    def recorder(name):
        return lambda image, strength: pairs.append((name, strength)) or image

    for name, (low, high, _) in list(OPERATIONS.items()):
        monkeypatch.setitem(OPERATIONS, name, Operation(low, high, recorder(name)))
    monkeypatch.setattr(views, "cut_out", lambda image, share, centre: cuts.append((share, *centre)) or image)
    torch.manual_seed(0)
    image, strong = Image.new("RGB", (40, 20)), StrongAugment()
    for _ in range(7000):
        strong(image)
    return pairs, np.array(cuts)


def test_operations_are_drawn_evenly_and_with_replacement(drawn):
    pairs, _ = drawn
    assert len(pairs) == 14_000
    names = np.array([name for name, _ in pairs])
    counts = {name: int((names == name).sum()) for name in OPERATIONS}
    # Binomial: 1,000 expected, standard deviation 30; five of them
    assert all(abs(count - 1000) < 152 for count in counts.values()), counts
    twice = int((names[::2] == names[1::2]).sum())
    assert abs(twice - 500) < 108  # one in 14, standard deviation 21.5


def test_strengths_are_uniform_and_independent(drawn):
    pairs, _ = drawn
    for name, (low, high, _) in PIL_SAYS.items():
        strengths = np.array([strength for found, strength in pairs if found == name])
        # 1.95 / sqrt(n) is passed by one uniform sample in 1,000
        assert ecdf_distance(strengths, low, high) < 1.95 / np.sqrt(len(strengths)), name
    ranks = np.array(
        [(strength - OPERATIONS[name].low) / (OPERATIONS[name].high - OPERATIONS[name].low)
         for name, strength in pairs]
    )  # fmt: skip
    assert abs(np.corrcoef(ranks[::2], ranks[1::2])[0, 1]) < 0.06  # five standard deviations


def test_cut_outs_are_drawn_uniformly(drawn):
    _, cuts = drawn
    bound = 1.95 / np.sqrt(len(cuts))
    assert ecdf_distance(cuts[:, 0], 0, 0.5) < bound
    # the releases' centres begin at 1, not at 0
    assert ecdf_distance(cuts[:, 1], 1, 40) < bound
    assert ecdf_distance(cuts[:, 2], 1, 20) < bound
    correlation = np.corrcoef(cuts.T)[np.triu_indices(3, 1)]
    assert (abs(correlation) < 0.06).all()


@pytest.mark.parametrize(
    ("share", "centre", "rows", "columns"),
    [
        (0.25, (16, 16), (12, 20), (12, 20)),  # 8 pixels, and the one where they end
        (0.25, (20, 10.9), (6, 14), (16, 24)),
        (0.25, (1, 2), (0, 8), (0, 8)),  # begins at the edge, and is whole
        (0.25, (32, 31), (27, 31), (28, 31)),  # ends at the edge
        (0.01, (16.5, 16.5), (16, 16), (16, 16)),  # smaller than a pixel: the one it touches
    ],
)
def test_where_a_cut_out_lies(share, centre, rows, columns):
    image = Image.new("RGB", (32, 32), (200, 0, 0))
    grey = (pixels(cut_out(image, share, centre)) == GREY).all(2)
    expected = np.zeros((32, 32), bool)
    expected[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1] = True
    assert np.array_equal(grey, expected)
    assert pixels(image).max(axis=(0, 1)).tolist() == [200, 0, 0]  # the image itself is left alone


def test_no_cut_out():
    image = picture(32, 32)
    assert cut_out(image, 0.0, (16, 16)) is image


@pytest.mark.parametrize("size", [(32, 32), (50, 30), (224, 224)], ids=str)
def test_a_cut_out_is_pils_rectangle(size):
    rng = np.random.default_rng(2)
    image = picture(*size)
    for _ in range(200):
        share, x, y = rng.uniform(0, 0.5), rng.uniform(1, size[0]), rng.uniform(1, size[1])
        side = share * size[0]
        left, top = int(max(0, x - side / 2)), int(max(0, y - side / 2))
        expected = image.copy()
        corners = (left, top, min(size[0], left + side), min(size[1], top + side))
        ImageDraw.Draw(expected).rectangle(corners, GREY)
        assert np.array_equal(pixels(cut_out(image, share, (x, y))), pixels(expected))


def test_strong_views_are_images_of_the_same_size_and_all_differ():
    torch.manual_seed(0)
    image = picture(45, 30)
    made = [StrongAugment()(image) for _ in range(100)]
    assert {(one.mode, one.size) for one in made} == {("RGB", (45, 30))}
    assert len({one.tobytes() for one in made}) == 100


def test_only_torchs_seed_matters():
    image, strong = picture(32, 32), StrongAugment()
    made = []
    for seed, others in ((3, 1), (3, 2), (4, 2)):
        torch.manual_seed(seed)
        random.seed(others)
        np.random.seed(others)  # noqa: NPY002 (the generator that the releases draw from)
        made.append([strong(image).tobytes() for _ in range(5)])
        assert random.random() == random.Random(others).random()  # nothing was drawn from it
    assert made[0] == made[1] != made[2]


def test_both_views_come_from_the_raw_image():
    seen = []
    image = picture(8, 8)
    make = TrainingViews((lambda one: seen.append(one) or one,), transforms.ToTensor(), True, None)
    weak, strong = make(image, Draw(0, 1, 0))
    assert torch.equal(weak, transforms.ToTensor()(image))
    assert not torch.equal(weak, strong)
    assert len(seen) == 2
    assert seen[0] is seen[1] is image


def test_views_are_cropped_and_flipped_independently(monkeypatch):
    """With the distortions off, both views are crops: equal only by chance, and each spread over all offsets."""
    monkeypatch.setattr(StrongAugment, "__call__", lambda self, image: image)
    column, row = np.meshgrid(np.arange(32), np.arange(32))
    image = Image.fromarray(np.stack([column, row, np.full((32, 32), 255)], 2).astype(np.uint8))
    make = DATASETS["cifar100"].training_views(2)
    mean, std = (
        torch.tensor(values)[:, None] for values in (data.source("cifar100").mean, data.source("cifar100").std)
    )
    found = []
    for index in range(600):
        for view in make(image, Draw(0, 1, index)):
            (left, right), (upper, _), _ = ((view[:, 16, 16:18] * std + mean) * 255).round().int().tolist()
            found.append((left, upper, right > left))
    weak, strong = np.array(found[::2]), np.array(found[1::2])
    same = (weak == strong).all(1).sum()
    assert same < 15  # 600 / 162 expected
    for view in (weak, strong):
        assert set(view[:, 1]) == set(range(12, 21))  # shifted by −4 … 4 rows
        assert 240 < view[:, 2].sum() < 360  # flipped half the time
    assert abs(np.corrcoef(weak[:, 1], strong[:, 1])[0, 1]) < 0.2


@pytest.mark.parametrize("workers", [0, 2])
def test_two_views_are_reproducible_from_the_seed(data_cfg, data_root, workers):
    cfg = data_cfg("glyphs100", data_root, method="MLKD", TRAIN_PER_CLASS=2, NUM_WORKERS=workers)

    def epoch(seed):
        cfg.SOLVER.SEED = seed
        train, *_ = get_dataset(cfg)
        batches = list(train)
        return tuple(torch.cat(parts) for parts in zip(*((*b[0], b[1], b[2]) for b in batches)))

    first, again, other = epoch(5), epoch(5), epoch(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    weak, strong, target, index = first
    assert sorted(index.tolist()) == list(range(200))
    assert torch.equal(target, index % 100)  # glyphs100 is interleaved
    for view, of_other_seed in ((weak, other[0]), (strong, other[1])):
        in_order, in_other_order = view[index.argsort()], of_other_seed[other[3].argsort()]
        assert (in_order != in_other_order).flatten(1).any(1).float().mean() > 0.9
    assert (weak != strong).flatten(1).any(1).float().mean() > 0.95


def test_the_weak_view_is_the_only_view_of_other_methods(data_cfg, data_root):
    """Whose numbers do not depend on the strong one."""
    samples = []
    for method in ("KD", "CRLD"):
        train, *_ = get_dataset(data_cfg("glyphs100", data_root, method=method))
        samples.append(train.dataset[3, 17])
    (one, *rest), ((weak, strong), *rest_of_two) = samples
    assert torch.equal(one, weak)
    assert not torch.equal(weak, strong)
    assert rest == rest_of_two == [17, 17]


@pytest.fixture(scope="module")
def roots(tmp_path_factory, data_root, cifar_root, imagenet_folders, tiny_root):
    imagenet = imagenet_folders(tmp_path_factory.mktemp("imagenet"), 1000)
    return {"glyphs100": data_root, "cifar100": cifar_root, "imagenet": imagenet, "tiny_imagenet": tiny_root}


@pytest.mark.parametrize(
    ("kind", "side"), [("glyphs100", 32), ("cifar100", 32), ("imagenet", 224), ("tiny_imagenet", 64)]
)
def test_batches_of_two_views_from_every_source(data_cfg, roots, kind, side):
    cfg = data_cfg(kind, roots[kind], method="MLKD", TEST={"BATCH_SIZE": 6})
    cfg.SOLVER.BATCH_SIZE = 8
    train, test, _, classes = get_dataset(cfg)
    image, target, index = next(iter(train))
    assert isinstance(image, list)
    for view in image:
        assert view.shape == (8, 3, side, side)
        assert view.dtype == torch.float32
        assert torch.isfinite(view).all()
    assert target.shape == index.shape == (8,)
    assert target.dtype == index.dtype == torch.int64
    assert 0 <= target.min() <= target.max() < classes
    for loader in (test, get_test_set(cfg)[0]):  # tests always have one
        image, target = next(iter(loader))
        assert image.shape == (6, 3, side, side)
    sent = pickle.loads(pickle.dumps(train.dataset))  # what workers that are not forked get
    assert len(sent[0][0]) == 2
    cfg.DISTILLER.TYPE = "KD"
    one_view, *_ = get_dataset(cfg)
    assert next(iter(one_view))[0].shape == (8, 3, side, side)


@pytest.mark.parametrize("kind", ["cifar100", "glyphs100", "imagenet", "tiny_imagenet"])
def test_the_strong_view_begins_with_the_weak_ones_operations(kind, monkeypatch):
    """Drawn anew: without its own distortions it is another weak view of the image."""
    monkeypatch.setattr(StrongAugment, "__call__", lambda self, image: image)
    source = DATASETS[kind]
    make, image = source.training_views(2), picture(source.side, source.side)
    two = [make(image, Draw(0, 1, index)) for index in range(12)]
    assert make.weak == source.augmentation
    assert sum(torch.equal(weak, strong) for weak, strong in two) < 3
    assert all(weak.shape == strong.shape == (3, source.side, source.side) for weak, strong in two)


@pytest.mark.parametrize(
    ("method", "base", "expected"),
    [
        ("MLKD", "KD", 2),
        ("CRLD", "KD", 2),
        ("DeepKD", "MLKD", 2),
        ("DeepKD", "CRLD", 2),
        ("DeepKD", "KD", 1),
        ("KD", "MLKD", 1),
        ("NONE", "KD", 1),
    ],
)
def test_the_method_decides_how_many_views(data_cfg, data_root, method, base, expected):
    train, *_ = get_dataset(data_cfg("glyphs100", data_root, method=method, base=base))
    image, _, _ = train.dataset[0]
    assert (len(image) if isinstance(image, list) else 1) == expected
