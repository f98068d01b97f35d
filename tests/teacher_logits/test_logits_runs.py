"""Runs with a table: what they learn is what runs without one learn, and what they save."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import same
from torch.utils.data import DataLoader

from deepkd_plugin import config
from deepkd_plugin.commands import cli
from deepkd_plugin.data import DATASETS, get_dataset
from deepkd_plugin.distillers import DISTILLERS, Distiller
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts.builtin import cifar_model_dict
from deepkd_plugin.hosts.registry import find_host
from deepkd_plugin.launch import read_config
from deepkd_plugin.study.reproduce.command import _saved
from deepkd_plugin.teacher_logits import open_logits
from deepkd_plugin.teacher_logits.tables import share_computed

TABLE = ("DISTILLER.TEACHER_LOGITS", "table", "DISTILLER.LOGITS_DTYPE", "float32")
GSNR = ("GSNR.MEASURE", "True", "GSNR.EVERY", "2", "GSNR.WINDOW", "2")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("kd", ()),
        ("dkd", ("DATASET.PIPELINE", "device")),
        ("deepkd", GSNR),
        ("deepkd", ("SOLVER.CHANNELS_LAST", "True", "DATASET.NUM_WORKERS", "0")),
        ("crld", ()),
        ("mlkd", ()),
    ],
)
def test_in_float32_a_run_is_bitwise_the_one_without_a_table(learn, method, options):
    plain, shares = learn(method, *options)
    assert shares == [None, None]
    first, shares = learn(method, *options, *TABLE)
    assert shares[0] == 1
    assert 0.9 < shares[1] < 1
    again, shares = learn(method, *options, *TABLE)
    assert shares == [0, 0]
    assert same(first, plain)
    assert same(again, plain)


def test_methods_seeds_and_parts_of_a_set_share_one_table(learn, tmp_path):
    options = TABLE[:2]
    learn("kd", *options)
    assert learn("deepkd", *options)[1] == [0, 0]
    assert learn("kd", *options, "DATASET.TRAIN_PER_CLASS", "1")[1] == [0, 0]
    assert 0.9 < learn("kd", *options, "SOLVER.SEED", "1")[1][0] < 1
    assert len(list((tmp_path / "logits").iterdir())) == 1


def test_a_run_in_float16_does_not_depend_on_the_table(learn, tmp_path):
    first, _ = learn("deepkd", *TABLE[:2])
    full, shares = learn("deepkd", *TABLE[:2])
    assert shares == [0, 0]
    closed, shares = learn("deepkd", *TABLE[:2], "DISTILLER.LOGITS_DIR", "/dev/null/closed")
    assert shares == [1, 1]
    assert same(first, full)
    assert same(first, closed)
    assert not same(first, learn("deepkd")[0])


def test_an_interrupted_run_goes_on_bitwise(learn, train):
    whole, _ = learn("deepkd", *TABLE)
    learn("deepkd", *TABLE, "SOLVER.EPOCHS", "2", "LOG.SAVE_CHECKPOINT_FREQ", "1")
    (train.folder / "epoch_1").rename(train.folder / "latest")
    resumed, shares = learn("deepkd", *TABLE, "LOG.SAVE_CHECKPOINT_FREQ", "1", flags=("--resume",))
    assert shares[1] == 0
    assert same(whole, resumed)


def test_another_teacher_has_another_table_and_cannot_have_this_one(train, tmp_path):
    options = "DISTILLER.TEACHER_LOGITS", "table", "DISTILLER.LOGITS_DIR"
    code, _, err = train("kd", *options, str(tmp_path))
    assert code == 0, err
    (path,) = tmp_path.glob("*.logits")
    for other in (("DISTILLER.LOGITS_DTYPE", "float32"), ("SOLVER.AMP", "True")):
        code, _, err = train("kd", *options, str(path), *other, flags=("--overwrite",))
        assert code == 2
        assert f"{path}: DISTILLER.LOGITS_DIR has a table of other logits" in err
        assert "dtype is 'float16', not 'float32'" in err or "precision is 'float32', not 'bfloat16'" in err
    assert (train.folder / "student_latest").exists()  # the run before is whole


def test_what_cannot_use_a_table_is_refused(monkeypatch):
    imagenet = "configs/imagenet/r34_r18/kd.yaml"
    with pytest.raises(UserError, match="'compute' with DATASET.TYPE imagenet, whose images have more views"):
        read_config(find_host(), imagenet, TABLE)
    cfg, _ = read_config(find_host(), "configs/glyphs100/res20_res8/kd.yaml", TABLE)
    cfg = cfg.clone()
    cfg.defrost()
    monkeypatch.setitem(DISTILLERS, "FEATURES", type("Features", (Distiller,), {}))
    cfg.DISTILLER.TYPE = "FEATURES"
    with pytest.raises(UserError, match="'compute' with DISTILLER.TYPE FEATURES, which needs more of the teacher"):
        config.check(cfg, {})


def test_mdistiller_s_own_methods_give_way_to_ours(mdistiller):
    """They know of no table; its trainers neither."""
    config = "configs/glyphs100/res20_res8/kd.yaml"
    for name, cls in (("KD", DISTILLERS["KD"]), ("DKD", DISTILLERS["DKD"])):
        cfg, _ = read_config(mdistiller, config, (*TABLE, "DISTILLER.TYPE", name))
        assert mdistiller.distiller(cfg) is cls
    with pytest.raises(UserError, match="'compute' with DISTILLER.TYPE RKD"):
        read_config(mdistiller, config, (*TABLE, "DISTILLER.TYPE", "RKD"))
    plain = (
        "SOLVER.CHANNELS_LAST",
        "False",
        "SOLVER.TRAINER",
        "dot",
        "SOLVER.LR_SCHEDULE",
        "step",
        "SOLVER.WARMUP_EPOCHS",
        "0",
        "SOLVER.MIN_LR",
        "0.0",
    )
    with pytest.raises(UserError, match="'compute' under mdistiller's trainer dot"):
        read_config(mdistiller, config, (*TABLE, *plain))


def test_a_loader_of_another_kind_is_refused(data_root, tmp_path):
    """Its views are nobody's function, so wrong logits would be kept."""
    options = ("DATASET.ROOT", str(data_root), "DISTILLER.LOGITS_DIR", str(tmp_path), *TABLE)
    cfg, _ = read_config(find_host(), "configs/glyphs100/res20_res8/kd.yaml", options)
    loader = get_dataset(cfg)[0]
    image = torch.stack([loader.dataset[place][0] for place in range(4)])
    teacher = cifar_model_dict["resnet20"][0](num_classes=100).eval()
    for other in (DataLoader(loader.dataset, 4, shuffle=True), DataLoader([*range(4)], 4, sampler=loader.sampler)):
        with pytest.raises(UserError, match="must be 'compute' with a training set that get_dataset did not make"):
            open_logits(cfg, teacher, "ab", other, image)
    assert not list(tmp_path.iterdir())
    open_logits(cfg, teacher, "ab", loader, image).close()
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_teacher_there_is_nothing_to_look_up(learn):
    assert same(learn("vanilla", *TABLE)[0], learn("vanilla")[0])


