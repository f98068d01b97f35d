"""How a config is read and checked; the keys that the plugin adds are in keys.py.

mdistiller keeps its settings in a yacs tree whose keys must exist before a file is merged.
`add_deepkd_config` adds ours to that tree; `load` merges a file and KEY VALUE pairs with errors that name the
file, and remembers where each value came from, so that `check` can name it too.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from .distillers.deepkd import BASES, classes
from .errors import UserError
from .keys import EXTRA_STREAMS, HOST_KEYS, KEYS, STREAMS, TRAINER, Key
from .topk import count_classes

HOW = (
    *("DATASET.ROOT", "DATASET.DOWNLOAD", "DATASET.TEST.BATCH_SIZE", "DISTILLER.TEACHER_WEIGHTS"),
    *("GSNR.MEASURE", "GSNR.LAYERS"),
)
"""Keys that say where a run finds things and what it looks at, not what it computes. (What a teacher's file holds is
compared by its content; the number of workers decides which random numbers an image gets.)"""


def add_deepkd_config(cfg: CfgNode) -> list[str]:
    """Add KEYS to a config tree, leaving what is there; returns the paths that were added.

    One default of mdistiller's changes with the first of them: LOG.WANDB is off until a config asks for it.
    """
    added = add_keys(cfg, KEYS)
    if added:
        set_default(cfg, "LOG.WANDB", False)
    return added


def add_keys(cfg: CfgNode, keys: Sequence[Key]) -> list[str]:
    """Add keys with their defaults to a config tree, leaving what is there; returns the paths that were added."""
    added = []
    frozen = cfg.is_frozen()
    cfg.defrost()
    for key in keys:
        *parents, leaf = key.path.split(".")
        node = cfg
        for name in parents:
            if name not in node:
                node[name] = CfgNode()
            node = node[name]
        if leaf not in node:
            node[leaf] = key.default
            added.append(key.path)
    if frozen:
        cfg.freeze()
    return added


def check_tree(cfg: CfgNode, name: str) -> None:
    """Raise UserError where a host's tree has something else at one of KEYS than the plugin would put there."""
    for key in KEYS:
        node: Any = cfg
        *parents, leaf = key.path.split(".")
        for parent in parents:
            node = node.get(parent, CfgNode())
            if not isinstance(node, CfgNode):
                raise UserError(
                    f"{name}: its config has the value {node!r} where the plugin has the section {key.path}"
                )
        held = node.get(leaf, key.default)
        numbers = {type(held), type(key.default)} <= {int, float}
        if type(held) is not type(key.default) and not numbers:
            raise UserError(
                f"{name}: its config key {key.path} is {held!r}; the plugin's of that name is like {key.default!r}"
            )


def set_default(cfg: CfgNode, path: str, value: Any) -> None:
    """Set one value of a tree, frozen or not, that has this key; leave a tree without it as it is."""
    *parents, leaf = path.split(".")
    node = cfg
    for name in parents:
        node = node.get(name, CfgNode())
    if leaf not in node:
        return
    frozen = cfg.is_frozen()
    cfg.defrost()
    node[leaf] = value
    if frozen:
        cfg.freeze()


def load(cfg: CfgNode, file: str | Path, options: Sequence[str] = ()) -> dict[str, str]:
    """Merge a YAML file and then KEY VALUE pairs into `cfg`.

    Returns where each value that was set came from. Raises UserError for a file that is missing or no
    YAML mapping, an unknown key and a value of another type.
    """
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a config file ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file}: is not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: must hold a YAML mapping of config keys, holds {type(tree).__name__}")
    origin: dict[str, str] = {}
    _merge(cfg, cfg, tree, "", str(file), origin)
    if len(options) % 2:
        raise UserError(f"command line: options come in pairs KEY VALUE, {options[-1]!r} has no value")
    for path, text in zip(options[::2], options[1::2]):
        node = cfg
        *parents, leaf = path.split(".")
        for name in parents:
            node = node.get(name) if isinstance(node, CfgNode) else None
        if not isinstance(node, CfgNode) or leaf not in node:
            raise _unknown(cfg, path, "command line")
        _set(node, leaf, text, path, "command line")
        origin[path] = "command line"
    return origin


