import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap

from deepkd_plugin.losses import decoupled_kd, kd_divergence, per_sample, standardise_logits
from deepkd_plugin.topk import TopP, top_k_mask

TEMPERATURES = (1, 4)


def close(value, golden, tolerance=1e-9):
    torch.testing.assert_close(value, golden, rtol=tolerance, atol=tolerance)


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    student, teacher = 5 * torch.randn(2, 16, 10, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 10, (16,), generator=generator)
    return student.requires_grad_(), teacher, target


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kd_equals_mdistiller(golden_losses, temperature):
    student = golden_losses["student"].clone().requires_grad_()
    loss = kd_divergence(student, golden_losses["teacher"], temperature).mean()
    close(loss.detach(), golden_losses[f"kd_T{temperature}"])
    close(gradient(loss, student), golden_losses[f"kd_T{temperature}_grad"])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", [8, 0.5])
def test_dkd_equals_mdistiller(golden_losses, temperature, beta):
    student = golden_losses["student"].clone().requires_grad_()
    terms = decoupled_kd(student, golden_losses["teacher"], golden_losses["target"], temperature)
    loss = terms.tckd.mean() + beta * terms.nckd.mean()
    close(loss.detach(), golden_losses[f"dkd_T{temperature}_a1_b{beta}"])
    close(gradient(loss, student), golden_losses[f"dkd_T{temperature}_a1_b{beta}_grad"])


def test_dkd_on_detection_logits_equals_mdistiller(golden_losses):
    student = golden_losses["rcnn_student"].clone().requires_grad_()
    terms = decoupled_kd(student, golden_losses["rcnn_teacher"], golden_losses["rcnn_target"], 1.0)
    loss = terms.tckd.mean() + 0.25 * terms.nckd.mean()
    close(loss.detach(), golden_losses["rcnn_dkd"])
    close(gradient(loss, student), golden_losses["rcnn_dkd_grad"])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [0, 5, 20, 55, 100])
def test_release_decomposition_over_dkd(golden_losses, temperature, k):
    """The release's DKD mode is our formula, but for its K, which counts the target where the teacher ranks it."""
    student = golden_losses["student"].clone().requires_grad_()
    teacher, target = golden_losses["teacher"], golden_losses["target"]
    tckd = decoupled_kd(student, teacher, target, temperature).tckd.mean()
    nckd = release_nckd(student, teacher, target, temperature, k).mean()
    name = f"release_dkd_top{k}_T{temperature}"
    for term, loss in (("tckd", tckd), ("nckd", 8 * nckd)):
        close(loss.detach(), golden_losses[f"{name}_{term}"])
        close(gradient(loss, student), golden_losses[f"{name}_{term}_grad"])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("k", [0, 5, 20, 55, 100])
def test_release_decomposition_over_kd_multiplies_batch_means(golden_losses, temperature, k):
    """The release's KD mode is mean(1 − p) · mean(NCKD); KD is mean((1 − p) · NCKD), which is what we compute."""
    student = golden_losses["student"].clone().requires_grad_()
    teacher, target = golden_losses["teacher"], golden_losses["target"]
    p = decoupled_kd(student, teacher, target, temperature).teacher_target_prob
    nckd = release_nckd(student, teacher, target, temperature, k)
    theirs = (1 - p).mean() * nckd.mean()
    name = f"release_kd_top{k}_T{temperature}_nckd"
    close(theirs.detach(), golden_losses[name])
    close(gradient(theirs, student), golden_losses[name + "_grad"])
    ours = ((1 - p) * release_nckd(student, teacher, target, temperature, k)).mean()
    departure = abs(ours / theirs - 1).item()
    assert 1e-6 < departure < 0.01  # measured on these logits: 0.001 % to 0.99 %


