"""NKD, RLD, WTTM, DIST and entropy weights against their authors' code, and where each becomes a simpler method.

tests/data/bases.json has figures of RLD (zju-SWJ/RLD d54578f), WTTM (zkxufo/TTM fe457b3), NKD (yzd-v/cls_KD 1e5d48f),
DIST (hunto/image_classification_sota 6f7a70a) and EA-KD (cpsu00/EA-KD 6fb4c06), run once in float64 on the logits of
losses.npz: the loss without cross-entropy, its gradient's norm, and the gradient's product with cos(0, 1, 2, …).
"""

import json
import math
from pathlib import Path

import pytest
import torch
from tables import Table

from deepkd_plugin.distillers import DISTILLERS, DKD, KD, DeepKD, Method, bases
from deepkd_plugin.distillers.dist import correlation
from deepkd_plugin.distillers.terms import entropy_weight

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "bases.json").read_text())
T4 = {
    "NKD": {"TEMPERATURE": 2.0, "CE_WEIGHT": 0.7},
    "RLD": {"ALPHA_T": 4.0, "WARMUP": 0},
    "WTTM": {"GAMMA": 0.2},
    "DKD": {"WARMUP": 0},
    "KD": {},
}


@pytest.fixture
def setting(golden_losses):
    student, teacher = Table(golden_losses["student"]), Table(golden_losses["teacher"])
    return student, teacher, {"image": torch.arange(12), "target": golden_losses["target"]}


def distilled(distiller, batch, epoch=100):
    """The losses of a step, and the gradient of what is distilled."""
    losses = distiller.train()(**batch, epoch=epoch)[1]
    loss = losses["loss_kd"]
    return losses, torch.autograd.grad(loss, distiller.student.logits, retain_graph=True)[0]


def matches(name, loss, gradient, factor=1.0, minus=0.0, tolerance=1e-9):
    golden = GOLDEN[name]
    product = (gradient * torch.cos(torch.arange(gradient.numel(), dtype=gradient.dtype)).view_as(gradient)).sum()
    assert loss.item() == pytest.approx(factor * (golden["loss"] - minus), rel=tolerance)
    assert gradient.norm().item() == pytest.approx(factor * golden["gradient_norm"], rel=tolerance)
    assert product.item() == pytest.approx(factor * golden["gradient_cos"], rel=tolerance)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("standardised", [False, True])
def test_rld_is_its_authors(cfg, setting, standardised):
    *networks, batch = setting
    cfg.EXPERIMENT.LOGIT_STAND = standardised
    losses, gradient = distilled(DISTILLERS["RLD"](*networks, cfg), batch)
    matches("rld_standardised" if standardised else "rld", losses["loss_kd"], gradient)
    losses, gradient = distilled(DISTILLERS["RLD"](*networks, cfg), batch, epoch=5)
    matches("rld_standardised" if standardised else "rld", losses["loss_kd"], gradient, 5 / 20)


def test_rld_is_dkd_where_the_teacher_is_right(cfg, setting):
    student, teacher, batch = setting
    cfg.RLD.ALPHA_T = 4.0
    batch["target"] = teacher.logits.argmax(1)
    (mine, my_gradient), (theirs, their_gradient) = (
        distilled(method(student, teacher, cfg), batch) for method in (DISTILLERS["RLD"], DKD)
    )
    close(mine["loss_kd"], theirs["loss_kd"])
    close(my_gradient, their_gradient)


def test_rld_learns_nothing_of_classes_above_the_target(cfg, setting):
    student, teacher, batch = setting
    cfg.RLD.ALPHA = 0.0
    _, gradient = distilled(DISTILLERS["RLD"](student, teacher, cfg), batch)
    own = teacher.logits.gather(1, batch["target"][:, None])
    above = teacher.logits > own
    assert above.any(1).all()
    assert not gradient[above].any()
    assert gradient[~above].any()


def test_rld_with_a_target_that_is_the_teachers_last_has_a_finite_gradient(cfg, setting):
    student, teacher, batch = setting
    batch["target"] = teacher.logits.argmin(1)
    cfg.RLD.ALPHA = 0.0
    losses, gradient = distilled(DISTILLERS["RLD"](student, teacher, cfg), batch)
    assert losses["loss_kd"] == 0
    assert not gradient.any()


def test_wttm_is_its_authors(cfg, setting):
    *networks, batch = setting
    losses, gradient = distilled(DISTILLERS["WTTM"](*networks, cfg), batch)
    matches("wttm", losses["loss_kd"], gradient, cfg.WTTM.KD_WEIGHT)


def test_wttm_without_a_power_is_kd_at_temperature_one(cfg, setting):
    *networks, batch = setting
    cfg.WTTM.update({"GAMMA": 1.0, "KD_WEIGHT": 0.9})
    cfg.KD.TEMPERATURE = 1.0
    (mine, my_gradient), (theirs, their_gradient) = (
        distilled(method(*networks, cfg), batch) for method in (DISTILLERS["WTTM"], KD)
    )
    close(mine["loss_kd"], theirs["loss_kd"])
    close(my_gradient, their_gradient)