def check(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Raise UserError for the first value that is out of range, naming its key and where it came from."""
    for path, value in flatten(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise wrong(origin, path, value, "a finite number")
    check_keys(cfg, origin, KEYS + HOST_KEYS)
    stages = list(cfg.SOLVER.LR_DECAY_STAGES)
    if any(not isinstance(stage, int) for stage in stages) or stages != sorted(set(stages)):
        raise wrong(origin, "SOLVER.LR_DECAY_STAGES", stages, "epochs in ascending order")
    if cfg.SOLVER.MIN_LR > cfg.SOLVER.LR:
        raise wrong(origin, "SOLVER.MIN_LR", cfg.SOLVER.MIN_LR, f"at most SOLVER.LR, {cfg.SOLVER.LR}")
    if cfg.SOLVER.WARMUP_EPOCHS >= cfg.SOLVER.EPOCHS and cfg.SOLVER.LR_SCHEDULE == "cosine":
        allowed = f"below SOLVER.EPOCHS, {cfg.SOLVER.EPOCHS}, with the cosine schedule"
        raise wrong(origin, "SOLVER.WARMUP_EPOCHS", cfg.SOLVER.WARMUP_EPOCHS, allowed)
    if cfg.LOG.WANDB and importlib.util.find_spec("wandb") is None:
        raise wrong(origin, "LOG.WANDB", True, "False, for wandb is not installed (pip install wandb)")
    check_pipeline(cfg, origin)
    if cfg.EXPERIMENT.LOGIT_STAND and cfg.DISTILLER.TYPE not in ("DeepKD", *BASES):
        allowed = f"False with DISTILLER.TYPE {cfg.DISTILLER.TYPE}, which has no distillation on logits"
        raise wrong(origin, "EXPERIMENT.LOGIT_STAND", True, allowed)
    check_momenta(cfg, origin)
    for key in KEYS:
        ours = key.path.startswith("SOLVER.DECOUPLED.") and cfg.SOLVER.TRAINER != TRAINER
        if ours and get(cfg, key.path) != key.default:
            trainer = f"SOLVER.TRAINER {cfg.SOLVER.TRAINER}, which does not read it; {TRAINER} does"
            allowed = f"{key.default!r} with {trainer}"
            raise wrong(origin, key.path, get(cfg, key.path), allowed)


def check_keys(cfg: CfgNode, origin: dict[str, str], keys: Sequence[Key]) -> None:
    """Raise UserError for the first of `keys` whose value it does not take."""
    for key in keys:
        value = get(cfg, key.path)
        try:
            valid = key.valid(value)
        except (TypeError, ValueError, IndexError):  # elements of another type than the check compares
            valid = False
        if not valid:
            raise wrong(origin, key.path, value, key.allowed)


def check_momenta(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Raise UserError where SOLVER.DECOUPLED gives a stream a momentum that is none, or its allocation does not fit."""
    solver, node = cfg.SOLVER, cfg.SOLVER.DECOUPLED
    measured = node.ALLOCATION == "gsnr"
    for stream in (*STREAMS, *EXTRA_STREAMS):
        path = f"SOLVER.DECOUPLED.DELTA.{stream.upper()}"
        delta = get(cfg, path)
        # an allocation may give a stream either end of its range
        if not all(0 <= solver.MOMENTUM + d < 1 for d in ((delta, -delta) if measured else (delta,))):
            low, high = -solver.MOMENTUM, 1 - solver.MOMENTUM
            allowed = (
                f"in [{low:g}, {high:g}), so that SOLVER.MOMENTUM {solver.MOMENTUM:g} plus it lies in [0, 1)"
            )
            if measured:
                allowed += ", and minus it too with SOLVER.DECOUPLED.ALLOCATION gsnr"
            raise wrong(origin, path, delta, allowed)
    path = "SOLVER.DECOUPLED.ALLOCATION"
    if measured and node.VARIANT == "release":
        allowed = "'fixed' with SOLVER.DECOUPLED.VARIANT release, which ties two streams together"
        raise wrong(origin, path, node.ALLOCATION, allowed)
    if measured and sum(node.DELTA[stream.upper()] != 0 for stream in momenta(cfg)[0]) < 2:
        allowed = (
            "'fixed' where fewer than two of SOLVER.DECOUPLED.DELTA differ from 0: their sizes are its bounds"
        )
        raise wrong(origin, path, node.ALLOCATION, allowed)


def check_pipeline(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Raise UserError where a method needs more of an image than batches made on the device hold."""
    node, method = cfg.DATASET, cfg.DISTILLER.TYPE
    if node.PIPELINE == "workers":
        return
    if views(cfg) > 1:
        asked = f"DeepKD.BASE {cfg.DeepKD.BASE}" if method == "DeepKD" else f"DISTILLER.TYPE {method}"
        reason = "the strong view is drawn by PIL's operations"
    elif method in ("CRD", "CRDKD"):
        asked, reason = f"DISTILLER.TYPE {method}", "its contrast indices are drawn image by image"
    else:
        return
    raise wrong(origin, "DATASET.PIPELINE", node.PIPELINE, f"'workers' with {asked}: {reason}")


def check_mask(cfg: CfgNode, origin: dict[str, str], num_classes: int) -> None:
    """Raise UserError where DeepKD.MASK does not fit a data set of `num_classes` classes."""
    mask = cfg.DeepKD.MASK
    used = {"none": (), "static": ("K",), "dynamic": ("INITIAL", "OPTIMAL")}[mask.TYPE]
    sizes = {}
    for name in used:
        path = f"DeepKD.MASK.{name}"
        try:
            sizes[name] = count_classes(classes(mask[name]), num_classes)
        except ValueError as error:
            raise UserError(f"{origin.get(path, 'default')}: {path}: {error}") from None
    if mask.TYPE == "dynamic" and sizes["INITIAL"] > sizes["OPTIMAL"]:
        path = next(
            (p for p in ("DeepKD.MASK.INITIAL", "DeepKD.MASK.OPTIMAL") if p in origin), "DeepKD.MASK.INITIAL"
        )
        raise UserError(
            f"{origin.get(path, 'default')}: DeepKD.MASK.INITIAL is {mask.INITIAL} ({sizes['INITIAL']} classes) and "
            f"DeepKD.MASK.OPTIMAL {mask.OPTIMAL} ({sizes['OPTIMAL']}); the mask must not shrink"
        )


def momenta(cfg: CfgNode) -> tuple[dict[str, float], str]:
    """Each stream's momentum, and the stream that decays the weights.

    The streams are STREAMS and those of EXTRA_STREAMS that LOSS_STREAMS gives a loss.

    `paper`: MOMENTUM + DELTA of each stream (DeepKD, section 3). `release`: what the authors' code does
    when every parameter gets all three gradients: the task stream's buffer decays with the target-class
    stream's coefficient, and weight decay enters through the target-class stream alone.

    With ALLOCATION gsnr these are the momenta before the first measurement: all streams have MOMENTUM.
    """
    node = cfg.SOLVER.DECOUPLED
    assigned = {pair.split(":")[1] for pair in node.LOSS_STREAMS}
    streams = STREAMS + tuple(s for s in EXTRA_STREAMS if s in assigned)
    if node.ALLOCATION == "gsnr":
        return dict.fromkeys(streams, cfg.SOLVER.MOMENTUM), node.WEIGHT_DECAY_STREAM
    momentum = {s: cfg.SOLVER.MOMENTUM + node.DELTA[s.upper()] for s in streams}
    if node.VARIANT == "release":
        return momentum | {"tog": momentum["tcg"]}, "tcg"
    return momentum, node.WEIGHT_DECAY_STREAM


def get(cfg: CfgNode, path: str) -> Any:
    """The value at a dotted path."""
    for name in path.split("."):
        cfg = cfg[name]
    return cfg


def computes(path: str) -> bool:
    """Whether a key says what a run computes, rather than where it finds things and how it goes about it."""
    if path == "EXPERIMENT.LOGIT_STAND":  # its place in the releases of logit standardisation and DeepKD
        return True
    return path.split(".")[0] not in ("LOG", "EXPERIMENT") and path not in HOW


def views(cfg: CfgNode) -> int:
    """How many views of each training image the config's method needs: 1, or 2 (weak and strong)."""
    method = cfg.DeepKD.BASE if cfg.DISTILLER.TYPE == "DeepKD" else cfg.DISTILLER.TYPE
    return BASES[method].views if method in BASES else 1


def flatten(cfg: CfgNode) -> dict[str, Any]:
    """Dotted path → value for every leaf."""
    return dict(_leaves(cfg))


def wrong(origin: dict[str, str], path: str, value: Any, allowed: str) -> UserError:
    """The error for a config value: where it came from, which key, what it held, what is allowed."""
    return UserError(f"{origin.get(path, 'default')}: {path} is {value!r}; it must be {allowed}")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _merge(
    root: CfgNode, node: CfgNode, tree: dict[str, Any], prefix: str, file: str, origin: dict[str, str]
) -> None:
    """Merge a YAML mapping into a node of the tree, key by key."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if name not in node:
            raise _unknown(root, path, file)
        if isinstance(node[name], CfgNode) and isinstance(value, dict):
            _merge(root, node[name], value, f"{path}.", file, origin)
        else:
            _set(node, name, value, path, file)
            origin[path] = file


def _unknown(root: CfgNode, path: str, source: str) -> UserError:
    near = difflib.get_close_matches(path, flatten(root), n=1)
    return UserError(f"{source}: unknown config key {path}{f'; did you mean {near[0]}?' if near else ''}")


def _set(node: CfgNode, leaf: str, value: Any, path: str, source: str) -> None:
    """Set one leaf, with yacs's rules of type and whole numbers accepted for floats."""
    old = node[leaf]
    if isinstance(old, CfgNode):
        raise UserError(
            f"{source}: {path} is {value!r}; it is a section and must hold keys: {', '.join(old)}"
        )
    if isinstance(value, str) and not isinstance(old, str):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if isinstance(old, (list, tuple)) and isinstance(value, (list, tuple)):
        value = type(old)(value)
    if type(value) is not type(old):
        raise UserError(
            f"{source}: {path} is {value!r} ({type(value).__name__}); it must be {type(old).__name__}, "
            f"like {old!r}"
        )
    node[leaf] = value
