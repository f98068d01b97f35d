"""Anybody's network under mdistiller's protocol: `network(image) -> (logits, features)`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError


class Input(NamedTuple):
    """What a network takes: square images of `side` pixels, normalised by mean and standard deviation of channels."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Adapter(nn.Module):
    """What `adapt` puts in front of a network's own class: one image in, `(logits (B, C), features)` out.

    The image may be normalised otherwise, or of another size, than the network's own are; it is converted first. Of the
    network's classes some may be taken, in any order. Names and values of its state dictionary stay as they are.
    """

    deepkd_scale: Tensor | None
    deepkd_shift: Tensor | None
    """Of the channels, (3, 1, 1): an image times the one plus the other is normalised as the network's own are."""
    deepkd_side: int | None = None
    """Pixels of the network's own images; None: as they come."""
    deepkd_classes: Tensor | None
    """Of each class that is asked for, its place among the network's own: (C,) int64."""
    deepkd_pools: bool = False
    """Whether the network's parts give what its classifier takes, (B, D), beside the same logits."""
    deepkd_features: frozenset[str] = frozenset()
    """Names of the features that it gives."""

    def forward(self, image: Tensor) -> tuple[Tensor, Any]:
        if self.deepkd_scale is not None and self.deepkd_shift is not None:
            image = image * self.deepkd_scale + self.deepkd_shift
        if self.deepkd_side is not None:
            side = (self.deepkd_side, self.deepkd_side)
            image = F.interpolate(image, side, mode="bilinear", antialias=True)
        if self.deepkd_pools:
            pooled = self.forward_head(self.forward_features(image), pre_logits=True)
            logits, features = self.get_classifier()(pooled), {"pooled_feat": pooled}
        else:
            logits, features = _protocol(super().forward(image))
        if self.deepkd_classes is not None:
            logits = logits.index_select(1, self.deepkd_classes)
        return logits, features

    def deepkd_changes(self) -> dict[str, Tensor]:
        """Return what the logits depend on beside image and weights, for the network's fingerprint."""
        side = None if self.deepkd_side is None else torch.tensor(self.deepkd_side)
        parts = {"scale": self.deepkd_scale, "shift": self.deepkd_shift, "side": side, "classes": self.deepkd_classes}
        return {f"deepkd_{name}": part for name, part in parts.items() if part is not None}


def adapt(network: nn.Module, name: str) -> nn.Module:
    """Put a network under the protocol, in place; returns it. UserError for one that keeps its forward elsewhere."""
    if isinstance(network, torch.jit.ScriptModule) or "forward" in vars(network):
        raise UserError(f"the network {name} is compiled, scripted or wrapped; it must be a plain module")
    if not isinstance(network, Adapter):
        network.__class__ = _fronted(Adapter, type(network))
        for part in ("scale", "shift", "classes"):  # which move with the network and are in no file of it
            network.register_buffer(f"deepkd_{part}", None, persistent=False)
    return network


