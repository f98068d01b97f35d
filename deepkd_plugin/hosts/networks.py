"""The networks of a run, of a host's zoo or of elsewhere, fresh or with weights."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import config, data, extensions
from ..errors import UserError, shown
from ..mixture import PROBABILITIES, Teachers
from ..run import checkpoint
from ..terminal import warn
from .adapter import Adapter, Input, adapt, choose, feed, offer_maps, plain, reason_of, try_out
from .builtin import shipped_weights
from .classes import KEY as CLASSES
from .classes import choose_classes, read_names
from .host import MDISTILLERS_OWN, Host
from .libraries import Outside, Timm, find

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


def _tried(make: Callable[..., nn.Module], name: str, side: int, num_classes: int) -> nn.Module:
    """Make a network under the protocol; UserError if an image does not become (logits, features) in it."""
    try:
        network = make(num_classes=num_classes)
        with torch.no_grad():
            outcome = network.eval()(torch.zeros(1, 3, side, side))
    except Exception as error:  # a user's network may fail in any way
        raise UserError(
            f"the network {name!r} cannot take an image of {side} x {side} pixels ({reason_of(error)})"
        ) from None
    logits = outcome[0] if isinstance(outcome, tuple) and len(outcome) == 2 else None
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        found = f"logits of the shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(outcome).__name__
        raise UserError(
            f"the network {name!r} returns {found} for one image; it must return (logits, features), and logits must "
            f"have the shape (1, {num_classes})"
        )
    return network.train()


def network(host: Host, dataset: Any, name: str, num_classes: int, drop_path: float = 0.0) -> nn.Module:
    """Make a fresh network, of the host's zoo or of elsewhere, for the images of a data set, as data.source takes it.

    drop_path: DISTILLER.STUDENT_DROP_PATH, which only networks of timm have. Raises UserError if it cannot be made,
    cannot take these images, or has other classes.
    """
    source = data.source(dataset)
    _check_classes(source, name, num_classes, "the student")
    side = source.side
    made = _fresh(host.models(source), source, name, side, num_classes=num_classes, drop_path=drop_path)
    if isinstance(made, Adapter):
        found = try_out(made, name, side, training=True)
        if found != num_classes:
            raise UserError(f"the network {name} gives {found} logits for an image; this run has {num_classes} classes")
    return made


def _fresh(
    zoo: Mapping[str, Any], source: data.Source, name: str, side: int, *, num_classes: int, drop_path: float = 0.0
) -> nn.Module:
    """Make a fresh network for images of side x side pixels; one from outside the zoos is adapted and not tried yet."""
    outside = None if name in NETWORKS else find(name)
    if drop_path:
        if not isinstance(outside, Timm):
            raise UserError(
                f"DISTILLER.STUDENT_DROP_PATH is {drop_path:g}; it must be 0.0 with {name}, which is not of timm"
            )
        return adapt(outside.make_dropping(num_classes, side, drop_path), name)
    if name in NETWORKS:
        return _tried(NETWORKS[name], name, side, num_classes)
    if outside is not None:
        return adapt(outside.make(num_classes, side), name)
    if isinstance(source, data.OwnImages) and isinstance(zoo[name], tuple):  # the zoo's are made for a few sizes
        return _tried(zoo[name][0], name, side, num_classes)
    return _of_a_zoo(zoo[name], num_classes)


def _of_a_zoo(entry: Any, num_classes: int) -> nn.Module:
    made: nn.Module = entry[0](num_classes=num_classes) if isinstance(entry, tuple) else entry(pretrained=False)
    return made


def described_network(host: Host, described: data.Description, where: str) -> nn.Module:
    """Make the network that a student's file describes, as it was before it was trained, for inference.

    It gives plain logits. Raises UserError, which begins with `where`, if there is no such network, or if it does not
    give the logits of these classes.
    """
    name, count = described.architecture, described.num_classes
    outside = None if name in NETWORKS else find(name, where)
    zoo = host.zoo(described.zoo)
    if outside is None and name not in zoo:
        brought = f"; the module that registers it must be in {extensions.VARIABLE}"
        raise UserError(f"{where} is {shown(name)}, and {host.name} has no such network{brought}")
    made = outside.make(count, described.size) if outside else _of_a_zoo(zoo[name], count)
    return plain(made, name, described.size, count)


def student_network(host: Host, cfg: Any, num_classes: int) -> nn.Module:
    """Make the student that a config means, with random weights or those of DISTILLER.STUDENT_WEIGHTS.

    If these are of another number of classes, the tensors that depend on it stay random, which is said.
    """
    name = cfg.DISTILLER.STUDENT
    made = network(host, cfg, name, num_classes, cfg.DISTILLER.STUDENT_DROP_PATH)
    path, key = cfg.DISTILLER.STUDENT_WEIGHTS, "DISTILLER.STUDENT_WEIGHTS"
    if not path:
        return made
    if path == "pretrained":
        outside = find(name)
        own = outside and outside.input()
        if outside is None or own is None:
            raise UserError(f"{key} is 'pretrained'; it must be a file with {name}, of which no library has weights")
        source = data.source(cfg)
        if isinstance(source, data.OwnImages) and (own.mean, own.std) != (source.mean, source.std):
            warn(
                f"{key} is 'pretrained', on images of mean {own.mean} and std {own.std}; {name} gets INPUT.MEAN "
                f"{source.mean} and INPUT.STD {source.std}, the teacher's by default"
            )
        with torch.random.fork_rng(devices=[]):
            weights = outside.pretrained(num_classes, data.source(cfg).side, key).state_dict()
    else:
        path = weights_file(host, cfg, name, path)
        weights = checkpoint.read_weights(path, key)
    fresh = made.state_dict()
    if classes := checkpoint.count_classes(weights, fresh):
        new = [part for part in fresh if part in weights and fresh[part].shape != weights[part].shape]
        print(f"student   {name}: {key} has {classes[0]} classes, so {', '.join(new)} begin at random")
        weights = weights | {part: fresh[part] for part in new}
    checkpoint.fit_weights(made, weights, path, key, name)
    return made


def check_files(host: Host, cfg: Any) -> None:
    """Raise UserError if a file that a config names for its networks is not there; none is read as a whole."""
    _check_files(host, cfg, ("STUDENT", "TEACHER")[: 1 if cfg.DISTILLER.TYPE == "NONE" else 2])
    for number, one in enumerate(config.by_teacher(cfg)[1:], 1):
        with config.naming(number):
            _check_files(host, one, () if cfg.DISTILLER.TYPE == "NONE" else ("TEACHER",))


def _check_files(host: Host, cfg: Any, used: Iterable[str]) -> None:
    node = cfg.DISTILLER
    for one in used:
        name, weights, key = node[one], node[f"{one}_WEIGHTS"], f"DISTILLER.{one}_WEIGHTS"
        if one == "STUDENT" and weights in ("", "pretrained"):
            continue
        path = weights_file(host, cfg, name, weights)
        if path:
            checkpoint.there(path, key)
        elif find(name) is None and isinstance(host.models(cfg)[name], tuple):
            raise _no_weights(name, key)
    if "TEACHER" in used and isinstance(node.TEACHER_CLASSES, str) and node.TEACHER_CLASSES:
        read_names(node.TEACHER_CLASSES)


def teacher_network(host: Host, cfg: Any, num_classes: int) -> nn.Module:
    """Make the teacher that a config means: with weights, its input by TEACHER_INPUT, classes by TEACHER_CLASSES.

    Of several, it is their mixture (mixture.py).
    """
    return _one_of_all(cfg, lambda one: _teacher(host, one, num_classes))


def _one_of_all(cfg: Any, make: Callable[[Any], nn.Module]) -> nn.Module:
    """Make each teacher of a config, by a config of its own, and one of all."""
    node, made = cfg.DISTILLER, []
    for number, one in enumerate(config.by_teacher(cfg)):
        with config.naming(number):
            made.append(make(one))
    if len(made) == 1:
        return made[0]
    shares = [one.DISTILLER.TEACHER_SHARE for one in config.by_teacher(cfg)]
    temperature = config.temperature(cfg) if node.TEACHER_POOL == PROBABILITIES else None
    return Teachers(made, shares, node.TEACHER_MIX, temperature)


def _teacher(host: Host, cfg: Any, num_classes: int) -> nn.Module:
    node, key = cfg.DISTILLER, "DISTILLER.TEACHER_WEIGHTS"
    named = (node.TEACHER, num_classes, node.TEACHER_WEIGHTS, key)
    choice = partial(choose_classes, node.TEACHER_CLASSES, data.source(cfg), cfg.DATASET.ROOT)
    return trained_network(host, cfg, *named, node.TEACHER_INPUT, choice if node.TEACHER_CLASSES else None)


def trained_network(
    host: Host,
    dataset: Any,
    name: str,
    num_classes: int,
    weights: str,
    key: str,
    given: Mapping[str, Any] | None = None,
    choice: Callable[[int], list[int]] | None = None,
) -> nn.Module:
    """Make a network with weights: of a file, of one that the package ships (builtin:NAME), or the zoo's own ("").

    It takes batches of the images of `dataset`, as data.source takes it. What it was trained on is known of a library's
    weights, and taken to be the data set's otherwise. `key` is the config key or option that gave `weights`, for
    errors. given: DISTILLER's node TEACHER_INPUT, which overrides both. choice: number of its classes -> those that are
    the data set's.
    """
    source, path = data.source(dataset), weights_file(host, dataset, name, weights)
    outside = None if name in NETWORKS else find(name)
    if choice is None:
        _check_classes(source, name, num_classes, key)
    batch, own = _inputs(source, outside, path, given)
    if path:
        made = _from_file(host, dataset, name, num_classes, path, key, own.side, choice is not None)
    elif outside is not None:
        made = outside.pretrained(num_classes, own.side, key)
    else:
        made = _of_the_zoo(host, dataset, name, key)
    if outside is not None or choice is not None or own != batch:
        made = adapt(made, name)
        found = try_out(made, name, own.side, training=False)
        if choice is not None:
            choose(made, choice(found))
        elif found != num_classes:
            raise _other_classes(path or name, key, name, found, num_classes)
        feed(made, batch, own)
    return made.requires_grad_(False)


def untrained_teacher(host: Host, cfg: Any, num_classes: int) -> nn.Module:
    """Make the teacher that a config means, without its weights: it takes images as it would with them, in their time.

    Raises UserError if it cannot be made, or cannot take these images.
    """
    return _one_of_all(cfg, lambda one: _untrained_teacher(host, one, num_classes))


def _untrained_teacher(host: Host, cfg: Any, num_classes: int) -> nn.Module:
    node, source = cfg.DISTILLER, data.source(cfg)
    name, path = node.TEACHER, weights_file(host, cfg, node.TEACHER, node.TEACHER_WEIGHTS)
    batch, own = _inputs(source, None if name in NETWORKS else find(name), path, node.TEACHER_INPUT)
    made = _fresh(host.models(source), source, name, own.side, num_classes=num_classes)
    if own != batch:
        made = adapt(made, name)
    if isinstance(made, Adapter):
        try_out(made, name, own.side, training=False)
        feed(made, batch, own)
    return made.requires_grad_(False)


def _inputs(
    source: data.Source, outside: Outside | None, path: str, given: Mapping[str, Any] | None
) -> tuple[Input, Input]:
    """Return what a data set's batches are, and what a network with weights of a file, or of its library, takes."""
    batch = Input(source.side, source.mean, source.std)
    return batch, _input(given, (outside and not path and outside.input()) or batch)


