"""Which of a teacher's classes are a data set's: DISTILLER.TEACHER_CLASSES."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..data import Source
from ..errors import UserError, shown

KEY = "DISTILLER.TEACHER_CLASSES"


def choose_classes(given: str | Sequence[int], source: Source, root: str, count: int) -> list[int]:
    """Return, for each class of a data set, its place among a teacher's classes.

    given: these places, or the path of a text file with the names of the teacher's classes, one a line in its order. A
    name must be the data set's own, letter by letter. root: DATASET.ROOT. count: how many classes the teacher has.
    Raises UserError for places that are doubled, out of range, too few or too many, and for names that cannot be found.
    """
    places = _by_name(given, source, root, count) if isinstance(given, str) else list(given)
    if len(places) != source.num_classes:
        raise UserError(
            f"{KEY} has {len(places)} entries; it must have {source.num_classes}, one for each class of the data set"
        )
    for place, times in Counter(places).items():
        if not 0 <= place < count:
            raise UserError(f"{KEY} has the entry {place}; the teacher has {count} classes, 0 … {count - 1}")
        if times > 1:
            raise UserError(f"{KEY} has the entry {place} {times} times; each class of the teacher can be taken once")
    return places


def _by_name(file: str, source: Source, root: str, count: int) -> list[int]:
    names = read_names(file)
    if len(names) != count:
        raise UserError(f"{file}: {KEY} names a file of {len(names)} classes; the teacher has {count}")
    wanted = source.class_names(root) if source.class_names else None
    if wanted is None:
        raise UserError(
            f"{file}: {KEY} names a file, and the data set has no names of classes to look for in it; it must be a "
            f"list of the teacher's classes, by number, in the data set's order"
        )
    times = Counter(names)
    for name in wanted:
        if times[name] != 1:
            found = "does not name" if not times[name] else f"names {times[name]} times"
            raise UserError(f"{file}: {KEY} {found} {shown(name)}, a class of the data set; it must name it once")
    return [names.index(name) for name in wanted]


def read_names(file: str) -> list[str]:
    """Read names of classes, one a line; UserError if the file cannot be read or has an empty line."""
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {KEY} must name a text file of classes ({error})") from None
    if "" in lines:
        raise UserError(f"{file}: line {lines.index('') + 1} is empty; {KEY} names a file with a class in each line")
    return lines
