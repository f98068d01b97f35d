"""A few views of an image and some classes' logits: what is exact, what the rest is bounded by, and runs with them."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import same
from torchvision import transforms
from torchvision.transforms import v2

from deepkd_plugin.commands import cli
from deepkd_plugin.data import DATASETS, Source, get_dataset
from deepkd_plugin.data.arrays import ArrayDataset
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts.networks import trained_network
from deepkd_plugin.hosts.registry import find_host
from deepkd_plugin.launch import read_config
from deepkd_plugin.losses import decoupled_kd, kd_divergence
from deepkd_plugin.run.checkpoint import fingerprint
from deepkd_plugin.teacher_logits import open_logits
from deepkd_plugin.teacher_logits.record import Record
from deepkd_plugin.teacher_logits.table import Table
from deepkd_plugin.teacher_logits.tables import _fingerprint, _fingerprint_with_labels, share_of

KD = "configs/glyphs100/res20_res8/kd.yaml"
STORED = ("DISTILLER.TEACHER_LOGITS", "stored")
ALL = (*STORED, "DISTILLER.LOGITS_DTYPE", "float32")  # 100 classes, all of glyphs100's


@pytest.mark.parametrize("seed", range(8))
def test_some_classes_are_exact_and_the_rest_is_bounded(seed):
    """In float64, against the losses on all logits: docs/teacher_logits.md has the bound."""
    draw = np.random.default_rng(seed)
    classes, kept = 60, int(draw.integers(1, 59))
    t, scale = float(draw.choice([1.0, 2.0, 4.0])), 10 ** draw.uniform(-1, 1)
    teacher = draw.normal(size=(40, classes)).astype(np.float32) * np.float32(scale)
    target = draw.integers(classes, size=40)
    form = Record(classes, "float32", kept, t)
    content, held = form.pack(teacher, target)
    assert held.all()
    assert content.dtype.itemsize == 4 + kept * 6
    assert (content["classes"] == target[:, None]).any(1).all()
    given = form.unpack(content)
    is_kept = np.zeros(given.shape, bool)
    np.put_along_axis(is_kept, content["classes"].astype(int), True, 1)
    assert np.array_equal(given[is_kept], teacher[is_kept])
    z, y, labels = (torch.tensor(one, dtype=torch.float64) for one in (teacher, given, target))
    student = torch.tensor(draw.normal(size=z.shape) * scale, requires_grad=True)
    p, q = (torch.softmax(logits / t, 1) for logits in (z, y))
    rest, inside = torch.tensor(~is_kept), torch.tensor(is_kept)
    assert (p - q)[inside].abs().max() < 1e-5  # the rest's logit is kept in float32
    true, ours = (kd_divergence(student, logits, t) for logits in (z, y))
    mass = (p * rest).sum(1)

    def spread(logits):
        return logits.masked_fill(~rest, -torch.inf).amax(1) - logits.masked_fill(~rest, torch.inf).amin(1)

    bound = mass * spread(z) * (spread(z) + 2 * spread(student)) / 8
    assert ((ours - true).abs() <= bound + 1e-4 * (1 + true)).all()
    one, other = (torch.autograd.grad(loss.sum(), student)[0] for loss in (true, ours))
    assert (one - other)[inside].abs().max() < 1e-5 * t
    assert ((one - other).abs().sum(1) <= 2 * t * mass + 1e-4).all()
    whole, part = (decoupled_kd(student, logits, labels.long(), t) for logits in (z, y))
    assert torch.allclose(whole.tckd, part.tckd, atol=1e-3, rtol=1e-4)
    assert torch.allclose(whole.teacher_target_prob, part.teacher_target_prob, atol=1e-5)
    if kept > 1:
        masked = [decoupled_kd(student, logits, labels.long(), t, kept - 1).nckd for logits in (z, y)]
        assert torch.equal(*masked)


def test_what_some_classes_cannot_hold_is_said():
    logits = np.zeros((3, 5), np.float32)
    logits[0, 1], logits[1, 2] = -np.inf, 1e5
    assert Record(5, "float16", 2).pack(logits, np.zeros(3, int))[1].tolist() == [False, False, True]
    assert Record(5, "float16").pack(logits, None)[1].tolist() == [True, False, True]
    assert Record(70_000, "float16", 2).type.itemsize == 4 + 2 * (2 + 4)


@pytest.mark.parametrize("method", ["kd", "crld"])
def test_with_a_view_for_each_epoch_a_run_is_the_one_without(learn, method):
    """All classes in float32, and the views are the epochs' own of the same seed."""
    plain, _ = learn(method)
    stored, shares = learn(method, *ALL)
    assert shares == [1, 1]
    assert same(plain, stored)
    again, shares = learn(method, *ALL)
    assert shares == [0, 0]
    assert same(plain, again)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_run_does_not_depend_on_what_is_there(learn, train, dtype):
    """One view, which the second epoch sees again; other seeds share it; both pipelines make its pixels."""
    some = (*STORED, "DISTILLER.LOGITS_K", "70", "DISTILLER.LOGITS_VIEWS", "1", "DISTILLER.LOGITS_DTYPE", dtype)
    first, shares = learn("deepkd_dkd", *some)
    assert shares == [1, 0]
    full, shares = learn("deepkd_dkd", *some, "DATASET.PIPELINE", "device")
    assert shares == [0, 0]
    assert same(first, full)
    closed, shares = learn("deepkd_dkd", *some, "DISTILLER.LOGITS_DIR", "/dev/null/closed")
    assert shares == [1, 1]
    assert same(first, closed)
    learn("deepkd_dkd", *some, "LOG.SAVE_CHECKPOINT_FREQ", "1")
    (train.folder / "epoch_1").rename(train.folder / "latest")
    resumed, _ = learn("deepkd_dkd", *some, "LOG.SAVE_CHECKPOINT_FREQ", "1", flags=("--resume",))
    assert same(first, resumed)
    assert learn("deepkd_dkd", *some, "SOLVER.SEED", "1")[1] == [0, 0]