def _check_classes(source: data.Source, name: str, num_classes: int, key: str) -> None:
    """Raise UserError if a zoo's network has a fixed number of classes, and a user's own images have another."""
    theirs = data.ZOOS[source.zoo]
    if name not in NETWORKS and find(name) is None and theirs not in (None, num_classes):
        raise UserError(
            f"{key} has the zoo's {name}, whose {theirs:,} classes are ImageNet's; for {num_classes:,} classes it must "
            f"be a library's, for example torchvision:resnet18, or the zoo's for INPUT.SIZE 32 or 64"
        )


def _input(given: Mapping[str, Any] | None, own: Input) -> Input:
    """Return what a network takes: what is given, for the rest its own."""
    if given is None:
        return own
    return Input(given["SIZE"] or own.side, tuple(given["MEAN"]) or own.mean, tuple(given["STD"]) or own.std)


def _from_file(
    host: Host, dataset: Any, name: str, num_classes: int, path: str, key: str, side: int, any_classes: bool
) -> nn.Module:
    """Make a network with the weights of a file. any_classes: with as many classes as these have."""
    weights = checkpoint.read_weights(path, key)
    source = data.source(dataset)
    make = partial(_fresh, host.models(source), source, name, side)
    made = make(num_classes=num_classes)
    if classes := checkpoint.count_classes(weights, made.state_dict()):
        if any_classes:
            made = make(num_classes=classes[0])
        elif classes[0] > num_classes and key == "DISTILLER.TEACHER_WEIGHTS":
            raise _other_classes(path, key, name, *classes)
    checkpoint.fit_weights(made, weights, path, key, name)
    return made


