"""DeepKD's losses on the tokens of a language model: logits (…, C) of a vocabulary of 100,000 and more.

They are those of losses.decoupled_kd, to rounding, by another route. A network's logits are read once for one
logsumexp, and the softmax under a mask is over the K kept classes alone. No tensor as large as the logits is kept for
the backward pass: both passes go through the tokens in parts, and the backward pass computes the softmax again. What is
left is the gradient itself, in the logits' own type.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import UserError, shown
from .losses import MASKS, DecoupledKD, check, kl, scaled, wide
from .topk import TopP, check_k

CELLS = 2**22
"""Logits that are worked on at once: 16 MiB in float32."""


def token_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    top_k: int | None = None,
    mask: str = "renormalise",
    ignore_index: int = -100,
    vocabulary: int | None = None,
) -> DecoupledKD:
    """Compute TCKD and NCKD of every token, as decoupled_kd does of every sample, in little memory.

    student_logits, teacher_logits: (…, C), the classes last; the teacher's without a gradient. target: (…) integers,
    the token that the logits are of: a language model's labels are to be shifted before. Returns three tensors (…).
    A token whose target is ignore_index has three zeros, and its logits are not read.

    temperature, top_k, mask: as in decoupled_kd. Of equal logits at the edge of a mask any may be kept.
    vocabulary: how many classes at the front are tokens, if the networks have more (see shared_vocabulary). The others
    are padding: they are not read, get no gradient, and the two networks may have different numbers of them.

    Differentiable once. Raises ValueError as decoupled_kd does, and for logits of two sizes without a vocabulary, a
    vocabulary that is larger than a network's, a topk.TopP, and a teacher that needs a gradient.
    """
    sizes = student_logits.shape[-1:] + teacher_logits.shape[-1:]
    if student_logits.ndim < 2 or student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"student and teacher logits must be (…, C) of the same tokens, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    if vocabulary is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"student and teacher must have one vocabulary, got logits of {sizes[0]:,} and {sizes[1]:,} classes; if "
            f"one tokenizer serves both, the rest is padding: pass vocabulary=shared_vocabulary(…)"
        )
    classes = sizes[0] if vocabulary is None else vocabulary
    if not 2 <= classes <= min(sizes):
        raise ValueError(
            f"a vocabulary must be from 2 to the networks' {sizes[0]:,} and {sizes[1]:,} classes, got {classes!r}"
        )
    if target.shape != student_logits.shape[:-1] or target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(
            f"target must be integers {tuple(student_logits.shape[:-1])}, one a token, got {tuple(target.shape)} of "
            f"{target.dtype}"
        )
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {MASKS}, got {mask!r}")
    if isinstance(top_k, TopP):
        raise ValueError("tokens take a mask of K classes; per_sample and decoupled_kd take a share of the mass")
    if teacher_logits.requires_grad:
        raise ValueError("the teacher's logits must need no gradient; compute them under torch.no_grad()")
    kept = None if top_k is None or check_k(top_k, classes) == classes - 1 else int(top_k)
    labels = target.reshape(-1).long()
    parts = _Tokens.apply(
        student_logits.reshape(-1, sizes[0]),
        teacher_logits.reshape(-1, sizes[1]),
        labels,
        (labels != ignore_index).nonzero().squeeze(1),
        classes,
        float(temperature),
        kept,
        mask,
    )
    return DecoupledKD(*(part.reshape(target.shape) for part in parts))


def shared_vocabulary(student: Mapping[str, int], teacher: Mapping[str, int]) -> int:
    """Return how many classes at the front of both networks' logits are tokens; refuse two different vocabularies.

    student, teacher: token -> its number, as `tokenizer.get_vocab()` of Transformers gives it. A network's own number
    of classes says too little: it may be padded, and two tokenizers may have as many tokens. Raises UserError if a
    token is missing in one, or has two numbers.
    """
    if not student or not teacher:
        raise UserError("the vocabularies of student and teacher must have tokens; pass tokenizer.get_vocab() of both")
    different = sorted(token for token in student.keys() | teacher.keys() if student.get(token) != teacher.get(token))
    if different:
        first = different[0]
        ours, theirs = (vocabulary.get(first, "not there") for vocabulary in (student, teacher))
        raise UserError(
            f"the vocabularies of student ({len(student):,} tokens) and teacher ({len(teacher):,}) differ in "
            f"{len(different):,} tokens: {shown(first)} is {ours} and {theirs}; logits can be compared only if one "
            f"tokenizer serves both"
        )
    return 1 + max(student.values())


class _Tokens(torch.autograd.Function):
    """TCKD and NCKD of logits (N, C), part by part; the teacher's probability of the target has no gradient.

    rest: logsumexp of the classes other than the target. r: the softmax over them, of the student; q the teacher's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        counted: Tensor,
        classes: int,
        temperature: float,
        top_k: int | None,
        mask: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = wide(student).dtype
        tckd, nckd, p = (torch.zeros(len(target), dtype=dtype, device=student.device) for _ in range(3))
        stored = []
        for rows in _parts(counted, classes):
            label = target[rows]
            z_s, z_t = student[rows, :classes], teacher[rows, :classes]
            check(z_s, z_t, temperature, label)
            label = label.unsqueeze(1)
            z_s, z_t = scaled(z_s, temperature), scaled(z_t, temperature)
            # −inf is below what `scaled` makes of a masked class, so topk takes the target last of all
            others_s, others_t = (z.scatter(1, label, -math.inf) for z in (z_s, z_t))
            rest_s, rest_t = (z.logsumexp(1, keepdim=True) for z in (others_s, others_t))
            ahead_s, ahead_t = z_s.gather(1, label) - rest_s, z_t.gather(1, label) - rest_t
            two_s, two_t = (torch.cat([F.logsigmoid(gap), F.logsigmoid(-gap)], 1) for gap in (ahead_s, ahead_t))
            kept = None
            if top_k is None:
                divergence = ((others_t - rest_t).exp() * (z_t - rest_t - (z_s - rest_s))).sum(1)
            else:
                kept = others_t.topk(top_k, dim=1, sorted=False).indices
                log_r, log_q = (_of_kept(z, rest, kept, mask) for z, rest in ((z_s, rest_s), (z_t, rest_t)))
                divergence = kl(log_q, log_r)
                kept = kept.int()
            tckd[rows] = (temperature**2 * kl(two_t, two_s)).to(dtype)
            nckd[rows] = (temperature**2 * divergence).to(dtype)
            p[rows] = two_t[:, 0].exp().to(dtype)
            stored += [rest_s, rest_t, ahead_s.sigmoid() - ahead_t.sigmoid(), kept]
        ctx.save_for_backward(student, teacher, target, counted, *stored)
        ctx.options = classes, temperature, mask
        ctx.mark_non_differentiable(p)
        ctx.set_materialize_grads(False)
        return tckd, nckd, p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_tckd: Tensor | None, of_nckd: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        student, teacher, target, counted, *stored = ctx.saved_tensors
        classes, temperature, mask = ctx.options
        gradient = torch.zeros_like(student)  # of padding and ignored tokens it stays so
        for number, rows in enumerate(_parts(counted, classes)):
            rest_s, rest_t, shift, kept = stored[4 * number : 4 * number + 4]
            label = target[rows].unsqueeze(1)
            z_s = scaled(student[rows, :classes], temperature)
            # T² of the loss and 1/T of the scaled logits
            part = torch.zeros_like(z_s)
            if of_tckd is not None:
                weight = temperature * of_tckd[rows].unsqueeze(1).to(z_s.dtype) * shift
                part.add_((z_s - rest_s).exp() * -weight).scatter_(1, label, weight)
            if of_nckd is not None:
                weight = temperature * of_nckd[rows].unsqueeze(1).to(z_s.dtype)
                z_t = scaled(teacher[rows, :classes], temperature)
                part.add_(_nckd_gradient(z_s, z_t, rest_s, rest_t, label, kept, mask).mul_(weight))
            gradient[rows, :classes] = part.to(gradient.dtype)
        return gradient, *[None] * 7


