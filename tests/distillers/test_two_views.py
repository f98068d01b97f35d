"""CRLD, MLKD and DeepKD over both: golden figures, identities, and the formula written out."""

import pytest
import torch
import torch.nn.functional as F
from tables import Table

from deepkd_plugin.distillers import CRLD, DKD, KD, MLKD, DeepKD
from deepkd_plugin.losses import decoupled_kd, kd_divergence, standardise_logits


@pytest.fixture
def setting(golden_losses):
    """(student, teacher, batch): rows 0 to 11 are the weak view's logits, 12 to 23 the strong view's."""
    g = golden_losses
    student = Table(torch.cat([g["student"], g["student_strong"]]))
    teacher = Table(torch.cat([g["teacher"], g["teacher_strong"]]))
    views = [torch.arange(12), torch.arange(12, 24)]
    return student, teacher, {"image": views, "target": g["target"], "index": torch.arange(12)}


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def run(distiller, batch, epoch=1):
    distiller.train()
    losses = distiller(**batch, epoch=epoch)[1]
    table = distiller.student.logits
    return losses, {k: torch.autograd.grad(v, table, retain_graph=True)[0] for k, v in losses.items()}


@pytest.mark.parametrize(
    ("method", "names"),
    [("crld", ["loss_ce", "loss_kd"]), ("mlkd", ["loss_ce", "loss_kd", "loss_cc", "loss_bc"])],
)
def test_golden_values_and_gradients(cfg, setting, golden_losses, method, names):
    student, teacher, batch = setting
    cfg.MLKD.VARIANT = "release"
    losses, gradients = run({"crld": CRLD, "mlkd": MLKD}[method](student, teacher, cfg), batch)
    assert list(losses) == names
    for name in names:
        golden = f"{method}_{name}"
        close(losses[name], golden_losses[golden])
        close(gradients[name][:12], golden_losses[f"{golden}_grad_weak"])
        close(gradients[name][12:], golden_losses[f"{golden}_grad_strong"])


def test_logits_and_evaluation_are_of_the_weak_view(cfg, setting):
    student, teacher, batch = setting
    distiller = CRLD(student, teacher, cfg).train()
    logits, _ = distiller(**batch, epoch=1)
    close(logits, student.logits[:12])
    close(distiller.eval()(image=batch["image"][0]), student.logits[:12])


@pytest.mark.parametrize(("count", "uncertain"), [(12, 6), (11, 6)])
def test_mlkd_formula_written_out(cfg, setting, golden_losses, count, uncertain):
    """With an odd number of samples the median is one of them, and that one counts."""
    student, teacher, batch = setting
    batch = batch | {"image": [view[:count] for view in batch["image"]], "target": batch["target"][:count]}
    losses, _ = run(MLKD(student, teacher, cfg), batch)
    s, t = golden_losses["student"][:count], golden_losses["teacher"][:count]
    strong = golden_losses["student_strong"][:count], golden_losses["teacher_strong"][:count]
    confidence, total = t.softmax(1).amax(1), t.softmax(1).sum(0)
    samples = confidence.argsort()[:uncertain].tolist()
    classes = total.argsort()[:50].tolist()
    kd = cc = bc = 0.0
    for temperature in (2, 3, 4, 5, 6):
        kd += kd_divergence(s, t, temperature)[samples].sum() / count + kd_divergence(*strong, temperature).mean()
        p, q = ((x / temperature).softmax(1) for x in (s, t))
        cc += ((p.T @ p - q.T @ q) ** 2)[classes].sum() / 100
        bc += ((p @ p.T - q @ q.T) ** 2)[samples].sum() / count
    close(losses["loss_kd"], 0.9 * kd, 1e-12)
    close(losses["loss_cc"], 0.9 * cc, 1e-12)
    close(losses["loss_bc"], 0.9 * bc, 1e-12)
    close(
        losses["loss_ce"],
        0.1 * (F.cross_entropy(s, batch["target"]) + F.cross_entropy(strong[0], batch["target"])),
    )


