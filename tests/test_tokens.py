"""Losses on tokens: the numbers of the losses on samples, and of a naive one; vocabularies that must agree."""

import math

import pytest
import torch
import torch.nn.functional as F

from deepkd_plugin import decoupled_kd, per_sample, shared_vocabulary, token_kd, tokens
from deepkd_plugin.errors import UserError
from deepkd_plugin.topk import TopP

C = 11
WAYS = [(None, "renormalise"), (3, "renormalise"), (3, "multiply"), (1, "renormalise"), (C - 1, "multiply")]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of two tokens, so that every test here goes through several."""
    monkeypatch.setattr(tokens, "CELLS", 2 * C)


def batch(dtype=torch.float64, spread=3.0):
    """Logits of 2 sequences of 4 tokens, the last of the first ignored."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (spread * torch.randn(2, 4, C, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.randint(C, (2, 4), generator=generator)
    target[0, 3] = -100
    return student.to(dtype).requires_grad_(), teacher.to(dtype), target


def naive(student, teacher, label, temperature, top_k, mask):
    """TCKD and NCKD of one token, in Python's numbers, from the formulas."""
    s, t = ([math.exp(z / temperature) for z in logits.tolist()] for logits in (student, teacher))
    p_s, p_t = s[label] / sum(s), t[label] / sum(t)
    tckd = p_t * math.log(p_t / p_s) + (1 - p_t) * math.log((1 - p_t) / (1 - p_s))
    others = sorted((c for c in range(len(s)) if c != label), key=lambda c: -t[c])
    kept = others[:top_k]
    among = kept if mask == "renormalise" else others
    q, r = ({c: z[c] / sum(z[i] for i in among) for c in kept} for z in (t, s))
    return temperature**2 * tckd, temperature**2 * sum(q[c] * math.log(q[c] / r[c]) for c in kept)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 50.0])
@pytest.mark.parametrize(("top_k", "mask"), WAYS)
def test_the_numbers_of_a_naive_implementation(top_k, mask, temperature):
    student, teacher, target = batch()
    tckd, nckd, p = token_kd(student, teacher, target, temperature, top_k, mask)
    for place in (tuple(row) for row in (target != -100).nonzero().tolist()):
        label = int(target[place])
        expected = naive(student[place], teacher[place], label, temperature, top_k, mask)
        assert (tckd[place].item(), nckd[place].item()) == pytest.approx(expected, rel=1e-10)
        assert p[place].item() == pytest.approx(F.softmax(teacher[place] / temperature, 0)[label].item())
    assert tckd[0, 3] == nckd[0, 3] == p[0, 3] == 0


@pytest.mark.parametrize(("top_k", "mask"), WAYS)
def test_gradients_are_those_of_numerical_differences(top_k, mask):
    student, teacher, target = batch(spread=1.0)
    for number in (0, 1):  # each stream has its own backward pass
        assert torch.autograd.gradcheck(
            lambda z, number=number: token_kd(z, teacher, target, 2.0, top_k, mask)[number], student
        )
    assert torch.autograd.gradcheck(lambda z: sum(token_kd(z, teacher, target, 2.0, top_k, mask)[:2]), student)


@pytest.mark.parametrize("spread", [3.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "mask"), WAYS)
def test_losses_and_gradients_of_sequences_are_those_of_their_samples(top_k, mask, dtype, spread):
    """(B, L, C) through token_kd, and (B·L, C) through per_sample and decoupled_kd."""
    student, teacher, target = batch(dtype, spread)
    ours = token_kd(student, teacher, target, 4.0, top_k, mask)
    samples = per_sample(student, teacher, target, class_dim=-1)
    theirs = decoupled_kd(samples.student, samples.teacher, samples.target, 4.0, top_k, mask)
    counted = samples.counted.reshape(2, 4)
    close = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-5}[dtype]
    for one, other in zip(ours, theirs):
        assert (one.shape, one.dtype) == ((2, 4), other.dtype)
        other = other.reshape(2, 4).masked_fill(~counted, 0.0)
        torch.testing.assert_close(one, other, rtol=close, atol=close * spread)
    weight = torch.arange(1.0, 9.0, dtype=ours.tckd.dtype)
    for number in (0, 1):
        (mine,) = torch.autograd.grad((weight * ours[number].flatten()).sum(), student, retain_graph=True)
        (other,) = torch.autograd.grad(
            (weight * theirs[number]).masked_fill(~samples.counted, 0).sum(), student, retain_graph=True
        )
        assert mine.dtype == dtype
        close = 2e-2 if dtype == torch.bfloat16 else 10 * close
        torch.testing.assert_close(mine, other, rtol=close, atol=close)
        assert (mine[0, 3] == 0).all()


def test_the_order_of_tokens_and_the_size_of_parts_change_nothing(monkeypatch):
    student, teacher, target = batch()
    in_parts = token_kd(student, teacher, target, top_k=3)
    monkeypatch.setattr(tokens, "CELLS", 2**22)
    flat = token_kd(student.reshape(8, C), teacher.reshape(8, C), target.reshape(8), top_k=3)
    for one, other in zip(in_parts, flat):
        assert torch.equal(one.reshape(8), other)


