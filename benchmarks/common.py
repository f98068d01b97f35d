"""What the benchmarks share: timing in turn, peak memory of a process, and the record of the machine."""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from deepkd_plugin import device
from deepkd_plugin.record import commit, processor


def medians_in_turn(steps: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of each step, timed A B C A B C … so that a drifting machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mebibytes(make: Callable[[], Callable[[], Any]], steps: int = 3) -> float:
    """The most memory that a few steps hold beyond what stood before the first, in a process of its own.

    make builds everything and returns the step; it must be picklable. On the CPU it is the growth of the
    resident set, on CUDA the allocator's peak.
    """
    # a forked child would hang in the thread pool that its parent has used
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (make, steps, torch.get_num_threads()))


def _peak(make: Callable[[], Callable[[], Any]], steps: int, threads: int) -> float:
    torch.set_num_threads(threads)
    step = make()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
    for _ in range(steps):
        step()
    after = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")
    return (after - before) / 2**20


def _status(name: str) -> int:
    """A size from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def machine() -> dict[str, Any]:
    """Hardware and versions, for the record."""
    return {
        "processor": processor(),
        "device": device.describe(device.pick()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def report(title: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print rows as a Markdown table under the machine's description and, with `path`, write both forms."""
    about = machine()
    columns = list(rows[0])
    lines = [f"{title}. " + ", ".join(f"{key} {value}" for key, value in about.items()) + ".", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    print(text)
    if path:
        path.write_text(text)
        held = {"title": title, "machine": about, "rows": rows}
        path.with_suffix(".json").write_text(json.dumps(held, indent=1) + "\n")


def _cell(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 10
        else (f"{value:.1f}" if isinstance(value, float) else str(value))
    )
