"""Batches made on the device against torchvision's functions, the worker pipeline, and whole runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import functional as F
from yacs.config import CfgNode

from deepkd_plugin import data as data_sets
from deepkd_plugin import device
from deepkd_plugin.accuracy import evaluate
from deepkd_plugin.data import DATASETS, Source, draws, get_dataset, get_test_set, resident, source
from deepkd_plugin.data.arrays import Passes
from deepkd_plugin.data.resident import ResidentLoader, batchwise
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts.builtin.models import cifar_model_dict
from deepkd_plugin.run import checkpoint, record
from deepkd_plugin.trainer import Trainer

SIDES = {"cifar100": 32, "glyphs100": 32, "tiny_imagenet": 64}


@pytest.fixture(scope="module")
def roots(data_root, cifar_root, tiny_root):
    return {"cifar100": cifar_root, "glyphs100": data_root, "tiny_imagenet": tiny_root}


def noise(count, side):
    return np.random.default_rng(0).integers(1, 256, (count, side, side, 3), dtype=np.uint8)


def loader_of(kind, images, batch_size=64, seed=0):
    """A training loader of a data set's distortions over other images; image i is of class i % 7."""
    source = DATASETS[kind]
    at = device.pick()
    targets = torch.arange(len(images), device=at) % 7
    pixels = torch.from_numpy(images).to(at)
    sampler = Passes(np.arange(len(images)), seed)
    return ResidentLoader(images, pixels, targets, batch_size, source.mean, source.std, source.augmentation, sampler)


def by_hand(kind, pixels, drawn):
    """One image by torchvision's functions: the same draws through PIL, ToTensor and Normalize."""
    image = Image.fromarray(pixels)
    for distortion, value in zip(DATASETS[kind].augmentation, drawn):
        name = type(distortion).__name__
        if name == "RandomCrop":
            top, left = value.tolist()
            image = F.crop(F.pad(image, 4), top + 4, left + 4, 32, 32)
        elif name == "RandomRotation":
            image = F.rotate(image, value.item())
        elif value:
            image = F.hflip(image)
    return F.normalize(F.to_tensor(image), DATASETS[kind].mean, DATASETS[kind].std)


@pytest.mark.parametrize("kind", SIDES)
def test_equal_draws_give_torchvisions_pixels(kind):
    images = noise(300, SIDES[kind])
    loader = loader_of(kind, images)
    numbers = torch.rand(300, resident.count_numbers(loader.distortions), dtype=torch.float64).to(device.pick())
    drawn = resident.draw(loader.distortions, numbers)
    index = torch.randperm(300, device=device.pick())
    made = loader.normalise(loader.distort(index, drawn)).cpu()
    assert (made.dtype, made.shape) == (torch.float32, (300, 3, SIDES[kind], SIDES[kind]))
    assert made.is_contiguous()
    for place, number in enumerate(index.tolist()):
        expected = by_hand(kind, images[number], [values[..., place] for values in drawn])
        assert torch.equal(made[place], expected)


def test_every_corner_of_the_crop_and_both_directions():
    """The extreme draws, which a random test may miss."""
    images = noise(162, 32)
    at = device.pick()
    shifts = torch.cartesian_prod(*2 * [torch.arange(-4, 5)]).repeat(2, 1).T
    flips = torch.arange(162) < 81
    loader = loader_of("cifar100", images)
    made = loader.normalise(loader.distort(torch.arange(162, device=at), [shifts.to(at), flips.to(at)]))
    for i in range(162):
        assert torch.equal(made[i].cpu(), by_hand("cifar100", images[i], [shifts[:, i], flips[i]]))


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (45, 30)], ids=str)
def test_a_rotation_is_pils(size):
    width, height = size
    pixels = np.random.default_rng(1).integers(1, 256, (height, width, 3), dtype=np.uint8)
    distortions = DATASETS["tiny_imagenet"].augmentation[:1]
    images = torch.from_numpy(pixels)[None]
    loader = ResidentLoader(images, images, torch.zeros(1), 1, (0.0,) * 3, (1.0,) * 3, distortions)
    angles = torch.cat([torch.empty(1000).uniform_(-20, 20), torch.tensor([-20.0, 0.0, 20.0, 1e-4])])
    turned = loader.distort(torch.zeros(len(angles), dtype=torch.int64), [angles]).permute(0, 2, 3, 1).numpy()
    for angle, image in zip(angles.tolist(), turned):
        assert np.array_equal(image, np.asarray(F.rotate(Image.fromarray(pixels), angle))), angle