def release_nckd(student, teacher, target, temperature, k):
    """Our NCKD per sample with K − 1 kept classes where the teacher has the target among its K best."""
    if k == 0:
        return decoupled_kd(student, teacher, target, temperature).nckd
    ranked = (teacher.topk(k, dim=1).indices == target.unsqueeze(1)).any(1)
    rows = [
        decoupled_kd(student[i : i + 1], teacher[i : i + 1], target[i : i + 1], temperature, k - int(ranked[i]))
        for i in range(len(target))
    ]
    return torch.cat([row.nckd for row in rows])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_identity_per_sample(logits, temperature):
    student, teacher, target = logits
    terms = decoupled_kd(student, teacher, target, temperature)
    joined = terms.tckd + (1 - terms.teacher_target_prob) * terms.nckd
    close(joined, kd_divergence(student, teacher, temperature), 1e-12)


def test_all_classes_kept_is_plain_nckd(logits):
    student, teacher, target = logits
    plain = decoupled_kd(student, teacher, target)
    for mask in ("renormalise", "multiply"):
        kept = decoupled_kd(student, teacher, target, top_k=9, mask=mask)
        close(kept.nckd, plain.nckd, 1e-12)
        close(kept.tckd, plain.tckd, 0.0)


def by_hand(student, teacher, target, temperature, k, mask):
    """NCKD of one sample, written out with loops over classes."""
    others = [c for c in range(len(student)) if c != target]
    best = sorted(others, key=lambda c: -teacher[c].item())[:k]
    support = best if mask == "renormalise" else others
    q_t = torch.softmax(torch.stack([teacher[c] for c in support]) / temperature, 0)
    q_s = torch.softmax(torch.stack([student[c] for c in support]) / temperature, 0)
    terms = {c: q_t[i] * (q_t[i].log() - q_s[i].log()) for i, c in enumerate(support)}
    return temperature**2 * sum(terms[c] for c in best)


@pytest.mark.parametrize("mask", ["renormalise", "multiply"])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_masks_against_loops(logits, mask, k):
    student, teacher, target = logits
    nckd = decoupled_kd(student, teacher, target, 2.0, k, mask).nckd
    expected = torch.stack([by_hand(s, t, y, 2.0, k, mask) for s, t, y in zip(student, teacher, target)])
    close(nckd, expected, 1e-12)
    if k == 1 and mask == "renormalise":
        assert nckd.abs().max() == 0.0  # one class left: nothing to tell apart


@pytest.mark.parametrize("mask", ["renormalise", "multiply"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.8, 0.97])
def test_shares_of_the_mass_against_loops(logits, mask, share):
    """Each sample has the K that its own teacher asks for, at the temperature of the loss."""
    student, teacher, target = logits
    nckd = decoupled_kd(student, teacher, target, 2.0, TopP(share), mask).nckd
    sizes = []
    for row, y in zip(teacher, target):
        others = torch.softmax(torch.cat([row[:y], row[y + 1 :]]) / 2.0, 0).sort(descending=True).values.tolist()
        sizes.append(next(k for k in range(1, 10) if sum(others[:k]) >= share))
    expected = [by_hand(s, t, y, 2.0, k, mask) for s, t, y, k in zip(student, teacher, target, sizes)]
    close(nckd, torch.stack(expected), 1e-12)
    assert len(set(sizes)) > 1 or share == 0.01
    one_size = decoupled_kd(student, teacher, target, 2.0, 3, mask).nckd
    of_three = torch.tensor(sizes) == 3
    close(nckd[of_three], one_size[of_three], 1e-12)


@pytest.mark.parametrize("mask", ["renormalise", "multiply"])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 50.0])
def test_the_whole_mass_is_no_mask_bit_by_bit(logits, mask, temperature):
    student, teacher, target = logits
    for dtype in (torch.float64, torch.float32):
        one, other = (student.detach().to(dtype).requires_grad_() for _ in range(2))
        plain = decoupled_kd(one, teacher.to(dtype), target, temperature)
        whole = decoupled_kd(other, teacher.to(dtype), target, temperature, TopP(1.0), mask)
        assert all(torch.equal(a, b) for a, b in zip(whole, plain))
        assert torch.equal(gradient(whole.nckd.sum(), other), gradient(plain.nckd.sum(), one))


def test_two_classes_have_no_non_target_term():
    student = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    teacher, target = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    for top_k in (None, 1, TopP(0.5)):
        terms = decoupled_kd(student, teacher, target, 2.0, top_k)
        assert terms.nckd.abs().max() == 0.0
        assert gradient(terms.nckd.sum(), student).abs().max() == 0.0
        close(terms.tckd, kd_divergence(student, teacher, 2.0), 1e-12)


