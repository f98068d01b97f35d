"""Means over seeds and differences between them: Welch's test, t intervals, Holm's correction.

The test is Welch's for independent samples, even if two cells share their seeds, so there is one verdict on a gain. A
seed fixes the student's first weights, the order of the images and each image's augmentation, whatever the method. How
far two runs of one seed then go together is a matter of the method and the length of training. The paired interval
beside Welch's holds in either case. It has about half the degrees of freedom, and is the narrower one if they do.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Confidence of the intervals; a verdict is at 1 - LEVEL."""

MIN_RUNS = 3
"""Runs that a cell needs before a verdict, a p value or an interval is given."""

HIGHER, LOWER, EQUAL = "higher", "lower", "not distinguishable"
"""The verdicts on a difference."""

NO_SPREAD = 1e-9
"""Values (percent) that differ by no more than this are one value: rounding, not seeds."""


@dataclass(frozen=True)
class Summary:
    """Runs of a cell: their number, mean (None without any) and sample standard deviation (None below two)."""

    n: int
    mean: float | None
    std: float | None


@dataclass(frozen=True)
class Difference:
    """Our mean minus another value, in the values' unit.

    low, high: its confidence interval. p: of Welch's test, two-sided. verdict: HIGHER, LOWER or EQUAL. Each is None
    if it cannot be had; `reason` then says why.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    verdict: str | None = None
    reason: str = ""


def summarise(values: Sequence[float]) -> Summary:
    """Take the mean and the sample standard deviation (n - 1) of a cell's runs."""
    n = len(values)
    if n == 0:
        return Summary(0, None, None)
    return Summary(n, float(np.mean(values)), float(np.std(values, ddof=1)) if n > 1 else None)


def compare(ours: Sequence[float], base: Sequence[float], names: tuple[str, str]) -> Difference | None:
    """Compare two cells' means by Welch's t-test and its interval; None if a cell has no runs.

    names: what a reason calls the two cells.
    """
    if not ours or not base:
        return None
    value = float(np.mean(ours) - np.mean(base))
    short = [f"{name} has {len(runs)}" for name, runs in zip(names, (ours, base)) if len(runs) < MIN_RUNS]
    if short:
        return Difference(value, reason=f"a verdict needs {MIN_RUNS} runs, {' and '.join(short)}")
    if np.ptp(ours) <= NO_SPREAD and np.ptp(base) <= NO_SPREAD:
        return Difference(value, reason="no seed differs from another in either cell, so there is no spread to test by")
    with warnings.catch_warnings():
        # scipy's, of a cell whose runs are all alike: the other one's spread is enough
        warnings.simplefilter("ignore", RuntimeWarning)
        test = stats.ttest_ind(ours, base, equal_var=False)
    interval = test.confidence_interval(LEVEL)
    p = float(test.pvalue)
    verdict = EQUAL if p >= 1 - LEVEL else HIGHER if value > 0 else LOWER
    return Difference(value, float(interval.low), float(interval.high), p, verdict)


def compare_published(ours: Sequence[float], published: float) -> Difference | None:
    """Compare a cell's mean with a published number; None if the cell has no runs.

    The interval is the t interval of our mean alone. The spread of a single published number is unknown, so there is
    no test and no verdict.
    """
    return _mean(np.subtract(ours, published)) if ours else None


def compare_paired(ours: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Compare two cells seed by seed, {seed: value}; None if they have not the same seeds, or none.

    The interval is the t interval of the differences. There is no second verdict: that is `compare`'s.
    """
    if not ours or ours.keys() != base.keys():
        return None
    return _mean(np.array([value - base[seed] for seed, value in ours.items()]))


def _mean(differences: np.ndarray) -> Difference:
    """Take the mean of differences, one for each seed, with its t interval."""
    value, n = float(np.mean(differences)), len(differences)
    if n < MIN_RUNS:
        there = "is 1" if n == 1 else f"are {n}"
        return Difference(value, reason=f"an interval needs {MIN_RUNS} runs, there {there}")
    if np.ptp(differences) <= NO_SPREAD:
        return Difference(value, reason="no seed differs from another, so there is no spread to make an interval of")
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(LEVEL)
    return Difference(value, float(interval.low), float(interval.high))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Adjust a table's p values by Holm's steps; a comparison without one (None) does not count."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted
