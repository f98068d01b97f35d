"""Distillation losses per sample: tensors in, tensors out.

Everything is computed in log space and in float32 or wider, whatever autocast is doing, so that values
and gradients stay finite if one logit is a thousand above the others.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .topk import non_target_index, top_k_index

MASKS = ("renormalise", "multiply")
FLOAT32_UP_TO = 20.0
"""The highest temperature at which float32 is enough: there a sample's T² · KL is right to 2e-5, at 1,000 to 4 %."""


class DecoupledKD(NamedTuple):
    """The two halves of knowledge distillation, each (B,), and what joins them."""

    tckd: Tensor
    """Target-class term: T² · KL between the two-way distributions target / not target."""
    nckd: Tensor
    """Non-target-class term: T² · KL between the distributions over the classes other than the target."""
    teacher_target_prob: Tensor
    """p, the teacher's probability of the target at temperature T: tckd + (1 − p) · nckd is plain KD."""


def kd_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute T² · KL(teacher ‖ student) of the softmax at temperature T (Hinton et al., 2015).

    Logits (B, C) each; returns (B,). Raises ValueError for other shapes or T ≤ 0.
    """
    _check(student_logits, teacher_logits, temperature)
    log_s = F.log_softmax(_softened(student_logits, temperature), dim=1)
    log_t = F.log_softmax(_softened(teacher_logits, temperature), dim=1)
    return (temperature**2 * _kl(log_t, log_s)).to(wide(student_logits).dtype)


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    top_k: int | None = None,
    mask: str = "renormalise",
) -> DecoupledKD:
    """Compute TCKD and NCKD of every sample (Zhao et al., 2022, eq. 7), with DeepKD's top-K mask on NCKD.

    student_logits, teacher_logits: (B, C), C ≥ 2; target: (B,) integers in [0, C). Returns three (B,)
    tensors. With p the teacher's target probability, tckd + (1 − p) · nckd equals kd_divergence if no
    mask is set. With two classes nckd is 0.

    top_k: how many non-target classes count, the teacher's largest; None or C − 1 for all of them.
    mask: "renormalise" leaves the others out before the softmax of both networks; "multiply" keeps the
    softmax over all non-target classes and drops the others' terms of the sum, which is then no longer a
    divergence and can be negative.

    Raises ValueError for shapes that do not fit, T ≤ 0, K outside 1 … C − 1, an unknown mask, and, for a
    target on the CPU, a label outside the classes (a check on a GPU would stop it for every batch).
    """
    _check(student_logits, teacher_logits, temperature, target)
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {MASKS}, got {mask!r}")
    target = target.long().unsqueeze(1)
    student, teacher = _softened(student_logits, temperature), _softened(teacher_logits, temperature)
    rest = non_target_index(target.squeeze(1), student.shape[1])

    log_s, log_t = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    not_s, not_t = (log.gather(1, rest).logsumexp(1, keepdim=True) for log in (log_s, log_t))
    target_s, target_t = log_s.gather(1, target), log_t.gather(1, target)
    tckd = _kl(torch.cat([target_t, not_t], 1), torch.cat([target_s, not_s], 1))

    kept = rest if top_k is None else top_k_index(teacher_logits, target.squeeze(1), top_k)
    if mask == "renormalise":
        log_q_s, log_q_t = (F.log_softmax(z.gather(1, kept), 1) for z in (student, teacher))
    else:
        column = kept - (kept > target).long()  # a class's place among the non-target ones
        log_q_s, log_q_t = (F.log_softmax(z.gather(1, rest), 1).gather(1, column) for z in (student, teacher))
    nckd = _kl(log_q_t, log_q_s)
    parts = temperature**2 * tckd, temperature**2 * nckd, target_t.squeeze(1).exp()
    return DecoupledKD(*(part.to(wide(student_logits).dtype) for part in parts))


def standardise_logits(logits: Tensor) -> Tensor:
    """Give each sample's logits mean 0 and standard deviation 1 (Sun et al., 2024, logit standardisation).

    logits: (B, C); returns (B, C) in float32 or wider. The deviation is the unbiased one. 1e-7 is added to
    it, as in the method's release.
    """
    logits = wide(logits)
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute KL(p ‖ q) over the last dimension, from log-probabilities that are all finite."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def wide(logits: Tensor) -> Tensor:
    """Return logits in float32 or wider: what autocast made narrow is widened."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _softened(logits: Tensor, temperature: float) -> Tensor:
    """Return z / T, in float64 if float32 would lose what T² is to multiply."""
    return (wide(logits) if temperature <= FLOAT32_UP_TO else logits.double()) / temperature


def _check(student: Tensor, teacher: Tensor, temperature: float, target: Tensor | None = None) -> None:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher logits must have one shape (B, C), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    if target is None:
        return
    num_classes = student.shape[1]
    if num_classes < 2:
        raise ValueError(f"decoupling needs at least 2 classes, got logits of shape {tuple(student.shape)}")
    if target.shape != student.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(
            f"target must be {student.shape[0]} integer labels, one a sample, got "
            f"{tuple(target.shape)} of {target.dtype}"
        )
    if target.device.type == "cpu" and target.numel() and not 0 <= target.min() <= target.max() < num_classes:
        raise ValueError(f"labels must be in 0 … {num_classes - 1}, got {target.min().item()} … {target.max().item()}")
