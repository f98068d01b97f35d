"""mdistiller as a host: where it is, where it keeps things, and what it needs on today's PyTorch.

This is the only module that knows mdistiller's inside (commit a08d46f, its last). `load` finds the registries. `mend`
replaces three of its functions, in place and wherever they were imported by name.
"""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .. import config, data, device
from ..accuracy import measure_teacher
from ..errors import UserError
from ..run import checkpoint
from ..trainer import Trainer
from . import builtin
from .host import Host
from .mdistiller_features import offer
from .networks import trained_network, weights_file

ENVIRONMENT = "MDISTILLER_ROOT"

_PLACES = {
    "distillers": ("mdistiller.distillers", "distiller_dict"),
    "trainers": ("mdistiller.engine", "trainer_dict"),
    "cifar_models": ("mdistiller.models", "cifar_model_dict"),
    "tiny_imagenet_models": ("mdistiller.models", "tiny_imagenet_model_dict"),
    "imagenet_models": ("mdistiller.models", "imagenet_model_dict"),
    "cfg": ("mdistiller.engine.cfg", "CFG"),
    "get_dataset": ("mdistiller.dataset", "get_dataset"),
    "load_checkpoint": ("mdistiller.engine.utils", "load_checkpoint"),
}
_OURS_ALONE = (
    *("LR_SCHEDULE", "WARMUP_EPOCHS", "WARMUP_UNIT", "MIN_LR", "AMP", "CHANNELS_LAST", "DETERMINISTIC", "EXECUTION"),
    *("ACCUMULATE", "SYNC_BATCHNORM", "CHECKPOINT_MINUTES", "GSNR.MEASURE", "DISTILLER.TEACHER_LOGITS"),
    *("DISTILLER.FOLD_TEACHER", "DISTILLER.MORE_TEACHERS", "DeepKD.MASK.UNIT"),
    *("WARMUP_START", "LABEL_SMOOTHING", "AUGMENT.MIXUP", "AUGMENT.CUTMIX"),
)
"""Keys that only our trainers read; those outside SOLVER are given with their section."""

_LAUNCHED = (
    *("DISTILLER.STUDENT_WEIGHTS", "DISTILLER.STUDENT_DROP_PATH", "DISTILLER.TEACHER_INPUT"),
    *("DISTILLER.TEACHER_CLASSES", "DISTILLER.MORE_TEACHERS"),
)
"""Keys that only our launcher reads."""

Replaced = tuple[dict[str, Any], str, Any]
"""A registry, a name in it, and its entry before."""


EVALUATION = "tools/eval.py"
"""mdistiller's script that tests a student file."""

_EVALUATES = ("cifar100", "imagenet", "tiny_imagenet")
"""The data sets that this script takes."""


def tests_for_us(root: Path) -> bool:
    """Tell whether mdistiller's tools/eval.py is running, and is asked for a data set that only the plugin has."""
    script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or ".").resolve()
    if script != root / EVALUATION:
        return False
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-d", "--dataset", default=_EVALUATES[0])
    asked = parser.parse_known_args()[0].dataset
    return asked in data.names() and asked not in _EVALUATES


def locate() -> Path | None:
    """Find the folder that holds the package mdistiller; None if there is none.

    In this order: the one that is already imported, the checkout whose script in tools/ is running, MDISTILLER_ROOT,
    an installed one. Raises UserError if MDISTILLER_ROOT names something else.
    """
    imported = _root_of(getattr(sys.modules.get("mdistiller"), "__path__", ()))
    if imported is not None:
        return imported
    script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or ".").resolve()
    if script.parent.name == "tools" and _is_root(script.parents[1]):
        return script.parents[1]
    named = os.path.expanduser(os.environ.get(ENVIRONMENT, ""))
    if named:
        if not _is_root(Path(named)):
            raise UserError(f"environment: {ENVIRONMENT} is {named!r}; it must name a checkout of mdistiller")
        return Path(named).resolve()
    spec = importlib.util.find_spec("mdistiller")
    return None if spec is None else _root_of(spec.submodule_search_locations or ())


