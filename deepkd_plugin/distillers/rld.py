"""Refined logit distillation (Sun et al., 2024): nothing is learned of classes above the target."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..losses import DecoupledKD, decoupled_kd
from ..rules import NOT_NEGATIVE, TEMPERATURE, Key, whole
from ..topk import Kept
from .base import Method
from .terms import Term, View


class RLD(Method):
    """CE_WEIGHT · CE + warm-up · (ALPHA · SCD + BETA · MCD), all from the config node RLD.

    SCD compares the student's probability of the target with the teacher's largest, whichever class has it, at ALPHA_T.
    MCD is NCKD over the classes that the teacher ranks below the target, at T. Where the teacher is right they are TCKD
    and NCKD. DeepKD over it: SCD is its target-class part, MCD, within the top-K mask, the other.
    """

    losses_of = "samples"
    by_default = False
    warmup_key = "RLD.WARMUP"
    keys = (
        Key("RLD.CE_WEIGHT", 1.0, "weight of the cross-entropy", *NOT_NEGATIVE),
        Key("RLD.ALPHA", 1.0, "weight of the comparison of target and largest probability", *NOT_NEGATIVE),
        Key("RLD.BETA", 8.0, "weight of the classes below the target", *NOT_NEGATIVE),
        Key("RLD.ALPHA_T", 1.0, "softmax temperature of the former", *TEMPERATURE),
        Key("RLD.T", 4.0, "softmax temperature of the latter", *TEMPERATURE),
        Key("RLD.WARMUP", 20, "W epochs of linear warm-up: epoch e has min(e/W, 1) of it, so 1 is none", *whole(0)),
    )

    @classmethod
    def terms(cls, views: Sequence[View], cfg: Any, temperature: float | None = None) -> list[Term]:
        return [Term(*views[0], temperature or float(cfg.RLD.T))]

    @classmethod
    def parts(cls, term: Term, target: Tensor, cfg: Any, top_k: Kept = None, mask: str = "renormalise") -> DecoupledKD:
        student, teacher, column = term.student, term.teacher, target.long().unsqueeze(1)
        own, largest = teacher.gather(1, column), teacher.max(1, keepdim=True)
        # with the two logits exchanged, the teacher's probability of the target is its largest one
        exchanged = teacher.scatter(1, largest.indices, own).scatter(1, column, largest.values)
        scd, _, p = decoupled_kd(student, exchanged, target, float(cfg.RLD.ALPHA_T))
        above = (teacher >= own).scatter(1, column, False)
        student, teacher = (logits.masked_fill(above, float("-inf")) for logits in (student, teacher))
        return DecoupledKD(scd, decoupled_kd(student, teacher, target, term.temperature, top_k, mask).nckd, p)

    @classmethod
    def weights(cls, cfg: Any) -> tuple[float, float]:
        return cfg.RLD.CE_WEIGHT, 1.0

    @classmethod
    def part_weights(cls, cfg: Any) -> tuple[float, float]:
        return cfg.RLD.ALPHA, cfg.RLD.BETA
