"""DETR-like heads: terms of queries against sums written out in numpy, and what they become in simpler cases."""

import math

import numpy as np
import pytest
import torch

from deepkd_plugin.detection.queries import NO_OBJECT, sigmoid_query_terms, softmax_query_terms
from deepkd_plugin.losses import decoupled_kd, kd_divergence

F64 = torch.float64
HEADS = (softmax_query_terms, sigmoid_query_terms)


def queries(batch=2, count=6, columns=8, matched=0.5, classes=None, seed=0):
    """Logits of both networks (B, Q, C) in float64 and labels, about a share of them matched."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, batch, count, columns, generator=generator, dtype=F64)
    target = torch.randint(0, classes or columns - 1, (batch, count), generator=generator)
    target[torch.rand(batch, count, generator=generator) >= matched] = NO_OBJECT
    return student.requires_grad_(), teacher, target


def rows(student, teacher, target):
    """The queries one by one, as plain numbers."""
    flat = (student.detach().reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1]), target.reshape(-1))
    return zip(*(part.tolist() for part in flat))


def softmax(row, temperature):
    powers = np.exp(np.array(row) / temperature - max(row) / temperature)
    return powers / powers.sum()


def kl(p, q):
    return float((p * np.log(p / q)).sum())


def by_hand_softmax(student, teacher, target, temperature, top_k, unmatched):
    sums, total = np.zeros(2), 0.0
    for s, t, label in rows(student, teacher, target):
        weight = unmatched if label == NO_OBJECT else 1.0
        label = len(s) - 1 if label == NO_OBJECT else label
        p, q = softmax(t, temperature), softmax(s, temperature)
        tckd = kl(np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]]))
        rest = sorted((c for c in range(len(s)) if c != label), key=lambda c: -t[c])[:top_k]
        nckd = kl(softmax([t[c] for c in rest], temperature), softmax([s[c] for c in rest], temperature))
        sums += weight * temperature**2 * np.array([tckd, nckd])
        total += weight
    return sums / total


def by_hand_sigmoid(student, teacher, target, temperature, top_k, unmatched):
    tcg, ncg, matched, total = 0.0, 0.0, 0, 0.0
    for s, t, label in rows(student, teacher, target):
        weight = unmatched if label == NO_OBJECT else 1.0
        p, q = ([1 / (1 + math.exp(-z / temperature)) for z in row] for row in (t, s))
        each = [temperature**2 * kl(np.array([a, 1 - a]), np.array([b, 1 - b])) for a, b in zip(p, q)]
        rest = sorted((c for c in range(len(s)) if c != label), key=lambda c: -t[c])[:top_k]
        tcg += 0.0 if label == NO_OBJECT else each[label]
        matched += label != NO_OBJECT
        ncg += weight * sum(each[c] for c in rest)
        total += weight
    return np.array([tcg / matched, ncg / total])


@pytest.mark.parametrize("unmatched", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("head", "by_hand"), [*zip(HEADS, (by_hand_softmax, by_hand_sigmoid))])
def test_terms_are_the_sums_written_out(head, by_hand, temperature, top_k, unmatched):
    student, teacher, target = queries()
    found = head(student, teacher, target, temperature=temperature, top_k=top_k, unmatched_weight=unmatched)
    wanted = by_hand(student, teacher, target, temperature, top_k, unmatched)
    assert [term.item() for term in found] == pytest.approx(wanted.tolist(), rel=1e-9)


@pytest.mark.parametrize("unmatched", [0.0, 0.3])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_finite_differences(head, top_k, unmatched):
    student, teacher, target = queries(1, 4, 5)
    options = {"temperature": 2.0, "top_k": top_k, "unmatched_weight": unmatched}
    assert torch.autograd.gradcheck(lambda z: tuple(head(z, teacher, target, **options)), student)


def test_a_softmax_head_whose_queries_are_all_matched_is_a_classifier():
    student, teacher, target = queries(matched=1.0)
    flat = student.reshape(-1, 8), teacher.reshape(-1, 8), target.reshape(-1)
    tckd, nckd, _ = decoupled_kd(*flat, 4.0, 3, "multiply")
    found = softmax_query_terms(student, teacher, target, temperature=4.0, top_k=3, mask="multiply")
    torch.testing.assert_close(tuple(found), (tckd.mean(), nckd.mean()))


def test_a_sigmoid_of_one_class_is_a_softmax_of_two():
    """KL of σ(z) is that of the softmax of (z, 0), whose logits differ by z."""
    student, teacher, target = queries(matched=1.0)
    columns = student.shape[-1]
    pairs = [torch.stack([z, torch.zeros_like(z)], -1).reshape(-1, 2) for z in (student, teacher)]
    whole = kd_divergence(*pairs, 2.0).reshape(-1, columns).sum(1).mean()
    torch.testing.assert_close(sum(sigmoid_query_terms(student, teacher, target, temperature=2.0)), whole)


def test_the_column_of_no_object_may_be_the_first():
    student, teacher, target = queries()
    moved = [torch.cat([z[..., -1:], z[..., :-1]], -1) for z in (student, teacher)]
    shifted = torch.where(target == NO_OBJECT, NO_OBJECT, target + 1)
    first = softmax_query_terms(*moved, shifted, unmatched_weight=0.1, no_object=0)
    torch.testing.assert_close(first, softmax_query_terms(student, teacher, target, unmatched_weight=0.1))


@pytest.mark.parametrize("head", HEADS)
def test_ignored_queries_may_hold_anything(head):
    student, teacher, target = queries()
    before = head(student, teacher, target)
    with torch.no_grad():
        for part in (student, teacher):
            part[target == NO_OBJECT] = torch.nan
    after = head(student, teacher, target)
    assert tuple(after) == tuple(before)
    (gradient,) = torch.autograd.grad(sum(after), student)
    assert gradient.isfinite().all()
    assert not gradient[target == NO_OBJECT].any()
    assert gradient[target != NO_OBJECT].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("head", HEADS)
def test_without_a_matched_query_terms_and_gradients_are_zero(head, count):
    student, teacher, target = queries(1, count, 5, matched=0.0)
    for term in head(student, teacher, target):
        assert term.item() == 0.0
        (gradient,) = torch.autograd.grad(term, student, retain_graph=True)
        assert not gradient.any()


@pytest.mark.parametrize("head", HEADS)
def test_certain_heads_in_half_precision_give_finite_numbers(head):
    student = torch.full((3, 5), 1000.0, dtype=torch.bfloat16, requires_grad=True)
    terms = head(student, -student.detach().flip(-1) * torch.arange(1, 6), torch.tensor([0, 1, NO_OBJECT]))
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms)
    (gradient,) = torch.autograd.grad(sum(terms), student)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_k": 8}, "K must be an integer from 1 to 7"),
        ({"unmatched_weight": -1.0}, "unmatched_weight must be a finite number from 0 on"),
        ({"target": torch.zeros(2, 5, dtype=torch.long)}, "must have one shape"),
        ({"target": torch.zeros(2, 6)}, "target must be integers"),
        ({"target": torch.full((2, 6), 8)}, "labels must be in 0 … 7"),
        ({"target": torch.full((2, 6), -2)}, "labels must be in 0 … 7"),
    ],
)
def test_what_does_not_fit_is_refused(head, change, message):
    student, teacher, target = queries()
    given = {"target": target} | change
    with pytest.raises(ValueError, match=message):
        head(student, teacher, **given)
    with pytest.raises(ValueError, match="no_object must be one of the 8 columns"):
        softmax_query_terms(student, teacher, target, no_object=8)