@pytest.mark.parametrize("mask", ["renormalise", "multiply"])
@pytest.mark.parametrize("top_k", [None, 1, 5, 9, TopP(0.5)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_finite_at_a_gap_of_a_thousand(temperature, top_k, mask):
    rows = torch.eye(10)[:4] * 1000.0
    student = torch.cat([rows, rows.flip(0), -rows]).requires_grad_()
    teacher = torch.cat([rows.flip(0), rows, rows])
    target = torch.tensor([0, 1, 2, 3] * 3)
    terms = decoupled_kd(student, teacher, target, temperature, top_k, mask)
    assert all(torch.isfinite(part).all() for part in terms)
    total = terms.tckd.sum() + terms.nckd.sum() + kd_divergence(student, teacher, temperature).sum()
    assert torch.isfinite(total)
    assert torch.isfinite(gradient(total, student)).all()


@pytest.mark.parametrize("mask", ["renormalise", "multiply"])
def test_gradients_by_finite_differences(mask):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    target = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda s: decoupled_kd(s, teacher, target, 3.0, 3, mask)[:2], (student,))
    assert torch.autograd.gradcheck(lambda s: kd_divergence(s, teacher, 3.0), (student,))
    assert torch.autograd.gradcheck(standardise_logits, (student,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_losses(logits, dtype):
    student, teacher, target = (logits[0].detach().to(dtype), logits[1].to(dtype), logits[2])
    with torch.autocast("cpu", torch.bfloat16):
        terms = decoupled_kd(student, teacher, target)
        kd = kd_divergence(student, teacher)
        standard = standardise_logits(student)
    wide = decoupled_kd(student.float(), teacher.float(), target)
    for part, expected in zip((*terms, kd, standard), (*wide, kd_divergence(student.float(), teacher.float()))):
        assert part.dtype == torch.float32
        close(part, expected, 1e-6)
    assert standard.dtype == torch.float32


def test_standardised_logits_have_mean_zero_and_deviation_one(logits):
    standard = standardise_logits(logits[0])
    close(standard.mean(1), torch.zeros(16, dtype=torch.float64), 1e-12)
    close(standard.std(1), torch.ones(16, dtype=torch.float64), 1e-6)
    assert torch.equal(standard.argmax(1), logits[0].argmax(1))


def test_cross_entropy_is_kd_of_a_certain_teacher():
    """At T = 1 a teacher that is sure of the target makes TCKD the cross-entropy: an outside oracle for TCKD."""
    student, target = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 3, 6, 1, 1])
    teacher = 1000.0 * F.one_hot(target, 7).double()
    tckd = decoupled_kd(student, teacher, target, 1.0).tckd
    close(tckd, F.cross_entropy(student, target, reduction="none"), 1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(logits, dtype):
    expected = decoupled_kd(*logits, top_k=3)
    for part, value in zip(decoupled_kd(*logits[:2], logits[2].to(dtype), top_k=3), expected):
        assert torch.equal(part, value)


def test_the_non_target_term_keeps_its_digits_beside_a_large_target():
    """The classes other than the target are compared among themselves, not after subtracting a gap of 1,000."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 10, generator=generator, dtype=torch.float64)
    target = torch.arange(4)
    student[target, target] = teacher[target, target] = 1000.0
    exact = decoupled_kd(student, teacher, target, 1.0).nckd
    single = decoupled_kd(student.float(), teacher.float(), target, 1.0).nckd
    close(single.double(), exact, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
        ({"top_k": 0}, "K must be an integer from 1 to 9"),
        ({"top_k": 10}, "K must be an integer from 1 to 9"),
        ({"mask": "both"}, "mask must be one of"),
        ({"target": torch.full((16,), 10)}, "labels must be in 0 … 9, got 10 … 10"),
        ({"target": torch.full((16,), -1)}, "labels must be in 0 … 9"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "16 integer labels"),
        ({"target": torch.zeros(16)}, "16 integer labels"),
        ({"target": torch.zeros(16, dtype=torch.bool)}, "16 integer labels"),
        ({"teacher_logits": torch.zeros(16, 9)}, "must have one shape"),
        ({"student_logits": torch.zeros(16, 10, 2), "teacher_logits": torch.zeros(16, 10, 2)}, "per_sample flattens"),
        ({"teacher_logits": torch.zeros(16, 10, dtype=torch.int64)}, "must be floating-point numbers, got .*int64"),
        ({"student_logits": torch.zeros(16, 10, dtype=torch.bool)}, "must be floating-point numbers, got torch.bool"),
        ({"top_k": np.float64(3)}, "K must be an integer from 1 to 9"),
        ({"top_k": np.True_}, "K must be an integer from 1 to 9"),
    ],
)
def test_bad_input_is_named(logits, change, message):
    given = {"student_logits": logits[0], "teacher_logits": logits[1], "target": logits[2]} | change
    with pytest.raises(ValueError, match=message):
        decoupled_kd(**given)


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_what_a_network_returns_beside_its_logits_is_refused(logits, name):
    """mdistiller's networks return (logits, features), others a dictionary."""
    given = dict(zip(("student_logits", "teacher_logits", "target"), logits))
    for output, kind in (((given[name], {}), "tuple"), ({"logits": given[name]}, "dict")):
        for loss in (decoupled_kd, per_sample):
            with pytest.raises(TypeError, match=f"{name} must be a tensor, got {kind}; take the logits out of what"):
                loss(**given | {name: output})
    for labels, kind in ((given["target"].tolist(), "list"), (given["target"].numpy(), "ndarray")):
        with pytest.raises(TypeError, match=f"target must be a tensor, got {kind}$"):
            decoupled_kd(**given | {"target": labels})


def test_swapped_networks_are_refused(logits):
    student, teacher, target = logits
    for loss in (lambda: decoupled_kd(teacher, student, target), lambda: kd_divergence(teacher, student)):
        with pytest.raises(ValueError, match="student_logits need none: are the two swapped"):
            loss()
        with torch.no_grad():  # a measurement, in which nobody learns
            loss()


def test_a_teacher_without_no_grad_changes_nothing(logits):
    """If both need a gradient there is nothing to tell them apart by, and the student's gradient is the same."""
    student, teacher, target = logits
    losses = [decoupled_kd(student, kept, target, top_k=3) for kept in (teacher, teacher.clone().requires_grad_())]
    one, other = (torch.autograd.grad(loss.tckd.sum() + loss.nckd.sum(), student) for loss in losses)
    assert torch.equal(one[0], other[0])


def test_one_class_cannot_be_decoupled():
    with pytest.raises(ValueError, match="at least 2 classes"):
        decoupled_kd(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))


def test_integer_logits_have_no_divergence():
    whole = torch.arange(6).reshape(2, 3)
    for loss in (lambda: kd_divergence(whole, whole), lambda: standardise_logits(whole)):
        with pytest.raises(ValueError, match="must be floating-point numbers, got torch.int64"):
            loss()


@pytest.mark.parametrize("k", [np.int64(3), np.uint8(3), np.int32(3)])
def test_k_may_be_numpys(logits, k):
    assert torch.equal(decoupled_kd(*logits, top_k=k).nckd, decoupled_kd(*logits, top_k=3).nckd)


# Compiled, exported, faked and mapped: the eager values


def everything(student, teacher, target, top_k=5, mask="renormalise"):
    terms = decoupled_kd(student, teacher, target, 2.0, top_k, mask)
    return *terms, kd_divergence(student, teacher), top_k_mask(teacher, target, 3)


class Everything(torch.nn.Module):
    def forward(self, student, teacher, target):
        return everything(student, teacher, target)


@pytest.mark.parametrize("mask", ["renormalise", "multiply"])
@pytest.mark.parametrize("top_k", [None, 1, 5, TopP(0.6)])
def test_compiled_whole(logits, top_k, mask):
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    student = logits[0]
    expected, found = (work(*logits, top_k, mask) for work in (everything, compiled))
    for value, golden in zip(found, expected, strict=True):
        assert torch.equal(value, golden)
    one, other = (gradient(terms[0].sum() + terms[1].sum() + terms[3].sum(), student) for terms in (expected, found))
    close(other, one, 1e-14)


def test_compiled_once_for_any_batch_and_any_k(logits):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of the tests before, which reset leaves
    compiled = torch.compile(everything, fullgraph=True, backend="eager", dynamic=True)
    for size, k in ((16, 3), (7, 3), (5, 4), (11, 9)):
        part = [part[:size] for part in logits]
        for value, golden in zip(compiled(*part, k), everything(*part, k), strict=True):
            assert torch.equal(value, golden)
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 3  # the mask of all classes is a case of its own


@pytest.mark.slow
def test_compiled_by_inductor(logits):
    torch._dynamo.reset()
    for value, golden in zip(torch.compile(everything, fullgraph=True)(*logits), everything(*logits), strict=True):
        torch.testing.assert_close(value, golden)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_with_a_dynamic_batch(logits, strict):
    logits = [part.detach() for part in logits]
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(Everything(), tuple(logits), dynamic_shapes=[{0: batch}] * 3, strict=strict)
    for size in (16, 7):
        part = [part[:size] for part in logits]
        for value, golden in zip(program.module()(*part), everything(*part), strict=True):
            assert torch.equal(value, golden)


def test_fake_tensors_have_the_losses_shapes(logits):
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(part) for part in logits]
        inside = everything(*fakes)
    expected = (*everything(*logits), kd_divergence(*logits[:2]))
    for value, golden in zip((*inside, kd_divergence(*fakes[:2])), expected, strict=True):
        assert (value.shape, value.dtype, type(value).__name__) == (golden.shape, golden.dtype, "FakeTensor")


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_traced_by_make_fx(logits, tracing_mode):
    graph = torch.fx.experimental.proxy_tensor.make_fx(Everything(), tracing_mode=tracing_mode)(*logits)
    for value, golden in zip(graph(*logits), everything(*logits), strict=True):
        assert torch.equal(value, golden)


