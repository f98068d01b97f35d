"""What a run measures and where it writes it."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from torch import Tensor

from ..errors import UserError
from .checkpoint import write_text

METRICS, GSNR = "metrics.jsonl", "gsnr.jsonl"
"""A run's records: one line an epoch, one line a window of gradient samples."""


class Sums:
    """Running sums of named tensors, kept on their device so that adding never waits for it."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: Mapping[str, Tensor], count: int) -> None:
        """Add scalars that already are sums over `count` samples."""
        for name, value in values.items():
            # never the value itself: a replayed step writes the next one into the same memory
            self._totals[name] = self._totals.get(name, 0.0) + value.detach().double()
        self.count += count

    def state_dict(self) -> dict[str, Any]:
        return {"totals": dict(self._totals), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._totals = {name: total.to(device) for name, total in state["totals"].items()}
        self.count = state["count"]

    def means(self) -> dict[str, float]:
        """Divide each sum by the number of samples; this waits for the device."""
        return {name: total / self.count for name, total in self.totals().items()}

    def totals(self) -> dict[str, float]:
        """Return the sums; this waits for the device."""
        if not self._totals:
            return {}
        return dict(zip(self._totals, torch.stack(list(self._totals.values())).tolist()))


class RunLog:
    """A run's records: metrics.jsonl, TensorBoard events and mdistiller's worklog.txt; gsnr.jsonl if it is measured.

    The sources are metrics.jsonl, one line an epoch, and gsnr.jsonl, one line a window. When a run resumes from
    `epoch`, later lines are dropped from both and the worklog is written anew. With LOG.WANDB of a config the numbers
    also go to Weights & Biases, to the run that is open there or to one of the experiment's name.
    """

    def __init__(self, folder: Path, epoch: int = 0, cfg: Any = None) -> None:
        self.folder = folder
        self._wandb = weights_and_biases(folder, cfg) if cfg is not None and cfg.LOG.WANDB else None
        self.lines, self.windows = (
            [line for line in read_lines(folder, name) if line["epoch"] <= epoch] if epoch else []
            for name in (METRICS, GSNR)
        )
        self._write()
        self._events = _Events(folder / "train.events", epoch + 1)
        # counted in iterations, so with a purge step of their own
        self._window_events: _Events | None = None

    def add(self, record: dict[str, Any], windows: Sequence[dict[str, Any]] = ()) -> None:
        """Append one epoch's record, and those of its GSNR windows, and show their numbers in TensorBoard."""
        if windows and self._window_events is None:
            done = self.windows[-1]["iteration"] if self.windows else 0
            self._window_events = _Events(self.folder / "gsnr.events", done + 1)
        self.lines.append(record)
        self.windows += windows
        self._write()
        for window in windows:
            self._show(self._window_events, window, "iteration")
        self._show(self._events, record, "epoch")

    def close(self) -> None:
        self._events.close()
        if self._window_events is not None:
            self._window_events.close()

    def _show(self, events: Any, record: dict[str, Any], step: str) -> None:
        """Hand a record's numbers to TensorBoard and W&B. step: the entry that they are counted by."""
        numbers = [(name, value) for name, value in _numbers(record) if name != step]
        events.add(numbers, record[step])
        if self._wandb is not None:
            self._wandb.log(dict(numbers) | {step: record[step]})

    def _write(self) -> None:
        write_text(self.folder / METRICS, _as_lines(self.lines))
        if self.windows or (self.folder / GSNR).exists():
            write_text(self.folder / GSNR, _as_lines(self.windows))
        write_text(self.folder / "worklog.txt", "".join(map(_worklog, self.lines)))


class _Events:
    """A file of TensorBoard's events, without tensorboardX's thread, whose end on a full disk would be a hang.

    purge: the step from which on TensorBoard is to hide what files before this one say.
    """

    def __init__(self, folder: Path, purge: int) -> None:
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._write(step=purge, session_log=SessionLog(status=SessionLog.START))

    def add(self, numbers: Sequence[tuple[str, float]], step: int) -> None:
        for name, value in numbers:
            self._write(step=step, summary=scalar(name, value))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, **content: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), **content))


def _as_lines(records: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read a run's records by epoch; none if there is no metrics.jsonl."""
    return read_lines(folder, METRICS)


def count_epochs(folder: Path) -> int:
    """Count the epochs that a run's record tells of; 0 if it cannot be read."""
    try:
        return len(read_metrics(folder))
    except UserError:
        return 0


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read the records of METRICS or GSNR in a run's folder; none if there is no such file.

    Raises UserError for a file that holds something else.
    """
    path = folder / name
    if not path.exists():
        return []
    try:
        lines = [json.loads(line, parse_constant=_refuse) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: must hold a record in each line ({error})") from None
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path}: must hold a record in each line")
    return lines


def _refuse(constant: str) -> None:
    """Take no NaN or infinity, which are never written."""
    raise ValueError(f"it holds {constant}")


def check_lines(folder: Path, epoch: int) -> None:
    """Raise UserError if a run that goes on after so many epochs would lose the record of one of them."""
    for name in (METRICS, GSNR):
        try:
            lines = read_lines(folder, name)
            done = [line["epoch"] for line in lines if line["epoch"] <= epoch]
            whole = all(line["iteration"] > 0 for line in lines) if name == GSNR else done == [*range(1, epoch + 1)]
        except (UserError, KeyError, TypeError):
            whole = False
        if not whole:
            raise UserError(
                f"{folder / name}: must hold the records of the {epoch} epochs that --resume goes on from; put it "
                f"back, or start again with --overwrite"
            )


def weights_and_biases(folder: Path, cfg: Any) -> Any:
    """Return the open run of W&B, or a new one; UserError if nobody is logged in, or it cannot be opened."""
    import wandb  # an extra: config.check has seen that it is there

    if wandb.run:
        return wandb.run
    check_login(cfg)  # for callers that have not: init leaves a folder behind
    try:
        return wandb.init(project=cfg.EXPERIMENT.PROJECT, name=folder.name, tags=cfg.EXPERIMENT.TAG.split(","))
    except Exception as error:  # its own errors have no common base
        raise _unreachable(str(error)) from None


def check_login(cfg: Any) -> None:
    """Raise UserError if a config logs to W&B and nobody is logged in there; before images are read, and teachers."""
    if not cfg.LOG.WANDB or os.environ.get("WANDB_MODE", "online") != "online":
        return
    import wandb

    if not (wandb.run or wandb.api.api_key):
        raise _unreachable("nobody is logged in")


def _unreachable(reason: str) -> UserError:
    return UserError(
        f"LOG.WANDB is True and Weights & Biases cannot be reached ({' '.join(reason.split())}); it must be False, or "
        f"log in with `wandb login`, or set WANDB_MODE=offline"
    )


def _numbers(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Flatten a record's numbers into (name, value); parts of a name are joined by slashes."""
    numbers: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "epoch":
            numbers.append((prefix + name, value))
    return numbers


def _worklog(record: Mapping[str, Any]) -> str:
    """Write one epoch in the manner of mdistiller's worklog, with small numbers unrounded."""
    rule = "-" * 25 + "\n"
    rows = "".join(
        f"{name}: {value:.6g}\n" if name == "lr" or name.startswith("gsnr/") else f"{name}: {value:.2f}\n"
        for name, value in _numbers(record)
    )
    return f"{rule}epoch: {record['epoch']}\n{rows}{rule}"