def _of_the_zoo(host: Host, dataset: Any, name: str, key: str) -> nn.Module:
    """Make a network of a zoo with the weights that the zoo fetches."""
    entry = host.models(dataset)[name]
    if isinstance(entry, tuple):
        raise _no_weights(name, key)
    try:
        return entry(pretrained=True)
    except OSError as error:
        raise UserError(
            f"{key} names no file and torchvision's weights of {name} cannot be fetched ({error}); name a file"
        ) from None


def _no_weights(name: str, key: str) -> UserError:
    return UserError(f"{key} names no file and the zoo has no weights of {name}; it must name a checkpoint")


def _other_classes(source: str, key: str, name: str, theirs: int, ours: int) -> UserError:
    more = f"; {CLASSES} says which of them they are, or train it for these first" if "TEACHER" in key else ""
    return UserError(f"{source}: {key} holds a {name} of {theirs} classes; this run has {ours}{more}")


def settle_features(cfg: Any, networks: Iterable[nn.Module]) -> None:
    """Let adapted networks give the features that a config's method compares; UserError if one cannot.

    Of DeepKD's own losses on features each says itself what it lacks.
    """
    method, feature = cfg.DISTILLER.TYPE, config.feature(cfg)
    if not feature and method not in MDISTILLERS_OWN["DISTILLER.TYPE"]:
        return
    needed = "pooled_feat" if (feature or method) in ("RKD", "PKT", "CRD") else "feats"
    for one in networks:
        if isinstance(one, Adapter) and needed == "feats" and "feats" not in one.deepkd_features:
            offer_maps(one, data.source(cfg).side)
            if "feats" in one.deepkd_features and cfg.SOLVER.EXECUTION != "eager":
                raise UserError(
                    f"config: SOLVER.EXECUTION is {cfg.SOLVER.EXECUTION!r}; it must be 'eager' with features of a "
                    f"{type(one).__name__}, which are taken from its layers"
                )
        if isinstance(one, Adapter) and needed not in one.deepkd_features:
            asked = f"DeepKD.FEATURE is {feature!r}" if feature else f"DISTILLER.TYPE is {method!r}"
            other = "none" if feature else "a method on logits"
            raise UserError(
                f"config: {asked}, which compares the features {needed!r}, and a {type(one).__name__} does not give "
                f"them; it must be {other}, or networks of the zoo"
            )


def weights_file(host: Host, dataset: Any, name: str, weights: str) -> str:
    """Return the file that `weights` means, as in trained_network; "" if a library provides them or nobody does."""
    if weights:
        return shipped_weights(weights) or weights
    entry = host.models(dataset).get(name)
    return entry[1] or "" if isinstance(entry, tuple) else ""
