import copy

import pytest
import torch
from torch.nn import functional as F

from deepkd_plugin.detection.distillers import DISTILLERS, training_pass
from deepkd_plugin.detection.losses import proposal_terms
from deepkd_plugin.topk import TopP

METHODS = ("NONE", "KD", "DKD", "DeepKD")
TASK = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
NAMES = {
    "NONE": TASK,
    "KD": TASK | {"loss_kd"},
    "DKD": TASK | {"loss_kd"},
    "DeepKD": {"tog", "tcg", "ncg"},
}


@pytest.fixture
def make(detector, detection_config):
    """A method in training mode with a student and another teacher: make("KD", "KEY", "VALUE", …)."""

    def made(method, *options):
        cfg = detection_config("DISTILLER.TYPE", method, *options)
        networks = (detector(0),) if method == "NONE" else (detector(0), detector(1).requires_grad_(False))
        return DISTILLERS[method](*networks, cfg).train()

    return made


def run(distiller, batch, epoch=1, progress=0.5):
    """(its losses, the step that it took, the teacher's logits of it), all of one draw of proposals."""
    images, targets = batch
    twin = copy.deepcopy(distiller)
    torch.manual_seed(5)
    logits, losses = distiller(image=images, target=targets, epoch=epoch, progress=progress)
    torch.manual_seed(5)
    step = training_pass(twin.student, images, targets)
    assert torch.equal(logits, step.logits)
    return losses, step, twin.teach(step) if hasattr(twin, "teacher") else None


def without_boxes(batch):
    images, targets = batch
    return images, [t | {"boxes": torch.zeros(0, 4), "labels": t["labels"][:0]} for t in targets]


def test_a_training_pass_is_torchvisions_own(detector, batch):
    images, targets = batch
    student = detector(0).train()
    twin = copy.deepcopy(student)
    torch.manual_seed(2)
    expected = student(images, targets)
    torch.manual_seed(2)
    step = training_pass(twin, images, targets)
    assert step.losses.keys() == expected.keys() == TASK
    assert all(torch.equal(step.losses[name], loss) for name, loss in expected.items())
    assert step.logits.shape == (16, 6)
    assert [len(p) for p in step.proposals] == [8, 8]
    foreground = step.labels[:8] > 0
    assert foreground.any()
    assert not foreground.all()
    assert (step.labels[8:] == 0).all()  # the second image has no box


def test_the_student_alone_and_in_evaluation_is_torchvisions(make, batch):
    distiller = make("NONE")
    losses, step, _ = run(distiller, batch)
    assert losses.keys() == TASK
    assert all(torch.equal(losses[name], loss) for name, loss in step.losses.items())
    with torch.no_grad():
        (boxes, _), (expected, _) = distiller.eval()(batch[0]), distiller.student(batch[0])
    assert torch.equal(boxes["boxes"], expected["boxes"])


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_teacher_is_in_evaluation_mode_from_construction_on(detector, detection_config, method):
    distiller = DISTILLERS[method](detector(0), detector(1).train(), detection_config("DISTILLER.TYPE", method))
    assert distiller.student.training
    assert not any(part.training for part in distiller.teacher.modules())
    assert not any(part.training for part in distiller.train().teacher.modules())


def test_only_what_is_trained_is_learnable(make):
    distiller = make("KD")
    frozen = distiller.student.backbone.body.conv1.weight.requires_grad_(False)
    learnable = distiller.get_learnable_parameters()
    assert len(learnable) == len(list(distiller.student.parameters())) - 1
    assert not any(p is frozen for p in learnable)


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_teacher_is_only_asked(make, batch, method):
    distiller = make(method)
    before = copy.deepcopy(distiller.teacher.state_dict())
    assert distiller.student.training
    assert not any(m.training for m in distiller.teacher.modules())
    losses, step, taught = run(distiller, batch)
    assert not taught.requires_grad
    sum(losses.values()).backward()
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert all(p.grad is not None for p in distiller.get_learnable_parameters())
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())
    distiller.teacher.requires_grad_(True)
    assert not distiller.teach(step).requires_grad


def test_the_teachers_logits_are_its_own_box_heads_of_the_students_proposals(make, batch):
    distiller = make("KD")
    _, step, taught = run(distiller, batch)
    teacher = distiller.teacher
    seen = []
    teacher.roi_heads.box_predictor.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        features = teacher.backbone(teacher.transform(batch[0])[0].tensors)
        teacher.roi_heads(features, step.proposals, [(48, 48)] * 2)
    assert torch.equal(seen[0][0], taught)
    assert not torch.allclose(taught, step.logits)


def test_kd(make, batch):
    options = ("KD.TEMPERATURE", "2", "KD.LOSS.CE_WEIGHT", "0.5", "KD.LOSS.KD_WEIGHT", "3.0")
    losses, step, taught = run(make("KD", *options), batch)
    assert losses.keys() == NAMES["KD"]
    assert all(torch.equal(losses[name], 0.5 * step.losses[name]) for name in TASK)
    log_p, log_q = (F.log_softmax(x / 2, 1) for x in (step.logits, taught))
    expected = 3 * 4 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    torch.testing.assert_close(losses["loss_kd"], expected)


def dkd(logits, taught, labels, temperature):
    """(TCKD, NCKD), as Zhao et al. write them: binary and conditional probabilities."""
    p, q = ((x / temperature).softmax(1).double() for x in (taught, logits))
    rows = torch.arange(len(labels))
    pt, qt = p[rows, labels], q[rows, labels]
    target = pt * (pt / qt).log() + (1 - pt) * ((1 - pt) / (1 - qt)).log()
    others = torch.ones_like(p, dtype=torch.bool)
    others[rows, labels] = False
    rest = [x[others].view(len(labels), -1) for x in (p, q)]
    hat_p, hat_q = (x / x.sum(1, keepdim=True) for x in rest)
    non_target = (hat_p * (hat_p / hat_q).log()).sum(1)
    return temperature**2 * target.mean(), temperature**2 * non_target.mean()