@pytest.mark.parametrize("mask", ["renormalise", "multiply"])
@pytest.mark.parametrize("top_k", [3, TopP(0.6)])
def test_gradients_of_each_sample(logits, mask, top_k):
    def loss(student, teacher, target):
        terms = decoupled_kd(student[None], teacher[None], target[None], 2.0, top_k, mask)
        return (terms.tckd + terms.nckd + kd_divergence(student[None], teacher[None])).sum()

    student, teacher, target = (part.detach() for part in logits)
    mapped = vmap(grad(loss))(student, teacher, target)
    rows = [grad(loss)(*row) for row in zip(student, teacher, target)]
    close(mapped, torch.stack(rows), 1e-14)
    terms = decoupled_kd(*logits, 2.0, top_k, mask)
    total = terms.tckd.sum() + terms.nckd.sum() + kd_divergence(*logits[:2]).sum()
    close(mapped, gradient(total, logits[0]), 1e-12)


def test_mapped_over_labels_alone(logits):
    student, teacher = logits[0][:1].detach(), logits[1][:1]
    labels = torch.arange(10)
    for part in range(5):
        mapped = vmap(lambda label: everything(student, teacher, label[None])[part])(labels)  # noqa: B023
        assert torch.equal(mapped, torch.stack([everything(student, teacher, label[None])[part] for label in labels]))


