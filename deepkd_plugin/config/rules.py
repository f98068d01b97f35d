"""What a config key is, and the rules for values that keys share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Key(NamedTuple):
    """One config key: its path, default, meaning (with unit and source), and which values it takes."""

    path: str
    default: Any
    meaning: str
    allowed: str
    valid: Callable[[Any], bool]


def one_of(*names: str) -> tuple[str, Callable[[Any], bool]]:
    """The rule of a key that takes one of some names."""
    return "one of " + ", ".join(names), lambda value: value in names


ANY = ("any text", lambda value: True)

FLAG = ("True or False", lambda value: isinstance(value, bool))

POSITIVE = ("a number above 0", lambda value: value > 0)

ABOVE_ONE = ("a number above 1", lambda value: value > 1)

NOT_NEGATIVE = ("a number from 0 on", lambda value: value >= 0)

FRACTION = ("a number in [0, 1)", lambda value: 0 <= value < 1)

PROBABILITY = ("a number in [0, 1]", lambda value: 0 <= value <= 1)

TEMPERATURES = (
    "a list of numbers above 0",
    lambda value: len(value) > 0 and all(type(t) in (int, float) and t > 0 for t in value),
)
