"""The configs of methods that the article does not have: each trains a step, and its numbers are its authors'."""

import math
from pathlib import Path

import pytest
import torch
from test_configs import CONFIGS, DATASETS, LATER, PAIRS, Small, Sure, batches, label, load, read

from deepkd_plugin import config
from deepkd_plugin.distillers import DISTILLERS
from deepkd_plugin.hosts import registry
from deepkd_plugin.launch import trainers

FILES = sorted(file for folder in PAIRS for file in folder.iterdir() if file.stem in LATER)
SLOW = ("MobileNetV2", "ShuffleV1", "ShuffleV2")

RLD = (
    *("res110_res20", "res110_res32", "res32x4_res8x4", "res32x4_shuv2", "res32x4_wrn_16_2", "res32x4_wrn_40_2"),
    *("res50_mv2", "res56_res20", "vgg13_mv2", "vgg13_vgg8", "wrn40_2_mv2", "wrn40_2_res8x4"),
    *("wrn40_2_wrn_16_2", "wrn40_2_wrn_40_1"),
)
DIST = ("res32x4_res8x4", "res32x4_shuv1", "res32x4_shuv2", "res50_mv2", "res56_res20", "wrn40_2_wrn_40_1")
WTTM = {
    "res110_res20": (0.2, 2.0),
    "res110_res32": (0.1, 1.5),
    "res32x4_res8x4": (0.1, 3.0),
    "res32x4_shuv1": (0.2, 1.4),
    "res32x4_shuv2": (0.4, 16.0),
    "res50_mv2": (0.2, 5.0),
    "res56_res20": (0.3, 1.5),
    "vgg13_mv2": (0.2, 3.0),
    "vgg13_vgg8": (0.1, 2.25),
    "wrn40_2_shuv1": (0.3, 3.0),
    "wrn40_2_wrn_16_2": (0.1, 4.0),
    "wrn40_2_wrn_40_1": (0.1, 3.0),
    "r34_r18": (0.8, 1.6),
    "r50_mv1": (0.7, 3.5),
}
"""γ and β, tables 8 to 10 of the article."""
IMAGENET = ("imagenet/r34_r18", "imagenet/r50_mv1")
REPORTED = {
    "nkd": {*IMAGENET},
    "rld": {*(f"cifar100/{pair}" for pair in RLD), *IMAGENET},
    "wttm": {*(f"cifar100/{pair}" for pair in list(WTTM)[:-2]), *IMAGENET},
    "dist": {*(f"cifar100/{pair}" for pair in DIST), *IMAGENET},
    "kd_ea": {"cifar100/res32x4_res8x4", "imagenet/r34_r18"},
    "dkd_ea": {"cifar100/res32x4_res8x4", "imagenet/r34_r18"},
    "mlkd_ea": {"cifar100/res32x4_res8x4"},
}
"""Method -> the pairs that its authors report and publish numbers for."""
REPORTED |= {f"deepkd_{method}": REPORTED[method] for method in ("nkd", "rld", "wttm")}


@pytest.fixture(autouse=True, scope="module")
def registered():
    registry.register(registry.BUILTIN)


def test_the_pairs_are_those_that_the_papers_report():
    there = {method: {label(file.parent) for file in FILES if file.stem == method} for method in LATER}
    assert there == REPORTED


@pytest.mark.parametrize("file", FILES, ids=label)
def test_a_file_trains_a_step(file):
    torch.manual_seed(0)
    cfg, classes = read(file), DATASETS[file.parts[-3]][2]
    config.check_mask(cfg, {}, classes)
    student, teacher = Small(classes), Sure(Small(classes)).requires_grad_(False)
    distiller = registry.BUILTIN.distillers[cfg.DISTILLER.TYPE](student, teacher, cfg)
    before = [p.detach().clone() for p in student.parameters()]
    trainer = trainers(registry.BUILTIN)[cfg.SOLVER.TRAINER]("run", distiller, *batches(cfg), cfg)
    trainer.teacher_acc = 50.0
    entry = trainer.train_epoch(1)
    deepkd = file.stem.startswith("deepkd_")
    assert set(entry["loss"]) == ({"tog", "tcg", "ncg"} if deepkd else {"tog"})
    assert all(0 < loss < math.inf for loss in entry["loss"].values())
    assert ("top_k" in entry) == deepkd
    assert not any(torch.equal(p, old) for p, old in zip(student.parameters(), before))


