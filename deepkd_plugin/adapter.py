"""mdistiller as a host: where it is, where it keeps things, and what it needs on today's PyTorch.

The only module that knows the inside of mdistiller (read off commit a08d46f, its last). `load` finds the
registries; `mend` replaces three of its functions, in place and wherever they were imported by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import builtin, checkpoint, config, data, device
from .errors import UserError
from .host import Host
from .networks import trained_network, weights_file
from .trainer import Trainer, measure_teacher

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
_OURS_ALONE = ("LR_SCHEDULE", "WARMUP_EPOCHS", "MIN_LR", "AMP", "CHANNELS_LAST")
"""Keys of SOLVER that only our trainers read."""


def locate() -> Path | None:
    """The folder that holds the package mdistiller; None where there is none.

    In this order: the one that is already imported, the checkout whose script under tools/ is running,
    MDISTILLER_ROOT, an installed one. Raises UserError where MDISTILLER_ROOT names something else.
    """
    held = getattr(sys.modules.get("mdistiller"), "__file__", None)
    if held:
        return Path(held).resolve().parents[1]
    script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or ".").resolve()
    if script.parent.name == "tools" and _is_root(script.parents[1]):
        return script.parents[1]
    named = os.environ.get(ENVIRONMENT)
    if named:
        if not _is_root(Path(named)):
            raise UserError(f"environment: {ENVIRONMENT} is {named!r}; it must name a checkout of mdistiller")
        return Path(named).resolve()
    spec = importlib.util.find_spec("mdistiller")
    # a folder of that name without the package, such as the checkout seen from outside, has no origin
    return Path(spec.origin).resolve().parents[1] if spec is not None and spec.origin else None


def load(root: Path) -> Host:
    """Import the mdistiller under `root` and find its registries.

    Raises UserError where it cannot be imported, or is a fork that keeps them elsewhere.
    """
    if "mdistiller" not in sys.modules and str(root) not in sys.path:
        sys.path.insert(0, str(root))
    found = {}
    for field, (module, name) in _PLACES.items():
        try:
            found[field] = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("mdistiller"):
                raise _other_fork(root, module, name) from None
            raise UserError(
                f"{root}: mdistiller needs the package {error.name}, which is not installed; pip install {error.name}"
            ) from None
        except AttributeError:
            if field != "tiny_imagenet_models":  # older versions have no Tiny ImageNet
                raise _other_fork(root, module, name) from None
            found[field] = {}
        except Exception as error:  # whatever an old module does on a new PyTorch
            raise UserError(
                f"{root}: mdistiller cannot be imported ({module}: {type(error).__name__}: {error})"
            ) from None
    del found["load_checkpoint"]
    theirs = getattr(found["get_dataset"], "theirs", found["get_dataset"])
    return Host("mdistiller", **found | {"get_dataset": partial(_read, root, theirs)}, root=root)


def mend(host: Host) -> list[str]:
    """Let mdistiller run on today's PyTorch and under the plugin's keys; returns what was replaced.

    get_dataset reads the plugin's DATASET keys, gives two views to the methods that need them, and is where
    a config is checked; load_checkpoint never runs code and takes every teacher file; a trainer tests the
    teacher first; without CUDA everything stays where it is. Idempotent.
    """
    dataset, utils = sys.modules["mdistiller.dataset"], sys.modules["mdistiller.engine.utils"]
    if dataset.get_dataset.__module__ == __name__:
        return []
    _replace(utils.load_checkpoint, load_checkpoint)
    _replace(dataset.get_dataset, _settled_reader(host, dataset.get_dataset))
    _measure_teachers(host.trainers["base"])
    device.tolerate_cuda_calls()
    if "ShuffleV2" in host.tiny_imagenet_models:  # mdistiller's pools 4 x 4 and cannot take 64 x 64 images
        host.tiny_imagenet_models["ShuffleV2"] = builtin.tiny_imagenet_model_dict["ShuffleV2"]
    config.set_default(host.cfg, "DATASET.ROOT", str(host.root / "data"))
    config.set_default(host.cfg, "DATASET.DOWNLOAD", True)  # as mdistiller does
    return ["get_dataset", "load_checkpoint"]


def load_checkpoint(path: str) -> Any:
    """mdistiller's load_checkpoint: a trainer's state as it is, a network's file as {"model": state dict}."""
    held = checkpoint.load(path, "the path")
    if not isinstance(held, Mapping):
        return held
    weights = held.get("model", held)
    if not isinstance(weights, Mapping) or not all(isinstance(v, Tensor) for v in weights.values()):
        return held
    wrapped = all(name.startswith("module.") for name in weights)
    if wrapped and any(name.startswith("module.student.") for name in weights):
        return held  # a whole distiller, to be loaded into DataParallel
    names = {name: name.removeprefix("module.") if wrapped else name for name in weights}
    rest = held if "model" in held else {}
    return {**rest, "model": {names[name]: value for name, value in weights.items()}}


