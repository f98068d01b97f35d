import copy

import pytest
import torch
import torch.nn.functional as F
from tables import Table
from torch import nn

from deepkd_plugin.distillers import CRLD, DKD, KD, MLKD, DeepKD, Distiller, Method
from deepkd_plugin.distillers.vanilla import Vanilla
from deepkd_plugin.losses import decoupled_kd
from deepkd_plugin.optim import DecoupledMomentumSGD
from deepkd_plugin.topk import TopKSchedule


@pytest.fixture
def setting(golden_losses):
    """(student, teacher, batch) that put the golden logits through a distiller."""
    student, teacher = Table(golden_losses["student"]), Table(golden_losses["teacher"])
    batch = {"image": torch.arange(12), "target": golden_losses["target"], "index": torch.arange(12)}
    return student, teacher, batch


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a.detach(), b, rtol=tolerance, atol=tolerance)


def losses_and_gradients(distiller, batch, epoch):
    distiller.train()
    losses = distiller(**batch, epoch=epoch)[1]
    table = distiller.student.logits
    return losses, {k: torch.autograd.grad(v, table, retain_graph=True)[0] for k, v in losses.items()}


def test_kd_losses_and_gradients(cfg, setting, golden_losses):
    student, teacher, batch = setting
    losses, gradients = losses_and_gradients(KD(student, teacher, cfg), batch, 1)
    close(losses["loss_kd"], 0.9 * golden_losses["kd_T4"])
    close(gradients["loss_kd"], 0.9 * golden_losses["kd_T4_grad"])
    close(losses["loss_ce"], 0.1 * F.cross_entropy(golden_losses["student"], batch["target"]))


@pytest.mark.parametrize(("epoch", "warmup"), [(1, 0.05), (10, 0.5), (20, 1.0), (100, 1.0)])
def test_dkd_losses_and_gradients(cfg, setting, golden_losses, epoch, warmup):
    student, teacher, batch = setting
    losses, gradients = losses_and_gradients(DKD(student, teacher, cfg), batch, epoch)
    close(losses["loss_kd"], warmup * golden_losses["dkd_T4_a1_b8"])
    close(gradients["loss_kd"], warmup * golden_losses["dkd_T4_a1_b8_grad"])


def test_deepkd_over_kd_sums_to_kd(cfg, setting):
    student, teacher, batch = setting
    cfg.DeepKD.update({"CE_WEIGHT": 0.1, "TCG_WEIGHT": 0.9, "NCG_WEIGHT": 0.9})
    cfg.DeepKD.MASK.TYPE = "none"
    losses, gradients = losses_and_gradients(DeepKD(student, teacher, cfg), batch, 1)
    base_losses, base_gradients = losses_and_gradients(KD(student, teacher, cfg), batch, 1)
    assert list(losses) == ["tog", "tcg", "ncg"]
    close(sum(losses.values()), sum(base_losses.values()).detach(), 1e-12)
    close(sum(gradients.values()), sum(base_gradients.values()), 1e-12)
    close(losses["tog"], base_losses["loss_ce"].detach(), 1e-12)


@pytest.mark.parametrize("epoch", [1, 7, 30])
def test_deepkd_over_dkd_is_the_releases_decomposition(cfg, setting, golden_losses, epoch):
    student, teacher, batch = setting
    cfg.DeepKD.update({"BASE": "DKD", "NCG_WEIGHT": 8.0, "WARMUP": 20})
    cfg.DeepKD.MASK.TYPE = "none"
    losses, gradients = losses_and_gradients(DeepKD(student, teacher, cfg), batch, epoch)
    warmup = min(epoch / 20, 1)
    for stream, term in (("tcg", "tckd"), ("ncg", "nckd")):
        golden = golden_losses[f"release_dkd_top0_T4_{term}"]
        close(losses[stream], warmup * golden)
        close(gradients[stream], warmup * golden_losses[f"release_dkd_top0_T4_{term}_grad"])


def test_the_mask_grows_over_training(cfg, setting):
    student, teacher, batch = setting
    cfg.SOLVER.EPOCHS = 10
    distiller = DeepKD(student, teacher, cfg)
    assert [distiller.top_k(e, 100) for e in range(1, 11)] == [5, 20, 35, 50, 50, 50, 50, 66, 83, 99]
    losses, _ = losses_and_gradients(distiller, batch, 2)
    terms = decoupled_kd(student.logits, teacher.logits, batch["target"], 4.0, 20)
    close(losses["ncg"], ((1 - terms.teacher_target_prob) * terms.nckd).mean().detach(), 1e-12)