def load(root: Path) -> Host:
    """Import the mdistiller in `root` and find its registries.

    Raises UserError if it cannot be imported or is a fork that keeps them elsewhere.
    """
    if not _is_root(root):
        raise UserError(f"{root}: is no checkout of mdistiller; it must hold mdistiller/engine/")
    spec = importlib.util.find_spec("mdistiller")
    if spec is None or _root_of(spec.submodule_search_locations or ()) != root:
        sys.path.insert(0, str(root))
        importlib.invalidate_caches()
    parts = {}
    for field, (module, name) in _PLACES.items():
        try:
            parts[field] = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("mdistiller"):
                raise _other_fork(root, module, name) from None
            raise UserError(
                f"{root}: mdistiller needs the package {error.name}, which is not installed; pip install {error.name}"
            ) from None
        except AttributeError:
            if field != "tiny_imagenet_models":  # older versions have no Tiny ImageNet
                raise _other_fork(root, module, name) from None
            parts[field] = {}
        except (Exception, SystemExit) as error:  # an old module on a new PyTorch can raise anything
            raise UserError(
                f"{root}: mdistiller cannot be imported ({module}: {type(error).__name__}: {error})"
            ) from None
    imported = _root_of(sys.modules["mdistiller"].__path__)
    if imported != root:
        raise UserError(f"{root}: another mdistiller is imported already, from {imported}; only one can be")
    for function in ("get_dataset", "load_checkpoint"):  # a host has no field for them, but mend needs them
        del parts[function]
    return Host("mdistiller", **parts, root=root)


def mend(host: Host) -> list[str]:
    """Let mdistiller run on today's PyTorch and under the plugin's keys; returns what was replaced.

    get_dataset reads the plugin's DATASET keys, gives two views to the methods that need them, and is where a config
    is checked. load_checkpoint never runs code and takes every teacher file. A trainer tests the teacher first.
    Without CUDA everything stays on the CPU. A second call changes nothing.
    """
    dataset, utils = sys.modules["mdistiller.dataset"], sys.modules["mdistiller.engine.utils"]
    if dataset.get_dataset.__module__ == __name__:
        return []
    _replace(utils.load_checkpoint, load_checkpoint)
    _replace(dataset.get_dataset, _settled_reader(host, dataset.get_dataset))
    _measure_teachers(host.trainers["base"])
    device.tolerate_cuda_calls()
    offer(host.distillers)
    replaced = ["get_dataset", "load_checkpoint", "the base trainer's constructor"]
    if "ShuffleV2" in host.tiny_imagenet_models:  # mdistiller's pools 4 x 4 and cannot take 64 x 64 images
        host.tiny_imagenet_models["ShuffleV2"] = builtin.tiny_imagenet_model_dict["ShuffleV2"]
        replaced.append("ShuffleV2 (Tiny ImageNet)")
    config.set_default(host.cfg, "DATASET.ROOT", str(host.root / "data"))
    config.set_default(host.cfg, "DATASET.DOWNLOAD", True)  # as mdistiller does
    return replaced


def load_checkpoint(path: str | None) -> Any:
    """Load a file as mdistiller does: a trainer's state as it is, a network's file as {"model": state dict}."""
    if path is None:
        raise UserError("command line: mdistiller has no weights of this network; -c must name a checkpoint")
    content = checkpoint.load(path, "the path")
    weights = checkpoint.network_weights(content)
    if weights is None:
        raise UserError(f"{path}: holds no network's weights; it must be a student's or a teacher's file")
    if any(name.startswith("student.") for name in weights):
        if "config" in content:
            raise UserError(f"{path}: {config.TRAINER} wrote it; --resume needs that SOLVER.TRAINER")
        return content  # the state of one of mdistiller's trainers
    return {**(content if "model" in content else {}), "model": weights}