def test_mlkd_release_departs_from_the_formula_by_this_much(cfg, setting, golden_losses):
    """The release weighs the batch mean by the share of uncertain samples, and reads weak logits twice."""
    student, teacher, batch = setting
    formula, _ = run(MLKD(student, teacher, cfg), batch)
    for name, ratio in [("loss_kd", 1.0083), ("loss_cc", 2.3662), ("loss_bc", 1.8249)]:
        assert (golden_losses[f"mlkd_{name}"] / formula[name]).item() == pytest.approx(ratio, abs=1e-4), name
    close(formula["loss_ce"], golden_losses["mlkd_loss_ce"])


def test_crld_thresholds_select_samples(cfg, setting, golden_losses):
    student, teacher, batch = setting
    cfg.CRLD.TAU_W, cfg.CRLD.TAU_S = 1.0, 1.0
    losses, gradients = run(CRLD(student, teacher, cfg), batch)
    assert losses["loss_kd"].item() == 0.0
    assert not gradients["loss_kd"].any()
    cfg.CRLD.TAU_W = float(golden_losses["teacher"].softmax(1).amax(1).median())
    losses, gradients = run(CRLD(student, teacher, cfg), batch)
    counted = golden_losses["teacher"].softmax(1).amax(1) >= cfg.CRLD.TAU_W
    assert (gradients["loss_kd"][:12].any(1) == counted).all()


def test_deepkd_over_crld_written_out(cfg, setting, golden_losses):
    student, teacher, batch = setting
    cfg.DeepKD.update({"BASE": "CRLD", "TCG_WEIGHT": 1.5, "NCG_WEIGHT": 2.0, "WARMUP": 20})
    cfg.DeepKD.MASK.update({"TYPE": "static", "K": 20.0})
    losses, _ = run(DeepKD(student, teacher, cfg), batch, epoch=10)
    g, y = golden_losses, batch["target"]
    within = 2.0 * (g["teacher"].softmax(1).amax(1) >= 0.9)
    across = 0.5 * (g["teacher_strong"].softmax(1).amax(1) >= 0.2)
    tcg = ncg = 0.0
    for s, t, weight in [
        ("student", "teacher", within),
        ("student_strong", "teacher_strong", within),
        ("student_strong", "teacher", across),
        ("student", "teacher_strong", across),
    ]:
        terms = decoupled_kd(g[s], g[t], y, 4.0, 20)
        tcg += (weight * terms.tckd).mean()
        ncg += (weight * terms.nckd).mean()
    close(losses["tcg"], 0.5 * 1.5 * tcg, 1e-12)
    close(losses["ncg"], 0.5 * 2.0 * ncg, 1e-12)
    close(losses["tog"], F.cross_entropy(g["student"], y) + F.cross_entropy(g["student_strong"], y), 1e-12)


@pytest.mark.parametrize("variant", ["formula", "release"])
def test_deepkd_over_mlkd_keeps_relations_in_the_task_stream(cfg, setting, golden_losses, variant):
    student, teacher, batch = setting
    cfg.DeepKD.update({"BASE": "MLKD", "CE_WEIGHT": 0.1, "WARMUP": 0})
    cfg.DeepKD.MASK.TYPE = "none"
    cfg.MLKD.VARIANT = variant
    losses, _ = run(DeepKD(student, teacher, cfg), batch)
    whole, _ = run(MLKD(student, teacher, cfg), batch)
    close(losses["tog"], whole["loss_ce"] + whole["loss_cc"] + whole["loss_bc"], 1e-12)
    # per term, tckd + (1 - p) nckd is plain KD: take (1 - p) away from every sample
    g, y = golden_losses, batch["target"]
    rest = 0.0
    uncertain = (g["teacher"].softmax(1).amax(1) <= g["teacher"].softmax(1).amax(1).quantile(0.5)).double()
    for temperature in (2.0, 3.0, 4.0, 5.0, 6.0):
        weak = decoupled_kd(g["student"], g["teacher"], y, temperature)
        strong = decoupled_kd(g["student_strong"], g["teacher_strong"], y, temperature)
        second = weak if variant == "release" and temperature in (2.0, 6.0) else strong
        first = uncertain if variant == "formula" else uncertain.mean()
        rest += (first * weak.teacher_target_prob * weak.nckd).mean()
        rest += (second.teacher_target_prob * second.nckd).mean()
    close(losses["tcg"] + losses["ncg"] - 0.9 * rest, whole["loss_kd"], 1e-10)


