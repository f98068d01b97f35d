"""The streams of a DETR-like head's step: class logits of queries in, TCG's and NCG's terms out.

A query is to such a head what an image is to a classifier. Bipartite matching (Carion et al., 2020, DETR) has given
some queries an object, and the rest none. The caller pairs queries of student and teacher, by position or by matching
both to the same objects, and gathers them; this module sees paired logits and labels alone.

Two kinds of head are there:

- A softmax over K classes and "no object" (DETR). Its terms are decoupled_kd's; a matched query has "no object" as one
  of its non-target classes, and an unmatched one, if it counts, has it as its target.
- K sigmoids (Deformable DETR, DINO). A class is a question of its own, so the loss is the sum over the classes of the
  binary KL between teacher and student. It falls apart exactly: the target's summand is TCG's, the others' are NCG's,
  and no weight of the teacher stands between them. An unmatched query has no target; all its classes are NCG's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import decoupled_kd, wide
from ..topk import check_k

NO_OBJECT = -1
"""The label of a query that is matched to no object."""


class QueryTerms(NamedTuple):
    """Both terms over the queries of a batch: scalars without a stream's weight."""

    tcg: Tensor
    ncg: Tensor


def softmax_query_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    mask: str = "renormalise",
    unmatched_weight: float = 0.0,
    no_object: int = -1,
) -> QueryTerms:
    """Return TCKD and NCKD of queries of a softmax head, their means by weight.

    student_logits, teacher_logits: (..., K + 1), for example (B, Q, K + 1). target: (...) integers: the class of the
    matched object, or NO_OBJECT. no_object: the column of "no object", counted from the end if negative (DETR's: the
    last); no target may be it. unmatched_weight: what an unmatched query counts beside a matched one's 1; 0 leaves it
    out whatever its logits are, and DETR's own classification loss has 0.1. top_k, mask: as in losses.decoupled_kd.
    Terms are Σ weight · term / Σ weight, and 0 with a gradient of 0 if no query counts.

    Raises ValueError as decoupled_kd does, and for a weight below 0 or a column that is not there.
    """
    columns = _columns(student_logits, teacher_logits, target)
    if not -columns <= no_object < columns:
        raise ValueError(f"no_object must be one of the {columns} columns, got {no_object}")
    weight = _weights(target, unmatched_weight, student_logits)
    student, teacher = _left_out(student_logits, weight), _left_out(teacher_logits, weight)
    labels = torch.where(target == NO_OBJECT, no_object % columns, target).reshape(-1)
    tckd, nckd, _ = decoupled_kd(student, teacher, labels, temperature, top_k, mask)
    return QueryTerms(*(_mean(term, weight.reshape(-1)) for term in (tckd, nckd)))


def sigmoid_query_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    unmatched_weight: float = 0.0,
) -> QueryTerms:
    """Return the binary KLs of queries of a sigmoid head: the target class's, and the sum of the other classes'.

    student_logits, teacher_logits: (..., K), for example (B, Q, K). target: (...) integers in [0, K), or NO_OBJECT.
    With KL_c = T² · KL(Bernoulli(σ(teacher_c / T)) ‖ Bernoulli(σ(student_c / T))), a query's target-class term is KL of
    its class and its non-target-class term the sum of the rest; without a mask they add up to the sum over all classes.
    top_k: how many non-target classes count, the teacher's largest, 1 … K − 1 (of an unmatched query as many of its K);
    None for all. A class of a sigmoid head has its own probability, so a mask drops summands, and there is nothing to
    renormalise. unmatched_weight: as in softmax_query_terms. Terms are Σ weight · term / Σ weight, TCG's over the
    matched queries, which alone have a target class, and 0 with a gradient of 0 if no query counts.

    Raises ValueError for shapes that do not fit, integer logits, T ≤ 0, K outside its range or a weight below 0 and, on
    a CPU, for a label outside the classes.
    """
    columns = _columns(student_logits, teacher_logits, target)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
    weight = _weights(target, unmatched_weight, student_logits).reshape(-1)
    student, teacher = (wide(_left_out(z, weight)) / temperature for z in (student_logits, teacher_logits))
    labels, matched = target.reshape(-1), (target != NO_OBJECT).reshape(-1)
    if labels.device.type == "cpu" and labels.numel() and not NO_OBJECT <= labels.min() <= labels.max() < columns:
        raise ValueError(
            f"labels must be in 0 … {columns - 1} or NO_OBJECT ({NO_OBJECT}), got {labels.unique().tolist()}"
        )
    is_target = torch.arange(columns, device=labels.device) == labels.unsqueeze(1)
    each = temperature**2 * _binary_kl(teacher, student)
    others = ~is_target
    if top_k is not None:
        best = teacher.detach().masked_fill(is_target, -torch.inf).topk(check_k(top_k, columns), dim=1).indices
        others = torch.zeros_like(others).scatter(1, best, True)
    tcg = each.masked_fill(~is_target, 0.0).sum(1)
    ncg = each.masked_fill(~others, 0.0).sum(1)
    return QueryTerms(_mean(tcg, weight * matched), _mean(ncg, weight))


def _binary_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute KL(Bernoulli(σ(teacher)) ‖ Bernoulli(σ(student))) of every element, in log space."""
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    return yes + (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))


def _columns(student: Tensor, teacher: Tensor, target: Tensor) -> int:
    """Check shapes and types; return the number of columns."""
    if student.ndim < 2 or student.shape != teacher.shape or target.shape != student.shape[:-1]:
        raise ValueError(
            f"student and teacher logits must have one shape (..., C) and the target (...), got "
            f"{tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(target.shape)}"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"logits must be floating-point numbers, got {student.dtype} and {teacher.dtype}")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target must be integers, got {target.dtype}")
    if student.shape[-1] < 2:
        raise ValueError(f"decoupling needs at least 2 columns, got logits of shape {tuple(student.shape)}")
    return student.shape[-1]


def _weights(target: Tensor, unmatched: float, logits: Tensor) -> Tensor:
    """Return each query's weight, 1 if it is matched, in the precision of the terms."""
    if not 0 <= unmatched < float("inf"):
        raise ValueError(f"unmatched_weight must be a finite number from 0 on, got {unmatched!r}")
    return torch.ones_like(target, dtype=wide(logits[:0]).dtype).masked_fill(target == NO_OBJECT, unmatched)


def _left_out(logits: Tensor, weight: Tensor) -> Tensor:
    """Return logits (N, C), with zeros for queries that do not count, so that whatever they held has no gradient."""
    flat = logits.reshape(-1, logits.shape[-1])
    return flat.masked_fill((weight.reshape(-1) == 0).unsqueeze(1), 0.0)


def _mean(term: Tensor, weight: Tensor) -> Tensor:
    """Return Σ weight · term / Σ weight; 0, with a gradient of 0, if all weights are 0."""
    total = weight.sum()
    return (weight * term).sum() / torch.where(total > 0, total, 1.0)
