"""Distillation losses per sample: tensors in, tensors out.

Everything is computed in log space and in float32 or wider, whatever autocast is doing, so that values
and gradients stay finite if one logit is a thousand above the others.

A class whose logit is −inf in both networks is masked: it has probability 0 in both and adds nothing to a loss or a
gradient. A target must not be masked, nor a class in one network alone.

The functions can be compiled, exported and mapped (torch.compile, torch.export, torch.func.vmap). Shapes and types are
checked always; values (labels, masked classes) only where a check can read them without waiting: on a CPU, outside of
all that. Elsewhere a class that is masked in one network alone gives a loss that means nothing.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .topk import Kept, TopP, non_target_index, top_k_index, top_p

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

    Logits (B, C) each; returns (B,). Raises TypeError for what is no tensor, ValueError for other shapes, integer
    logits, T ≤ 0, logits of which the teacher's alone need a gradient or, on a CPU, a class that is −inf in one network
    alone.
    """
    check(student_logits, teacher_logits, temperature)
    log_s = F.log_softmax(scaled(student_logits, temperature), dim=1)
    log_t = F.log_softmax(scaled(teacher_logits, temperature), dim=1)
    return (temperature**2 * kl(log_t, log_s)).to(wide(student_logits).dtype)


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    top_k: Kept = None,
    mask: str = "renormalise",
) -> DecoupledKD:
    """Compute TCKD and NCKD of every sample (Zhao et al., 2022, eq. 7), with DeepKD's top-K mask on NCKD.

    student_logits, teacher_logits: (B, C), C ≥ 2; target: (B,) integers in [0, C). Returns three (B,)
    tensors. With p the teacher's target probability, tckd + (1 − p) · nckd equals kd_divergence if no
    mask is set. With two classes nckd is 0.

    top_k: how many non-target classes count, the teacher's largest; None or C − 1 for all of them. A topk.TopP: as many
    of each sample as hold a share of the teacher's non-target mass at temperature T; TopP(1.0) is None.
    mask: "renormalise" leaves the others out before the softmax of both networks; "multiply" keeps the
    softmax over all non-target classes and drops the others' terms of the sum, which is then no longer a
    divergence and can be negative.

    Logits of other shapes, soft labels and positions to ignore: see per_sample.

    Raises TypeError for what is no tensor, ValueError for shapes that do not fit, integer logits, T ≤ 0, K outside
    1 … C − 1, an unknown mask, logits of which the teacher's alone need a gradient (swapped networks), and, on a CPU,
    a label outside the classes, a masked target or a class that is −inf in one network alone (a check on a GPU would
    stop it for every batch).
    """
    check(student_logits, teacher_logits, temperature, target)
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {MASKS}, got {mask!r}")
    target = target.long().unsqueeze(1)
    student, teacher = (scaled(logits, temperature) for logits in (student_logits, teacher_logits))
    rest = non_target_index(target.squeeze(1), student.shape[1])

    log_s, log_t = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    not_s, not_t = (log.gather(1, rest).logsumexp(1, keepdim=True) for log in (log_s, log_t))
    target_s, target_t = log_s.gather(1, target), log_t.gather(1, target)
    tckd = kl(torch.cat([target_t, not_t], 1), torch.cat([target_s, not_s], 1))

    if isinstance(top_k, TopP):
        nckd = _nckd_of_mass(student.gather(1, rest), teacher.gather(1, rest), top_k.share, mask)
    else:
        kept = rest if top_k is None else top_k_index(teacher_logits, target.squeeze(1), top_k)
        if mask == "renormalise":
            log_q_s, log_q_t = (F.log_softmax(z.gather(1, kept), 1) for z in (student, teacher))
        else:
            column = kept - (kept > target).long()  # a class's place among the non-target ones
            log_q_s, log_q_t = (F.log_softmax(z.gather(1, rest), 1).gather(1, column) for z in (student, teacher))
        nckd = kl(log_q_t, log_q_s)
    parts = temperature**2 * tckd, temperature**2 * nckd, target_t.squeeze(1).exp()
    return DecoupledKD(*(part.to(wide(student_logits).dtype) for part in parts))