@pytest.mark.parametrize("mask", ["none", "static", "dynamic"])
@pytest.mark.parametrize("base", ["KD", "DKD", "MLKD", "CRLD"])
@pytest.mark.parametrize("reading", ["renormalise", "multiply"])
def test_every_base_takes_every_mask(cfg, setting, base, mask, reading):
    student, teacher, batch = setting
    if base in ("KD", "DKD"):
        batch = batch | {"image": batch["image"][0]}
    cfg.DeepKD.BASE = base
    cfg.DeepKD.MASK.update({"TYPE": mask, "READING": reading})
    distiller = DeepKD(student, teacher, cfg)
    expected = {"none": [None] * 3, "static": [50] * 3, "dynamic": [5, 50, 99]}[mask]
    assert [distiller.top_k(epoch, 100) for epoch in (1, 120, 240)] == expected
    losses, gradients = run(distiller, batch, epoch=1)
    assert list(losses) == ["tog", "tcg", "ncg"]
    assert all(torch.isfinite(g).all() for g in gradients.values())
    whole, _ = run(distiller, batch, epoch=240)
    # the mask is about non-target classes only, and gone at the end of a dynamic one
    close(losses["tcg"], whole["tcg"], 1e-12)
    assert (mask == "dynamic") == bool((losses["ncg"] - whole["ncg"]).abs() > 1e-9)


@pytest.mark.parametrize("method", [KD, DKD, CRLD, MLKD, DeepKD])
def test_logit_standardisation_in_every_distillation_term(cfg, setting, method):
    """The terms on raw logits equal those with the option on once the logits are standardised by hand."""
    student, teacher, batch = setting
    if method in (KD, DKD, DeepKD):
        batch = batch | {"image": batch["image"][0]}
    cfg.CRLD.TAU_W = cfg.CRLD.TAU_S = 0.0  # its confidences are those of the raw logits
    cfg.MLKD.TEMPERATURES = [2.0]
    cfg.DeepKD.MASK.TYPE = "none"
    cfg.EXPERIMENT.LOGIT_STAND = True
    with_option, _ = run(method(student, teacher, cfg), batch)
    cfg.EXPERIMENT.LOGIT_STAND = False
    raw, _ = run(method(student, teacher, cfg), batch)
    with torch.no_grad():
        student.logits.copy_(standardise_logits(student.logits))
    if method is not MLKD:  # whose mask would move with the teacher's logits
        with torch.no_grad():
            teacher.logits.copy_(standardise_logits(teacher.logits))
        by_hand, _ = run(method(student, teacher, cfg), batch)
        for name in set(raw) - {"loss_ce", "tog"}:
            close(with_option[name], by_hand[name], 1e-6)
    for name, value in raw.items():
        same = name in ("loss_ce", "tog", "loss_cc", "loss_bc")
        assert same == torch.equal(value, with_option[name]), name


def test_a_batch_with_the_wrong_number_of_views_is_refused(cfg, setting):
    student, teacher, batch = setting
    with pytest.raises(ValueError, match=r"CRLD needs 2 view\(s\) of each image, the batch has 1"):
        CRLD(student, teacher, cfg).train()(**batch | {"image": batch["image"][0]}, epoch=1)
    with pytest.raises(ValueError, match=r"KD needs 1 view\(s\) of each image, the batch has 2"):
        KD(student, teacher, cfg).train()(**batch, epoch=1)


@pytest.mark.parametrize("method", [CRLD, MLKD])
def test_losses_stay_in_float32_under_autocast(cfg, golden_losses, method):
    g = golden_losses
    student = Table(torch.cat([g["student"], g["student_strong"]]).float())
    teacher = Table(torch.cat([g["teacher"], g["teacher_strong"]]).float())
    batch = {"image": [torch.arange(12), torch.arange(12, 24)], "target": g["target"]}
    plain, _ = run(method(student, teacher, cfg), batch)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, _ = run(method(student, teacher, cfg), batch)
    for name, value in plain.items():
        assert narrow[name].dtype == torch.float32
        torch.testing.assert_close(narrow[name], value, rtol=1e-5, atol=1e-6)