def test_nkd_is_its_authors_but_for_the_teachers_entropy(cfg, setting, golden_losses):
    *networks, batch = setting
    cfg.NKD.TEMPERATURE = 2.0
    losses, gradient = distilled(DISTILLERS["NKD"](*networks, cfg), batch)
    others = torch.nn.functional.one_hot(batch["target"], 100).bool()
    q = torch.softmax(golden_losses["teacher"][~others].view(12, 99) / 2.0, 1)
    entropy = torch.special.entr(q).sum(1).mean().item()
    matches("nkd", losses["loss_kd"], gradient, minus=1.5 * 2.0**2 * entropy)


def test_dist_is_its_authors(cfg, setting):
    *networks, batch = setting
    cfg.DIST.update({"BETA": 1.0, "GAMMA": 1.0})
    losses, gradient = distilled(DISTILLERS["DIST"](*networks, cfg), batch)
    matches("dist", losses["loss_kd"], gradient)


def test_dist_does_not_see_scale_and_shift_of_probabilities_and_has_no_parts(cfg):
    a = torch.rand(5, 7, dtype=torch.float64)
    torch.testing.assert_close(correlation(a, 3 * a + 2), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)
    assert correlation(a, torch.ones_like(a)).tolist() == [0.0] * 5
    assert not issubclass(DISTILLERS["DIST"], Method)
    assert "DIST" not in bases()


@pytest.mark.parametrize(("weight", "name"), [("release", "ea_kd_cifar"), ("formula", "ea_kd_log_100")])
def test_entropy_weights_over_kd_are_their_authors(cfg, setting, weight, name):
    *networks, batch = setting
    cfg.DISTILLER.ENTROPY_WEIGHT = weight
    losses, gradient = distilled(KD(*networks, cfg), batch)
    matches(name, losses["loss_kd"], gradient, 0.9, tolerance=1e-7)  # they add 1e-10 to the probabilities


def test_entropy_weights_over_dkd_are_their_authors(cfg, setting):
    *networks, batch = setting
    cfg.DISTILLER.ENTROPY_WEIGHT = "release"
    losses, gradient = distilled(DKD(*networks, cfg), batch)
    matches("ea_dkd_cifar", losses["loss_kd"], gradient)


def test_equal_entropies_are_one_factor(cfg, setting):
    """Logits of each sample in another order: every entropy is that of the first."""
    student, teacher, batch = setting
    generator = torch.Generator().manual_seed(0)
    for table in (student, teacher):
        orders = torch.stack([torch.randperm(100, generator=generator) for _ in range(12)])
        table.logits.data = table.logits.data[0][orders]
    plain, gradient = distilled(KD(student, teacher, cfg), batch)
    cfg.DISTILLER.ENTROPY_WEIGHT = "formula"
    weighted, weighted_gradient = distilled(KD(student, teacher, cfg), batch)
    factor = entropy_weight(student.logits[:1], teacher.logits[:1], 3.0, False)
    close(weighted["loss_kd"], (factor * plain["loss_kd"])[0])
    close(weighted_gradient, factor * gradient)
    uniform = torch.zeros(1, 100, dtype=torch.float64)
    assert entropy_weight(uniform, uniform, 3.0, False).item() == pytest.approx(math.log(100))


@pytest.mark.parametrize("weight", ["none", "formula"])
@pytest.mark.parametrize("base", [name for name in bases() if bases()[name].views == 1])
def test_deepkds_streams_add_up_to_the_base(cfg, setting, base, weight):
    """Without a mask, with the base's own weights, and at the base's temperature."""
    *networks, batch = setting
    cfg.DISTILLER.ENTROPY_WEIGHT = weight
    for path, values in T4.items():
        cfg[path].update(values)
    factors = {"DKD": (1, 8, 4.0), "RLD": (1, 8, 4.0), "NKD": (1, 1.5, 2.0), "WTTM": (4, 4, 4.0), "KD": (0.9, 0.9, 4.0)}
    tcg, ncg, temperature = factors[base]
    ce = {"KD": 0.1, "NKD": 0.7}.get(base, 1.0)
    cfg.DeepKD.update({"BASE": base, "CE_WEIGHT": ce, "TCG_WEIGHT": tcg, "NCG_WEIGHT": ncg, "TEMPERATURE": temperature})
    cfg.DeepKD.MASK.TYPE = "none"
    plain = bases()[base](*networks, cfg).train()(**batch, epoch=1)[1]
    taken_apart = DeepKD(*networks, cfg).train()(**batch, epoch=1)[1]
    table = networks[0].logits
    close(sum(taken_apart.values()), sum(plain.values()))
    ours, theirs = (torch.autograd.grad(sum(losses.values()), table)[0] for losses in (taken_apart, plain))
    close(ours, theirs)


def test_deepkds_mask_is_within_what_rld_keeps(cfg, setting):
    student, teacher, batch = setting
    cfg.DeepKD.update({"BASE": "RLD"})
    cfg.DeepKD.MASK.update({"TYPE": "static", "K": 10})
    losses = DeepKD(student, teacher, cfg).train()(**batch, epoch=1)[1]
    gradient = torch.autograd.grad(losses["ncg"], student.logits)[0]
    own = teacher.logits.gather(1, batch["target"][:, None])
    below = teacher.logits < own
    best = teacher.logits.masked_fill(~below, float("-inf")).topk(10, 1).indices
    kept = torch.zeros_like(below).scatter(1, best, True) & below
    assert not gradient[~kept].any()
    several = kept.sum(1) > 1  # a class alone has probability 1 in both networks
    assert several.any()
    assert (gradient.abs().sum(1)[several] > 0).all()
