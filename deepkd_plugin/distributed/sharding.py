"""Which images of a batch each process passes."""

from .process_group import rank, size


def shares(count: int, chunk: int) -> list[list[int]]:
    """Divide a batch of `count` images: of each micro-batch of at most `chunk`, how many images each process has."""
    sizes = [min(chunk, count - first) for first in range(0, count, chunk)]
    return [[whole // size() + (number < whole % size()) for number in range(size())] for whole in sizes]


def own(count: int, chunk: int) -> list[int]:
    """Return the places in a batch of the images that this process passes, micro-batch by micro-batch.

    If it has none in a micro-batch it passes the first image there all the same, for nothing: the others wait for it.
    """
    places: list[int] = []
    first = 0
    for counts in shares(count, chunk):
        start, mine = first + sum(counts[: rank()]), counts[rank()]
        places += range(start, start + mine) if mine else [first]
        first += sum(counts)
    return places
