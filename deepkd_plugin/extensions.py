"""Users' own methods, data sets and networks: which modules bring them, and the hashes of their files.

The environment variable DEEPKD_EXTENSIONS names modules to import, separated by commas. A module registers what it
brings when it is imported (distillers.register_distiller, data.register_dataset, hosts.networks.register_network).
A config that names a network package.module:constructor asks for that module too. Every process of a table inherits
the variable, so each of its runs knows the same methods.
"""

import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from .errors import UserError

VARIABLE = "DEEPKD_EXTENSIONS"

_PACKAGE = Path(__file__).parent
_contents: dict[str, str] = {}
"""Module -> the hash of its file, as it was when it was imported or registered something."""


def load() -> None:
    """Import the modules that DEEPKD_EXTENSIONS names; UserError for one that cannot be imported."""
    for name in _named():
        bring(name, f"environment: {VARIABLE} names {name!r}")


def _named() -> list[str]:
    return [name for part in os.environ.get(VARIABLE, "").split(",") if (name := part.strip())]


def asked_by(name: str) -> str | None:
    """Return the module that a name package.module:function asks for; None for one of timm, torchvision or a zoo."""
    module = name.partition(":")[0] if re.fullmatch(r"[A-Za-z_][\w.]*:.+", name) else None
    return None if module in ("timm", "torchvision") else module


def is_named(module: str) -> bool:
    """Tell whether DEEPKD_EXTENSIONS names a module."""
    return module in _named()


def bring(name: str, asked: str) -> ModuleType:
    """Import a user's module; UserError, which begins with `asked`, if it cannot be imported.

    What it imports from its own folder, or from below it, is part of a run's code hash too. The processes that this one
    starts import it as well, so that they have the same hash.
    """
    before = set(sys.modules)
    try:
        module = importlib.import_module(name)
        folder = Path(module.__file__ or "").resolve().parent
    except UserError:
        raise
    except Exception as error:  # a user's module may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        missing = "; is its folder in PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"{asked}, which cannot be imported ({reason}{missing})") from None
    for other in {name, *sys.modules} - (before - {name}):
        file = Path(getattr(sys.modules[other], "__file__", None) or "/").resolve()
        if folder in file.parents and "site-packages" not in file.relative_to(folder).parts:
            _contents[other] = hashlib.sha256(file.read_bytes()).hexdigest()
    if name not in _named():
        os.environ[VARIABLE] = ",".join([*_named(), name])
    return module


def remember(registered: Any) -> None:
    """Note the files of what was registered and of the module that registers it, unless they are this package's own.

    What is computed depends on them, so they are part of a run's code hash (run.record.code_hash).
    """
    while isinstance(registered, functools.partial):
        registered = registered.func
    kind = registered if inspect.isclass(registered) or inspect.isroutine(registered) else type(registered)
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    by = frame.f_globals if frame else {}
    for name in {kind.__module__, by.get("__name__", "__main__")}:
        file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        if _PACKAGE in file.resolve().parents:
            continue
        # none for what is typed into a shell
        content = file.read_bytes() if file.is_file() else kind.__qualname__.encode()
        _contents[name] = hashlib.sha256(content).hexdigest()


def contents() -> dict[str, str]:
    """Return the hash of each registered module's file, by the module's name, in the order of the names."""
    return dict(sorted(_contents.items()))