# Masked classes


MASKED = {
    "one class": [[3], [3], [3], [3]],
    "other classes in each sample": [[1], [0, 2, 5], [], [5, 6, 7, 9]],
    "all but the target and one": [[2, 3, 4, 5, 6, 7, 8, 9]] * 2 + [[0, 1, 2, 3, 4, 5, 6, 9]] * 2,
    "all but the target": [[1, 2, 3, 4, 5, 6, 7, 8, 9]] * 4,
}


def masked(logits, classes):
    student, teacher = (part[:4].detach().clone() for part in logits[:2])
    target = torch.tensor([0, 1, 7, 8] if classes is not MASKED["all but the target"] else [0, 0, 0, 0])
    for row, columns in enumerate(classes):
        student[row, columns] = teacher[row, columns] = -math.inf
    return student.requires_grad_(), teacher.requires_grad_(), target


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("mask", ["renormalise", "multiply"])
@pytest.mark.parametrize("top_k", [None, 1, 4, TopP(0.6)])
@pytest.mark.parametrize("classes", MASKED.values(), ids=MASKED)
def test_a_masked_class_is_as_if_it_were_not_there(logits, classes, top_k, mask, temperature):
    student, teacher, target = masked(logits, classes)
    terms = decoupled_kd(student, teacher, target, temperature, top_k, mask)
    kd = kd_divergence(student, teacher, temperature)
    grads = torch.autograd.grad(terms.tckd.sum() + terms.nckd.sum() + kd.sum(), (student, teacher))
    for row, columns in enumerate(classes):
        left = [c for c in range(10) if c not in columns]
        pair = [part[row : row + 1, left].detach().requires_grad_() for part in (student, teacher)]
        whole = kd_divergence(*pair, temperature)
        close(kd[row : row + 1], whole, 1e-12)
        if len(left) == 1:  # the target alone
            assert all(part[row] == 0 for part in (*terms[:2], *(g.abs().sum(1) for g in grads)))
            continue
        there = torch.tensor([left.index(target[row])])
        fewer = min(top_k, len(left) - 1) if isinstance(top_k, int) else top_k
        alone = decoupled_kd(*pair, there, temperature, fewer, mask)
        for part, golden in zip(terms, alone):
            close(part[row : row + 1], golden, 1e-12)
        expected = torch.autograd.grad(alone.tckd.sum() + alone.nckd.sum() + whole.sum(), pair)
        for found, golden in zip(grads, expected):
            close(found[row, left], golden[0], 1e-12)
            assert found[row, columns].abs().sum() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masked_classes_in_narrow_types(logits, dtype):
    student, teacher, target = masked(logits, MASKED["other classes in each sample"])
    exact = decoupled_kd(student.detach().to(dtype).double(), teacher.detach().to(dtype).double(), target, 1.0, 4)
    student = student.detach().to(dtype).requires_grad_()
    terms = decoupled_kd(student, teacher.detach().to(dtype), target, 1.0, 4)
    for part, golden in zip(terms, exact):
        torch.testing.assert_close(part.double(), golden, rtol=1e-4, atol=1e-6)
    assert gradient(terms.tckd.sum() + terms.nckd.sum(), student).isfinite().all()


