"""The config tree: add keys, merge a file and KEY VALUE pairs, and know where each value came from.

mdistiller keeps its settings in a yacs tree whose keys must exist before a file is merged. `add_deepkd_config` adds
ours. `load` names the file in its errors and remembers each value's origin, so that checks.py can name it too.
"""

import ast
import contextlib
import difflib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from ..errors import UserError, shown
from ..rules import AUTO, Key, plain
from ..terminal import nearest
from . import file as config_file
from .keys import CHOICES, MIXED, PATHS, REMOVED, all_keys


def add_deepkd_config(cfg: CfgNode) -> list[str]:
    """Add the keys of all_keys to a config tree, leaving what is there; returns the paths that were added.

    One default of mdistiller's changes with the first of them: LOG.WANDB is off until a config asks for it.
    """
    added = add_keys(cfg, all_keys())
    if added:
        set_default(cfg, "LOG.WANDB", False)
    return added


def add_keys(cfg: CfgNode, added_keys: Sequence[Key]) -> list[str]:
    """Add keys with their defaults to a config tree, leaving what is there; returns the paths that were added.

    `auto` is None there.
    """
    added = []
    frozen = cfg.is_frozen()
    cfg.defrost()
    for key in added_keys:
        *parents, leaf = key.path.split(".")
        node = cfg
        for name in parents:
            node = node.setdefault(name, CfgNode())
        if leaf not in node:
            # yacs, by which mdistiller's launcher merges, lets only None give way to a word or a flag
            node[leaf] = None if key.path in CHOICES else key.default
            added.append(key.path)
    if frozen:
        cfg.freeze()
    return added


def check_tree(cfg: CfgNode, name: str) -> None:
    """Raise UserError if a host's tree has something else at one of our keys than the plugin would put there."""
    for key in all_keys():
        node: Any = cfg
        *parents, leaf = key.path.split(".")
        for parent in parents:
            node = node.get(parent, CfgNode())
            if not isinstance(node, CfgNode):
                raise UserError(
                    f"{name}: its config has the value {shown(node)} where the plugin has the section {key.path}"
                )
        value = node.get(leaf, key.default)
        numbers = {type(value), type(key.default)} <= {int, float}
        if key.path in CHOICES and AUTO[1](value):
            continue
        mixed = key.path in MIXED and key.valid(value)
        if type(value) is not type(key.default) and not numbers and not mixed:
            raise UserError(
                f"{name}: its config key {key.path} is {shown(value)}; the plugin's of that name is like "
                f"{key.default!r}"
            )


def expand(cfg: CfgNode) -> None:
    """Put the user's home where a path of a tree begins with ~, in a tree that yacs has merged."""
    for path, value in flatten(cfg).items():
        if path in PATHS and isinstance(value, str):
            set_default(cfg, path, os.path.expanduser(value))


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
    """Merge a YAML file and then KEY VALUE pairs into `cfg`; returns where each value that was set came from.

    Raises UserError for a file that cannot be read (see config/file.py), and as `merge` does.
    """
    return merge(cfg, config_file.read(file), str(file), options)


def merge(cfg: CfgNode, tree: Any, file: str, options: Sequence[str] = ()) -> dict[str, str]:
    """Merge what a file held and then KEY VALUE pairs into `cfg`; returns where each value that was set came from.

    Raises UserError if the file held no mapping, for an unknown key and for a value of another type.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{file}: must hold a YAML mapping of config keys, holds {type(tree).__name__}")
    origin: dict[str, str] = {}
    _merge(cfg, cfg, tree, "", file, origin)
    if len(options) % 2:
        raise UserError(f"command line: options come in pairs KEY VALUE, {shown(options[-1])} has no value")
    for path, text in zip(options[::2], options[1::2]):
        if not plain(text):  # it may become a part of the run's name
            raise UserError(f"command line: {path} is {shown(text)}; it must be text that can be printed")
        node = cfg
        *parents, leaf = path.split(".")
        for name in parents:
            node = node.get(name) if isinstance(node, CfgNode) else None
        if not isinstance(node, CfgNode) or leaf not in node:
            raise _unknown(cfg, path, "command line")
        _set(node, leaf, text, path, "command line")
        origin[path] = "command line"
    return origin


def get(cfg: CfgNode, path: str) -> Any:
    """Return the value at a dotted path."""
    for name in path.split("."):
        cfg = cfg[name]
    return cfg


def flatten(cfg: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted path → value for every leaf of a tree, each behind a prefix."""
    leaves: dict[str, Any] = {}
    for name, value in cfg.items():
        leaves |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def nest(settings: Mapping[str, Any]) -> CfgNode:
    """Return the tree of dotted path → value: what `flatten` was given."""
    tree = CfgNode()
    for path, value in settings.items():
        *parents, leaf = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, CfgNode())
        node[leaf] = value
    return tree


def wrong(origin: dict[str, str], path: str, value: Any, allowed: str) -> UserError:
    """Make the error for a config value: where it came from, which key, its value, what is allowed."""
    one_of, _, rest = allowed.partition("one of ")
    names = [] if one_of or not isinstance(value, str) else re.split(r";| for |, ", rest)
    meant = "" if value in names else nearest(str(value), names)
    return UserError(f"{origin.get(path, 'default')}: {path} is {shown(value)}; it must be {allowed}{meant}")


def _merge(root: CfgNode, node: CfgNode, tree: dict[str, Any], prefix: str, file: str, origin: dict[str, str]) -> None:
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
    if path in REMOVED:
        return UserError(f"{source}: {path} is no longer a config key, {REMOVED[path]}; leave it out")
    known, name = list(flatten(root)), path.lower()
    near = [key for key in known if f".{key.lower()}".endswith(f".{name}")]  # in another case, or without its section
    if not near and len(path) < 100:
        near = difflib.get_close_matches(path, known, n=1)
    return UserError(f"{source}: unknown config key {path[:200]}{f'; did you mean {near[0]}?' if near else ''}")


def _set(node: CfgNode, leaf: str, value: Any, path: str, source: str) -> None:
    """Set one leaf, with yacs's rules of type and whole numbers accepted for floats."""
    # of no single type; checks.py says which values there are
    old = None if path in (*CHOICES, *MIXED) else node[leaf]
    if isinstance(old, CfgNode):
        raise UserError(f"{source}: {path} is {shown(value)}; it is a section and must hold keys: {', '.join(old)}")
    if isinstance(value, str) and not isinstance(old, str):
        failures = contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
        with failures, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's about its own grammar
            value = ast.literal_eval(value)
    if path in PATHS and isinstance(value, str):
        value = os.path.expanduser(value)
    if isinstance(old, float) and type(value) is int and plain(value):
        value = float(value)
    if isinstance(old, (list, tuple)) and isinstance(value, (list, tuple)):
        value = type(old)(value)
    if old is not None and type(value) is not type(old):
        raise UserError(
            f"{source}: {path} is {shown(value)} ({type(value).__name__}); it must be {type(old).__name__}, "
            f"like {shown(old)}"
        )
    node[leaf] = value