def test_a_stored_table_of_something_else_is_refused(train, tmp_path):
    some = (*STORED, "DISTILLER.LOGITS_K", "7", "DISTILLER.LOGITS_DIR")
    assert train("kd", *some, str(tmp_path))[0] == 0
    (path,) = tmp_path.glob("*.logits")
    for name, value, said in (
        ("DISTILLER.LOGITS_K", "8", "kept is 7, not 8"),
        ("DISTILLER.LOGITS_SEED", "3", "seed is 0, not 3"),
        ("DISTILLER.LOGITS_VIEWS", "2", "views is 4, not 2"),
        ("KD.TEMPERATURE", "2", "temperature is 4.0, not 2.0"),
        ("DISTILLER.TEACHER_LOGITS", "table", "seed is 0, not None"),
    ):
        code, _, err = train("kd", *some, str(path), name, value, flags=("--overwrite",))
        assert code == 2
        assert said in err


@pytest.mark.parametrize(
    ("file", "options", "said"),
    [
        (KD, ("DISTILLER.LOGITS_K", "-1"), "LOGITS_K is -1; it must be a whole number from 0"),
        (KD, ("DISTILLER.LOGITS_VIEWS", "0"), "LOGITS_VIEWS is 0; it must be a whole number from 1"),
        (
            KD,
            ("DISTILLER.LOGITS_K", "99", "EXPERIMENT.LOGIT_STAND", "True"),
            "0, which keeps all 100 classes, with EX",
        ),
        (KD, ("DISTILLER.LOGITS_K", "9", "DISTILLER.ENTROPY_WEIGHT", "formula"), "classes, with DISTILLER.ENTROPY_WEI"),
        (KD, ("DISTILLER.LOGITS_K", "9", "DISTILLER.TYPE", "RLD"), "DISTILLER.TYPE RLD, which reads logits at several"),
        (KD.replace("kd.", "crld."), ("DISTILLER.LOGITS_K", "9"), "DISTILLER.TYPE CRLD, which reads logits at several"),
        (KD.replace("kd.", "deepkd_mlkd."), ("DISTILLER.LOGITS_K", "9"), "DeepKD.BASE MLKD, which reads logits at sev"),
    ],
)
def test_what_cannot_be_stored_is_refused(file, options, said):
    with pytest.raises(UserError) as refused:
        read_config(find_host(), file, (*STORED, *options))
    assert said in str(refused.value)


def test_a_mask_beyond_what_is_kept_is_refused():
    """glyphs100's keeps up to 98 classes beside the target; then all 99, which needs none of their order."""
    file = KD.replace("kd.", "deepkd.")
    with pytest.raises(UserError, match=r"LOGITS_K is 98; it must be 0, or above 98: DeepKD.MASK keeps so many"):
        read_config(find_host(), file, (*STORED, "DISTILLER.LOGITS_K", "98", "SOLVER.EPOCHS", "1000"))
    read_config(find_host(), file, (*STORED, "DISTILLER.LOGITS_K", "99", "SOLVER.EPOCHS", "1000"))
    read_config(find_host(), file, (*STORED, "DISTILLER.LOGITS_K", "9", "DeepKD.MASK.TYPE", "none"))


def test_a_mask_by_mass_needs_all_classes():
    file, mask = KD.replace("kd.", "deepkd."), ("DeepKD.MASK.TYPE", "top_p")
    said = "LOGITS_K is 98; it must be 0, which keeps all 100 classes, with DeepKD.MASK.TYPE top_p: it may ask for any"
    with pytest.raises(UserError, match=said):
        read_config(find_host(), file, (*STORED, "DISTILLER.LOGITS_K", "98", *mask))
    read_config(find_host(), file, (*STORED, "DISTILLER.LOGITS_K", "0", *mask))