def test_masked_classes_beside_a_logit_near_the_largest_number():
    student = torch.tensor([[1e32, 3.0, -math.inf, 5.0], [-1e32, 1e32, -math.inf, 5.0]], requires_grad=True)
    teacher = torch.tensor([[5.0, 1e32, -math.inf, 2.0], [1e32, 1.0, -math.inf, 5.0]])
    terms = decoupled_kd(student, teacher, torch.tensor([0, 1]), 1.0, 2)
    loss = terms.tckd.sum() + terms.nckd.sum() + kd_divergence(student, teacher).sum()
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


def test_a_sample_of_masked_classes_alone_adds_nothing():
    student = torch.full((2, 5), -math.inf).requires_grad_()
    kd = kd_divergence(student, torch.full((2, 5), -math.inf))
    assert kd.tolist() == [0.0, 0.0]
    assert gradient(kd.sum(), student).tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize("network", [0, 1])
def test_a_class_masked_in_one_network_alone_is_refused(logits, network):
    logits[network].detach()[2, 7] = -math.inf
    for loss in (lambda: decoupled_kd(*logits), lambda: kd_divergence(*logits[:2])):
        with pytest.raises(ValueError, match="must be masked .* in both networks or in none"):
            loss()


def test_a_masked_target_is_refused(logits):
    for part in logits[:2]:
        part.detach()[2, logits[2][2]] = -math.inf
    with pytest.raises(ValueError, match="the target class of a sample is masked"):
        decoupled_kd(*logits)
    assert kd_divergence(*logits[:2]).isfinite().all()


