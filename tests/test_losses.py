import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepkd_plugin.losses import decoupled_kd, kd_divergence, standardise_logits

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


def test_two_classes_have_no_non_target_term():
    student = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    teacher, target = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    for top_k in (None, 1):
        terms = decoupled_kd(student, teacher, target, 2.0, top_k)
        assert terms.nckd.abs().max() == 0.0
        assert gradient(terms.nckd.sum(), student).abs().max() == 0.0
        close(terms.tckd, kd_divergence(student, teacher, 2.0), 1e-12)


@pytest.mark.parametrize("mask", ["renormalise", "multiply"])
@pytest.mark.parametrize("top_k", [None, 1, 5, 9])
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
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"top_k": 0}, "K must be an integer from 1 to 9"),
        ({"top_k": 10}, "K must be an integer from 1 to 9"),
        ({"mask": "both"}, "mask must be one of"),
        ({"target": torch.full((16,), 10)}, "labels must be in 0 … 9, got 10 … 10"),
        ({"target": torch.full((16,), -1)}, "labels must be in 0 … 9"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "16 integer labels"),
        ({"target": torch.zeros(16)}, "16 integer labels"),
        ({"target": torch.zeros(16, dtype=torch.bool)}, "16 integer labels"),
        ({"teacher_logits": torch.zeros(16, 9)}, "must have one shape"),
    ],
)
def test_bad_input_is_named(logits, change, message):
    given = {"student_logits": logits[0], "teacher_logits": logits[1], "target": logits[2]} | change
    with pytest.raises(ValueError, match=message):
        decoupled_kd(**given)


def test_one_class_cannot_be_decoupled():
    with pytest.raises(ValueError, match="at least 2 classes"):
        decoupled_kd(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))


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