def cells(images):
    """How often each (rows, columns, flipped) is seen, in images whose pixels hold their row and column."""
    mean, std = (torch.tensor(values)[:, None] for values in (DATASETS["cifar100"].mean, DATASETS["cifar100"].std))
    found = ((images[:, :, 16, 15:17] * std + mean) * 255).round().int()
    upper, left, right = found[:, 1, 0], found[:, 0, 0], found[:, 0, 1]
    flipped = right < left
    down, across = upper - 16, torch.where(flipped, right - 15, left - 15)
    assert max(down.abs().max(), across.abs().max()) == 4
    return torch.bincount((down + 4) * 18 + (across + 4) * 2 + flipped, minlength=162)


def test_crops_and_flips_are_distributed_as_torchvisions():
    """Chi-squared over the 162 cells, which also sees rows, columns and flips that depend on each other."""
    row, column = np.mgrid[:32, :32]
    image = np.stack([column, row, np.full((32, 32), 255)], 2).astype(np.uint8)
    count = 8100
    ours = cells(torch.cat([batch[0] for batch in loader_of("cifar100", np.stack([image] * count), 500)]).cpu())
    source = DATASETS["cifar100"]
    torchvisions = transforms.Compose(
        [*source.augmentation, transforms.ToTensor(), transforms.Normalize(source.mean, source.std)]
    )
    torch.manual_seed(0)
    theirs = cells(torch.stack([torchvisions(Image.fromarray(image)) for _ in range(count)]))
    for observed in (ours, theirs):
        assert observed.sum() == count
        statistic = (observed - 50).square().sum() / 50
        assert statistic < 161 + 5 * 18  # degrees of freedom, and five standard deviations
    assert abs(ours[1::2].sum() / count - 0.5) < 0.03


def test_angles_are_uniform_and_flips_are_fair():
    distortions = batchwise(DATASETS["tiny_imagenet"].augmentation, 64, 64)
    numbers = draws.uniforms(0, 1, torch.arange(10_000), draws.WEAK, 2)
    angles, flips = resident.draw(distortions, numbers)
    expected = torch.linspace(-20, 20, 10_000)
    assert (angles.sort().values - expected).abs().max() < 40 * 0.02  # Kolmogorov and Smirnov's distance
    assert abs(flips.float().mean() - 0.5) < 0.02


def test_a_distortion_without_a_counterpart():
    with pytest.raises(UserError, match="RandomResizedCrop.*, which is not made on a device for images of 64 x 64"):
        batchwise(DATASETS["imagenet"].augmentation[:1], 64, 64)
    with pytest.raises(UserError, match="RandomCrop.* images of 64 x 64"):
        batchwise(DATASETS["cifar100"].augmentation[:1], 64, 64)


def test_glyphs_are_never_mirrored():
    assert [type(d) for d in loader_of("glyphs100", noise(2, 32)).distortions] == [resident.Crop]


def test_each_pass_is_another_permutation_with_the_last_smaller_batch():
    images = noise(150, 32)
    loader = loader_of("cifar100", images)
    orders = []
    for _ in range(2):
        batches = list(loader)
        assert [len(batch[0]) for batch in batches] == [64, 64, 22]
        assert len(loader) == 3
        _, target, index = (torch.cat(parts) for parts in zip(*batches))
        assert (target.dtype, index.dtype) == (torch.int64, torch.int64)
        assert sorted(index.tolist()) == list(range(150))
        assert torch.equal(target, index % 7)
        orders.append(index)
    assert (orders[0] == orders[1]).sum() < 10
    assert loader.batch_size == 64
    assert len(loader_of("cifar100", images[:128])) == 2


