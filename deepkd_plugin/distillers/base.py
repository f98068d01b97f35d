"""What every distiller declares and does, as mdistiller's trainers and tools expect it; and the registry of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .. import extensions
from ..losses import DecoupledKD, decoupled_kd, kd_divergence
from ..mixture import Teachers
from ..rules import Key
from ..topk import Kept
from .terms import Term, View, classes, cross_entropy, prepared, total

Losses = dict[str, Tensor]
"""Name -> scalar: what a training step minimises the sum of."""

Said = tuple[Tensor, Mapping[str, Any]]
"""What a network says of a batch: logits (B, C) and features by name, of mdistiller's names."""


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


class Taught(nn.Module):
    """A module whose part `teacher` is in evaluation mode from the moment it is set, whatever mode the module is in."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher" and isinstance(value, nn.Module):
            value.eval()
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Taught:
        super().train(mode)
        teacher = getattr(self, "teacher", None)
        if isinstance(teacher, nn.Module):
            teacher.eval()
        return self


class Distiller(Taught):
    """A student that trains beside a teacher in evaluation mode.

    In training, `forward(image=, target=, epoch=, …)` returns `(logits, {name: scalar loss})`. With teacher_logits=,
    those of the first view, `compare` does not compute them. In evaluation, `forward(image=)` returns the student's
    logits. Both networks map images (B, 3, H, W) to
    `(logits (B, C), features)`. The teacher may be several (mixture.Teachers): then teacher_logits are (B, M, C), and
    `compare` gives those of their mixture, `compare_each` each one's.

    A subclass declares what the rest of the package reads of it:

    name: its DISTILLER.TYPE; the class's own name if it gives none.
    keys: the config keys that it adds.
    views: how many views of an image it needs, 1 or 2 (weak and strong).
    streams: the streams that its losses are named after; () if they are named otherwise, and
        SOLVER.DECOUPLED.LOSS_STREAMS assigns them.
    on_logits: whether logits are all that it needs of the teacher, so that they may be read from a file.
    in_terms: whether its loss is a sum of terms, which EXPERIMENT.LOGIT_STAND and DISTILLER.ENTROPY_WEIGHT change.
    losses_of: what its losses are made of: "samples", if each is a mean over the batch of what a sample's logits and
        label say alone; "batch", if they need the batch's logits and labels together and get them by `compare`; "", if
        they read anything else, such as features or the index. A batch can be divided among processes and micro-batches
        unless it is "". A class that defines terms of its own and does not say it has "batch", one that defines its own
        step and does not say it has "".
    soft_labels: whether `target` may be the shares of all classes, (B, C), which mixed images and smoothed labels have.
        The target class of a method that needs one is then the largest (terms.classes). A class that defines its own
        step and does not say it does not take them.
    warmup_key: the config key of the epochs over which its losses warm up; "" if they do not. It gets them from
        warmup_factor(epoch, …). `epoch` counts from 1 and is a whole number, but while a warm-up by
        SOLVER.WARMUP_UNIT iteration lasts: then it is a fraction, which the epoch's last iteration makes whole.
    by_iteration: whether `epoch` is such a fraction throughout, whatever WARMUP_UNIT says.
    by_default: whether the tables that ship train its rows unless `--methods` names others.
    """

    name: ClassVar[str]
    keys: ClassVar[tuple[Key, ...]] = ()
    views: ClassVar[int] = 1
    streams: tuple[str, ...] = ()
    on_logits: ClassVar[bool] = False
    in_terms: ClassVar[bool] = False
    soft_labels: ClassVar[bool] = False
    warmup_key: ClassVar[str] = ""
    by_default: ClassVar[bool] = True
    by_iteration: bool = False
    losses_of: str = ""
    known: Sequence[Tensor] = ()
    """The teacher's logits of the first views of the batch that is passed, (B, C) each, if somebody knows them."""
    labels: Tensor | None = None
    """The target classes of the batch that is passed, (B,)."""
    whole: Callable[[Tensor], Tensor] = staticmethod(_as_it_is)
    """Makes the logits of a whole batch of those of a part that is passed, in a step of divided.py."""
    folded: nn.Module | None = None
    """What `compare` asks instead of the teacher, see `fold`."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.cfg = cfg

    @classmethod
    def config_keys(cls) -> tuple[Key, ...]:
        """Return `keys`; a class whose rules depend on other distillers makes them here."""
        return cls.keys

    @classmethod
    def views_of(cls, cfg: Any) -> int:
        """Return how many views of an image the method needs under a config."""
        return cls.views

    @classmethod
    def streams_of(cls, cfg: Any) -> tuple[str, ...]:
        """Return `streams` under a config."""
        return cls.streams

    @classmethod
    def feature_of(cls, cfg: Any) -> str:
        """Return the loss on features that a config adds to the method, the stream `feat`; "" without one."""
        return ""

    @classmethod
    def temperature_of(cls, cfg: Any) -> float | None:
        """Return the one temperature at which the method reads the teacher's logits under a config.

        None if there are several, or if nothing says so: a class that defines its own comparison inherits no answer.
        A table of some classes has the others' probability at one temperature.
        """
        return None

    @classmethod
    def loss_weights(cls, cfg: Any) -> dict[str, float]:
        """Return what the method weighs its losses by under a config, by name, so that two methods can be compared.

        CE is the cross-entropy, KD a divergence as a whole, TCKD and NCKD its parts, (1 − p) NCKD the latter as the
        former has it; "epochs of warm-up" are there if it has any. {}: nothing says so, as of a class that defines its
        own step and does not say it.
        """
        return {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = {name: getattr(value, "__func__", value) for name, value in vars(cls).items()}
        functions = {name: value for name, value in own.items() if inspect.isfunction(value)}
        reads = [name for name, value in functions.items() if "epoch" in inspect.signature(value).parameters]
        if "constants" not in own and {"forward", "forward_train", *reads} & own.keys():
            # what the class above says of its own step does not hold for this one
            cls.constants = Distiller.constants  # type: ignore[method-assign]
        if (
            "temperature_of" not in own
            and {"compare", "forward", "forward_train", "terms", "distance", "parts", "task"} & own.keys()
        ):
            cls.temperature_of = Distiller.temperature_of  # type: ignore[method-assign]
        if "loss_weights" not in own and {"forward", "forward_train", "decoupled"} & own.keys():
            cls.loss_weights = Distiller.loss_weights  # type: ignore[method-assign]
        if "soft_labels" not in own and {"forward", "forward_train"} & own.keys():
            cls.soft_labels = False
        if "losses_of" not in own and {"forward", "forward_train"} & own.keys():
            cls.losses_of = ""
        elif (
            "losses_of" not in own
            and cls.losses_of
            and {"terms", "distance", "parts", "task", "decoupled"} & own.keys()
        ):
            cls.losses_of = "batch"

    def constants(self, epoch: float, num_classes: int) -> Hashable:
        """Return every number of a training step that the epoch decides; steps with equal ones may share a capture.

        By default the epoch itself, which is safe. A class whose own methods take the epoch, or that defines `forward`
        or `forward_train`, inherits no other answer than this one.
        """
        return epoch

    def fold(self, folded: nn.Module | None) -> None:
        """Let `compare` ask a network of the teacher's logits, no part of the module's state; None: the teacher."""
        object.__setattr__(self, "folded", folded)

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return list(self.student.parameters())

    def get_extra_parameters(self) -> int:
        """Return how many learnable parameters the method adds to the student's."""
        return 0

    def forward(self, **batch: Any) -> Any:
        known = batch.pop("teacher_logits", ())
        self.known = [known] if isinstance(known, Tensor) else known
        target = batch.get("target")
        self.labels = None if target is None else classes(target)
        if self.training:
            return self.forward_train(**batch)
        return self.student(batch["image"])[0]

    def forward_train(self, image: Any, target: Tensor, epoch: float, **batch: Any) -> tuple[Tensor, Losses]:
        raise NotImplementedError(f"{type(self).__name__} must define forward_train")

    def compare(self, image: Tensor | Sequence[Tensor]) -> list[View]:
        """Return both networks' logits of each view of the batch; the teacher's carry no graph.

        image: (B, 3, H, W), or a list of views, weak before strong. Raises ValueError for another number of
        views than the method needs.
        """
        return [(student, self._mixed(taught)) for student, taught in self.compare_each(image)]

    def compare_each(self, image: Tensor | Sequence[Tensor]) -> list[View]:
        """Do as `compare`, with the logits (B, M, C) of several teachers as they are."""
        known = [*self.known, *[None] * self.views_of(self.cfg)]
        return [self._view(one, logits) for one, logits in zip(self._images(image), known)]

    def compare_features(self, image: Tensor | Sequence[Tensor], names: Sequence[str]) -> tuple[list[View], Said, Said]:
        """Do as `compare`, and return what student and teacher said of the first view, with features of these names.

        Each network passes an image once. The teacher's features carry no graph.
        """
        first, *others = self._images(image)
        logits, features = self._teach(self.teacher, first)
        given = features if isinstance(features, Mapping) else {}
        taught = logits, _own({name: given[name] for name in names if name in given})
        learned = self.student(first)
        view = self.whole(learned[0]), self.whole(logits)
        return [view, *(self._view(one, None) for one in others)], learned, taught

    def _images(self, image: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Return a batch's views; ValueError for another number of them than the method needs."""
        images = [image] if isinstance(image, Tensor) else list(image)
        count = self.views_of(self.cfg)
        if len(images) != count:
            raise ValueError(
                f"{type(self).__name__} needs {count} view(s) of each image, the batch has {len(images)}; "
                f"get_dataset gives as many as the config's method needs"
            )
        return images

    def _view(self, image: Tensor, teacher_logits: Tensor | None) -> View:
        if teacher_logits is None:
            teacher_logits, _ = self._teach(self.teacher if self.folded is None else self.folded, image)
        return self.whole(self.student(image)[0]), self.whole(teacher_logits)

    def _mixed(self, taught: Tensor) -> Tensor:
        return self.teacher.mix(taught, self.labels) if isinstance(self.teacher, Teachers) else taught

    @staticmethod
    def _teach(teacher: nn.Module, image: Tensor) -> tuple[Tensor, Any]:
        with torch.inference_mode():  # without autograd's bookkeeping
            logits, features = teacher(image)
        # an ordinary tensor again, and before the student's pass: compiled networks may use the memory again
        return logits.clone(), features


def _own(value: Any) -> Any:
    """Copy tensors of inference mode, in lists and by name, to ordinary ones."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {name: _own(part) for name, part in value.items()}
    return [_own(part) for part in value] if isinstance(value, (list, tuple)) else value


class Method(Distiller):
    """A method that compares logits, term by term; DeepKD can take its terms apart (DeepKD.BASE).

    Its loss is weights[0] · CE + weights[1] · warm-up · (the sum of its terms) + what `task` adds; a term counts with
    the batch's mean of weight · `distance`. A subclass gives `terms`; one that weighs the two parts of KL by themselves
    `part_weights`; one whose term is no KL `parts` or `distance`, or both. It declares besides:

    keeps_weight: whether NCKD keeps the teacher's (1 − p) of each sample when DeepKD takes the terms apart, as it
        has it in plain KD.
    on_proposals: whether its one term is a plain comparison of two sets of logits, so that DeepKD can be put over
        it on a detector's proposals too.
    published: what published tables call it; its name if it gives none.
    """

    on_logits = in_terms = soft_labels = True
    losses_of = "batch"
    keeps_weight: ClassVar[bool] = False
    on_proposals: ClassVar[bool] = False
    published: ClassVar[str] = ""

    @classmethod
    def terms(cls, views: Sequence[View], cfg: Any, temperature: float | None = None) -> list[Term]:
        """Return the distillation terms of a batch's views.

        temperature: used in place of the method's own, by DeepKD; a method with several ignores it.
        """
        raise NotImplementedError(f"{cls.__name__} must define terms")

    @classmethod
    def distance(cls, term: Term, target: Tensor, cfg: Any) -> Tensor:
        """Return how far the student is from the teacher in a term, for each sample: (B,).

        target: the classes, (B,). T² · KL, or the sum of `parts` under `part_weights` if the method has these.
        """
        if (weights := cls.part_weights(cfg)) is None:
            return kd_divergence(term.student, term.teacher, term.temperature)
        tckd, nckd, _ = cls.parts(term, target, cfg)
        distance: Tensor = weights[0] * tckd + weights[1] * nckd
        return distance

    @classmethod
    def part_weights(cls, cfg: Any) -> tuple[float, float] | None:
        """Return the weights of the target-class and the non-target-class part; None if a term counts whole."""
        return None

    @classmethod
    def parts(cls, term: Term, target: Tensor, cfg: Any, top_k: Kept = None, mask: str = "renormalise") -> DecoupledKD:
        """Return what a term falls into, for DeepKD's streams; arguments and result as losses.decoupled_kd has them."""
        return decoupled_kd(term.student, term.teacher, target, term.temperature, top_k, mask)

    @classmethod
    def task(cls, views: Sequence[View], cfg: Any) -> Losses:
        """Return what the student learns beside cross-entropy and terms; DeepKD leaves it in the task stream."""
        return {}

    @classmethod
    def weights(cls, cfg: Any) -> tuple[float, float]:
        """Return the weights of the cross-entropy and of the sum of the terms."""
        return 1.0, 1.0

    @classmethod
    def term_weights(cls, cfg: Any) -> dict[str, float]:
        """Return the weights that the terms and `task` have of their own, by config key; DeepKD over it has them too.

        They are the keys that end in WEIGHT, but for the cross-entropy's.
        """
        paths = [key.path for key in cls.config_keys() if key.path.endswith("WEIGHT")]
        return {path: value_at(cfg, path) for path in paths if not path.endswith(".CE_WEIGHT")}

    @classmethod
    def loss_weights(cls, cfg: Any) -> dict[str, float]:
        (ce, kd), apart = cls.weights(cfg), cls.part_weights(cfg)
        whole = {"KD": kd} if apart is None else {"TCKD": kd * apart[0], "NCKD": kd * apart[1]}
        return {"CE": ce} | whole | cls.term_weights(cfg) | warmup_epochs(cls, cfg)

    def constants(self, epoch: float, num_classes: int) -> Hashable:
        return self.warmup(epoch)

    def warmup(self, epoch: float) -> float:
        """Return the factor of the terms in this epoch."""
        return warmup_factor(epoch, value_at(self.cfg, self.warmup_key)) if self.warmup_key else 1.0

    def forward_train(self, image: Any, target: Tensor, epoch: float, **batch: Any) -> tuple[Tensor, Losses]:
        views, labels = self.compare(image), classes(target)
        ce_weight, kd_weight = self.weights(self.cfg)
        terms = prepared(self.terms(views, self.cfg), self.cfg)
        distance = total((term.weight * self.distance(term, labels, self.cfg)).mean() for term in terms)
        return views[0][0], {
            "loss_ce": ce_weight * cross_entropy(views, target),
            "loss_kd": kd_weight * self.warmup(epoch) * distance,
            **self.task(views, self.cfg),
        }


DISTILLERS: dict[str, type[nn.Module]] = {}
"""DISTILLER.TYPE -> class, in the order in which tables show them."""

Class = TypeVar("Class", bound=type[nn.Module])


def register_distiller(cls: Class) -> Class:
    """Make a class a value of DISTILLER.TYPE and, if it is a Method, of DeepKD.BASE; usable as a decorator.

    Raises ValueError if another class has the name, in capitals or not, or if `streams` are no names.
    """
    name = vars(cls).get("name", cls.__name__)
    for other, known in DISTILLERS.items():
        if other.lower() == name.lower() and known is not cls:
            raise ValueError(
                f"DISTILLER.TYPE {other!r} is {known.__module__}.{known.__qualname__} already; "
                f"{cls.__module__}.{cls.__qualname__} needs another `name`"
            )
    streams = getattr(cls, "streams", ())
    if isinstance(streams, str) or not all(stream.isidentifier() and stream.islower() for stream in streams):
        raise ValueError(f"{cls.__qualname__}.streams is {streams!r}; it must be a tuple of names in small letters")
    DISTILLERS[name] = cls
    cls.name = name  # type: ignore[attr-defined]
    extensions.remember(cls)
    return cls


def bases() -> dict[str, type[Method]]:
    """Return the methods that DeepKD can take apart, by DeepKD.BASE."""
    return {name: cls for name, cls in DISTILLERS.items() if issubclass(cls, Method)}


def warmup_factor(epoch: float, epochs: float) -> float:
    """Return DKD's linear warm-up of the distillation loss: epoch / epochs up to 1 (epochs are counted from 1)."""
    return min(epoch / epochs, 1.0) if epochs else 1.0


def value_at(cfg: Any, path: str) -> Any:
    """Return the value of a config at a dotted path."""
    return reduce(lambda node, name: node[name], path.split("."), cfg)


def warmup_epochs(cls: type[Distiller], cfg: Any) -> dict[str, float]:
    """Return the epochs over which a method's distillation losses warm up, for loss_weights; {} if that is none."""
    epochs = value_at(cfg, cls.warmup_key) if cls.warmup_key else 0
    none = 0 if cfg.SOLVER.WARMUP_UNIT == "iteration" else 1  # by the epoch, a warm-up of one is whole in it
    return {"epochs of warm-up": epochs} if epochs > none else {}
