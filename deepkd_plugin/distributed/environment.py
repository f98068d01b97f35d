"""What a launcher such as torchrun says in the environment: how many processes there are, and which this one is."""

import os

from ..errors import UserError, shown


def world_size() -> int:
    """Return how many processes a launcher such as torchrun has started, by WORLD_SIZE; 1 without one."""
    return _whole_numbers(WORLD_SIZE="1")[0] or 1


def process_share(*needed: str) -> tuple[int, int, int]:
    """Return this process's number among a launcher's, how many these are, and its number on this machine.

    From RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; (0, 1, 0) without. needed: variables that must be set
    too if there are several. Raises UserError for other values, and for several processes without a number.
    """
    size = world_size()
    missing = [name for name in ("RANK", "LOCAL_RANK", *needed) if not os.environ.get(name, "").strip()]
    if size > 1 and missing:
        raise UserError(
            f"environment: WORLD_SIZE is {size} and {', '.join(missing)} is missing; start several processes by "
            f"torchrun, which sets them all, and one without WORLD_SIZE"
        )
    rank, local = _whole_numbers(RANK="0", LOCAL_RANK="0")
    if rank >= size:
        raise UserError(f"environment: RANK is {rank}; it must be below WORLD_SIZE, {size}, as torchrun sets them")
    return rank, size, local


def _whole_numbers(**usual: str) -> list[int]:
    """Read numbers from the environment; usual: their values if they are not set. UserError for what is no number."""
    numbers = []
    for name, value in usual.items():
        text = os.environ.get(name, "").strip() or value
        if not (text.isascii() and text.isdecimal()):
            raise UserError(f"environment: {name} is {shown(text)}; it must be a whole number, as torchrun sets them")
        numbers.append(int(text))
    return numbers


def one_process() -> None:
    """Raise UserError in one of several processes of a launcher such as torchrun: each would do the same work."""
    if (size := world_size()) > 1:
        raise UserError(
            f"environment: WORLD_SIZE is {size}; this is work for one process, so start it without torchrun (it is "
            f"tools/train.py and tools/train_detection.py that train one run in several)"
        )
