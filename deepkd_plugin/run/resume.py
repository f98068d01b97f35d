"""The checkpoint that a run goes on from: read, and refused if it is damaged, another run's or not whole."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..distillers.variants import resolved
from ..errors import UserError
from ..rules import automatic
from . import checkpoint

FUTURE = (
    *("SOLVER.LR", "SOLVER.MIN_LR", "SOLVER.LR_SCHEDULE", "SOLVER.LR_DECAY_STAGES", "SOLVER.LR_DECAY_RATE"),
    "SOLVER.EPOCHS",
)
"""Keys that compute, and that --resume may change: they say how a run goes on, not what was done."""

Changes = dict[str, list[Any]]
"""Key -> its value before and now."""

_SHAPE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epoch": ("a whole number from 1 on", lambda value: type(value) is int and value >= 0),
    "best_epoch": ("a whole number", lambda value: type(value) is int and value >= 0),
    "best_acc": ("a finite number", lambda value: isinstance(value, (int, float)) and math.isfinite(value)),
    "config": ("a mapping of config keys", lambda value: isinstance(value, Mapping)),
    "model": ("a network's tensors by name", lambda value: checkpoint.network_weights(value) is not None),
    "optimizer": ("an optimizer's state", lambda value: isinstance(value, Mapping)),
    "teacher": ("a fingerprint or None", lambda value: value is None or isinstance(value, str)),
}
"""What every checkpoint of a trainer holds."""


def read_state(folder: Path, cfg: Any, teacher: str | None) -> tuple[Path, dict[str, Any], Changes]:
    """Read what a run in a folder goes on from: `latest`, or the newest whole checkpoint beside it if that is damaged.

    Returns its file, its content, and which keys of FUTURE have changed. Raises UserError if there is none that is
    whole, if an entry is missing or odd, and if it was written under another config or with another teacher. teacher:
    the fingerprint of the teacher's weights, None without one.
    """
    path = folder / "latest"
    if not checkpoint.is_whole(path):
        path = _newest_whole(folder)
    state = checkpoint.load(path, "--resume")
    if not isinstance(state, Mapping) or "config" not in state:
        raise UserError(f"{path}: --resume needs a checkpoint that this trainer wrote")
    rest = {name: value for name, value in state.items() if name != "outline"}
    if state.get("outline", whole := checkpoint.outline(rest)) != whole:
        raise _odd(path, "it was changed since")
    for name, (allowed, valid) in _SHAPE.items():
        if name not in state or not valid(state[name]):
            raise _odd(path, f"its entry {name!r} {'is not' if name in state else 'is missing; it must be'} {allowed}")
    if not state["epoch"] and "within" not in state:
        raise _odd(path, "its entry 'epoch' is not a whole number from 1 on")
    if not state["best_epoch"] <= state["epoch"]:
        raise _odd(path, f"its best epoch is {state['best_epoch']}, and it ends with epoch {state['epoch']}")
    changes = _changes(path, config.flatten(cfg), state["config"])
    if state["epoch"] > cfg.SOLVER.EPOCHS:
        raise UserError(
            f"{path}: --resume finds {state['epoch']} epochs done; SOLVER.EPOCHS is {cfg.SOLVER.EPOCHS} and must be "
            f"more"
        )
    if state["teacher"] != teacher:
        raise UserError(f"{path}: --resume needs the run's own teacher{_others(cfg, state['teacher'], teacher)}")
    return path, dict(state), changes


def _others(cfg: Any, before: str | None, now: str | None) -> str:
    """Say whose weights are others than they were."""
    was, have = ([] if teacher is None else teacher.split("+") for teacher in (before, now))
    if len(have) > 1 and len(was) == len(have):
        names = config.teacher_name(cfg).split(" + ")
        parts = [f"{name}'s weights had the fingerprint {b}, now {n}" for name, b, n in zip(names, was, have) if b != n]
        return f"s: {'; '.join(parts)}"
    return f": its weights had the fingerprint {before}, those of DISTILLER.TEACHER_WEIGHTS have {now}"


def settled(path: Path, cfg: Any, before: Mapping[str, Any]) -> dict[str, bool]:
    """Return what a run had settled on where the config has `auto`. before: the config of its checkpoint `path`."""
    now = config.flatten(cfg)
    values = {key: before.get(key, config.BEFORE[key]) for key in config.CHOICES if key in now and automatic(now[key])}
    for key, value in values.items():
        if not isinstance(value, bool):
            raise _odd(path, f"its config has {key} {_shown(value)}")
    return values


def take_up(path: Path, load: Callable[[Any], Any], part: str, state: Any) -> None:
    """Let a part of a trainer load its state; UserError for one that it refuses, in whatever way."""
    try:
        load(state)
    except Exception as error:  # what a file holds may be anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise _odd(path, f"its entry {part!r} cannot be taken up ({reason})") from None


def check_within(path: Path, within: Any, steps: int) -> None:
    """Raise UserError if what a checkpoint says of an epoch that had not ended is not whole; steps: in an epoch."""
    kinds = {"step": int, "seconds": float, "waited": float, "windows": list, "generators": Tensor, "sums": Mapping}
    whole = isinstance(within, Mapping) and all(isinstance(within.get(name), kind) for name, kind in kinds.items())
    if not whole or not 0 < within["step"] < steps or not isinstance(within["sums"].get("count"), int):
        raise _odd(path, "its entry 'within' is not of an epoch of this run")


def check_model(path: Path, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError if a checkpoint's weights are not those of the networks that they are for."""
    for name in weights.keys() | wanted.keys():
        if name not in weights or name not in wanted:
            raise _odd(path, f"its networks {'lack' if name in wanted else 'have an unknown'} {name}")
        reason = checkpoint.unfit(weights[name], wanted[name])
        if weights[name].shape != wanted[name].shape:
            reason = f"has the shape {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}"
        if reason:
            raise _odd(path, f"its {name} {reason}")