def test_masked_logits_are_not_standardised(logits):
    logits[1][2, 7] = -math.inf
    with pytest.raises(ValueError, match="−inf .* cannot be standardised"):
        standardise_logits(logits[1])


# Other shapes, soft labels, labels to ignore


def test_samples_of_a_plain_batch_are_the_batch(logits):
    samples = per_sample(*logits)
    for part, given in zip(samples, logits):
        assert torch.equal(part, given)
    assert samples.counted.tolist() == [True] * 16
    values = decoupled_kd(*samples[:3]).nckd
    assert torch.equal(values, decoupled_kd(*logits).nckd)
    close(samples.mean(values), values.mean(), 1e-15)


@pytest.mark.parametrize("layout", ["images", "sequences"])
def test_dense_logits_are_flattened_by_hand(layout):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(2, 24, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (24,), generator=generator)
    skipped = torch.arange(24) % 3 == 0
    shape, class_dim = ((2, 3, 4), 1) if layout == "images" else ((4, 6), -1)
    student, teacher = (part.reshape(*shape, 7).movedim(-1, class_dim).clone().requires_grad_() for part in flat)
    target = labels.where(~skipped, 255).reshape(shape).to(torch.uint8)
    samples = per_sample(student, teacher, target, class_dim, 255)
    assert samples.counted.tolist() == (~skipped).tolist()
    terms = decoupled_kd(*samples[:3], 2.0, 3)
    left = [part[~skipped].requires_grad_() for part in flat]
    expected = decoupled_kd(*left, labels[~skipped], 2.0, 3)
    for part, golden in zip(terms, expected):
        close(part[samples.counted], golden, 1e-12)
        close(samples.mean(part), golden.mean(), 1e-12)
    dense = torch.autograd.grad(samples.mean(terms.tckd + terms.nckd), (student, teacher))
    for found, golden in zip(dense, torch.autograd.grad((expected.tckd + expected.nckd).mean(), left)):
        found = found.movedim(class_dim, -1).reshape(24, 7)
        close(found[~skipped], golden, 1e-12)
        assert found[skipped].abs().sum() == 0.0
    task = F.cross_entropy(samples.student, samples.target, reduction="none")
    close(samples.mean(task), F.cross_entropy(left[0], labels[~skipped]), 1e-12)


def test_nothing_is_read_of_ignored_samples(logits):
    """Padding may hold anything, NaN and a masked target among it."""
    student, teacher, target = (part.detach().clone() for part in logits)
    target[3:6] = -100
    expected = decoupled_kd(student, teacher, target.clamp(min=0)).tckd[target >= 0].mean()
    student[3], student[4], teacher[5] = math.nan, -math.inf, math.inf
    student.requires_grad_()
    samples = per_sample(student, teacher, target)
    loss = samples.mean(decoupled_kd(*samples[:3]).tckd)
    close(loss, expected, 1e-12)
    assert gradient(loss, student)[3:6].abs().sum() == 0.0


@pytest.mark.parametrize("count", [16, 0])
def test_a_batch_without_a_label_is_0_with_a_gradient_of_0(logits, count):
    student, teacher = (part[:count].detach().requires_grad_() for part in logits[:2])
    samples = per_sample(student, teacher, torch.full((count,), -100))
    terms = decoupled_kd(*samples[:3], top_k=3)
    loss = samples.mean(terms.tckd) + samples.mean(terms.nckd) + samples.mean(kd_divergence(*samples[:2]))
    assert loss.item() == 0.0
    loss.backward()
    assert student.grad.shape == (count, 10)
    assert student.grad.abs().sum() == 0.0


def test_a_soft_labels_class_is_its_largest(logits):
    student, teacher, target = logits
    other = target.roll(1)
    mixed = 0.7 * F.one_hot(target, 10) + 0.3 * F.one_hot(other, 10)
    samples = per_sample(student, teacher, mixed)
    assert torch.equal(samples.target, target)
    assert samples.counted.all()
    assert torch.equal(decoupled_kd(*samples[:3]).nckd, decoupled_kd(*logits).nckd)
    halves = torch.tensor([[0.0, 0.5, 0.5]])
    assert per_sample(torch.zeros(1, 3), torch.zeros(1, 3), halves).target.tolist() == [1]


