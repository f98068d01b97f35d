"""Which non-target classes a student learns from: the top-K and the top-p mask, and their schedules over training."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor


def non_target_index(target: Tensor, num_classes: int) -> Tensor:
    """Return the class indices other than the target's, in ascending order.

    target: (B,) integers in [0, C). Returns (B, C − 1). Made by arithmetic rather than by a boolean
    selection, whose data-dependent shape would stop a GPU for every batch.
    """
    others = torch.arange(num_classes - 1, device=target.device)
    return others + (others >= target.unsqueeze(1))


def top_k_index(teacher_logits: Tensor, target: Tensor, k: int) -> Tensor:
    """Return the class indices of the k non-target classes with the largest teacher logits.

    teacher_logits: (B, C); target: (B,); 1 ≤ k ≤ C − 1. Returns (B, k), largest first. The target is
    never among them (the authors' release counts it as one of the k).
    """
    num_classes = teacher_logits.shape[1]
    k = check_k(k, num_classes)
    rest = non_target_index(target, num_classes)
    best = teacher_logits.gather(1, rest).topk(k, dim=1).indices
    return rest.gather(1, best)


def top_k_mask(teacher_logits: Tensor, target: Tensor, k: int) -> Tensor:
    """Return the static mask of top_k_index as booleans (B, C): True for the k kept classes."""
    index = top_k_index(teacher_logits, target, k)
    # out of place: vmap over the labels writes into no tensor that it does not map
    return torch.zeros_like(teacher_logits, dtype=torch.bool).scatter(1, index, True)


class TopP(NamedTuple):
    """As many non-target classes of each sample as hold a share of the teacher's non-target mass: its top-p set."""

    share: float
    """In (0, 1]; 1 is all of them."""


Kept = int | TopP | None
"""What a mask keeps of a sample's non-target classes: so many, so much, or all."""


def top_p(teacher_log_probs: Tensor, share: float) -> Tensor:
    """Return the smallest set of largest classes that holds a share of each sample's mass (the nucleus of sampling).

    teacher_log_probs: (B, N), logarithms of probabilities that add up to 1, of the non-target classes alone if it is
    they that are to be kept. share: in (0, 1]. Returns booleans (B, N): at least one True in a row, all for a share of
    1. Of equal classes the first count first. Raises ValueError for another share.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"a share of the mass must be in (0, 1], got {share!r}")
    if share == 1.0:  # whatever the sum of rounded probabilities
        return torch.ones_like(teacher_log_probs, dtype=torch.bool)
    mass, order = teacher_log_probs.exp().sort(dim=1, descending=True, stable=True)
    before = mass.cumsum(1) - mass
    # the largest is in whatever 0 became by rounding; out of place, as vmap needs it
    needed = torch.cat([torch.ones_like(before[:, :1], dtype=torch.bool), before[:, 1:] < share], 1)
    return torch.zeros_like(needed).scatter(1, order, needed)


def check_k(k: Any, num_classes: int) -> int:
    """Return k as an int; ValueError unless it is an integer, numpy's included, with 1 ≤ k ≤ num_classes − 1."""
    if not _whole(k) or not 1 <= k <= num_classes - 1:
        raise ValueError(
            f"K must be an integer from 1 to {num_classes - 1} (the non-target classes of {num_classes}), got {k!r}"
        )
    return int(k)


def count_classes(value: float, num_classes: int) -> int:
    """Count non-target classes, given as a count (an integer) or as a fraction of all classes (a float).

    Fractions are in (0, 1] and are rounded to the nearest count within 1 … C − 1. Counts outside
    1 … C − 1 and fractions outside (0, 1] raise ValueError.
    """
    if isinstance(value, bool) or _whole(value):
        return check_k(value, num_classes)
    if not isinstance(value, Real) or not 0.0 < value <= 1.0:
        raise ValueError(f"a fraction of the classes must be in (0, 1], got {value!r}; a count is written as an int")
    return min(max(round(float(value) * num_classes), 1), num_classes - 1)


class TopKSchedule:
    """The dynamic top-K mask (DTM): how many non-target classes count at a point of training.

    Three phases over progress u in [0, 1] with ends φ1 < φ2 (paper section on the dynamic top-K mask):
    easy, K grows linearly from `initial` to `optimal`; transition, K stays at `optimal`; hard, K grows
    linearly from `optimal` to C − 1, which is plain NCKD.

    num_classes: C ≥ 2. initial, optimal: a fraction of the classes (float) or a count (int), with
    initial ≤ optimal. phases: (φ1, φ2), 0 ≤ φ1 < φ2 ≤ 1; φ1 = 0 leaves out the easy phase and φ2 = 1 the
    hard one. The paper's values for `optimal` and `phases` are not public; the defaults are ours.
    """

    def __init__(
        self, num_classes: int, initial: float = 0.05, optimal: float = 0.5, phases: Sequence[float] = (1 / 3, 2 / 3)
    ) -> None:
        if not _whole(num_classes) or num_classes < 2:
            raise ValueError(f"num_classes must be an integer from 2 on, got {num_classes!r}")
        if len(phases) != 2 or not 0.0 <= phases[0] < phases[1] <= 1.0:
            raise ValueError(f"phases must be two ends in order, 0 <= phi1 < phi2 <= 1, got {tuple(phases)!r}")
        self.num_classes = int(num_classes)
        self.initial = count_classes(initial, num_classes)
        self.optimal = count_classes(optimal, num_classes)
        if self.initial > self.optimal:
            raise ValueError(
                f"the mask must not shrink: initial K {self.initial} (from {initial!r}) exceeds "
                f"optimal K {self.optimal} (from {optimal!r})"
            )
        self.phases = (float(phases[0]), float(phases[1]))

    def __call__(self, progress: float) -> int:
        """Return K at `progress`, the share of training that is done, in [0, 1]."""
        if not 0.0 <= progress <= 1.0:
            raise ValueError(
                f"progress must be in [0, 1], got {progress!r}: it is the share of training that is done, such as "
                f"epoch / (epochs - 1)"
            )
        return round(_by_phases(progress, self.phases, self.initial, self.optimal, self.num_classes - 1))

    def __repr__(self) -> str:
        return (
            f"TopKSchedule(num_classes={self.num_classes}, initial={self.initial}, "
            f"optimal={self.optimal}, phases={self.phases})"
        )


def _by_phases(progress: float, phases: Sequence[float], start: float, middle: float, end: float) -> float:
    """Go from `start` to `middle` in the first phase, stay there in the second, and go to `end` in the third."""
    first, second = phases
    if progress < first:
        return start + (middle - start) * progress / first
    if progress <= second:
        return middle
    share = (progress - second) / (1.0 - second)
    return middle + (end - middle) * share


GROWING = ("dynamic", "top_p")
"""The values of DeepKD.MASK.TYPE whose mask grows over the training."""


def mask_size(mask: Any, num_classes: int, progress: float) -> Kept:
    """Return what a config node DeepKD.MASK keeps at `progress` in [0, 1]; ValueError if the node does not fit C."""
    if mask.TYPE == "none":
        return None
    if mask.TYPE == "static":
        return count_classes(classes(mask.K), num_classes)
    if mask.TYPE == "top_p":
        return TopP(_by_phases(progress, mask.PHASES, mask.INITIAL, mask.OPTIMAL, 1.0))
    return TopKSchedule(num_classes, classes(mask.INITIAL), classes(mask.OPTIMAL), mask.PHASES)(progress)


def recorded(kept: Kept) -> dict[str, float]:
    """Return what a mask keeps as a run's log has it: `top_k` or `top_p`; {} without a mask."""
    if kept is None:
        return {}
    return {"top_p": kept.share} if isinstance(kept, TopP) else {"top_k": kept}


def shown(entry: Mapping[str, Any]) -> str:
    """Say what a mask keeps in a line of a run's log, for people; "" without a mask."""
    names = {"top_k": "K", "top_p": "p"}
    return "".join(f" {names[key]} {value:.4g}" for key, value in entry.items() if key in names)


def classes(value: float) -> float:
    """Read a YAML number of classes: from 1 on a count, below 1 a fraction of the classes."""
    return int(value) if value >= 1 and value == int(value) else float(value)


def _whole(value: Any) -> bool:
    """Tell whether a value is an integer, of Python or numpy. A boolean is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