@functools.cache
def _fronted(front: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    """Return a kind of network that is `cls` with another class in front of it, and goes by its name."""
    return type(cls.__name__, (front, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


class Plain(nn.Module):
    """What `plain` puts in front of a network's own class: images (B, 3, H, W) in, logits (B, C) out."""

    def forward(self, image: Tensor) -> Tensor:
        return _protocol(super().forward(image))[0]


def plain(network: nn.Module, name: str, side: int, num_classes: int) -> nn.Module:
    """Make a network give logits and nothing else, in place, and put it into evaluation mode; returns it.

    The names of its state dictionary stay its own. Raises UserError if it cannot take an image of side x side pixels,
    or gives other logits for it than (1, num_classes).
    """
    network.eval()
    with torch.no_grad():
        try:
            outcome = network(torch.zeros(1, 3, side, side))
            logits = _protocol(outcome)[0]
        except UserError as error:
            raise UserError(f"the network {name} {error}") from None
        except Exception as error:  # anybody's network may fail in any way
            raise UserError(
                f"the network {name} cannot take images of {side} x {side} pixels ({reason_of(error)})"
            ) from None
    if logits.shape != (1, num_classes):
        raise UserError(
            f"the network {name} gives logits of the shape {tuple(logits.shape)} for an image; it must be "
            f"(1, {num_classes})"
        )
    if not isinstance(outcome, Tensor):
        network.__class__ = _fronted(Plain, type(network))
    return network


def _protocol(outcome: Any) -> tuple[Tensor, Any]:
    """Take logits and features from what a network returns; UserError if it is something else."""
    if isinstance(outcome, Tensor):
        return outcome, {}
    logits = outcome.get("logits") if isinstance(outcome, Mapping) else getattr(outcome, "logits", None)
    if isinstance(logits, Tensor):
        return logits, {}
    pair = isinstance(outcome, tuple) and len(outcome) == 2
    if pair and isinstance(outcome[0], Tensor) and not isinstance(outcome[1], Tensor):
        return outcome[0], outcome[1]
    of = f" of {', '.join(type(part).__name__ for part in outcome)}" if isinstance(outcome, tuple) else ""
    raise UserError(
        f"returns a {type(outcome).__name__}{of}; it must return logits, something with logits in it (.logits), or "
        f"(logits, features) with features that are no tensor"
    )


def try_out(network: nn.Module, name: str, side: int, training: bool) -> int:
    """Let an adapted network look at two images; returns its number of classes. It ends in training mode.

    training: also as in a training step; nothing of it is kept. Raises UserError if the network cannot take images of
    side x side pixels, or returns something else than logits (B, C).
    """
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    before = {part: buffer.clone() for part, buffer in network.named_buffers()}
    modes = (False, True) if training else (False,)
    pools = all(hasattr(network, part) for part in ("forward_features", "forward_head", "get_classifier"))
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for mode in modes:
                network.train(mode)
                logits, features = _seeded(network, image)
                if logits.ndim != 2 or len(logits) != 2:
                    raise UserError(
                        f"returns logits of the shape {tuple(logits.shape)} for two images; it must be (2, C)"
                    )
                pools = pools and _pools_alike(network, image, logits)
    except UserError as error:
        raise UserError(f"the network {name} {error}") from None
    except Exception as error:  # anybody's network may fail in any way
        raise UserError(
            f"the network {name} cannot take images of {side} x {side} pixels ({reason_of(error)})"
        ) from None
    finally:
        network.train()
        with torch.no_grad():
            for part, buffer in network.named_buffers():
                if part in before:
                    buffer.copy_(before[part])
    network.deepkd_pools = pools
    network.deepkd_features = frozenset({"pooled_feat"} if pools else features if isinstance(features, Mapping) else ())
    return logits.shape[1]


def _seeded(network: nn.Module, image: Tensor) -> Any:
    torch.manual_seed(0)
    return network(image)


def _pools_alike(network: Any, image: Tensor, logits: Tensor) -> bool:
    """Tell whether a network of timm's kind gives the same logits by way of what its classifier takes."""
    network.deepkd_pools = True
    try:
        again, features = _seeded(network, image)
        return torch.equal(again, logits) and features["pooled_feat"].ndim == 2
    except Exception:  # it has other parts, or several classifiers
        return False
    finally:
        network.deepkd_pools = False


def reason_of(error: BaseException) -> str:
    """Say an error of somebody else's code in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def feed(network: nn.Module, batch: Input, own: Input) -> None:
    """Let an adapted network convert images that are normalised and sized as a batch's into its own kind.

    p being a pixel, (p - m) / s of the batch times s / s' plus (m - m') / s' is (p - m') / s'. Images of another size
    are then resized as torchvision and PIL do: bilinear, with antialiasing.
    """
    if (batch.mean, batch.std) != (own.mean, own.std):
        mean, std, m, s = (torch.tensor(part, dtype=torch.float64) for part in (*batch[1:], *own[1:]))
        network.deepkd_scale = (std / s).float().reshape(-1, 1, 1)
        network.deepkd_shift = ((mean - m) / s).float().reshape(-1, 1, 1)
    network.deepkd_side = own.side if batch.side != own.side else None


def choose(network: nn.Module, classes: Sequence[int]) -> None:
    """Let an adapted network give the logits of some of its classes, in this order."""
    network.deepkd_classes = torch.tensor(list(classes))
