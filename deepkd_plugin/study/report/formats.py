"""How the report writes numbers, in Markdown as on the page."""

from collections.abc import Iterable, Sequence

from .statistics import LEVEL, Difference, Summary

NONE = "–"
"""In the place of a number that does not exist."""

CONFIDENCE = f"{100 * LEVEL:g}\u00a0%"

# no-break spaces: a line may end before an interval, not inside it


def ranges(numbers: Iterable[int]) -> str:
    """Write whole numbers in short: "0–4, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def signed(value: float) -> str:
    """Write a difference with its sign and two decimals."""
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text[1:] == "0.00" else text


def span(values: Sequence[float]) -> str:
    """Write the lowest and the highest of some differences; one alone is written once."""
    return " to ".join(signed(value) for value in (min(values), max(values))[: len(values)])


def interval(difference: Difference) -> str:
    """Write a difference, with its interval if it has one."""
    return " ".join((signed(difference.value), *_ends(difference)))


def paired(difference: Difference | None) -> tuple[str, ...]:
    """Write the interval of a gain seed by seed, for small letters; nothing if there is none."""
    return tuple(f"paired\u00a0{ends}" for ends in _ends(difference))


def _ends(difference: Difference | None) -> tuple[str, ...]:
    if difference is None or difference.low is None or difference.high is None:
        return ()
    return (f"[{signed(difference.low)},\u00a0{signed(difference.high)}]",)


def mean_std(summary: Summary) -> str:
    """Write mean ± sample standard deviation; "no runs" if there are none."""
    if summary.mean is None:
        return "no runs"
    return f"{summary.mean:.2f}" + ("" if summary.std is None else f"\u00a0±\u00a0{summary.std:.2f}")


def p_value(p: float) -> str:
    """Write a p value with as many digits as mean something."""
    if p < 1e-4:
        return "<\u00a00.0001"
    digits = 4 if p < 0.01 else 3 if p < 0.1 else 2
    return f"{p:.{digits}f}"
