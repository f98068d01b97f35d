"""Distillation as a sum of terms, each a pair of logits compared at a temperature.

KD and DKD have one term, CRLD and MLKD one for each pair of views and each temperature. A method says
which terms it has. Whether a term counts whole (KL) or falls into target and non-target class (DeepKD) is
then the same question for all of them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..losses import kd_divergence, standardise_logits

View = tuple[Tensor, Tensor]
"""Student and teacher logits (B, C) of one view of the batch."""


class Term(NamedTuple):
    """One comparison of student and teacher logits, (B, C) each."""

    student: Tensor
    teacher: Tensor
    temperature: float
    weight: Tensor | float = 1.0
    """Of each sample, (B,), or one number for all; it carries no graph."""


def standardised(terms: Iterable[Term], enabled: bool) -> list[Term]:
    """Return the terms on standardised logits if `enabled` (EXPERIMENT.LOGIT_STAND), else as they are."""
    if not enabled:
        return list(terms)
    return [t._replace(student=standardise_logits(t.student), teacher=standardise_logits(t.teacher)) for t in terms]


def divergence(terms: Iterable[Term]) -> Tensor:
    """Sum the terms' batch means of weight · T² · KL(teacher ‖ student): a scalar."""
    return total((t.weight * kd_divergence(t.student, t.teacher, t.temperature)).mean() for t in terms)


def cross_entropy(views: Sequence[View], target: Tensor) -> Tensor:
    """Sum the student's cross-entropy over the views, for labels or soft labels: a scalar."""
    return total(F.cross_entropy(student, target) for student, _ in views)


def classes(target: Tensor) -> Tensor:
    """Return the target classes (B,) of labels: themselves, or the largest share of each soft one (B, C).

    Of equal shares the first counts, as in losses.per_sample.
    """
    return target.argmax(1) if target.is_floating_point() else target


def total(scalars: Iterable[Tensor]) -> Tensor:
    """Sum at least one scalar, from the first to the last."""
    first, *others = scalars
    return sum(others, first)
