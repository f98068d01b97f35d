"""DeepKD: a base method's loss taken apart into the streams TOG, TCG and NCG (arXiv 2505.15133)."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from ..losses import MASKS
from ..mixture import STREAMS as APART
from ..mixture import Teachers
from ..rules import NOT_NEGATIVE, TEMPERATURE, Key, Rule, one_of, whole
from ..streams import OF_A_TEACHER, STREAMS, of_teacher
from ..topk import GROWING, Kept, mask_size
from .base import Distiller, Losses, bases, warmup_epochs, warmup_factor
from .features import FEATURES, KEY, THEIRS, FeatureLoss
from .terms import Term, View, classes, cross_entropy, prepared, total
from .variants import BY_VARIANT, variant

_CLASSES: Rule = (
    "a fraction of the classes in (0, 1), or a whole number of classes from 2 on; 1 could be either",
    lambda value: 0 < value < 1 or (value >= 2 and float(value).is_integer()),
)
_PHASES: Rule = (
    "two ends in order, 0 <= phi1 < phi2 <= 1",
    lambda value: [type(end) in (int, float) for end in value] == [True, True] and 0 <= value[0] < value[1] <= 1,
)


class DeepKD(Distiller):
    """CE_WEIGHT · CE, TCG_WEIGHT · L_TCG and NCG_WEIGHT · L_NCG as the losses `tog`, `tcg` and `ncg`.

    Weights, temperature, warm-up and mask come from the config node DeepKD. What else a base method has,
    such as MLKD's temperatures or CRLD's thresholds, comes from its own node. The trainer DecoupledMomentumSGD
    gives each loss a momentum of its own. Under a trainer that sums the losses this is the base method with
    the top-K mask: the ablation without decoupling.

    With DeepKD.FEATURE there is a fourth loss, `feat`: FEAT_WEIGHT times a loss on the features of the weak view
    (features.py), whose connectors are trained with the student and are no part of it.

    With DISTILLER.TEACHER_POOL streams each of several teachers has losses of its own, `tcg` and `ncg` of the first,
    `tcg_2` and `ncg_2` of the second: those of DeepKD with that one alone, each sample's times the teacher's weight for
    it (mixture.sample_weights; of two views, for the weak one).
    """

    streams: tuple[str, ...] = STREAMS
    on_logits = in_terms = soft_labels = True
    warmup_key = "DeepKD.WARMUP"
    losses_of = "samples"
    keys = (
        Key("DeepKD.CE_WEIGHT", 1.0, "alpha, weight of the cross-entropy (TOG)", *NOT_NEGATIVE),
        Key("DeepKD.TCG_WEIGHT", 1.0, "beta, weight of the target-class loss (TCG)", *NOT_NEGATIVE),
        Key("DeepKD.NCG_WEIGHT", 1.0, "gamma, weight of the non-target-class loss (NCG)", *NOT_NEGATIVE),
        Key(KEY, "none", "a loss on features as a fourth stream, FEAT", *one_of("none", "AT", "FITNET", *THEIRS)),
        Key("DeepKD.FEAT_WEIGHT", 1.0, "weight of that loss, times the method's own", *NOT_NEGATIVE),
        Key("DeepKD.TEMPERATURE", 4.0, "softmax temperature (over MLKD: MLKD.TEMPERATURES)", *TEMPERATURE),
        Key(
            "DeepKD.WARMUP",
            0,
            "W epochs of linear warm-up: epoch e has min(e/W, 1) of TCG and NCG, so 1 is none (DKD: 20)",
            *whole(0),
        ),
        Key(
            "DeepKD.MASK.TYPE",
            "dynamic",
            "top-K mask on the non-target classes; static: K of them, dynamic: growing, top_p: a growing share of the "
            "teacher's non-target mass, so a K for each sample",
            *one_of("none", "static", *GROWING),
        ),
        Key("DeepKD.MASK.K", 0.5, "classes kept by the static mask", *_CLASSES),
        Key("DeepKD.MASK.INITIAL", 0.05, "classes (top_p: the share) kept at the start of a mask (paper)", *_CLASSES),
        Key("DeepKD.MASK.OPTIMAL", 0.5, "the same in its middle phase (ours; not published)", *_CLASSES),
        Key("DeepKD.MASK.PHASES", (1 / 3, 2 / 3), "ends of its first two phases, of training", *_PHASES),
        Key(
            "DeepKD.MASK.UNIT",
            "epoch",
            "what a mask grows by: epochs, or iterations as the article's t; detectors' always by the latter",
            *one_of("epoch", "iteration"),
        ),
        Key(
            "DeepKD.MASK.READING",
            BY_VARIANT,
            "how the mask enters NCKD, see losses.py; variant: as SOLVER.DECOUPLED.VARIANT has it",
            *one_of(BY_VARIANT, *MASKS),
        ),
    )

    feature: FeatureLoss | None

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, num_data: int | None = None) -> None:
        """num_data: the number of training images, which the feature loss CRD needs."""
        super().__init__(student, teacher, cfg)
        self.base = bases()[cfg.DeepKD.BASE]
        self.streams = self.streams_of(cfg)
        self.by_iteration = cfg.DeepKD.MASK.UNIT == "iteration" and cfg.DeepKD.MASK.TYPE in GROWING
        if self.losses_of == "samples":
            self.losses_of = self.base.losses_of
        self.feature = None
        if name := self.feature_of(cfg):
            self.feature, self.losses_of = FEATURES[name](student, teacher, cfg, num_data), ""

    @classmethod
    def config_keys(cls) -> tuple[Key, ...]:
        base = Key("DeepKD.BASE", "KD", "the method whose loss is taken apart", *one_of(*bases()))
        return base, *cls.keys

    @classmethod
    def views_of(cls, cfg: Any) -> int:
        return bases()[cfg.DeepKD.BASE].views

    @classmethod
    def streams_of(cls, cfg: Any) -> tuple[str, ...]:
        node = cfg.DISTILLER
        apart = getattr(node, "TEACHER_POOL", "") == APART  # runs of before have no such key
        more = len(node.MORE_TEACHERS) if apart else 0
        return *cls.streams, *(of_teacher(name, number) for number in range(1, more + 1) for name in OF_A_TEACHER)

    @classmethod
    def feature_of(cls, cfg: Any) -> str:
        name = getattr(cfg.DeepKD, "FEATURE", "none")  # runs of before have no such key
        return "" if name == "none" else str(name)

    @classmethod
    def temperature_of(cls, cfg: Any) -> float | None:
        base = bases()[cfg.DeepKD.BASE]
        return None if base.temperature_of(cfg) is None else float(cfg.DeepKD.TEMPERATURE)

    @classmethod
    def loss_weights(cls, cfg: Any) -> dict[str, float]:
        node, base = cfg.DeepKD, bases()[cfg.DeepKD.BASE]
        ce, tckd, nckd = node.CE_WEIGHT, node.TCG_WEIGHT, node.NCG_WEIGHT
        parts = {"CE": ce, "TCKD": tckd, "(1 − p) NCKD" if base.keeps_weight else "NCKD": nckd}
        if base.keeps_weight and tckd == nckd:
            parts = {"CE": ce, "KD": tckd}
        feature = {f"FEAT ({name})": node.FEAT_WEIGHT} if (name := cls.feature_of(cfg)) else {}
        return parts | base.term_weights(cfg) | feature | warmup_epochs(cls, cfg)

    def constants(self, epoch: float, num_classes: int) -> Hashable:
        by_epoch = self.feature is not None and self.feature.by_epoch
        return self.warmup(epoch), self.top_k(epoch, num_classes), epoch if by_epoch else None

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        connectors = [] if self.feature is None else self.feature.get_learnable_parameters()
        return [*super().get_learnable_parameters(), *connectors]

    def get_extra_parameters(self) -> int:
        return sum(p.numel() for p in self.get_learnable_parameters()[len(list(self.student.parameters())) :])

    def forward_train(
        self, image: Tensor | Sequence[Tensor], target: Tensor, epoch: float, **batch: Any
    ) -> tuple[Tensor, Losses]:
        node, feat = self.cfg.DeepKD, {}
        if self.feature is None:
            of_each, weights = self._by_teacher(image)
        else:
            views, learned, taught = self.compare_features(image, self.feature.needs)
            weak = image if isinstance(image, Tensor) else image[0]
            whole = {**batch, "image": weak, "target": target, "epoch": epoch}
            feat = {"feat": node.FEAT_WEIGHT * self.feature(learned, taught, whole)}
            of_each, weights = [views], [1.0]
        views = of_each[0]
        task = self.base.task(views, self.cfg)
        losses = {"tog": total([node.CE_WEIGHT * cross_entropy(views, target), *task.values()])}
        warmup = self.warmup(epoch)
        for number, (of_one, weight) in enumerate(zip(of_each, weights)):
            terms = self.base.terms(of_one, self.cfg, float(node.TEMPERATURE))
            tcg, ncg = self.decoupled(terms, classes(target), epoch, weight)
            losses[of_teacher("tcg", number)] = warmup * node.TCG_WEIGHT * tcg
            losses[of_teacher("ncg", number)] = warmup * node.NCG_WEIGHT * ncg
        return views[0][0], losses | feat

    def _by_teacher(self, image: Tensor | Sequence[Tensor]) -> tuple[list[list[View]], list[Tensor | float]]:
        """Return the views as each teacher sees them that has streams, and its weight for each sample, (B,) or 1."""
        if self.cfg.DISTILLER.TEACHER_POOL != APART or not isinstance(self.teacher, Teachers):
            return [self.compare(image)], [1.0]
        said = self.compare_each(image)
        weights = self.teacher.weights(said[0][1], self.labels).float().unbind(1)
        return [[(student, each[:, m]) for student, each in said] for m in range(len(weights))], list(weights)

    def decoupled(
        self, terms: Sequence[Term], target: Tensor, epoch: float, weight: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the target-class and the non-target-class parts of the terms, two scalars.

        weight: of each sample, (B,), or one number for all.
        """
        top_k = self.top_k(epoch, terms[0].student.shape[1])
        reading = variant(self.cfg).reading
        target_class, non_target = [], []
        for term in prepared(terms, self.cfg):
            tckd, nckd, p = self.base.parts(term, target, self.cfg, top_k, reading)
            if self.base.keeps_weight:
                nckd = (1.0 - p) * nckd
            target_class.append((weight * term.weight * tckd).mean())
            non_target.append((weight * term.weight * nckd).mean())
        return total(target_class), total(non_target)

    def top_k(self, epoch: float, num_classes: int) -> Kept:
        """Return which non-target classes count in this epoch (from 1; a part of it is it); None without a mask.

        With DeepKD.MASK.UNIT iteration the part counts: progress is the share of all iterations up to this one.
        """
        epochs = self.cfg.SOLVER.EPOCHS
        progress = epoch / epochs if self.by_iteration else (math.ceil(epoch) - 1) / max(epochs - 1, 1)
        return mask_size(self.cfg.DeepKD.MASK, num_classes, min(progress, 1.0))

    def warmup(self, epoch: float) -> float:
        """Return the factor of TCG and NCG in this epoch, which a fraction is a part of unless warm-ups go by it."""
        by_parts = self.cfg.SOLVER.WARMUP_UNIT == "iteration"
        return warmup_factor(epoch if by_parts else math.ceil(epoch), self.cfg.DeepKD.WARMUP)