def test_soft_labels_of_dense_logits():
    student = torch.randn(2, 5, 3, 3)
    soft = torch.randn(2, 5, 3, 3).softmax(1)
    assert torch.equal(per_sample(student, student, soft).target, soft.argmax(1).flatten())
    last = per_sample(student.movedim(1, -1), student.movedim(1, -1), soft.movedim(1, -1), class_dim=-1)
    assert torch.equal(last.target, soft.argmax(1).flatten())


def test_timms_mixup_gives_soft_labels():
    mixup = pytest.importorskip("timm.data").Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)
    _, soft = mixup(torch.randn(4, 3, 8, 8), torch.arange(4))
    logits = torch.randn(4, 10)
    samples = per_sample(logits, logits, soft)
    assert torch.equal(samples.target, soft.argmax(1))
    assert decoupled_kd(*samples[:3]).tckd.isfinite().all()


def test_per_sample_is_compiled_and_mapped():
    torch._dynamo.reset()
    student, teacher = torch.randn(2, 2, 5, 3, 3)
    target = torch.randint(-1, 5, (2, 3, 3))

    def loss(student, teacher, target):
        samples = per_sample(student, teacher, target, 1, -1)
        return samples.mean(decoupled_kd(*samples[:3], top_k=2).nckd)

    expected = loss(student, teacher, target)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert torch.equal(compiled(student, teacher, target), expected)
    each = vmap(lambda s, t, y: loss(s[None], t[None], y[None]))(student, teacher, target)
    close(each, torch.stack([loss(s[None], t[None], y[None]) for s, t, y in zip(student, teacher, target)]), 1e-6)


@pytest.mark.parametrize(
    ("shape", "target", "class_dim", "message"),
    [
        ((4,), torch.zeros(4), 0, "must have one shape"),
        ((4, 5), torch.zeros(4, dtype=torch.int64), 2, "class_dim=2"),
        ((4, 5), torch.zeros(5, dtype=torch.int64), 1, r"integers \(4,\) or soft labels \(4, 5\)"),
        ((4, 5), torch.zeros(4), 1, r"got \(4,\) of torch.float32"),
        ((4, 5), torch.zeros(4, 5, dtype=torch.int64), 1, r"got \(4, 5\) of torch.int64"),
        ((4, 5), torch.zeros(4, dtype=torch.bool), 1, "of torch.bool"),
        ((4, 6, 5), torch.zeros(4, 6, dtype=torch.int64), 1, r"integers \(4, 5\).* with class_dim=1"),
    ],
)
def test_what_cannot_be_flattened_is_named(shape, target, class_dim, message):
    with pytest.raises(ValueError, match=message):
        per_sample(torch.zeros(shape), torch.zeros(shape), target, class_dim)


def test_networks_of_two_shapes_and_values_of_another():
    with pytest.raises(ValueError, match="must have one shape"):
        per_sample(torch.zeros(4, 5), torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64))
    samples = per_sample(torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"values must be \(4,\), one a sample, got \(\)"):
        samples.mean(torch.zeros(()))


@pytest.mark.parametrize("temperature", [0.5, 4.0, 20.0, 21.0, 1e3, 1e5])
def test_high_temperatures_lose_no_digits(temperature):
    """T² multiplies what is left of a difference: at T = 1,000 float32 alone is 4 % off, at 100,000 it is noise."""
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(64, 100), 5 * torch.randn(64, 100)
    target = torch.randint(100, (64,))
    s, t = (logits.double().numpy() / temperature for logits in (student, teacher))
    log_s, log_t = (z - np.log(np.exp(z).sum(1, keepdims=True)) for z in (s, t))
    expected = temperature**2 * (np.exp(log_t) * (log_t - log_s)).sum(1)
    whole = kd_divergence(student.requires_grad_(), teacher, temperature)
    tckd, nckd, p = decoupled_kd(student, teacher, target, temperature)
    for found in (whole, tckd + (1 - p) * nckd):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4)
    whole.sum().backward()
    gradient = temperature * (np.exp(log_s) - np.exp(log_t))
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-3, atol=1e-5)
