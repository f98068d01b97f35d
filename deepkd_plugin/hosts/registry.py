"""Find the host and put the plugin into its registries, in place."""

from collections.abc import Callable
from functools import partial
from typing import Any
from warnings import warn

from .. import extensions
from ..config import add_deepkd_config, check_tree
from ..config.keys import ADAMW, TRAINER
from ..distillers import DISTILLERS
from ..errors import UserError
from ..trainer import DecoupledAdamWTrainer, DecoupledMomentumTrainer
from . import builtin, mdistiller
from .host import Host
from .networks import add_networks

TRAINERS = {TRAINER: DecoupledMomentumTrainer, ADAMW: DecoupledAdamWTrainer}

BUILTIN = Host(
    "builtin",
    builtin.distiller_dict,
    builtin.trainer_dict,
    builtin.cifar_model_dict,
    builtin.tiny_imagenet_model_dict,
    builtin.imagenet_model_dict,
    builtin.CFG,
)


def find_host() -> Host:
    """Return mdistiller if it can be found (see mdistiller.locate), else the built-in host.

    Imports the modules of DEEPKD_EXTENSIONS first.
    """
    extensions.load()
    root = mdistiller.locate()
    return BUILTIN if root is None else mdistiller.load(root)


def added_distillers() -> dict[str, Any]:
    """Return the distillers that the plugin adds to a host; the others every host has itself."""
    return {name: cls for name, cls in DISTILLERS.items() if name not in builtin.NATIVE}


def register(host: Host | None = None) -> list[str]:
    """Put the plugin's distillers, trainers and config keys into a host's registries, in place.

    host: by default the one that find_host finds. Idempotent; what is there stays. Returns what was added.
    Raises UserError, before anything is changed, if another class or config key has one of our names.
    """
    host = find_host() if host is None else host
    registries: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (host.distillers, added_distillers()),
        (host.trainers, TRAINERS),
    ]
    for registry, ours in registries:
        for name, cls in ours.items():
            theirs = registry.get(name, cls)
            if theirs is not cls:
                raise UserError(
                    f"{host.name} already has {name!r}: {theirs.__module__}.{theirs.__qualname__}; the plugin "
                    f"would register {cls.__module__}.{cls.__qualname__}, so remove one of the two"
                )
    check_tree(host.cfg, host.name)
    added = []
    for registry, ours in registries:
        added += [name for name in ours if name not in registry]
        registry.update(ours)
    added += add_networks(host)
    if "MobileNetV1" in host.imagenet_models and "MobileNetV2" not in host.imagenet_models:
        host.imagenet_models["MobileNetV2"] = partial(_mobilenet_alias, host.imagenet_models["MobileNetV1"])
        added.append("MobileNetV2 (ImageNet), an alias of MobileNetV1")
    return added + add_deepkd_config(host.cfg) + (mdistiller.mend(host) if host.root is not None else [])


def _mobilenet_alias(mobilenet_v1: Callable[..., Any], **arguments: Any) -> Any:
    warn(
        "MobileNetV2 on ImageNet is mdistiller's MobileNetV1: papers that build on mdistiller call it by this "
        "name; compare with r50_mv1, not with torchvision's MobileNetV2",
        stacklevel=2,
    )
    return mobilenet_v1(**arguments)