class Samples(NamedTuple):
    """Logits and labels as the losses take them, a row for each sample; made by per_sample."""

    student: Tensor
    """(N, C)"""
    teacher: Tensor
    """(N, C)"""
    target: Tensor
    """(N,), integers in [0, C); 0 for a sample that is ignored."""
    counted: Tensor
    """(N,), False for a sample that is ignored."""

    def mean(self, values: Tensor) -> Tensor:
        """Average values (N,) over the samples that count: a scalar; 0, with a gradient of 0, if none does."""
        if values.shape != self.counted.shape:
            raise ValueError(f"values must be {tuple(self.counted.shape)}, one a sample, got {tuple(values.shape)}")
        return values.masked_fill(~self.counted, 0.0).sum() / self.counted.sum().clamp(min=1)


def per_sample(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, class_dim: int = 1, ignore_index: int = -100
) -> Samples:
    """Flatten logits of any shape, soft labels and labels to ignore into what kd_divergence and decoupled_kd take.

    student_logits, teacher_logits: one shape, with the C classes in dimension class_dim: 1 for (B, C) and (B, C, H, W),
    -1 for (B, L, C). target: integers of that shape without class_dim, or soft labels (mixup, cutmix) of that very
    shape. N is the number of labels, whatever they are, so the shapes suit a compiled loop; a tensor (N,) of losses
    is in the order of the labels.

    ignore_index: an integer label that marks a sample to leave out, as in torch.nn.functional.cross_entropy. Its logits
    count as 0, whatever they are, so its losses and gradients are finite, and Samples.mean leaves it out.

    A soft label's target class is its largest, the first of equals. TCKD then speaks of that class, and NCKD of all
    others, those that the label names beside it included.

    Raises TypeError for what is no tensor, ValueError for shapes or types that do not fit.
    """
    _check_tensors(student_logits=student_logits, teacher_logits=teacher_logits, target=target)
    shape = tuple(student_logits.shape)
    if len(shape) < 2 or shape != teacher_logits.shape or not -len(shape) <= class_dim < len(shape):
        raise ValueError(
            f"student and teacher logits must have one shape, with the classes in dimension class_dim={class_dim}, got "
            f"{shape} and {tuple(teacher_logits.shape)}"
        )
    columns = [
        logits.movedim(class_dim, -1).reshape(-1, shape[class_dim]) for logits in (student_logits, teacher_logits)
    ]
    without = student_logits.movedim(class_dim, -1).shape[:-1]
    soft = target.is_floating_point()
    if target.shape != (shape if soft else without) or target.dtype == torch.bool:
        raise ValueError(
            f"target must be integers {tuple(without)} or soft labels {shape}, for logits {shape} with class_dim="
            f"{class_dim}, got {tuple(target.shape)} of {target.dtype}"
        )
    labels = (target.argmax(class_dim) if soft else target.long()).reshape(-1)
    counted = torch.ones_like(labels, dtype=torch.bool) if soft else labels != ignore_index
    student, teacher = (logits.masked_fill(~counted.unsqueeze(1), 0.0) for logits in columns)
    return Samples(student, teacher, labels.masked_fill(~counted, 0), counted)


def standardise_logits(logits: Tensor) -> Tensor:
    """Give each sample's logits mean 0 and standard deviation 1 (Sun et al., 2024, logit standardisation).

    logits: (B, C); returns (B, C) in float32 or wider. The deviation is the unbiased one. 1e-7 is added to
    it, as in the method's release. Raises ValueError for integer logits and, on a CPU, for a masked class: −inf has
    no mean.
    """
    _check_type(logits)
    if _readable(logits) and logits.isneginf().any():
        raise ValueError("logits that hold −inf (a masked class) cannot be standardised")
    logits = wide(logits)
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute KL(p ‖ q) over the last dimension, from log-probabilities that are all finite."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _nckd_of_mass(student: Tensor, teacher: Tensor, share: float, mask: str) -> Tensor:
    """Return KL over the classes that hold a share of the teacher's mass, (B,); scaled logits (B, C − 1) each.

    Sets of samples differ in size, so their classes stay in place and the others count as masked.
    """
    log_s, log_t = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    kept = top_p(log_t.detach(), share)
    if mask == "multiply":
        return (log_t.exp() * (log_t - log_s)).masked_fill(~kept, 0.0).sum(1)
    nothing = torch.finfo(student.dtype).min / 2  # as in scaled
    log_s, log_t = (F.log_softmax(z.masked_fill(~kept, nothing), 1) for z in (student, teacher))
    return kl(log_t, log_s)