def settle(host: Host, cfg: Any, zoo: Mapping[str, dict[str, Any]], own: Mapping[str, Any]) -> None:
    """Check a config and put what it asks of the plugin where mdistiller's launcher looks for it.

    zoo, own: the networks by data set and the distillers as they were, to start from.
    """
    origin = _Somewhere()
    for name, networks in zoo.items():
        host.models(name).update(networks)
    host.distillers.update(own)
    host.check(cfg, origin)
    check_trainer(cfg, origin, host.trainers[cfg.SOLVER.TRAINER])
    host.distillers[cfg.DISTILLER.TYPE] = host.distiller(cfg)
    if cfg.DISTILLER.TYPE != "NONE":
        _put_teacher(host, cfg)
    device.seed_everything(cfg.SOLVER.SEED)


def check_trainer(cfg: Any, origin: Mapping[str, str], trainer: type) -> None:
    """Raise UserError where a config asks of one of mdistiller's trainers what only ours can do."""
    if issubclass(trainer, Trainer):
        return
    if config.views(cfg) > 1:
        reason = f"{cfg.DISTILLER.TYPE} needs two views of an image, and mdistiller's trainers take one"
        raise config.wrong(origin, "SOLVER.TRAINER", cfg.SOLVER.TRAINER, f"{config.TRAINER}: {reason}")
    for key in config.KEYS:
        if key.path.removeprefix("SOLVER.") in _OURS_ALONE and config.get(cfg, key.path) != key.default:
            allowed = (
                f"{key.default!r} under mdistiller's trainer {cfg.SOLVER.TRAINER}, which does not read it"
            )
            raise config.wrong(origin, key.path, config.get(cfg, key.path), allowed)


def _put_teacher(host: Host, cfg: Any) -> None:
    """Have mdistiller's launcher find the teacher's weights, checked beforehand."""
    dataset, name = cfg.DATASET.TYPE, cfg.DISTILLER.TEACHER
    models = host.models(dataset)
    path = weights_file(host, dataset, name, cfg.DISTILLER.TEACHER_WEIGHTS)
    load = partial(trained_network, host, dataset, name, weights=path, key="DISTILLER.TEACHER_WEIGHTS")
    classes = data.num_classes(cfg)
    if dataset != "imagenet":
        load(num_classes=classes)
        models[name] = (models[name][0], path)
    elif path:
        make, loaded = models[name], load(num_classes=classes)
        models[name] = lambda pretrained=False: loaded if pretrained else make(pretrained=False)


def _settled_reader(host: Host, theirs: Callable[[Any], Any]) -> Callable[[Any], Any]:
    zoo = {name: dict(host.models(name)) for name in ("cifar100", "tiny_imagenet", "imagenet")}
    own = dict(host.distillers)

    def get_dataset(cfg: Any) -> Any:
        """The plugin's get_dataset, where mdistiller's launcher first shows its config."""
        if cfg.is_frozen():  # tools/eval.py leaves its config open: there is nothing to train and to check
            settle(host, cfg, zoo, own)
        return host.get_dataset(cfg)

    get_dataset.theirs = theirs
    return get_dataset


def _read(root: Path, theirs: Callable[[Any], Any], cfg: Any) -> Any:
    """The plugin's data sets; CRD's contrast indices come from mdistiller's own."""
    if cfg.DISTILLER.TYPE not in ("CRD", "CRDKD"):
        return data.get_dataset(cfg)
    node = cfg.DATASET
    if node.ROOT not in (str(root / "data"), "./data") or node.TRAIN_PER_CLASS or node.HOLDOUT:
        raise UserError(
            f"config: DISTILLER.TYPE {cfg.DISTILLER.TYPE} reads mdistiller's own {root / 'data'}; DATASET.ROOT, "
            f"TRAIN_PER_CLASS and HOLDOUT must be left at their defaults"
        )
    return theirs(cfg)


def _measure_teachers(base_trainer: type) -> None:
    """Let mdistiller's trainers say how good the teacher is before they write anything."""
    construct = base_trainer.__init__

    def tested(
        self: Any, name: str, distiller: nn.Module, train_loader: Any, val_loader: Any, cfg: Any
    ) -> None:
        measure_teacher(distiller.module, val_loader, cfg)
        construct(self, name, distiller, train_loader, val_loader, cfg)

    base_trainer.__init__ = tested


def _replace(theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    """Put our function in the place of theirs, in every module that has it under its name."""
    name = theirs.__name__
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is theirs:
            setattr(module, name, ours)


def _is_root(folder: Path) -> bool:
    return (folder / "mdistiller" / "__init__.py").is_file()


def _other_fork(root: Path, module: str, name: str) -> UserError:
    return UserError(
        f"{root}: this mdistiller has no {module}.{name}; the plugin needs a fork that keeps mdistiller's names"
    )


class _Somewhere(dict[str, str]):
    """Origins of a config that mdistiller has merged itself, without telling where a value came from."""

    def get(self, key: str, default: Any = None) -> str:
        return "config"
