"""DeepKD: a base method's loss taken apart into the streams TOG, TCG and NCG (arXiv 2505.15133)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..losses import decoupled_kd
from ..topk import mask_size
from .base import Distiller, warmup_factor
from .crld import crld_terms
from .mlkd import mlkd_relations, mlkd_terms
from .terms import Term, View, cross_entropy, standardised


class Base(NamedTuple):
    """A method whose distillation terms DeepKD takes apart."""

    views: int
    """How many views of an image it needs."""
    terms: Callable[[Sequence[View], Any], list[Term]]
    """(views, cfg) -> its terms."""
    keeps_weight: bool = False
    """Whether NCKD keeps the teacher's (1 - p) of each sample, as it has it in plain KD."""
    task: Callable[[Sequence[View], Any], Tensor] | None = None
    """(views, cfg) -> what stays with the task stream beside the cross-entropy, a scalar."""


def _single(views: Sequence[View], cfg: Any) -> list[Term]:
    return [Term(*views[0], float(cfg.DeepKD.TEMPERATURE))]


BASES = {
    "KD": Base(1, _single, keeps_weight=True),
    "DKD": Base(1, _single),
    "MLKD": Base(
        2,
        lambda views, cfg: mlkd_terms(views, cfg.MLKD),
        task=lambda views, cfg: sum(mlkd_relations(views, cfg.MLKD)),
    ),
    "CRLD": Base(2, lambda views, cfg: crld_terms(views, float(cfg.DeepKD.TEMPERATURE), cfg.CRLD)),
}
"""The methods that DeepKD can take apart, by DeepKD.BASE."""


class DeepKD(Distiller):
    """CE_WEIGHT · CE, TCG_WEIGHT · L_TCG and NCG_WEIGHT · L_NCG as the losses `tog`, `tcg` and `ncg`.

    Weights, temperature, warm-up and mask come from the config node DeepKD; what else a base method has,
    such as MLKD's temperatures or CRLD's thresholds, from its own node. The trainer DecoupledMomentumSGD
    gives each loss a momentum of its own; under a trainer that sums the losses this is the base method with
    the top-K mask, the ablation without decoupling.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.cfg = cfg
        self.node = cfg.DeepKD
        self.base = BASES[self.node.BASE]
        self.standardise = cfg.EXPERIMENT.LOGIT_STAND

    def forward_train(
        self, image: Tensor | Sequence[Tensor], target: Tensor, epoch: int, **batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        node = self.node
        views = self.views(image, self.base.views)
        tog = node.CE_WEIGHT * cross_entropy(views, target)
        if self.base.task is not None:
            tog = tog + self.base.task(views, self.cfg)
        tcg, ncg = self.decoupled(self.base.terms(views, self.cfg), target, epoch)
        warmup = warmup_factor(epoch, node.WARMUP)
        return views[0][0], {
            "tog": tog,
            "tcg": warmup * node.TCG_WEIGHT * tcg,
            "ncg": warmup * node.NCG_WEIGHT * ncg,
        }

    def decoupled(self, terms: Sequence[Term], target: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """The target-class and the non-target-class parts of the terms, two scalars."""
        top_k = self.top_k(epoch, terms[0].student.shape[1])
        target_class, non_target = [], []
        for term in standardised(terms, self.standardise):
            tckd, nckd, p = decoupled_kd(
                term.student, term.teacher, target, term.temperature, top_k, self.node.MASK.READING
            )
            if self.base.keeps_weight:
                nckd = (1.0 - p) * nckd
            target_class.append((term.weight * tckd).mean())
            non_target.append((term.weight * nckd).mean())
        return sum(target_class), sum(non_target)

    def top_k(self, epoch: int, num_classes: int) -> int | None:
        """How many non-target classes count in this epoch (from 1); None without a mask."""
        progress = min((epoch - 1) / max(self.cfg.SOLVER.EPOCHS - 1, 1), 1.0)
        return mask_size(self.node.MASK, num_classes, progress)