def settle(host: Host, cfg: Any, replaced: list[Replaced]) -> None:
    """Check a config, and put what it asks of the plugin where mdistiller's launcher looks for it.

    replaced: what the call for an earlier config replaced. It is put back first; then the list is filled again.
    """
    while replaced:
        registry, name, value = replaced.pop()
        registry[name] = value

    def put(registry: dict[str, Any], name: str, value: Any) -> None:
        replaced.append((registry, name, registry[name]))
        registry[name] = value

    origin = dict.fromkeys(config.flatten(cfg), "config")  # mdistiller merged it, so nobody knows the file
    config.expand(cfg)
    host.check(cfg, origin)
    check_launcher(host, cfg, origin)
    check_trainer(cfg, origin, host.trainers[cfg.SOLVER.TRAINER])
    put(host.distillers, cfg.DISTILLER.TYPE, host.distiller(cfg))
    if cfg.DISTILLER.TYPE != "NONE":
        name, models = cfg.DISTILLER.TEACHER, host.models(cfg)
        put(models, name, _teacher(host, cfg, models[name]))
    device.tune(cfg.SOLVER.DETERMINISTIC)  # before CUDA starts, which our trainer is too late for
    device.seed_everything(cfg.SOLVER.SEED)


def check_launcher(host: Host, cfg: Any, origin: dict[str, str]) -> None:
    """Raise UserError if a config asks mdistiller's own launcher for networks that only ours can make."""
    used = ("DISTILLER.STUDENT", "DISTILLER.TEACHER")[: 1 if cfg.DISTILLER.TYPE == "NONE" else 2]
    reason = "under mdistiller's own launcher, which makes networks itself; ours makes others (train there instead)"
    source = data.source(cfg)
    if isinstance(source, data.OwnImages) and source.zoo != "cifar":
        raise config.wrong(origin, "INPUT.SIZE", cfg.INPUT.SIZE, f"32, for networks of mdistiller's zoo {reason}")
    for path in used:
        name = config.get(cfg, path)
        if name not in host.models(cfg):
            raise config.wrong(origin, path, name, f"a network of mdistiller's zoo {reason}")
    if config.feature(cfg) == "CRD":
        allowed = "another under mdistiller's own launcher, which tells DeepKD no number of images; ours does"
        raise config.wrong(origin, "DeepKD.FEATURE", "CRD", allowed)
    for key in config.all_keys():
        if key.path.startswith(_LAUNCHED) and config.get(cfg, key.path) != key.default:
            raise config.wrong(origin, key.path, config.get(cfg, key.path), f"{key.default!r} {reason}")


def check_trainer(cfg: Any, origin: Mapping[str, str], trainer: type) -> None:
    """Raise UserError if a config asks one of mdistiller's trainers for something that only ours can do."""
    if issubclass(trainer, Trainer):
        return
    method, name = cfg.DISTILLER.TYPE, cfg.SOLVER.TRAINER
    if (method == "CRD") != (name in ("crd", "crd_dot")):
        allowed = f"crd, crd_dot or {config.TRAINER}" if method == "CRD" else "another: it is for CRD alone"
        raise config.wrong(origin, "SOLVER.TRAINER", name, f"{allowed} with DISTILLER.TYPE {method}")
    if name == "dot" and method in ("NONE", "DeepKD"):
        allowed = f"base or {config.TRAINER} with DISTILLER.TYPE {method}, which has no loss_ce and loss_kd"
        raise config.wrong(origin, "SOLVER.TRAINER", name, allowed)
    if config.views(cfg) > 1:
        reason = f"{cfg.DISTILLER.TYPE} needs two views of an image, and mdistiller's trainers take one"
        raise config.wrong(origin, "SOLVER.TRAINER", cfg.SOLVER.TRAINER, f"{config.TRAINER}: {reason}")
    for key in config.all_keys():
        plain = key.default, *((None, False) if key.path in config.CHOICES else ())
        if key.path.removeprefix("SOLVER.") in _OURS_ALONE and config.get(cfg, key.path) not in plain:
            allowed = f"{key.default!r} under mdistiller's trainer {cfg.SOLVER.TRAINER}, which does not read it"
            raise config.wrong(origin, key.path, config.get(cfg, key.path), allowed)


