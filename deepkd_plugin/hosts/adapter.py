"""Anybody's network under mdistiller's protocol: `network(image) -> (logits, features)`."""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
    deepkd_blocks: tuple[int, ...] = ()
    """Of timm's forward_intermediates, which maps it gives as `feats`."""
    deepkd_layers: tuple[str, ...] = ()
    """Layers whose outputs it gives as `feats`, if it has no such method."""

    def forward(self, image: Tensor) -> tuple[Tensor, Any]:
        image = self.deepkd_converted(image)
        with outputs(self, self.deepkd_layers) as maps:
            if self.deepkd_blocks:
                final, between = self.forward_intermediates(image, indices=list(self.deepkd_blocks))
                maps += between
            elif self.deepkd_pools:
                final = self.forward_features(image)
            if self.deepkd_pools:
                pooled = self.forward_head(final, pre_logits=True)
                logits, features = self.get_classifier()(pooled), {"pooled_feat": pooled}
            elif self.deepkd_blocks:
                logits, features = self.forward_head(final), {}
            else:
                logits, features = _protocol(super().forward(image))
        if maps:
            features = {**features, "feats": maps}
        if self.deepkd_classes is not None:
            logits = logits.index_select(1, self.deepkd_classes)
        return logits, features

    def deepkd_converted(self, image: Tensor) -> Tensor:
        """Return a batch's images as the network's own are."""
        if self.deepkd_scale is not None and self.deepkd_shift is not None:
            image = image * self.deepkd_scale + self.deepkd_shift
        if self.deepkd_side is not None:
            side = (self.deepkd_side, self.deepkd_side)
            image = F.interpolate(image, side, mode="bilinear", antialias=True)
        return image

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


@contextlib.contextmanager
def outputs(network: nn.Module, layers: Sequence[str]) -> Iterator[list[Any]]:
    """Collect what some layers of a network return while it passes a batch, in the order in which they are done."""
    collected: list[Any] = []
    # of this pass alone: a copy of the network has its own
    hooks = [
        network.get_submodule(layer).register_forward_hook(lambda *call: collected.append(call[-1])) for layer in layers
    ]
    try:
        yield collected
    finally:
        for hook in hooks:
            hook.remove()


def offer_maps(network: Any, side: int) -> None:
    """Let an adapted network give `feats`, the last map (B, C, H, W) of each size, if it has two of them.

    Of one whose maps are all of one size, such as a transformer, they are the first and the last. They are timm's
    forward_intermediates, or else outputs of the network's layers. side: pixels of the batch's images. The logits stay
    what they are, bit for bit, in training too, or it is left as it was.
    """
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    mode = network.training
    before = {part: buffer.clone() for part, buffer in network.named_buffers()}

    def say(training: bool) -> Tensor:
        logits: Tensor = _seeded(network.train(training), image)[0]
        for part, buffer in network.named_buffers():
            buffer.copy_(before[part])
        return logits

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        plain = say(False), say(True)
        for find in (_blocks, _layers):
            try:
                network.deepkd_blocks, network.deepkd_layers = find(network.eval(), image)
                found = bool(network.deepkd_blocks or network.deepkd_layers)
                if found and all(map(torch.equal, (say(False), say(True)), plain)):
                    network.deepkd_features |= {"feats"}
                    break
            except Exception:  # anybody's network may fail in any way
                pass
            network.deepkd_blocks, network.deepkd_layers = (), ()
        for part, buffer in network.named_buffers():
            buffer.copy_(before[part])
    network.train(mode)


def _blocks(network: Any, image: Tensor) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Choose maps of timm's forward_intermediates, by number."""
    if not hasattr(network, "forward_intermediates"):
        return (), ()
    maps = network.forward_intermediates(network.deepkd_converted(image))[1]
    return tuple(_stages(list(range(len(maps))), maps)), ()


def _layers(network: nn.Module, image: Tensor) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Choose layers in the network's chain, by name: its parts, and those of Sequential ones."""
    chain: list[str] = []
    for name, part in network.named_children():
        inner = part.named_children() if isinstance(part, nn.Sequential) else ()
        chain += [name, *(f"{name}.{one}" for one, _ in inner)]
    done: list[tuple[str, Any]] = []
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda *call, name=name: done.append((name, call[-1])))
        for name in chain
    ]
    try:
        network(image)
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(name for name, _ in done)  # one that is passed twice would give a map too many
    found = [(name, out) for name, out in done if isinstance(out, Tensor) and _is_map(out) and times[name] == 1]
    return (), tuple(_stages([name for name, _ in found], [out for _, out in found]))


def _is_map(value: Tensor) -> bool:
    return value.ndim == 4 and len(value) == 2 and value.shape[2] == value.shape[3] > 1


def _stages(names: list[Any], maps: Sequence[Tensor]) -> list[Any]:
    """Return the names of the last map of each size, from large to small, and of the first if all are of one size."""
    if not maps or not all(map(_is_map, maps)):
        return []
    last: dict[int, Any] = {}
    for name, one in zip(names, maps):
        if one.shape[2] <= min(last, default=one.shape[2]):
            last[one.shape[2]] = name
    chosen = list(last.values())
    if len(chosen) == 1 and names[0] != chosen[0]:
        return [names[0], *chosen]
    return chosen if len(chosen) > 1 else []


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