def test_the_share_that_is_computed():
    assert share_computed(162, 240) == pytest.approx(0.52, abs=0.005)
    assert share_computed(81, 1) == pytest.approx(1)


def test_what_runs_saved_is_said(tmp_path):
    runs = [SimpleNamespace(folder=tmp_path / str(n)) for n in range(2)]
    assert _saved(runs) == ""
    for run, shares in zip(runs, ([1.0, 0.5], [0.1, 0.0])):
        run.folder.mkdir()
        lines = [json.dumps({"epoch": n, "teacher_computed": share}) for n, share in enumerate(shares, 1)]
        (run.folder / "metrics.jsonl").write_text("\n".join(lines))
    assert _saved(runs) == "60% of its logits in 4 epochs were read from a table"


@pytest.fixture
def cache(capsys):
    """Run `deepkd cache`; returns exit code, stdout, stderr."""

    def run(*words):
        code = cli.main(["cache", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def small(data_root, tmp_path):
    """The words that fill a table of a set of few views; glyphs100 has 81 of 10,000 images."""
    return [
        *("--cfg", "configs/glyphs100/res20_res8/kd.yaml", "DATASET.ROOT", str(data_root)),
        *("DISTILLER.LOGITS_DIR", str(tmp_path / "logits"), "DISTILLER.LOGITS_DTYPE", "float32"),
    ]


def test_a_filled_table_has_what_a_run_would_compute(cache, small, learn, tmp_path, monkeypatch):
    """A set of 120 images, filled; a run then computes nothing, and learns what it learns without the table."""
    source = DATASETS["glyphs100"]

    def read(root, split):
        images, labels = source.read(root, split)
        some = np.linspace(0, len(images) - 1, 120 if split == "train" else len(images)).astype(int)
        return images[some], labels[some]

    few = replace(source, read=read, train=120)
    monkeypatch.setitem(DATASETS, "glyphs100", few)
    part = ("DATASET.TRAIN_PER_CLASS", "0", "DATASET.HOLDOUT", "0.0")
    plain, _ = learn("kd", *part)
    code, out, err = cache("fill", *small)
    assert code == 0, err
    assert "about 100% filled" in out
    table, shares = learn("kd", *part, *TABLE)
    assert shares == [0, 0]
    assert same(plain, table)
    (path,) = (tmp_path / "logits").iterdir()
    before = path.read_bytes()
    assert cache("fill", *small)[0] == 0
    assert path.read_bytes() == before
    code, out, _ = cache("check", tmp_path / "logits")
    assert (code, out) == (0, f"{path}: 9,720 of 9,720 views are there, 0 are damaged\n")
    content = bytearray(before)
    content[5000] ^= 1
    path.write_bytes(content)
    code, out, _ = cache("check", path)
    assert code == 1
    assert "9,719 of 9,720 views are there, 1 are damaged" in out
    code, out, _ = cache("list", tmp_path / "logits")
    assert code == 0
    assert out.startswith(f"{path}: glyphs100, resnet20 ")
    assert "120 images x 81 views x 100 classes in float32; about 100% filled" in out
    # deleting asks
    code, _, err = cache("delete", tmp_path / "logits")
    assert code == 2
    assert "needs --yes" in err
    assert path.exists()
    code, out, _ = cache("delete", path, "--yes")
    assert code == 0
    assert not path.exists()


def test_only_tables_are_deleted(cache, tmp_path):
    other = tmp_path / "notes.logits"
    other.write_text("notes")
    code, _, err = cache("delete", tmp_path, "--yes")
    assert code == 2
    assert "is no table of teacher logits, and stays" in err
    assert other.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fill"], "--cfg FILE goes with fill"),
        (["list", "--cfg", "kd.yaml"], "--cfg FILE goes with fill"),
        (["delete"], "delete needs PATH"),
        (["check", "nowhere"], "nowhere: no such folder"),
        (["fill", "nowhere", "--cfg", "kd.yaml"], "fill takes no PATH"),
        (["list", "--yes"], "--yes with delete"),
        (["fill", "--cfg", "configs/glyphs100/res20_res8/vanilla.yaml"], "must be a method with a teacher"),
    ],
)
def test_what_cache_refuses(cache, words, message):
    code, _, err = cache(*words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_damaged_header_is_found(cache, tmp_path):
    (tmp_path / "a.logits").write_bytes(bytes(5000))
    code, out, _ = cache("check", tmp_path)
    assert code == 1
    assert "its header is damaged" in out
