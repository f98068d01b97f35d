"""The streams of a detector's step: class logits of sampled proposals in, losses by stream out.

A proposal is to a detector what an image is to a classifier. It has K + 1 class logits, for K classes and the
background, and a class, which may be the background. Distillation is decoupled over a proposal as over an image (DKD,
Zhao et al., 2022, section 4.3: background proposals take part, and their target is the background).

Normaliser: every term is the mean over the N proposals that the step sampled, over all images and classes. This is how
mdistiller's rcnn_dkd_loss and detectors' own classification losses do it. Without proposals every term is 0.
"""

from collections.abc import Mapping

from torch import Tensor

from ..distillers import bases
from ..losses import decoupled_kd, kd_divergence, wide
from ..topk import Kept

BASES = {name: method for name, method in bases().items() if method.on_proposals}
"""Methods that can be taken apart on proposals."""

TASK, TARGET, NON_TARGET, FEATURES = STREAMS = ("tog", "tcg", "ncg", "feat")
"""Streams: all detection losses, target class, non-target classes, and a feature method's loss if there is one."""


def proposal_kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return plain KD over proposals: the mean of T² · KL(teacher ‖ student), a scalar.

    student_logits, teacher_logits: (N, K + 1). Raises ValueError for other shapes or if T ≤ 0.
    """
    return _mean(kd_divergence(student_logits, teacher_logits, temperature), student_logits)


def proposal_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    base: str = "DKD",
    temperature: float = 1.0,
    top_k: Kept = None,
    mask: str = "renormalise",
) -> tuple[Tensor, Tensor]:
    """Return the target-class and the non-target-class term over proposals, two scalars without weights.

    student_logits, teacher_logits: (N, K + 1). target: (N,) integers, the column of each proposal's class; a proposal
    without an object has the background's column (the last in detectron2, the first in torchvision). base: "DKD" or
    "KD"; the two terms of "KD" add up to proposal_kd if there is no mask. top_k, mask: as in losses.decoupled_kd; if a
    proposal has an object, the background is one of its non-target classes. Raises ValueError as decoupled_kd does,
    and for another base.
    """
    if base not in BASES:
        raise ValueError(f"base must be one of {tuple(BASES)}, got {base!r}")
    tckd, nckd, p = decoupled_kd(student_logits, teacher_logits, target, temperature, top_k, mask)
    if BASES[base].keeps_weight:
        nckd = (1.0 - p) * nckd
    return _mean(tckd, student_logits), _mean(nckd, student_logits)


def losses_by_stream(
    detection_losses: Mapping[str, Tensor],
    terms: tuple[Tensor, Tensor],
    *,
    task_weight: float = 1.0,
    tcg_weight: float = 1.0,
    ncg_weight: float = 0.25,
    feature_losses: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return everything that a step minimises, by stream.

    detection_losses: name → scalar, of the proposal network and the box head; their sum is the task stream. terms:
    what proposal_terms returned. feature_losses: name → scalar, already weighted, of a method on features such as
    ReviewKD; if there are any, they make a stream of their own. The default weights are mdistiller's for DKD on
    detectors.
    """
    tcg, ncg = terms
    streams = {
        TASK: task_weight * sum(detection_losses.values()),
        TARGET: tcg_weight * tcg,
        NON_TARGET: ncg_weight * ncg,
    }
    return streams | ({FEATURES: sum(feature_losses.values())} if feature_losses else {})


def _mean(per_proposal: Tensor, logits: Tensor) -> Tensor:
    """Return the mean over proposals; without proposals 0, with a gradient of 0."""
    return per_proposal.mean() if len(per_proposal) else wide(logits).sum()
