"""The one exception that means "the user can mend this": printed as a single line, exit code 2."""

import re
import reprlib
from typing import Any

LONGEST = 1000
"""Characters of a message; of a longer one the middle is left out, for it says at its end what would be right."""


class UserError(Exception):
    """A mistake in what the program was given: a config, a file, a data set, a diverging recipe.

    The message is one line that says what was wrong, where it came from (file and key) and what
    would be right. The commands print it without a traceback and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):
            # a loader's worker process hands it on with its whole traceback in front
            message = message.rpartition("UserError: ")[2]
        super().__init__(_cut(_one_line(message), LONGEST))


class _Shown(reprlib.Repr):
    """Python's own way to show a part of a large value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100
        self.maxlist = self.maxtuple = 10

    def repr_int(self, number: int, level: int) -> str:
        # Python refuses to write out more than 4,300 digits
        digits = int(number.bit_length() * 0.30103) + 1
        return repr(number) if digits <= 100 else f"a number of about {digits} digits"


def shown(value: Any) -> str:
    """Show a value in a message: as repr does, but a large one in part and in a line that can be printed."""
    return _cut(_one_line(_Shown().repr(value)), 200)


def _one_line(text: str) -> str:
    text = re.sub(r"\s*[\n\r\t\v\f]\s*", " ", text.strip())
    # what no terminal prints: control characters, and the lone surrogates of names that are no UTF-8
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _cut(text: str, longest: int) -> str:
    half = longest // 2 - 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"
