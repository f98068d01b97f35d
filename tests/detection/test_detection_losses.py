"""A proposal is to the core what an image is to the classification losses."""

import pytest
import torch

from deepkd_plugin.detection.losses import losses_by_stream, proposal_kd, proposal_terms
from deepkd_plugin.losses import decoupled_kd, kd_divergence

F64 = torch.float64


def proposals(n=32, classes=81, background="last", dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 4 * torch.randn(2, n, classes, generator=generator, dtype=F64)
    target = torch.randint(0, classes, (n,), generator=generator)
    target[::2] = classes - 1 if background == "last" else 0
    return student.to(dtype).requires_grad_(), teacher.to(dtype), target


def test_terms_equal_mdistillers_rcnn_dkd_loss(golden_losses):
    student = golden_losses["rcnn_student"].clone().requires_grad_()
    tcg, ncg = proposal_terms(student, golden_losses["rcnn_teacher"], golden_losses["rcnn_target"])
    streams = losses_by_stream({}, (tcg, ncg), task_weight=0.0)
    loss = streams["tcg"] + streams["ncg"]
    torch.testing.assert_close(loss.detach(), golden_losses["rcnn_dkd"], rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, golden_losses["rcnn_dkd_grad"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("mask", ["renormalise", "multiply"])
def test_terms_equal_the_classification_losses(temperature, top_k, mask):
    student, teacher, target = proposals()
    expected = decoupled_kd(student, teacher, target, temperature, top_k, mask)
    settings = {"temperature": temperature, "top_k": top_k, "mask": mask}
    dkd = proposal_terms(student, teacher, target, base="DKD", **settings)
    kd = proposal_terms(student, teacher, target, base="KD", **settings)
    assert dkd == (expected.tckd.mean(), expected.nckd.mean())
    weighted = (1 - expected.teacher_target_prob) * expected.nckd
    assert kd == (expected.tckd.mean(), weighted.mean())


def test_kds_terms_add_up_to_kd():
    student, teacher, target = proposals()
    whole = proposal_kd(student, teacher, 2.0)
    assert whole == kd_divergence(student, teacher, 2.0).mean()
    torch.testing.assert_close(sum(proposal_terms(student, teacher, target, base="KD", temperature=2.0)), whole)


def test_the_backgrounds_column_does_not_matter():
    student, teacher, target = proposals()
    moved = [torch.cat([x[:, -1:], x[:, :-1]], 1) for x in (student, teacher)]  # last to first
    first = proposal_terms(*moved, (target + 1) % 81)
    torch.testing.assert_close(torch.stack(first), torch.stack(proposal_terms(student, teacher, target)))


@pytest.mark.parametrize("base", ["KD", "DKD"])
def test_without_proposals_losses_and_gradients_are_zero(base):
    student, teacher, target = proposals(0, dtype=torch.bfloat16)
    terms = (*proposal_terms(student, teacher, target, base=base, top_k=5), proposal_kd(student, teacher))
    for term in terms:
        assert term.item() == 0.0
        assert term.dtype == torch.float32
        (gradient,) = torch.autograd.grad(term, student)
        assert gradient.shape == (0, 81)


def test_without_foreground_the_background_is_the_target():
    student, teacher, target = proposals()
    target[:] = 80
    tcg, ncg = proposal_terms(student, teacher, target)
    expected = decoupled_kd(student, teacher, target, 1.0)
    assert (tcg, ncg) == (expected.tckd.mean(), expected.nckd.mean())
    assert tcg > 0
    assert ncg > 0


@pytest.mark.parametrize("sign", [1, -1])
def test_certain_networks_give_finite_numbers(sign):
    """mdistiller's own loss takes the log of a softmax, and is NaN here."""
    student, teacher, target = proposals(4, dtype=torch.float32)
    with torch.no_grad():
        student[:, 80] += 1000.0
        teacher[:, 80] += sign * 1000.0
    terms = proposal_terms(student, teacher, target)
    (gradient,) = torch.autograd.grad(sum(terms), student)
    assert all(term.isfinite() for term in terms)
    assert gradient.isfinite().all()


def test_every_detection_loss_is_in_the_task_stream():
    found = {"loss_cls": torch.tensor(1.0), "loss_rpn_cls": torch.tensor(2.0)}
    terms = torch.tensor(3.0), torch.tensor(8.0)
    streams = losses_by_stream(found, terms, task_weight=0.5, tcg_weight=2.0)
    assert streams == {"tog": 1.5, "tcg": 6.0, "ncg": 2.0}


def test_feature_losses_are_a_fourth_stream():
    terms = torch.tensor(3.0), torch.tensor(8.0)
    features = {"loss_reviewkd": torch.tensor(5.0), "loss_other": torch.tensor(1.0)}
    assert losses_by_stream({}, terms, feature_losses=features)["feat"] == 6.0
    assert "feat" not in losses_by_stream({}, terms, feature_losses={})


def test_an_unknown_base_is_refused():
    with pytest.raises(ValueError, match=r"base must be one of \('KD', 'DKD'\), got 'CRLD'"):
        proposal_terms(*proposals(), base="CRLD")
