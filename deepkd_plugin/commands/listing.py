"""What `deepkd configs`, `keys` and `networks` share: lines, and those of them that have a word."""

from collections.abc import Callable, Iterable, Sequence

from ..errors import UserError, shown
from ..terminal import Parser, guarded, nearest


def show(words: Sequence[str], name: str, description: str, word: str, lines: Callable[[], Iterable[str]]) -> int:
    """Print the lines that have the word of the command line, in capitals or not; returns the exit code.

    word: one for the example of the help.
    """
    return guarded(lambda: _show(words, name, description, word, lines))


def _show(words: Sequence[str], name: str, description: str, example: str, lines: Callable[[], Iterable[str]]) -> None:
    parser = Parser(f"deepkd {name}", description=description, examples=("", example))
    parser.add_argument("word", metavar="WORD", nargs="?", default="", help="only what has this in it")
    word = parser.parse(words).word
    all_lines = list(lines())
    found = [line for line in all_lines if word.lower() in line.lower()]
    if not found:
        meant = nearest(word, [part.strip(".,:;()'") for line in all_lines for part in line.split()])
        raise UserError(
            f"command line: no line of `deepkd {name}` has {shown(word)}; without a word it lists all{meant}"
        )
    print("\n".join(found))
