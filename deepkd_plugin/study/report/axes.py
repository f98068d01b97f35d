"""Where ticks and labels of the figures lie, and what ticks are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in their order, at least `gap` apart, within [low, high] where they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    below = low - gap
    for i in order:
        below = placed[i] = max(wanted[i], below + gap)
    above = high + gap
    for i in reversed(order):
        above = placed[i] = min(placed[i], above - gap)
    return placed


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round values within [low, high], at steps of 1, 2 or 5 times a power of ten, `most` of them at most."""
    span = high - low
    if span <= 0:
        return [low]
    exponent = math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10, 20, 50):
        step = factor * 10.0**exponent
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [round(i * step, 10) + 0.0 for i in range(first, last + 1)]


def tick(value: float, among: Sequence[float]) -> str:
    """A tick's label, with the digits that the step between ticks needs."""
    step = min((b - a for a, b in pairwise(among)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits}f}".replace("-", "−")


def signed_tick(value: float, among: Sequence[float]) -> str:
    """A tick of differences."""
    text = tick(value, among)
    return text if value <= 0 else f"+{text}"