def test_dkd_with_its_warm_up(make, batch):
    options = ("DKD.T", "2.0", "DKD.ALPHA", "1.5", "DKD.BETA", "4.0", "DKD.CE_WEIGHT", "0.5")
    losses, step, taught = run(make("DKD", *options, "DKD.WARMUP", "4"), batch, epoch=1)
    assert losses.keys() == NAMES["DKD"]
    assert all(torch.equal(losses[name], 0.5 * step.losses[name]) for name in TASK)
    target, non_target = dkd(step.logits, taught, step.labels, 2.0)
    assert losses["loss_kd"].item() == pytest.approx((0.25 * (1.5 * target + 4 * non_target)).item(), rel=1e-4)


WEIGHTS = ("DeepKD.CE_WEIGHT", "0.5", "DeepKD.TCG_WEIGHT", "2.0", "DeepKD.NCG_WEIGHT", "3.0")


def test_deepkd_over_dkd_without_a_mask(make, batch):
    distiller = make("DeepKD", *WEIGHTS, "DeepKD.TEMPERATURE", "2.0", "DeepKD.MASK.TYPE", "none")
    assert distiller.top_k(0.5, 6) is None
    losses, step, taught = run(distiller, batch)
    assert losses.keys() == NAMES["DeepKD"]
    target, non_target = dkd(step.logits, taught, step.labels, 2.0)
    assert losses["tog"].item() == pytest.approx(0.5 * sum(step.losses.values()).item(), rel=1e-6)
    assert losses["tcg"].item() == pytest.approx(2 * target.item(), rel=1e-4)
    assert losses["ncg"].item() == pytest.approx(3 * non_target.item(), rel=1e-4)


@pytest.mark.parametrize("base", ["KD", "DKD"])
@pytest.mark.parametrize("reading", ["renormalise", "multiply"])
@pytest.mark.parametrize(("progress", "k"), [(0.0, 1), (0.5, 3), (1.0, 5)])
def test_deepkd_has_the_cores_terms_with_the_masks_k(make, batch, base, reading, progress, k):
    distiller = make("DeepKD", *WEIGHTS, "DeepKD.BASE", base, "DeepKD.MASK.READING", reading)
    assert distiller.top_k(progress, 6) == k
    losses, step, taught = run(distiller, batch, progress=progress)
    tcg, ncg = proposal_terms(step.logits, taught, step.labels, base=base, top_k=k, mask=reading)
    torch.testing.assert_close(losses["tcg"], 2 * tcg)
    torch.testing.assert_close(losses["ncg"], 3 * ncg)


@pytest.mark.parametrize("reading", ["renormalise", "multiply"])
def test_deepkds_mask_may_go_by_the_mass_of_each_proposal(make, batch, reading):
    """At the end it is no mask."""
    words = ("DeepKD.MASK.TYPE", "top_p", "DeepKD.MASK.READING", reading)
    distiller = make("DeepKD", *WEIGHTS, *words)
    assert distiller.top_k(0.5, 6) == TopP(0.5)
    losses, step, taught = run(distiller, batch, progress=0.5)
    _, ncg = proposal_terms(step.logits, taught, step.labels, top_k=TopP(0.5), mask=reading)
    torch.testing.assert_close(losses["ncg"], 3 * ncg)
    last, _, _ = run(distiller, batch, progress=1.0)
    none, _, _ = run(make("DeepKD", *WEIGHTS, "DeepKD.MASK.TYPE", "none"), batch, progress=1.0)
    assert torch.equal(last["ncg"], none["ncg"])
    assert not torch.equal(last["ncg"], losses["ncg"])


def test_deepkds_warm_up_is_of_the_distillation_alone(make, batch):
    losses, _, _ = run(make("DeepKD"), batch, epoch=1)
    warm, _, _ = run(make("DeepKD", "DeepKD.WARMUP", "4"), batch, epoch=1)
    assert torch.equal(warm["tog"], losses["tog"])
    for stream in ("tcg", "ncg"):
        torch.testing.assert_close(warm[stream], 0.25 * losses[stream])


@pytest.mark.parametrize("method", METHODS)
def test_images_without_boxes(make, batch, method):
    losses, step, _ = run(make(method), without_boxes(batch))
    assert (step.labels == 0).all()
    assert losses.keys() == NAMES[method]
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert step.losses["loss_box_reg"] == 0
    assert step.losses["loss_classifier"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_proposals(make, batch, method, monkeypatch):
    distiller = make(method)
    propose = type(distiller.student.rpn).forward

    def nothing(rpn, *inputs):
        proposals, losses = propose(rpn, *inputs)
        return [p[:0] for p in proposals], losses

    monkeypatch.setattr(type(distiller.student.rpn), "forward", nothing)
    losses, step, _ = run(distiller, without_boxes(batch))
    assert step.logits.shape == (0, 6)
    assert losses.keys() == NAMES[method]
    assert step.losses["loss_classifier"] == step.losses["loss_box_reg"] == 0
    for name in {"loss_kd", "tcg", "ncg"} & losses.keys():
        assert losses[name] == 0, name
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    grads = [p.grad for p in distiller.get_learnable_parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in grads)
    # the graph reaches the head, so that several processes find the same parameters
    assert (distiller.student.roi_heads.box_predictor.cls_score.weight.grad == 0).all()
