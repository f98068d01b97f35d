"""register(): the only module that knows where a host keeps its registries.

A host is mdistiller or, where that is absent, `deepkd_plugin.builtin`: dictionaries of distillers,
trainers and networks, a config tree, and get_dataset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

from . import builtin
from .config import add_deepkd_config
from .distillers import DeepKD
from .trainer import DecoupledMomentumTrainer

DISTILLERS = {"DeepKD": DeepKD}
TRAINERS = {"DecoupledMomentumSGD": DecoupledMomentumTrainer}


@dataclass(frozen=True)
class Host:
    """Where the registries of one host are."""

    name: str
    distillers: dict[str, Any]
    trainers: dict[str, Any]
    cifar_models: dict[str, Any]
    tiny_imagenet_models: dict[str, Any]
    imagenet_models: dict[str, Any]
    cfg: CfgNode
    get_dataset: Callable[[Any], Any]
    get_test_set: Callable[[Any], Any]

    def models(self, dataset: str) -> dict[str, Any]:
        """The dictionary of networks for a data set."""
        return {"imagenet": self.imagenet_models, "tiny_imagenet": self.tiny_imagenet_models}.get(
            dataset, self.cifar_models
        )


BUILTIN = Host(
    "builtin",
    builtin.distiller_dict,
    builtin.trainer_dict,
    builtin.cifar_model_dict,
    builtin.tiny_imagenet_model_dict,
    builtin.imagenet_model_dict,
    builtin.CFG,
    builtin.get_dataset,
    builtin.get_test_set,
)


def register(host: Host = BUILTIN) -> list[str]:
    """Put the plugin's distillers, trainer and config keys into a host's registries, in place.

    Idempotent; what is there stays. Returns what was added. Raises RuntimeError, before anything is
    changed, where another class holds one of our names.
    """
    wanted = [(host.distillers, DISTILLERS), (host.trainers, TRAINERS)]
    for registry, ours in wanted:
        for name, cls in ours.items():
            held = registry.get(name, cls)
            if held is not cls:
                raise RuntimeError(
                    f"{host.name} already has {name!r}: {held.__module__}.{held.__qualname__}; the plugin "
                    f"would register {cls.__module__}.{cls.__qualname__}"
                )
    added = []
    for registry, ours in wanted:
        added += [name for name in ours if name not in registry]
        registry.update(ours)
    return added + add_deepkd_config(host.cfg)