def wide(logits: Tensor) -> Tensor:
    """Return logits in float32 or wider: what autocast made narrow is widened."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / T in float32 or wider, with a number for −inf that still has probability 0 and no gradient.

    Above FLOAT32_UP_TO it is float64: what T² is to multiply must not be rounded before. −inf itself makes NaN of
    0 · (−inf + inf) and of the softmax over classes that are all masked.
    """
    divided = (wide(logits) if temperature <= FLOAT32_UP_TO else logits.double()) / temperature
    # half, so that subtracting the row's maximum does not bring −inf back
    return divided.clamp(min=torch.finfo(divided.dtype).min / 2)


def _readable(tensor: Tensor) -> bool:
    """Tell whether a check may read values: on a CPU, and nothing traces, fakes, shards or maps the tensor."""
    return tensor.device.type == "cpu" and _plain(tensor)


def _plain(tensor: Tensor) -> bool:
    """Tell whether nothing traces, fakes, shards or maps the tensor."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _check_type(*logits: Tensor) -> None:
    if not all(part.is_floating_point() for part in logits):
        raise ValueError(f"logits must be floating-point numbers, got {', '.join(str(part.dtype) for part in logits)}")


def _check_tensors(**values: Any) -> None:
    """Raise TypeError for the first value that is no tensor, such as the tuple that mdistiller's networks return."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            pick = "; take the logits out of what the network returns" if name.endswith("logits") else ""
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{pick}")


def check(student: Tensor, teacher: Tensor, temperature: float, target: Tensor | None = None) -> None:
    """Raise for what the losses above refuse: types, shapes, swapped networks, T; values if they can be read."""
    _check_tensors(student_logits=student, teacher_logits=teacher, target=target)
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher logits must have one shape (B, C), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; per_sample flattens logits with more dimensions"
        )
    _check_type(student, teacher)
    alone = teacher.requires_grad and not student.requires_grad
    if alone and torch.is_grad_enabled() and _plain(student) and _plain(teacher):
        raise ValueError(
            "teacher_logits need a gradient and student_logits need none: are the two swapped? If they are not, call "
            "the teacher under torch.no_grad()"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
    num_classes = student.shape[1]
    if target is not None:
        if num_classes < 2:
            raise ValueError(f"decoupling needs at least 2 classes, got logits of shape {tuple(student.shape)}")
        if target.shape != student.shape[:1] or target.is_floating_point() or target.dtype == torch.bool:
            raise ValueError(
                f"target must be {student.shape[0]} integer labels, one a sample, got "
                f"{tuple(target.shape)} of {target.dtype}; per_sample takes soft labels"
            )
        if _readable(target) and target.numel() and not 0 <= target.min() <= target.max() < num_classes:
            low, high = target.min().item(), target.max().item()
            raise ValueError(f"labels must be in 0 … {num_classes - 1}, got {low} … {high}")
    if not _readable(student) or not _readable(teacher):
        return
    masked = teacher.isneginf()
    if not torch.equal(student.isneginf(), masked):
        raise ValueError("a class must be masked (−inf) in both networks or in none; it is in one of them alone")
    if target is not None and _readable(target) and masked.gather(1, target.long().unsqueeze(1)).any():
        raise ValueError("the target class of a sample is masked (−inf); mask other classes, or leave the sample out")