def _teacher(host: Host, cfg: Any, entry: Any) -> Any:
    """Return the zoo's entry of a teacher with its weights loaded or named, after trying them."""
    name = cfg.DISTILLER.TEACHER
    path = weights_file(host, cfg, name, cfg.DISTILLER.TEACHER_WEIGHTS)
    key = "DISTILLER.TEACHER_WEIGHTS"
    loaded = trained_network(host, cfg, name, data.num_classes(cfg), path, key)
    if isinstance(entry, tuple):
        return (entry[0], path)
    return lambda pretrained=False: loaded if pretrained else entry(pretrained=False)


def _settled_reader(host: Host, theirs: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make the get_dataset of a host; theirs: its own, which may know data sets that the plugin does not."""
    replaced: list[Replaced] = []
    known: set[str] = set()

    def get_dataset(cfg: Any) -> Any:
        """Settle the config, which mdistiller's launcher shows here first, and return the plugin's data set."""
        loaders = None
        if cfg.DATASET.TYPE in known or not data.knows(cfg.DATASET.TYPE):
            loaders = _their_loaders(theirs, cfg)
            known.add(cfg.DATASET.TYPE)
        if cfg.is_frozen():  # tools/eval.py, which does not train, leaves its config open
            settle(host, cfg, replaced)
        return loaders or data.get_dataset(cfg)

    return get_dataset


def _their_loaders(theirs: Callable[[Any], Any], cfg: Any) -> Any:
    """Return what a checkout's own get_dataset gives, and let the plugin know what it can of that data set.

    Raises UserError for a type that it does not have either, and for keys that only the plugin's readers read.
    """
    name, origin = cfg.DATASET.TYPE, dict.fromkeys(config.flatten(cfg), "config")
    for key in config.all_keys():
        value, ours = config.get(cfg, key.path), ("DATASET.HOLDOUT", "DATASET.TRAIN_PER_CLASS", "DATASET.PIPELINE")
        if key.path in ours and value != key.default:
            allowed = f"{key.default!r} with DATASET.TYPE {name}, which mdistiller's own get_dataset reads"
            raise config.wrong(origin, key.path, value, allowed)
    if config.views(cfg) > 1:
        allowed = f"another with DATASET.TYPE {name}, of whose images mdistiller's own get_dataset gives one view"
        raise config.wrong(origin, "DISTILLER.TYPE", cfg.DISTILLER.TYPE, allowed)
    try:
        loaders = theirs(cfg)
    except NotImplementedError:
        data.source(cfg)  # which says what there is
        raise
    _, test, count, num_classes = loaders
    side = getattr(test.dataset[0][0], "shape", (32,))[-1]
    data.DATASETS[name] = data.Source(
        theirs, num_classes=num_classes, train=count, test=len(test.dataset), side=side, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    return loaders


def _measure_teachers(base_trainer: type) -> None:
    """Let mdistiller's trainers say how good the teacher is before they write anything."""
    construct = base_trainer.__init__

    def tested(self: Any, name: str, distiller: nn.Module, train_loader: Any, val_loader: Any, cfg: Any) -> None:
        measure_teacher(distiller.module, val_loader, cfg)
        construct(self, name, distiller, train_loader, val_loader, cfg)

    base_trainer.__init__ = tested


def _replace(theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Replace their function by ours in every module that has it under its name."""
    name = theirs.__name__
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is theirs:
            setattr(module, name, ours)


def _is_root(folder: Path) -> bool:
    """Say whether a folder holds mdistiller. Some forks have no mdistiller/__init__.py, so that is not asked."""
    return (folder / "mdistiller" / "engine" / "cfg.py").is_file()


def _root_of(package: Iterable[str]) -> Path | None:
    """Return the first root of mdistiller that is above one of a package's folders."""
    return next((root for folder in package if _is_root(root := Path(folder).resolve().parent)), None)


def _other_fork(root: Path, module: str, name: str) -> UserError:
    return UserError(
        f"{root}: this mdistiller has no {module}.{name}; the plugin needs a fork that keeps mdistiller's names"
    )