def test_a_pass_follows_from_the_seed_alone():
    """Not from what a training step draws, before it or between two batches."""

    def one_pass(seed, drawn):
        parts = []
        for batch in loader_of("cifar100", noise(150, 32), seed=seed):
            torch.rand(drawn)
            parts.append(batch)
        return [torch.cat(part) for part in zip(*parts)]

    first, again, other = one_pass(3, 0), one_pass(3, 5), one_pass(4, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[2], other[2])


@pytest.mark.parametrize("holdout", [0.0, 0.34])
@pytest.mark.parametrize("kind", SIDES)
def test_test_batches_are_the_workers_bit_for_bit(data_cfg, roots, kind, holdout):
    ours, theirs = (
        get_test_set(data_cfg(kind, roots[kind], HOLDOUT=holdout, PIPELINE=pipeline))[0]
        for pipeline in ("device", "workers")
    )
    assert (len(ours), ours.batch_size) == (len(theirs), 50)
    assert len(ours.dataset) == len(theirs.dataset)
    for batch, expected in zip(ours, theirs):
        assert len(batch) == 2
        for ours_part, part in zip(batch, expected):
            assert ours_part.dtype == part.dtype
            assert torch.equal(ours_part.cpu(), part)


@pytest.mark.parametrize(
    ("kind", "asked", "on_gpu"),
    [
        *(("cifar100", 64, 1000), ("glyphs100", 250, 1000), ("tiny_imagenet", 64, 250)),
        *(("cifar100", 2000, 2000), ("imagenet", 64, 64)),
    ],
)
def test_small_images_are_tested_in_large_batches_on_a_gpu(data_cfg, monkeypatch, kind, asked, on_gpu):
    cfg = data_cfg(kind, "nowhere", TEST={"BATCH_SIZE": asked})
    assert source(kind).test_batch(cfg) == asked
    monkeypatch.setattr(device, "pick", lambda: torch.device("cuda"))
    assert source(kind).test_batch(cfg) == on_gpu


def test_a_loader_takes_the_size_of_a_test_from_its_set(data_cfg, data_root, monkeypatch):
    monkeypatch.setattr(Source, "test_batch", lambda self, cfg: 77)
    for pipeline in ("device", "workers"):
        cfg = data_cfg("glyphs100", data_root, PIPELINE=pipeline)
        assert get_test_set(cfg)[0].batch_size == 77
        assert get_dataset(cfg)[0].batch_size == cfg.SOLVER.BATCH_SIZE


@pytest.mark.parametrize("kind", SIDES)
def test_training_sets_are_the_workers(data_cfg, roots, kind):
    """The same images under the same indices with TRAIN_PER_CLASS and HOLDOUT, and the same single samples."""
    node = {"TRAIN_PER_CLASS": 1, "HOLDOUT": 0.34}
    (ours, _, count, classes), (theirs, *rest) = (
        get_dataset(data_cfg(kind, roots[kind], PIPELINE=pipeline, **node)) for pipeline in ("device", "workers")
    )
    assert [count, classes] == rest[1:] == [len(theirs.dataset), len(theirs.dataset)]
    assert len(ours.dataset) == count
    assert len(ours) == len(theirs)
    plain = ours.normalise(ours.images).cpu()
    transform = DATASETS[kind].test_transform()
    arrays = theirs.dataset.images.pixels(theirs.dataset.chosen)
    for i in (0, 57, count - 1):
        assert torch.equal(plain[i], transform(Image.fromarray(arrays[i])))
        sample, expected = ours.dataset[2, i], theirs.dataset[2, i]
        assert torch.equal(sample[0], expected[0])
        assert sample[1:] == expected[1:] == (ours.targets[i], i)
    image, target, index = next(iter(ours))
    assert image.device == target.device == index.device == ours.images.device
    assert ours.images.device.type == device.pick().type
    assert torch.equal(target, ours.targets[index])