def test_the_mask_may_grow_with_the_iterations(cfg, setting):
    cfg.SOLVER.EPOCHS = 10
    by_epoch = DeepKD(*setting[:2], cfg)
    cfg = cfg.clone()
    cfg.DeepKD.MASK.UNIT = "iteration"
    distiller = DeepKD(*setting[:2], cfg)
    points = [step / 40 for step in range(1, 401)]  # of 40 steps an epoch
    sizes = [distiller.top_k(point, 100) for point in points]
    schedule = TopKSchedule(100)
    assert sizes == [schedule(step / 400) for step in range(1, 401)]
    assert (sizes[0], sizes[-1]) == (5, 99)
    assert len(set(sizes)) > 60  # by epoch there are 8
    assert [by_epoch.top_k(point, 100) for point in points] == [by_epoch.top_k(-(-s // 40), 100) for s in range(1, 401)]
    cfg.DeepKD.MASK.TYPE = "static"
    assert not DeepKD(*setting[:2], cfg).by_iteration


def test_a_warm_up_by_epoch_stays_so_under_a_mask_by_iteration(cfg, setting):
    cfg.DeepKD.update({"WARMUP": 4})
    cfg.DeepKD.MASK.UNIT = "iteration"
    distiller = DeepKD(*setting[:2], cfg)
    assert [distiller.warmup(epoch) for epoch in (0.1, 1, 1.5, 2, 9.3)] == [0.25, 0.25, 0.5, 0.5, 1]
    cfg.SOLVER.WARMUP_UNIT = "iteration"
    assert [distiller.warmup(epoch) for epoch in (0.1, 1.5, 9.3)] == [0.025, 0.375, 1]


def test_the_mask_is_read_as_the_variant_has_it(cfg, setting):
    student, teacher, batch = setting
    cfg.DeepKD.MASK.update({"TYPE": "static", "K": 7})
    for variant, reading in (("article", "multiply"), ("paper", "renormalise"), ("release", "renormalise")):
        cfg.SOLVER.DECOUPLED.VARIANT = variant
        losses, _ = losses_and_gradients(DeepKD(student, teacher, cfg), batch, 1)
        terms = decoupled_kd(student.logits, teacher.logits, batch["target"], 4.0, 7, reading)
        close(losses["ncg"], ((1 - terms.teacher_target_prob) * terms.nckd).mean().detach(), 1e-12)


@pytest.mark.parametrize(("k", "count"), [(0.2, 20), (7.0, 7), (1.0, 1)])
def test_a_static_mask(cfg, setting, k, count):
    student, teacher, batch = setting
    cfg.DeepKD.MASK.update({"TYPE": "static", "K": k, "READING": "multiply"})
    distiller = DeepKD(student, teacher, cfg)
    assert {distiller.top_k(e, 100) for e in (1, 100, 240)} == {count}
    losses, _ = losses_and_gradients(distiller, batch, 1)
    terms = decoupled_kd(student.logits, teacher.logits, batch["target"], 4.0, count, "multiply")
    close(losses["ncg"], ((1 - terms.teacher_target_prob) * terms.nckd).mean().detach(), 1e-12)


def test_one_epoch_is_a_whole_schedule(cfg, setting):
    cfg.SOLVER.EPOCHS = 1
    assert DeepKD(*setting[:2], cfg).top_k(1, 100) == 5


@pytest.mark.parametrize("make", [KD, DKD, DeepKD])
def test_the_teacher_stays_in_evaluation_and_learns_nothing(cfg, setting, make):
    student, teacher, batch = setting
    distiller = make(student, teacher, cfg)
    assert distiller.train() is distiller
    assert student.norm.training
    assert not teacher.training
    assert not teacher.norm.training
    _, losses = distiller(**batch, epoch=1)
    sum(losses.values()).backward()
    assert teacher.logits.grad is None
    assert student.logits.grad is not None
    assert [id(p) for p in distiller.get_learnable_parameters()] == [id(p) for p in student.parameters()]
    assert distiller.get_extra_parameters() == 0
    assert torch.equal(distiller.eval()(image=batch["image"]), student.logits[batch["image"]])


def test_equal_momenta_make_deepkd_its_base(cfg, setting):
    """DeepKD without deltas, by streams, is KD under plain SGD: the ablation without decoupling."""
    student, teacher, batch = setting
    other = Table(student.logits.detach())
    cfg.DeepKD.update({"CE_WEIGHT": 0.1, "TCG_WEIGHT": 0.9, "NCG_WEIGHT": 0.9})
    cfg.DeepKD.MASK.TYPE = "none"
    ours, theirs = DeepKD(student, teacher, cfg), KD(other, teacher, cfg)
    opt = DecoupledMomentumSGD([student.logits], 0.1, {"tog": 0.9, "tcg": 0.9, "ncg": 0.9}, 1e-3, "tcg")
    sgd = torch.optim.SGD([other.logits], 0.1, 0.9, weight_decay=1e-3)
    for _ in range(5):
        opt.zero_grad()
        opt.backward(ours.train()(**batch, epoch=1)[1])
        opt.step()
        sgd.zero_grad()
        sum(theirs.train()(**batch, epoch=1)[1].values()).backward()
        sgd.step()
    close(student.logits, other.logits.detach(), 1e-10)


def test_vanilla_is_cross_entropy(setting):
    student, _, batch = setting
    distiller = Vanilla(student).train()
    logits, losses = distiller(**batch, epoch=1)
    close(losses["ce"], F.cross_entropy(student.logits, batch["target"]).detach(), 1e-12)
    assert torch.equal(distiller.eval()(image=batch["image"]), logits)
    assert distiller.get_extra_parameters() == 0


class Rebuilt(KD):
    """A user's distiller that puts another teacher in the place of the one that it was given."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.teacher = nn.Sequential(nn.Dropout(), teacher)


class OnItsOwn(Distiller):
    """A user's distiller that does without the constructor of the base class."""

    def __init__(self, student, teacher, cfg):
        nn.Module.__init__(self)
        self.student, self.teacher, self.cfg = student, teacher, cfg


@pytest.mark.parametrize("method", [KD, DKD, DeepKD, Rebuilt, OnItsOwn])
def test_the_teacher_is_in_evaluation_mode_from_construction_on(cfg, method):
    distiller = method(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)), cfg)
    assert distiller.training
    assert distiller.student.training
    assert not any(part.training for part in distiller.teacher.modules())
    assert not any(part.training for part in copy.deepcopy(distiller).teacher.modules())
    assert not any(part.training for part in distiller.train().teacher.modules())


@pytest.mark.parametrize("method", [Vanilla, KD, DKD, DeepKD])
def test_soft_labels_of_one_class_are_labels(cfg, setting, method):
    student, teacher, batch = setting
    made = method(student) if method is Vanilla else method(student, teacher, cfg)
    assert made.soft_labels
    hard, gradients = losses_and_gradients(made, batch, 1)
    num_classes = student.logits.shape[1]
    soft = batch | {"target": F.one_hot(batch["target"], num_classes).to(student.logits.dtype)}
    losses, theirs = losses_and_gradients(made, soft, 1)
    for name, loss in hard.items():
        close(losses[name], loss.detach(), 1e-12)
        close(theirs[name], gradients[name], 1e-12)


@pytest.mark.parametrize(("method", "task"), [(DKD, "loss_ce"), (DeepKD, "tog")])
def test_the_target_class_of_a_soft_label_is_its_larger_one(cfg, setting, method, task):
    student, teacher, batch = setting
    made = method(student, teacher, cfg)
    num_classes = student.logits.shape[1]
    other = (batch["target"] + 1) % num_classes
    labels = [F.one_hot(target, num_classes).to(student.logits.dtype) for target in (batch["target"], other)]
    of_each = [losses_and_gradients(made, batch | {"target": target}, 1)[0] for target in (batch["target"], other)]
    losses, _ = losses_and_gradients(made, batch | {"target": 0.7 * labels[0] + 0.3 * labels[1]}, 1)
    close(losses[task], (0.7 * of_each[0][task] + 0.3 * of_each[1][task]).detach(), 1e-12)
    for name in losses.keys() - {task}:
        close(losses[name], of_each[0][name].detach(), 1e-12)


@pytest.mark.parametrize(
    ("method", "base"),
    [(KD, ""), (DKD, ""), (DeepKD, "KD"), (DeepKD, "DKD")],
    ids=lambda one: getattr(one, "name", one),
)
def test_the_loss_weights_that_a_method_states_are_those_of_its_loss(cfg, setting, golden_losses, method, base):
    student, teacher, batch = setting
    cfg.KD.LOSS.update({"CE_WEIGHT": 0.3, "KD_WEIGHT": 0.7})
    cfg.DKD.update({"CE_WEIGHT": 0.4, "ALPHA": 1.5, "BETA": 6.0, "WARMUP": 10})
    cfg.DeepKD.update({"BASE": base or "KD", "CE_WEIGHT": 0.2, "TCG_WEIGHT": 1.1, "NCG_WEIGHT": 2.5, "WARMUP": 10})
    cfg.DeepKD.MASK.TYPE = "none"
    logits, labels = (student.logits.detach(), teacher.logits.detach()), batch["target"]
    tckd, nckd, p = decoupled_kd(*logits, labels, 4.0)
    parts = {"TCKD": tckd.mean(), "NCKD": nckd.mean(), "(1 − p) NCKD": ((1 - p) * nckd).mean()}
    parts |= {"KD": parts["TCKD"] + parts["(1 − p) NCKD"]}
    weights = method.loss_weights(cfg)
    epochs, ce = weights.pop("epochs of warm-up", 0), weights.pop("CE") * F.cross_entropy(logits[0], labels)
    losses, _ = losses_and_gradients(method(student, teacher, cfg), batch, 5)
    factor = 5 / epochs if epochs else 1.0
    close(sum(losses.values()), ce + factor * sum(weight * parts[name] for name, weight in weights.items()))
    assert epochs == (0 if method is KD else 10)


def test_loss_weights_of_deepkd_and_its_base_are_in_the_same_terms(cfg):
    cfg.DeepKD.update({"CE_WEIGHT": 0.1, "TCG_WEIGHT": 0.9, "NCG_WEIGHT": 0.9})
    assert DeepKD.loss_weights(cfg) == KD.loss_weights(cfg) == {"CE": 0.1, "KD": 0.9}
    cfg.DeepKD.BASE = "CRLD"
    theirs = {"CRLD.WV_WEIGHT": 2.0, "CRLD.CV_WEIGHT": 0.5}
    assert DeepKD.loss_weights(cfg) == {"CE": 0.1, "TCKD": 0.9, "NCKD": 0.9} | theirs
    assert CRLD.loss_weights(cfg) == {"CE": 1.0, "KD": 1.0} | theirs
    assert MLKD.loss_weights(cfg) == {"CE": 0.1, "KD": 1.0, "MLKD.KD_WEIGHT": 0.9}


def test_a_warm_up_of_one_epoch_is_none_unless_it_goes_by_iterations(cfg):
    cfg.DeepKD.WARMUP = 1
    assert "epochs of warm-up" not in DeepKD.loss_weights(cfg)
    cfg.SOLVER.WARMUP_UNIT = "iteration"
    assert DeepKD.loss_weights(cfg)["epochs of warm-up"] == 1


def test_a_step_of_ones_own_states_its_loss_weights_or_none_are_known(cfg):
    class Step(KD):
        def forward_train(self, image, target, epoch, **batch):
            raise NotImplementedError

    class Parts(DeepKD):
        def decoupled(self, terms, target, epoch):
            raise NotImplementedError

    class Declared(Step):
        def forward_train(self, image, target, epoch, **batch):
            raise NotImplementedError

        @classmethod
        def loss_weights(cls, cfg):
            return {"CE": 1.0}

    assert (Step.loss_weights(cfg), Parts.loss_weights(cfg), Declared.loss_weights(cfg)) == ({}, {}, {"CE": 1.0})
    assert Vanilla.loss_weights(cfg) == {}


def test_a_step_of_ones_own_says_that_it_takes_soft_labels():
    class Terms(Method):
        pass

    class Step(Method):
        def forward_train(self, **batch):
            raise NotImplementedError

    class Declared(Step):
        soft_labels = True

    assert (Terms.soft_labels, Step.soft_labels, Declared.soft_labels, Distiller.soft_labels) == (
        *(True, False, True),
        False,
    )