def check_optimizer(path: Path, optimizer: torch.optim.Optimizer, before: list[dict[str, Any]]) -> None:
    """Raise UserError if an optimizer has taken up what the next step would stumble over, or compute something else by.

    before: its parameter groups as the config made them. Learning rate and momenta may have moved since then.
    """
    for now, made in zip(optimizer.param_groups, before):
        for name, value in made.items():
            if name in ("params", "lr", "initial_lr", "momentum", "momentum_shares"):
                continue
            if type(now.get(name)) is not type(value) or now[name] != value:
                raise _odd(path, f"its optimizer has {name} {_shown(now.get(name))}, the config {value!r}")
        momenta = now["momentum"]
        if momenta.keys() != made["momentum"].keys() or not all(
            isinstance(m, float) and 0 <= m < 1 for m in momenta.values()
        ):
            raise _odd(path, f"its optimizer has the momenta {_shown(momenta)}")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = dict(optimizer.state.get(parameter, {}))
            # AdamW's: a number of steps, and means of squares
            counts, squares = (_tensors(state.get(name)) for name in ("step", "exp_avg_sq"))
            if not all(count.ndim == 0 and bool(torch.isfinite(count)) and count >= 0 for count in counts):
                raise _odd(path, "its optimizer holds a number of steps that is none")
            if any(bool((square < 0).any()) for square in squares):
                raise _odd(path, "its optimizer holds means of squares below 0")
            state.pop("step", None)
            for tensor in _tensors(state):
                if tensor.shape != parameter.shape or not bool(torch.isfinite(tensor).all()):
                    raise _odd(path, "its optimizer holds a buffer of another shape, or one that is not finite")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _changes(path: Path, now: dict[str, Any], before: Mapping[str, Any]) -> Changes:
    """Return the keys of FUTURE that have changed; UserError for another one that computes."""
    # of keys that are newer than the checkpoint
    defaults = {key.path: key.default for key in config.all_keys()} | config.BEFORE
    now, known = resolved(now), resolved(defaults | dict(before))
    sections = {key.split(".")[0] for key in now}
    changes: Changes = {}
    for key in sorted(now.keys() | set(map(str, before))):
        if key not in now and (key.split(".")[0] not in sections or key.startswith("SOLVER.DECOUPLED.DELTA.")):
            continue  # an extension's that this method has no use of, or it would be there
        if key in config.REMOVED or (key in config.CHOICES and automatic(now.get(key))):
            continue
        was, value = known.get(key), now.get(key)
        same = not isinstance(was, Tensor) and config.compared(key, was) == config.compared(key, value)
        if same or not config.computes(key):
            continue
        if key not in FUTURE:
            raise UserError(f"{path}: --resume needs the run's own config: {key} was {_shown(was)}, is {value!r}")
        changes[key] = [was, value]
    return changes


def _newest_whole(folder: Path) -> Path:
    """Find the newest whole checkpoint beside a damaged `latest`; UserError without one."""
    whole: dict[int, Path] = {}
    for path in (*folder.glob("epoch_*"), folder / "best"):
        if path.is_file() and checkpoint.is_whole(path):
            state = checkpoint.load(path, "--resume")
            if isinstance(state, Mapping) and type(state.get("epoch")) is int:
                whole[state["epoch"]] = path
    # `best` must be of what is gone on from: of an epoch that is dropped, it would stand for one that never was
    if whole and folder / "best" in whole.values():
        newest = whole[max(whole)]
        print(f"{folder / 'latest'}: is damaged; going on from {newest.name}, epoch {max(whole)}")
        return newest
    raise UserError(
        f"{folder / 'latest'}: is damaged, and neither is a whole 'best' beside it; start again with --overwrite"
    )


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:100]


def _odd(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: --resume needs a checkpoint that this trainer wrote, and {what}; put a whole one in its place, or "
        f"start again with --overwrite"
    )
