"""What a config key is, and the rules that keys share about the values they take."""

from collections.abc import Callable
from typing import Any, NamedTuple

Rule = tuple[str, Callable[[Any], bool]]
"""What a key takes, in words, and whether a value is that. A check may raise TypeError, ValueError or IndexError."""


class Key(NamedTuple):
    """One config key: its path, default, meaning (with unit and source), and which values it takes."""

    path: str
    default: Any
    meaning: str
    allowed: str
    valid: Callable[[Any], bool]


def one_of(*names: str) -> Rule:
    """Return the rule of a key that takes one of some names."""
    return "one of " + ", ".join(names), lambda value: value in names


ANY: Rule = ("any text", lambda value: True)
FLAG: Rule = ("True or False", lambda value: isinstance(value, bool))
POSITIVE: Rule = ("a number above 0", lambda value: value > 0)
ABOVE_ONE: Rule = ("a number above 1", lambda value: value > 1)
NOT_NEGATIVE: Rule = ("a number from 0 on", lambda value: value >= 0)
FRACTION: Rule = ("a number in [0, 1)", lambda value: 0 <= value < 1)
PROBABILITY: Rule = ("a number in [0, 1]", lambda value: 0 <= value <= 1)
SHARE: Rule = ("a number in (0, 1]", lambda value: 0 < value <= 1)
WHOLE: Rule = ("a whole number above 0", lambda value: value > 0)
TEMPERATURES: Rule = (
    "a list of numbers above 0",
    lambda value: len(value) > 0 and all(type(t) in (int, float) and t > 0 for t in value),
)