@pytest.mark.parametrize("file", FILES, ids=label)
def test_its_protocol_is_its_authors(file):
    cfg = read(file)
    rates = {"nkd": 0.1, "dist": 0.1, "wttm": 0.1, "rld": 0.2, "kd_ea": 0.2, "dkd_ea": 0.2}
    method = file.stem.removeprefix("deepkd_")
    if file.parts[-3] == "imagenet":
        batch = 256 if method in ("nkd", "dist", "wttm") else 512
        wanted = (batch, 100, rates[method], [30, 60, 90], 1e-4)
    else:
        usual = (240, 0.01 if cfg.DISTILLER.STUDENT in SLOW else 0.05)
        epochs, rate = (480, 0.025) if method == "mlkd_ea" else usual
        wanted = (64, epochs, rate, [150, 180, 210], 5e-4)
    solver = cfg.SOLVER
    held = (solver.BATCH_SIZE, solver.EPOCHS, solver.LR, list(solver.LR_DECAY_STAGES), solver.WEIGHT_DECAY)
    assert held == wanted
    assert (solver.LR_SCHEDULE, solver.MOMENTUM, solver.WARMUP_EPOCHS) == ("step", 0.9, 0)
    same = read(file.with_name("kd.yaml"))
    assert (cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT) == (same.DISTILLER.TEACHER, same.DISTILLER.STUDENT)
    assert same.EXPERIMENT.TAG.replace("kd,", f"{file.stem},", 1) == cfg.EXPERIMENT.TAG


@pytest.mark.parametrize("file", [file for file in FILES if file.stem in ("nkd", "rld", "wttm", "dist")], ids=label)
def test_its_weights_are_its_authors(file):
    imagenet, node = file.parts[-3] == "imagenet", file.stem.upper()
    wanted = {"CE_WEIGHT": 1.0}
    if node == "NKD":
        wanted |= {"GAMMA": 1.5, "TEMPERATURE": 1.0}
    elif node == "WTTM":
        gamma, beta = WTTM[file.parent.name]
        wanted |= {"KD_WEIGHT": beta, "GAMMA": gamma}
    elif node == "DIST":
        wanted |= {"BETA": 2.0, "GAMMA": 2.0, "TEMPERATURE": 1.0 if imagenet else 4.0}
    else:
        beta = {"r34_r18": 0.5, "r50_mv1": 2.0}.get(file.parent.name, 8.0)
        wanted |= {"ALPHA": 1.0, "BETA": beta, "ALPHA_T": 1.0}
        wanted |= {"T": 1.0, "WARMUP": 1} if imagenet else {"T": 4.0, "WARMUP": 20}
    assert load(file)[node] == wanted


def test_weights_by_entropy_are_those_of_the_authors_code():
    def held(name):
        cfg = read(CONFIGS / f"{name}.yaml")
        return cfg.DISTILLER.TYPE, cfg.DISTILLER.ENTROPY_WEIGHT, cfg.DISTILLER.ENTROPY_TEMPERATURE

    pair = "cifar100/res32x4_res8x4"
    assert held(f"{pair}/kd_ea") == ("KD", "release", 3.0)
    assert held(f"{pair}/dkd_ea") == ("DKD", "release", 3.0)
    assert held(f"{pair}/mlkd_ea") == ("MLKD", "formula", 3.0)  # its code has log 100 there
    assert held("imagenet/r34_r18/kd_ea") == ("KD", "formula", 2.0)
    assert held("imagenet/r34_r18/dkd_ea") == ("DKD", "formula", 2.0)
    kd = read(CONFIGS / "imagenet/r34_r18/kd_ea.yaml").KD
    assert (kd.TEMPERATURE, kd.LOSS.CE_WEIGHT, kd.LOSS.KD_WEIGHT) == (1, 1.0, 0.5)


@pytest.mark.parametrize("file", [file for file in FILES if file.stem.startswith("deepkd_")], ids=label)
def test_deepkd_over_it_has_its_protocol_weights_and_temperature_and_the_deltas_over_dkd(file):
    ours, base = read(file), read(file.with_name(file.name.removeprefix("deepkd_")))
    assert base.DISTILLER.TYPE == ours.DeepKD.BASE
    stated = [DISTILLERS[cfg.DISTILLER.TYPE].loss_weights(cfg) for cfg in (ours, base)]
    assert stated[0] == stated[1] != {}
    node = base[ours.DeepKD.BASE]
    assert node.get("T", node.get("TEMPERATURE", 1.0)) == ours.DeepKD.TEMPERATURE  # WTTM's student has none
    assert (ours.RLD.ALPHA_T, ours.WTTM.GAMMA) == (base.RLD.ALPHA_T, base.WTTM.GAMMA)
    assert ours.SOLVER.DECOUPLED.DELTA == read(file.with_name("deepkd_dkd.yaml")).SOLVER.DECOUPLED.DELTA
    for cfg in (ours, base):
        cfg.defrost()
        del cfg.SOLVER["DECOUPLED"]
    assert ours.SOLVER == base.SOLVER


def test_every_file_says_where_its_numbers_are_from():
    for file in FILES:
        said = [line for line in Path(file).read_text().splitlines() if line.startswith("# ")]
        assert "Made by tools/make_configs.py." in said[0]
        source = "# No recipe for it is published. " if file.stem.startswith("deepkd_") else "# Source: "
        assert said[1].startswith(source), file
        assert all(len(line) <= 120 for line in said), file
