"""How numbers are written in the report: the same in Markdown and on the page."""

from __future__ import annotations

from collections.abc import Iterable

from .statistics import LEVEL, Difference, Summary

NONE = "–"
"""Stands where there is no number."""

CONFIDENCE = f"{100 * LEVEL:g}\u00a0%"

# no-break spaces: a line may end before an interval, not inside it


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in short: "0–4, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def signed(value: float) -> str:
    """A difference with its sign, two decimals."""
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text[1:] == "0.00" else text


def interval(difference: Difference) -> str:
    """A difference with its interval, where it has one."""
    text = signed(difference.value)
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{signed(difference.low)},\u00a0{signed(difference.high)}]"


def mean_std(summary: Summary) -> str:
    """Mean ± sample standard deviation; "no runs" where there are none."""
    if summary.mean is None:
        return "no runs"
    return f"{summary.mean:.2f}" + ("" if summary.std is None else f"\u00a0±\u00a0{summary.std:.2f}")


def p_value(p: float) -> str:
    """A p value with as many digits as mean something."""
    if p < 1e-4:
        return "<\u00a00.0001"
    digits = 4 if p < 0.01 else 3 if p < 0.1 else 2
    return f"{p:.{digits}f}"
