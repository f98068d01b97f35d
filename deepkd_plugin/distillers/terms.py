"""Distillation as a sum of terms, each a pair of logits compared at a temperature.

KD and DKD have one term, CRLD and MLKD one for each pair of views and each temperature. A method says
which terms it has. Whether a term counts whole (KL) or falls into target and non-target class (DeepKD) is
then the same question for all of them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import standardise_logits, wide

View = tuple[Tensor, Tensor]
"""Student and teacher logits (B, C) of one view of the batch."""


class Term(NamedTuple):
    """One comparison of student and teacher logits, (B, C) each."""

    student: Tensor
    teacher: Tensor
    temperature: float
    weight: Tensor | float = 1.0
    """Of each sample, (B,), or one number for all; it carries no graph."""


def prepared(terms: Iterable[Term], cfg: Any) -> list[Term]:
    """Return a method's terms as a config changes those of any method.

    DISTILLER.ENTROPY_WEIGHT: each sample's weight times entropy_weight of its logits. EXPERIMENT.LOGIT_STAND:
    standardised logits; the weight is of the logits as they were.
    """
    terms, node = list(terms), cfg.DISTILLER
    if node.ENTROPY_WEIGHT != "none":
        literal = node.ENTROPY_WEIGHT == "release" and cfg.DATASET.TYPE != "imagenet"
        terms = [
            t._replace(weight=t.weight * entropy_weight(t.student, t.teacher, node.ENTROPY_TEMPERATURE, literal))
            for t in terms
        ]
    if cfg.EXPERIMENT.LOGIT_STAND:
        both = [(standardise_logits(t.student), standardise_logits(t.teacher)) for t in terms]
        terms = [t._replace(student=student, teacher=teacher) for t, (student, teacher) in zip(terms, both)]
    return terms


@torch.no_grad()
def entropy_weight(student_logits: Tensor, teacher_logits: Tensor, temperature: float, literal: bool) -> Tensor:
    """Weigh samples by how unsure the teacher is, and the student with it (EA-KD, arXiv 2311.13621).

    Logits (B, C) each; returns (B,): H_t · (1 + H_s / H) / 2, with the entropies of the softmax at a temperature and
    H = log C, the largest one. literal: H = 100, as the authors' code has it for every data set but ImageNet, so that
    the student hardly counts.
    """
    of_teacher, of_student = (
        torch.special.entr(F.softmax(wide(logits) / temperature, dim=1)).sum(1)
        for logits in (teacher_logits, student_logits)
    )
    largest = 100.0 if literal else math.log(student_logits.shape[1])
    weight: Tensor = of_teacher * (1 + of_student / largest) / 2
    return weight


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