def test_ignored_tokens_are_not_read():
    student, teacher, target = batch()
    expected = token_kd(student, teacher, target, top_k=3)
    broken = student.detach().clone()
    broken[0, 3] = math.nan
    broken.requires_grad_()
    teacher[0, 3] = math.inf
    losses = token_kd(broken, teacher, target, top_k=3)
    assert all(torch.equal(one, other) for one, other in zip(losses, expected))
    (losses.tckd + losses.nckd).sum().backward()
    assert broken.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [None, 3])
def test_nothing_counts(top_k):
    student, teacher, _ = batch()
    losses = token_kd(student, teacher, torch.full((2, 4), -1), top_k=top_k, ignore_index=-1)
    (losses.tckd + losses.nckd).sum().backward()
    assert not any(part.any() for part in (*losses, student.grad))


def test_padding_of_two_lengths_is_not_read_and_gets_no_gradient():
    student, teacher, target = batch()
    expected = token_kd(student, teacher, target, top_k=3)
    (expected.tckd + expected.nckd).sum().backward()
    padded = torch.cat([student.detach(), torch.full((2, 4, 5), 70.0)], -1).requires_grad_()
    losses = token_kd(padded, F.pad(teacher, (0, 2), value=90.0), target, top_k=3, vocabulary=C)
    assert all(torch.equal(one, other) for one, other in zip(losses, expected))
    (losses.tckd + losses.nckd).sum().backward()
    assert torch.equal(padded.grad[..., :C], student.grad)
    assert not padded.grad[..., C:].any()


def test_a_class_that_is_masked_in_both_networks_counts_for_nothing():
    student, teacher, target = batch()
    student = student.detach()
    target[target == 2] = 3
    without = [z[..., [c for c in range(C) if c != 2]].clone().requires_grad_() for z in (student, teacher)]
    lower = torch.where(target > 2, target - 1, target)
    student[..., 2] = teacher[..., 2] = -math.inf
    student.requires_grad_()
    losses = token_kd(student, teacher, target)
    expected = token_kd(without[0], without[1].detach(), lower)
    for one, other in zip(losses, expected):
        torch.testing.assert_close(one, other)
    (losses.tckd + losses.nckd).sum().backward()
    assert student.grad.isfinite().all()
    assert not student.grad[..., 2].any()
    # more kept than there are: the target still is not among them
    torch.testing.assert_close(token_kd(student, teacher, target, top_k=C - 2).nckd, losses.nckd)


def test_the_backward_pass_keeps_nothing_as_large_as_the_logits():
    """What is saved of a token beside both networks' logits: four numbers and its K classes."""
    student, teacher, target = (
        torch.randn(40, 5000, requires_grad=True),
        torch.randn(40, 5000),
        torch.zeros(40).long(),
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        token_kd(student, teacher, target, top_k=50)
    own = {student.data_ptr(), teacher.data_ptr()}
    assert sum(x.numel() for x in kept if x.data_ptr() not in own) <= 40 * (50 + 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_logits": torch.zeros(2, 4, C + 1)}, "one vocabulary, got logits of 11 and 12 classes"),
        ({"vocabulary": C + 1}, "must be from 2 to the networks' 11 and 11 classes, got 12"),
        ({"vocabulary": 1}, "from 2 to"),
        ({"teacher_logits": torch.zeros(2, 3, C)}, "of the same tokens"),
        ({"target": torch.zeros(2, 3).long()}, r"target must be integers \(2, 4\)"),
        ({"target": torch.zeros(2, 4)}, "one a token"),
        ({"target": torch.full((2, 4), C)}, "labels must be in 0 … 10"),
        ({"target": torch.full((2, 4), C - 1), "vocabulary": C - 1}, "labels must be in 0 … 9"),
        ({"top_k": C}, "K must be an integer from 1 to 10"),
        ({"top_k": C - 1, "vocabulary": C - 1}, "K must be an integer from 1 to 9"),
        ({"top_k": TopP(0.5)}, "decoupled_kd take a share of the mass"),
        ({"mask": "other"}, "mask must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"teacher_logits": torch.zeros(2, 4, C, requires_grad=True)}, "torch.no_grad"),
        ({"teacher_logits": torch.zeros(2, 4, C).long()}, "floating-point"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    student, teacher, target = batch(torch.float32)
    given = {"student_logits": student, "teacher_logits": teacher, "target": target} | change
    with pytest.raises(ValueError, match=message):
        token_kd(**given)


def test_one_tokenizer_is_one_vocabulary():
    words = {"a": 0, "b": 1, "<pad>": 4}  # with a gap, as added tokens may leave
    assert shared_vocabulary(words, dict(reversed(words.items()))) == 5


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"a": 1, "b": 0}, r"\(2 tokens\) and teacher \(2\) differ in 2 tokens: 'a' is 0 and 1"),
        ({"a": 0, "b": 1, "c": 2}, r"differ in 1 tokens: 'c' is not there and 2; logits"),
        ({}, "must have tokens"),
    ],
)
def test_two_vocabularies_are_refused_in_one_line(teacher, message):
    with pytest.raises(UserError, match=message) as refused:
        shared_vocabulary({"a": 0, "b": 1}, teacher)
    assert "\n" not in str(refused.value)
