"""Other people's training steps, for step.py: mdistiller's (MDISTILLER_ROOT) and the authors' release's.

Both packages are called `mdistiller`, so each is imported from its checkout alone, under that name, and taken
out of sys.modules again; what was imported keeps working. Nothing is installed or copied, and neither's networks or
data sets are imported: a step runs their distiller KD and their trainer on the networks it is given.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepkd_plugin import device
from deepkd_plugin.errors import UserError

MDISTILLER, RELEASE = "MDISTILLER_ROOT", "DEEPKD_RELEASE_ROOT"
"""The environment variables that name a checkout."""

MISTAKEN = ("termios", "turtle")
"""Modules of which the release imports a name that it never uses; `turtle` needs a windowing system's library."""

OPTIONAL = ("scipy", "scipy.stats")
"""Modules that both import for other distillers than KD."""


class Theirs(NamedTuple):
    """What is needed of one of the packages."""

    trainers: dict[str, Any]
    """name -> class, as SOLVER.TRAINER names it."""
    kd: type[nn.Module]
    cfg: Any
    """The config tree with its defaults."""


class Taken(Exception):  # noqa: N818 (no error: the step is over)
    """Ends a trainer's iteration when it takes the time of its step."""


class _Passing:
    """A meter that does nothing."""

    def update(self, value: float, n: int = 1) -> None:
        return


class _Ending:
    """A meter that ends the iteration."""

    def update(self, value: float, n: int = 1) -> None:
        raise Taken


def find(variable: str) -> Path | None:
    """Return the checkout that an environment variable names; UserError if it names something else."""
    named = os.environ.get(variable)
    if not named:
        return None
    root = Path(named).resolve()
    if not (root / "mdistiller" / "engine" / "trainer.py").is_file():
        package = "the authors' release" if variable == RELEASE else "mdistiller"
        raise UserError(f"environment: {variable} is {named!r}; it must name a checkout of {package}")
    return root


@functools.cache
def load(root: Path) -> Theirs:
    """Import the package under `root` alone; UserError if it cannot be imported."""
    # standard output is for the table, and theirs print while they are imported
    with _alone(root), contextlib.redirect_stdout(sys.stderr):
        try:
            trainers = importlib.import_module("mdistiller.engine").trainer_dict
            kd = importlib.import_module("mdistiller.distillers").distiller_dict["KD"]
            cfg = importlib.import_module("mdistiller.engine.cfg").CFG
        except Exception as error:  # whatever an old module does on a new PyTorch
            raise UserError(f"{root}: its mdistiller cannot be imported ({type(error).__name__}: {error})") from None
    return Theirs(trainers, kd, cfg)


def training_step(
    root: Path,
    trainer: str,
    student: nn.Module,
    teacher: nn.Module,
    batch: dict[str, Tensor],
    solver: dict[str, Any],
    amp: bool = False,
) -> Callable[[], None]:
    """Make the step of the trainer `trainer` under `root` with its own KD, on networks and a batch of ours.

    A call runs the trainer's own `train_iter` up to its clock for "training_time": unpacking the batch, the
    forward passes, losses, backward passes and the optimizer. What follows there, accuracies, meters and
    a message, some of it waiting for the device, is left out. batch: `image` (B, 3, H, W), `target` (B,).
    solver: keys of SOLVER that differ from its defaults. amp: bfloat16 autocast around the forward passes
    and losses, which neither package has.
    """
    theirs = load(root)
    device.tolerate_cuda_calls()
    cfg = theirs.cfg.clone()
    cfg.SOLVER.merge_from_list([part for pair in {"TRAINER": trainer, **solver}.items() for part in pair])
    distiller = theirs.kd(student, teacher, cfg)
    if amp:
        distiller.forward = device.autocast(batch["image"].device, True)(distiller.forward)
    # their trainers expect it; one device, as everything beside them
    distiller = nn.DataParallel(distiller, device_ids=[0] if batch["image"].is_cuda else None).train()
    # the constructor beyond this makes folders and opens logs
    runner = object.__new__(theirs.trainers[trainer])
    runner.cfg, runner.distiller = cfg, distiller
    with contextlib.redirect_stdout(sys.stderr):
        runner.optimizer = runner.init_optimizer(cfg)
    data = (batch["image"], batch["target"], torch.arange(len(batch["target"])).to(batch["target"].device))
    meters = {"data_time": _Passing(), "training_time": _Ending()}

    def step() -> None:
        try:
            runner.train_iter(data, 1, meters)
        except Taken:
            return
        raise UserError(f"{root}: trainer {trainer} has no clock 'training_time' after its step")

    return step


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Let `mdistiller` stand for the package under `root` in sys.modules, which is as it was afterwards."""
    stand_ins = [*MISTAKEN, *(name for name in OPTIONAL if not _is_here(name))]
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_theirs(name) or name in stand_ins}
    package = ModuleType("mdistiller")  # the release has no __init__.py, an installed one would win over it
    package.__path__ = [str(root / "mdistiller")]
    sys.modules["mdistiller"] = package
    sys.modules.update({name: _StandIn(name) for name in stand_ins})
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _is_theirs(name) or name in stand_ins]:
            del sys.modules[name]
        sys.modules.update(before)


class _StandIn(ModuleType):
    """A module that has every name, so that `from it import name` works."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _is_theirs(module: str) -> bool:
    return module.split(".")[0] == "mdistiller"


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
