"""What planning, running and reporting a table have in common."""

import contextlib
import csv
import io
import os
import shutil
import signal
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy() -> str:
    """Say that other programs take this machine's cores, so that what is timed now takes longer; "" if they do not.

    By the load of the last minute, which leaves out what has begun in the last seconds.
    """
    load, there = os.getloadavg()[0], os.cpu_count() or 1
    if load < there / 2:
        return ""
    return f"other programs keep this machine busy (load {load:.1f} on {there} cores), and without them it is faster"


def threads(jobs: int, cores: int) -> int:
    """Count the threads of one of `jobs` runs: OMP_NUM_THREADS if it is set, else its share of the cores."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else max(1, cores // max(jobs, 1))


def duration(seconds: float, short: bool = False) -> str:
    """Put a time into the unit that suits it: "40 seconds", "12 minutes", "5.5 hours", "3.1 days"; short: "40 s", …"""
    units = (("days", "d", 86400), ("hours", "h", 3600), ("minutes", "min", 60))
    for unit, letter, length in units:
        least = 2 if unit != "minutes" else 1 if short else 1.5
        if seconds >= least * length:
            return f"{seconds / length:.{0 if unit == 'minutes' else 1}f} {letter if short else unit}"
    return f"{seconds:.0f} {'s' if short else 'seconds'}"


def entry(name: str, text: str) -> str:
    """Make a line of a plan; one that is longer than the terminal is wide, or than 110, goes on below."""
    indent = " " * 10
    return textwrap.fill(
        text,
        min(110, shutil.get_terminal_size((110, 0)).columns),
        initial_indent=f"{name:<10}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def ending(code: int) -> str:
    """Say how a process ended, by its exit code (negative: a signal's number)."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def count(number: int, what: str) -> str:
    """Write how many there are: "1 run", "2 runs"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as CSV under the first one's keys; None is an empty field."""
    text = io.StringIO()
    if rows:
        table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return text.getvalue()
