"""What a config key is, and the rules that keys share about the values they take."""

import math
import unicodedata
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


def automatic(value: Any) -> bool:
    """Tell whether a key that takes AUTO leaves it to a measurement, in a config (auto) or by default (None)."""
    return value is None or value == "auto"


def one_of(*names: str) -> Rule:
    """Return the rule of a key that takes one of some names."""
    return "one of " + ", ".join(names), lambda value: value in names


def whole(low: int, high: int = 1_000_000) -> Rule:
    """Return the rule of a key that takes the whole numbers from `low` to `high`."""
    return f"a whole number from {low:,} to {high:,}", lambda value: type(value) is int and low <= value <= high


def plain(value: Any, levels: int = 3) -> bool:
    """Tell whether a config may hold a value at all: text, numbers, flags and small lists and sections of them.

    Numbers are finite and fit into 64 bits. Text has no control characters and no lone surrogates, which names of files
    cannot have or a run's config.yaml cannot keep.
    """
    if isinstance(value, str):
        return len(value) <= 4096 and not any(unicodedata.category(c) in ("Cc", "Cs") for c in value)
    if isinstance(value, dict):  # in a list, such as one of teachers
        return len(value) <= 20 and all(plain(part, levels) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return levels > 0 and len(value) <= 1000 and all(plain(part, levels - 1) for part in value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return value is None or (isinstance(value, float) and math.isfinite(value))


PLAIN = "text that can be printed, a finite number of 64 bits, True, False, or a list of at most 1,000 of them"
"""What `plain` takes, in words."""


LONGEST_NAME = 255
"""Bytes of a file's name, which file systems take."""


def _fits(path: str) -> bool:
    return all(len(part.encode()) <= LONGEST_NAME for part in path.split("/"))


ANY: Rule = ("any text", lambda value: True)
NAME: Rule = (
    "a name for a folder below LOG.PREFIX: parts of at most 255 bytes between slashes, none of them empty, '.' or '..'",
    lambda value: not {"", ".", ".."} & set(value.split("/")) and _fits(value),
)
NAME_OR_NONE: Rule = (f"{NAME[0]}; or no text", lambda value: value == "" or NAME[1](value))
FOLDER: Rule = (
    "the path of a folder, in parts of at most 255 bytes",
    lambda value: value != "" and _fits(value),
)
FILE_OR_NONE: Rule = (
    "the path of a file, in parts of at most 255 bytes; or no text",
    _fits,
)
PART_OR_NONE: Rule = (
    "the name of a folder, without slashes; or no text",
    lambda value: value == "" or (NAME[1](value) and "/" not in value and not value.startswith(".")),
)
FLAG: Rule = ("True or False", lambda value: isinstance(value, bool))
AUTO: Rule = ("auto, True or False", lambda value: isinstance(value, bool) or automatic(value))
POSITIVE: Rule = ("a number above 0", lambda value: value > 0)
ABOVE_ONE: Rule = ("a number above 1", lambda value: value > 1)
NOT_NEGATIVE: Rule = ("a number from 0 on", lambda value: value >= 0)
FRACTION: Rule = ("a number in [0, 1)", lambda value: 0 <= value < 1)
PROBABILITY: Rule = ("a number in [0, 1]", lambda value: 0 <= value <= 1)
SHARE: Rule = ("a number in (0, 1]", lambda value: 0 < value <= 1)
WHOLE: Rule = whole(1)
TEMPERATURE: Rule = ("a number from 0.01 to 100,000", lambda value: 0.01 <= value <= 1e5)
TEMPERATURES: Rule = (
    "a list of 1 to 20 numbers from 0.01 to 100,000",
    lambda value: 0 < len(value) <= 20 and all(type(t) in (int, float) and TEMPERATURE[1](t) for t in value),
)