def test_both_pipelines_give_a_network_the_same_accuracy(data_cfg, data_root):
    torch.manual_seed(0)
    student = cifar_model_dict["resnet8"][0](num_classes=100)
    network = device.place(Images(student), device.pick(), False)
    solver = CfgNode({"CHANNELS_LAST": True, "AMP": False})
    results = [
        evaluate(
            network,
            get_test_set(data_cfg("glyphs100", data_root, HOLDOUT=0.02, PIPELINE=pipeline))[0],
            device.pick(),
            solver,
        )
        for pipeline in ("device", "workers")
    ]
    assert results[0] == results[1]
    assert results[0]["test_loss"] > 0


class Images(nn.Module):
    """A network that is called as distillers are."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        return self.network(image)[0]


@pytest.mark.parametrize(
    ("kind", "method", "base", "reason"),
    [
        ("cifar100", "CRLD", "KD", "DISTILLER.TYPE CRLD: the strong view is drawn by PIL's operations"),
        ("cifar100", "MLKD", "KD", "DISTILLER.TYPE MLKD: the strong view is drawn by PIL's operations"),
        ("cifar100", "DeepKD", "CRLD", "DeepKD.BASE CRLD: the strong view is drawn by PIL's operations"),
        ("cifar100", "CRD", "KD", "DISTILLER.TYPE CRD: its contrast indices are drawn image by image"),
        (
            "imagenet",
            "KD",
            "KD",
            "DATASET.TYPE imagenet: its images are of many sizes, and too many for a device",
        ),
    ],
)
def test_what_the_device_cannot_make_is_refused_before_anything_is_read(data_cfg, tmp_path, kind, method, base, reason):
    with pytest.raises(UserError) as caught:
        get_dataset(data_cfg(kind, tmp_path / "none", method, base, PIPELINE="device"))
    assert str(caught.value) == f"config: DATASET.PIPELINE is 'device'; it must be 'workers' with {reason}"


def test_refusals_on_the_command_line(train):
    for options, expected in (
        (
            ("DATASET.PIPELINE", "gpu"),
            "command line: DATASET.PIPELINE is 'gpu'; it must be one of auto, workers, device",
        ),
        (
            ("DATASET.PIPELINE", "device", "DeepKD.BASE", "MLKD"),
            "command line: DATASET.PIPELINE is 'device'; it must be 'workers' with DeepKD.BASE MLKD: the strong",
        ),
    ):
        code, _, err = train("deepkd", *options)
        (line,) = err.strip().splitlines()
        assert code == 2
        assert expected in line
    assert not train.folder.exists()


def test_a_run_on_the_device_resumes_bitwise(train, monkeypatch):
    options = ("DATASET.PIPELINE", "device")
    assert train("vanilla", *options, "EXPERIMENT.NAME", "whole")[0] == 0
    original = Trainer.losses_by_stream
    finished = []

    def stop(self, losses):
        finished.append(self.epoch)
        if finished.count(1) == 3:  # the third step of epoch 2
            raise KeyboardInterrupt
        return original(self, losses)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "losses_by_stream", stop)
        code, _, err = train("vanilla", *options)
        assert (code, "interrupted in epoch 2" in err) == (130, True)
    assert train("vanilla", *options, flags=["--resume"])[0] == 0
    ends = [checkpoint.load(train.folder.parent / n / "student_latest", "test")["model"] for n in ("whole", "run")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    code, _, err = train("vanilla", flags=["--resume"])
    assert code == 2
    assert "DATASET.PIPELINE was 'device', is 'auto'" in err


def test_the_pipeline_is_part_of_what_a_run_computes(data_cfg):
    """auto is what older runs have: which one it chooses is the machine's, and a plan may be another machine's."""
    hashes = [record.config_hash(data_cfg("cifar100", "x", PIPELINE=p)) for p in ("workers", "device", "auto")]
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A stand-in: the machine says that it has one, and what is put there stays where it is."""
    monkeypatch.setattr(device, "pick", lambda: torch.device("cuda"))
    to = torch.Tensor.to
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.Tensor, "to", lambda self, at, *rest, **how: self if at == cuda else to(self, at))


