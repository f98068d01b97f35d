"""Networks of a host's zoo, fresh or with weights."""

from __future__ import annotations

from importlib.resources import files

from torch import nn

from ..errors import UserError
from ..run import checkpoint
from .host import Host


def network(host: Host, dataset: str, name: str, num_classes: int) -> nn.Module:
    """A fresh network of the host's zoo."""
    make = host.models(dataset)[name]
    return make(pretrained=False) if dataset == "imagenet" else make[0](num_classes=num_classes)


def trained_network(
    host: Host, dataset: str, name: str, num_classes: int, weights: str, key: str
) -> nn.Module:
    """A network with weights: a file, one that the package ships (builtin:NAME), or the zoo's own ("").

    `key` is the config key or option that gave `weights`, for errors.
    """
    path = weights_file(host, dataset, name, weights)
    if not path and dataset == "imagenet":
        try:
            return host.models(dataset)[name](pretrained=True).requires_grad_(False)
        except OSError as error:
            raise UserError(
                f"{key} names no file and torchvision's weights of {name} cannot be fetched ({error}); name a file"
            ) from None
    if not path:
        raise UserError(
            f"{key} names no file and the zoo has no weights of {name}; it must name a checkpoint"
        )
    made = network(host, dataset, name, num_classes)
    checkpoint.load_weights(made, path, key, name)
    return made.requires_grad_(False)


def weights_file(host: Host, dataset: str, name: str, weights: str) -> str:
    """The file that `weights` means, as in trained_network; "" where torchvision provides them or nobody does."""
    if weights.startswith("builtin:"):
        shipped = files("deepkd_plugin.hosts.builtin").joinpath("weights")
        return str(shipped.joinpath(weights.removeprefix("builtin:") + ".pt"))
    if weights or dataset == "imagenet":
        return weights
    return host.models(dataset)[name][1] or ""
