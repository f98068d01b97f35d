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

PARTS, CELLS = 16, 2**20
"""Into how many parts the tokens are divided at most, and the logits of a part at least (4 MiB in float32)."""


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
            z_s, z_t = (z.index_select(0, rows)[:, :classes] for z in (student, teacher))
            check(z_s, z_t, temperature, label)
            label = label.unsqueeze(1)
            z_s, z_t = scaled(z_s, temperature), scaled(z_t, temperature)
            ahead_s, ahead_t = z_s.gather(1, label), z_t.gather(1, label)
            for z in (z_s, z_t):  # below what `scaled` makes of a masked class, so topk takes the target last of all
                z.scatter_(1, label, -math.inf)
            rest_s, rest_t = z_s.logsumexp(1, keepdim=True), z_t.logsumexp(1, keepdim=True)
            ahead_s, ahead_t = ahead_s - rest_s, ahead_t - rest_t
            two_s, two_t = (torch.cat([F.logsigmoid(gap), F.logsigmoid(-gap)], 1) for gap in (ahead_s, ahead_t))
            kept = None
            if top_k is None:
                log_q, log_r = z_t.sub_(rest_t), z_s.sub_(rest_s)
                q = log_q.exp()
                divergence = q.mul_(log_q.sub_(log_r).scatter_(1, label, 0.0)).sum(1)
            else:
                kept = z_t.topk(top_k, dim=1, sorted=False).indices
                log_q, log_r = (_of_kept(z.gather(1, kept), rest, mask) for z, rest in ((z_t, rest_t), (z_s, rest_s)))
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
            # T² of the loss and 1/T of the scaled logits
            of_t, of_n = (
                None if loss is None else temperature * loss[rows].unsqueeze(1).to(rest_s.dtype)
                for loss in (of_tckd, of_nckd)
            )
            of_r = None if of_t is None else -of_t * shift  # what r, of all classes but the target, is to be times
            of_kept = None
            if of_n is not None and kept is not None:
                kept = kept.long()
                z_s, z_t = (scaled(z[rows.unsqueeze(1), kept], temperature) for z in (student, teacher))
                q = _of_kept(z_t, rest_t, mask).exp_()
                if mask == "renormalise":
                    of_kept = of_n * (F.softmax(z_s, 1) - q)
                else:
                    of_kept = -of_n * q
                    of_r = of_n * q.sum(1, keepdim=True) + (0.0 if of_r is None else of_r)
            elif of_n is not None:
                of_r = of_n + (0.0 if of_r is None else of_r)
            if of_r is None:  # nothing but the kept classes has a gradient
                if of_kept is not None:
                    gradient[rows.unsqueeze(1), kept] = of_kept.to(gradient.dtype)
                continue
            part = (scaled(student.index_select(0, rows)[:, :classes], temperature) - rest_s).exp_().mul_(of_r)
            if of_kept is not None:
                part.scatter_add_(1, kept, of_kept)
            elif of_n is not None:
                part.sub_((scaled(teacher.index_select(0, rows)[:, :classes], temperature) - rest_t).exp_().mul_(of_n))
            part.scatter_(1, label, torch.zeros_like(shift) if of_t is None else of_t * shift)
            gradient[rows, :classes] = part.to(gradient.dtype)
        return gradient, *[None] * 7


def _of_kept(chosen: Tensor, rest: Tensor, mask: str) -> Tensor:
    """Return the kept classes' log-probabilities, of their logits (n, K): among themselves, or all but the target."""
    return F.log_softmax(chosen, 1) if mask == "renormalise" else chosen - rest


def _parts(counted: Tensor, classes: int) -> tuple[Tensor, ...]:
    """Split the tokens that count: at most PARTS parts, of CELLS logits or more. One part is empty if no token counts.

    So what a pass needs beside its results is a share of the logits, and a GPU gets PARTS times the kernels at most.
    """
    parts: tuple[Tensor, ...] = torch.split(counted, max(-(-len(counted) // PARTS), CELLS // classes, 1))
    return parts
