"""Networks of a host's zoo, fresh or with weights."""

from collections.abc import Callable
from functools import partial
from importlib.resources import files

import torch
from torch import Tensor, nn

from .. import data, extensions
from ..errors import UserError
from ..run import checkpoint
from .host import Host

NETWORKS: dict[str, Callable[..., nn.Module]] = {}
"""Users' own networks: name -> make(num_classes=C)."""


def register_network(name: str, make: Callable[..., nn.Module]) -> None:
    """Make a constructor a value of DISTILLER.STUDENT and DISTILLER.TEACHER, on every data set.

    make: make(num_classes=C) returns a network that maps images (B, 3, H, W) to (logits (B, C), features).
    Raises ValueError if another constructor has the name.
    """
    if NETWORKS.setdefault(name, make) is not make:
        raise ValueError(f"the network {name!r} is registered already, as {NETWORKS[name]!r}; give another name")
    extensions.remember(make)


def add_networks(host: Host) -> list[str]:
    """Put the users' own networks into a host's zoos, in place; returns the names that were added.

    Raises UserError, before anything is changed, if the host has a network of such a name itself.
    """
    zoos = (host.cifar_models, host.tiny_imagenet_models)
    added = [name for name, make in NETWORKS.items() if host.cifar_models.get(name) != (make, None)]
    for name in added:
        if any(name in zoo for zoo in (*zoos, host.imagenet_models)):
            raise UserError(f"{host.name} already has the network {name!r}; register yours under another name")
    for name in added:
        for zoo in zoos:
            zoo[name] = (NETWORKS[name], None)
        host.imagenet_models[name] = partial(_of_imagenet, NETWORKS[name])
    return added


def _of_imagenet(make: Callable[..., nn.Module], pretrained: bool = False) -> nn.Module:
    """Make a network for ImageNet's classes, as mdistiller's zoo of it is called; there are no weights to fetch."""
    if pretrained:
        raise OSError("it is registered without weights")
    return make(num_classes=1000)


def _tried(name: str, side: int, num_classes: int) -> nn.Module:
    """Make a user's own network; UserError if an image does not become (logits, features) in it."""
    try:
        network = NETWORKS[name](num_classes=num_classes)
        with torch.no_grad():
            outcome = network.eval()(torch.zeros(1, 3, side, side))
    except Exception as error:  # a user's network may fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the network {name!r} cannot take an image of {side} x {side} pixels ({reason})") from None
    logits = outcome[0] if isinstance(outcome, tuple) and len(outcome) == 2 else None
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        found = f"logits of the shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(outcome).__name__
        raise UserError(
            f"the network {name!r} returns {found} for one image; it must return (logits, features), and logits must "
            f"have the shape (1, {num_classes})"
        )
    return network.train()


def network(host: Host, dataset: str, name: str, num_classes: int) -> nn.Module:
    """Make a fresh network of the host's zoo."""
    if name in NETWORKS:
        return _tried(name, data.source(dataset).side, num_classes)
    entry = host.models(dataset)[name]
    return entry[0](num_classes=num_classes) if isinstance(entry, tuple) else entry(pretrained=False)


def trained_network(host: Host, dataset: str, name: str, num_classes: int, weights: str, key: str) -> nn.Module:
    """Make a network with weights: of a file, of one that the package ships (builtin:NAME), or the zoo's own ("").

    `key` is the config key or option that gave `weights`, for errors.
    """
    path = weights_file(host, dataset, name, weights)
    entry = host.models(dataset)[name]
    if not path and not isinstance(entry, tuple):
        try:
            return entry(pretrained=True).requires_grad_(False)
        except OSError as error:
            raise UserError(
                f"{key} names no file and torchvision's weights of {name} cannot be fetched ({error}); name a file"
            ) from None
    if not path:
        raise UserError(f"{key} names no file and the zoo has no weights of {name}; it must name a checkpoint")
    made = network(host, dataset, name, num_classes)
    checkpoint.load_weights(made, path, key, name)
    return made.requires_grad_(False)


def weights_file(host: Host, dataset: str, name: str, weights: str) -> str:
    """Return the file that `weights` means, as in trained_network; "" if torchvision provides them or nobody does."""
    if weights.startswith("builtin:"):
        shipped = files("deepkd_plugin.hosts.builtin").joinpath("weights")
        return str(shipped.joinpath(weights.removeprefix("builtin:") + ".pt"))
    if weights:
        return weights
    entry = host.models(dataset)[name]
    return entry[1] or "" if isinstance(entry, tuple) else ""