@pytest.mark.parametrize(
    ("kind", "method", "base", "chosen"),
    [
        *((kind, "KD", "KD", "device") for kind in SIDES),
        *((("cifar100", "DeepKD", "DKD", "device"), ("cifar100", "NONE", "KD", "device"))),
        *((("cifar100", "MLKD", "KD", "workers"), ("cifar100", "DeepKD", "CRLD", "workers"))),
        *((("cifar100", "CRD", "KD", "workers"), ("imagenet", "KD", "KD", "workers"))),
        ("coco", "KD", "KD", "workers"),
    ],
)
def test_auto_chooses_the_device_on_a_gpu_for_what_can_be_made_there(data_cfg, monkeypatch, kind, method, base, chosen):
    cfg = data_cfg(kind, "x", method, base, PIPELINE="auto")
    monkeypatch.setattr(device, "pick", lambda: torch.device("cpu"))
    assert data_sets.pipeline(cfg) == "workers"
    monkeypatch.setattr(device, "pick", lambda: torch.device("cuda"))
    assert data_sets.pipeline(cfg) == chosen
    for asked in ("workers", "device"):
        assert data_sets.pipeline(data_cfg(kind, "x", method, base, PIPELINE=asked)) == asked


def test_auto_leaves_other_distortions_to_the_workers(data_cfg, monkeypatch):
    monkeypatch.setattr(device, "pick", lambda: torch.device("cuda"))
    own = replace(DATASETS["cifar100"], augmentation=(transforms.ColorJitter(0.5),))
    monkeypatch.setitem(DATASETS, "cifar100", own)
    assert data_sets.pipeline(data_cfg("cifar100", "x", PIPELINE="auto")) == "workers"


def test_the_loaders_of_auto(data_cfg, data_root, request):
    cfg = data_cfg("glyphs100", data_root, PIPELINE="auto")
    assert device.pick().type != "cpu" or {type(loader) for loader in get_dataset(cfg)[:2]} == {DataLoader}
    request.getfixturevalue("on_a_gpu")
    assert {type(loader) for loader in get_dataset(cfg)[:2]} == {ResidentLoader}
    cfg.DISTILLER.TYPE = "MLKD"
    assert {type(loader) for loader in get_dataset(cfg)[:2]} == {DataLoader}


@pytest.mark.parametrize("before", ["workers", "auto"])
def test_a_run_goes_on_under_auto_on_a_gpu_as_it_began_with_workers(train, monkeypatch, before):
    """And the other way round. The images are the same, so this changes nothing and is not asked about."""
    now = {"workers": "auto", "auto": "workers"}[before]
    short = ("SOLVER.EPOCHS", "2")
    assert train("vanilla", "DATASET.PIPELINE", before, *short)[0] == 0
    makes = []
    original = data_sets.pipeline
    monkeypatch.setattr(data_sets, "pipeline", lambda cfg: makes.append(original(cfg)) or "device")
    assert train("vanilla", "DATASET.PIPELINE", now, "SOLVER.EPOCHS", "3", flags=["--resume"])[0] == 0
    assert makes
    run = record.read_run(train.folder)
    assert run["finished"]
    assert set(run["resumed"][0].get("changed", {})) <= {"SOLVER.EPOCHS"}


def test_mdistillers_own_trainer_takes_the_batches(mdistiller, data_root, tmp_path):
    cfg = mdistiller.cfg.clone()
    cfg.DATASET.update({"TYPE": "glyphs100", "ROOT": str(data_root), "PIPELINE": "device"})
    cfg.DATASET.update({"TRAIN_PER_CLASS": 1, "HOLDOUT": 0.02})
    cfg.LOG.PREFIX = str(tmp_path)
    train_loader, test_loader, *_ = get_dataset(cfg)
    student = mdistiller.cifar_models["resnet8"][0](num_classes=100)
    distiller = device.place(mdistiller.distillers["NONE"](student), device.pick(), False)
    trainer = mdistiller.trainers["base"]("run", nn.DataParallel(distiller), train_loader, test_loader, cfg)
    trainer.train_epoch(1)
    assert (tmp_path / "run" / "student_latest").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", SIDES)
def test_no_batch_waits_for_the_device(kind):
    batches = iter(loader_of(kind, noise(300, SIDES[kind])))
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(batches)) == 4
    finally:
        torch.cuda.set_sync_debug_mode("default")