def test_what_is_computed_of_it():
    cfg, _ = read_config(find_host(), KD, (*STORED, "SOLVER.EPOCHS", "12"))
    assert share_of(cfg, 24) == 4 / 24


@pytest.fixture(params=[transforms, v2], ids=["PIL", "bytes"])
def folders(request, monkeypatch, tmp_path):
    """A set of image files of many sizes with a random resized crop, and the words of a run on it."""
    kind = request.param
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for n in range(40):
            pixels = noise.integers(0, 256, (20 + n % 7, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{n:02}.png")

    def read(root, split):
        return [f"{tmp_path}/{split}/{n:02}.png" for n in range(40)], [n % 100 for n in range(40)]

    crop = (kind.RandomResizedCrop(16), kind.RandomHorizontalFlip())
    resizing = (kind.Resize((16, 16)),)
    parts = {"side": 16, "mean": (0.5,) * 3, "std": (0.2,) * 3, "augmentation": crop, "resizing": resizing}
    noisy = Source(read, num_classes=100, train=40, test=40, small=False, **parts)
    monkeypatch.setitem(DATASETS, "glyphs100", noisy)
    logits = ("DISTILLER.LOGITS_DIR", str(tmp_path / "logits"), "DISTILLER.LOGITS_K", "9")
    return ["--cfg", KD, *STORED, *logits, "DATASET.ROOT", str(tmp_path), "SOLVER.BATCH_SIZE", "16"]


def test_processes_fill_their_shares_of_a_set_of_files(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["cache", "fill", *folders]) == 2  # without a number it would fill the first's share
    assert "WORLD_SIZE is 2 and RANK, LOCAL_RANK is missing" in capsys.readouterr().err
    for rank, count in (("1", 52), ("0", 160)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.main(["cache", "fill", *folders]) == 0, capsys.readouterr().err
        (path,) = (tmp_path / "logits").iterdir()
        assert list(Table.open(path).counts())[-1] == (160, count, 0)
    out = capsys.readouterr().out
    assert "40 images x 4 views x 44 bytes: up to 0.0 MB" in out
    assert "40 images x 4 views x 9 of 100 classes at temperature 4 (seed 0) in float16; about 100% filled" in out
    whole = path.read_bytes()
    path.unlink()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["cache", "fill", *folders, "DATASET.NUM_WORKERS", "0"]) == 0
    assert path.read_bytes() == whole
    content = bytearray(whole)
    content[5000] ^= 1
    path.write_bytes(content)
    assert cli.main(["cache", "check", str(path)]) == 1
    assert cli.main(["cache", "fill", *folders]) == 0
    assert cli.main(["cache", "check", str(path)]) == 0
    for rank in ("2", "x"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["cache", "fill", *folders]) == 2
    assert "as torchrun sets them" in capsys.readouterr().err


def test_a_run_finds_its_own_views_in_what_was_filled(folders):
    """A batch of each epoch is compared with the teacher, too."""
    assert cli.main(["cache", "fill", *folders]) == 0
    host = find_host()
    cfg, _ = read_config(host, KD, folders[2:])
    weights = ("glyphs100", "resnet20", 100, cfg.DISTILLER.TEACHER_WEIGHTS, "DISTILLER.TEACHER_WEIGHTS")
    teacher, loader = trained_network(host, *weights).eval(), get_dataset(cfg)[0]
    image = next(iter(loader))[0]
    logits = open_logits(cfg, teacher, fingerprint(teacher), loader, image)
    for epoch in (1, 2, 6):
        loader.sampler.set_epoch(epoch)
        for image, _, index in loader:
            logits(image, index, epoch)
        assert logits.checked == epoch
    assert logits.share_computed() == 0
    logits.close()


def test_files_and_labels_are_told_apart(folders, tmp_path):
    images = DATASETS["glyphs100"].load(read_config(find_host(), KD, ())[0].DATASET, "train")
    first = _fingerprint_with_labels(images)
    assert _fingerprint_with_labels(images) == first
    images.targets[3] += 1
    assert _fingerprint_with_labels(images) != first
    images.targets[3] -= 1
    (tmp_path / "train" / "05.png").write_bytes(b"another")
    assert _fingerprint_with_labels(images) != first


def test_images_are_the_same_however_they_lie_in_memory():
    """As glyphs that a run has just drawn, and read from their file by the next one."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    drawn = ArrayDataset(pixels.transpose(0, 2, 3, 1), np.arange(5), None)
    read = ArrayDataset(np.ascontiguousarray(drawn.images), np.arange(5), None)
    assert _fingerprint(drawn) == _fingerprint(read)