def _nckd_gradient(
    z_s: Tensor, z_t: Tensor, rest_s: Tensor, rest_t: Tensor, label: Tensor, kept: Tensor | None, mask: str
) -> Tensor:
    """Return the gradient of KL over the kept classes by the student's scaled logits, (n, C)."""
    if kept is None:
        return ((z_s - rest_s).exp() - (z_t - rest_t).exp()).scatter_(1, label, 0.0)
    kept = kept.long()
    log_r, log_q = (_of_kept(z, rest, kept, mask) for z, rest in ((z_s, rest_s), (z_t, rest_t)))
    if mask == "renormalise":
        return torch.zeros_like(z_s).scatter_(1, kept, log_r.exp() - log_q.exp())
    q = log_q.exp()
    all_r = ((z_s - rest_s).exp() * q.sum(1, keepdim=True)).scatter_(1, label, 0.0)
    return all_r.scatter_add_(1, kept, -q)


def _of_kept(scaled_logits: Tensor, rest: Tensor, kept: Tensor, mask: str) -> Tensor:
    """Return the kept classes' log-probabilities, (n, K): among themselves, or among all but the target."""
    chosen = scaled_logits.gather(1, kept)
    return F.log_softmax(chosen, 1) if mask == "renormalise" else chosen - rest


def _parts(counted: Tensor, classes: int) -> tuple[Tensor, ...]:
    """Split the tokens that count into parts of about CELLS logits; one that is empty if none counts."""
    parts: tuple[Tensor, ...] = torch.split(counted, max(CELLS // classes, 1))
    return parts
