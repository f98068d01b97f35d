"""What the benchmarks share: timing in turn, peak memory of a process, and the record of the machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from deepkd_plugin import device
from deepkd_plugin.run.record import commit, processor

LINE = 120
"""Characters of a line of text that report() writes; a table's lines are as long as they are."""

Rows = list[dict[str, Any]]
"""A table: each row maps the columns to its values, all with the same columns."""


def medians_in_turn(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 3,
    repeat: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median milliseconds of each step, timed A B C A B C … so that a drifting machine hits all alike.

    repeat: how many steps are taken between two readings of the clock, each of which waits for the device;
    training does not wait after each step. clock: in seconds; time.process_time counts what this process computes, of
    all cores together, whatever else the machine does.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + rounds):
        for name, step in steps.items():
            start = clock()
            for _ in range(repeat):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(1e3 * (clock() - start) / repeat)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mebibytes(make: Callable[[], Callable[[], Any]], steps: int = 2) -> float:
    """Return the most memory that a few steps hold beyond what was there before the first.

    make builds everything and returns the step; it must be picklable. On CUDA it is the allocator's peak after
    one step, in which cuDNN may still try its algorithms. On the CPU it is the growth of the resident set, in a
    process of its own.
    """
    if torch.cuda.is_available():
        return _cuda_peak(make, steps)
    # a child of this process would hang in the thread pool that it has used, and forking a clean server is
    # faster than starting Python anew
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(["torch", "torchvision", "deepkd_plugin.hosts.builtin"])
    with context.Pool(1) as pool:
        return pool.apply(_resident_peak, (make, steps, torch.get_num_threads()))


def _cuda_peak(make: Callable[[], Callable[[], Any]], steps: int) -> float:
    step = make()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _resident_peak(make: Callable[[], Callable[[], Any]], steps: int, threads: int) -> float:
    torch.set_num_threads(threads)
    step = make()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    for _ in range(steps):
        step()
    return (_status("VmHWM") - before) / 2**20


def _status(name: str) -> int:
    """Read a size from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name + ":")).split()[1])


def machine() -> dict[str, Any]:
    """Describe hardware and versions, for the record."""
    torch_device = device.pick()
    about = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": device.describe(torch_device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    if torch_device.type == "cuda":
        about |= {"threads": torch.get_num_threads()} | device.settings(torch_device)
    return about | {"commit": commit()}


def memory_format(channels_last: bool) -> str:
    """Name a memory format."""
    return "channels last" if channels_last else "contiguous"


def conditions(channels_last: bool, amp: bool) -> dict[str, str]:
    """Describe what a run's images and networks are like, for the record."""
    return {
        "memory format": memory_format(channels_last),
        "precision": "bfloat16 autocast" if amp else "float32",
    }


def report(
    title: str,
    rows: Rows,
    path: Path | None,
    settings: Mapping[str, str] | None = None,
    parts: Rows | None = None,
) -> None:
    """Print rows as a Markdown table under the machine's description and, with `path`, write both forms.

    settings: how the run was set up, beside the title. parts: a second table.
    """
    record = {"title": title, "machine": machine()} | ({"settings": dict(settings)} if settings else {})
    record |= {"rows": rows} | ({"parts": parts} if parts else {})
    text = markdown(record)
    print(text)
    if path:
        path.write_text(text)
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def markdown(record: Mapping[str, Any]) -> str:
    """Write what report() leaves as JSON as Markdown."""
    about = record.get("settings", {}) | record["machine"]
    intro = f"{record['title']}. " + ", ".join(f"{key} {value}" for key, value in about.items()) + "."
    lines = textwrap.wrap(intro, LINE, break_long_words=False, break_on_hyphens=False)
    for table in (record[name] for name in ("rows", "parts") if name in record):
        columns = list(table[0])
        lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in table]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
