"""Networks from outside a host's zoo: timm:NAME, torchvision:NAME and package.module:constructor."""

from __future__ import annotations

import difflib
import functools
import importlib
import operator
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from .. import extensions
from ..errors import UserError, shown
from ..run import checkpoint
from .adapter import Input, reason_of

FORMS = "timm:NAME, torchvision:NAME, package.module:constructor"
"""What such a name looks like."""


def known_names() -> list[str]:
    """List the classification networks of torchvision, and of timm if it is installed, as configs name them."""
    names = [f"torchvision:{name}" for name in models.list_models(module=models)]
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        return names
    return names + [f"timm:{name}" for name in timm.list_models()]


class Outside:
    """A network that is made elsewhere.

    Its constructor raises UserError, which begins with `where`, if there is none of this name; its methods do if it
    cannot be made for so many classes, or for images of this size.
    """

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where = name, where
        self.short = name.partition(":")[2]

    def make(self, num_classes: int, side: int) -> nn.Module:
        """Make a fresh network for images of side x side pixels."""
        raise NotImplementedError

    def input(self) -> Input | None:
        """Return what the library's weights were trained on; None if it has none."""
        return None

    def pretrained(self, num_classes: int, side: int, key: str) -> nn.Module:
        """Make the network with the library's weights and their own classes; without a library it has its own.

        key: what could name a file of weights instead, for the UserError if they cannot be had.
        """
        return self.make(num_classes, side)

    def build(self, make: Callable[[], Any]) -> nn.Module:
        """Call what makes a network; UserError if it fails or returns something else."""
        try:
            with warnings.catch_warnings():  # the libraries' about their own versions
                warnings.simplefilter("ignore")
                network = make()
        except UserError:
            raise
        except Exception as error:  # anybody's constructor may fail in any way
            raise UserError(f"the network {self.name} cannot be made ({reason_of(error)})") from None
        if not isinstance(network, nn.Module):
            made = type(network).__name__
            raise UserError(f"the network {self.name} cannot be made (its constructor returns a {made}, not a module)")
        return network

    def fetch(self, source: str, key: str, make: Callable[[], Any]) -> nn.Module:
        """Make a network with a library's weights; UserError, with their source, if these cannot be had."""
        try:
            return self.build(make)
        except UserError as error:
            raise UserError(
                f"{error}; its weights come from {source}; without a network {key} must name their file"
            ) from None

    def unknown(self, names: Iterable[str]) -> UserError:
        library = self.name.partition(":")[0]
        near = difflib.get_close_matches(self.short, names, n=1)
        hint = f"; did you mean {library}:{near[0]}?" if near else ""
        return UserError(f"{self.where} is {shown(self.name)}; {library} has no network of this name{hint}")


class Timm(Outside):
    """A network of timm, by its name there, with or without a tag."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(name, where)
        try:
            self.library: Any = importlib.import_module("timm")
        except ImportError as error:
            raise UserError(
                f"{where} is {shown(name)}, and timm cannot be imported ({error}); "
                f'pip install -e ".[networks]" (or: pip install timm) brings it'
            ) from None
        try:
            known = self.library.is_model(self.short)
            self.cfg: Any = self.library.get_pretrained_cfg(self.short) if known else None
        except RuntimeError:  # an unknown tag
            known = False
        if not known:
            raise self.unknown(self.library.list_models(pretrained="." in self.short))

    def make(self, num_classes: int, side: int) -> nn.Module:
        return self._make(side, num_classes=num_classes)

    def make_dropping(self, num_classes: int, side: int, drop_path: float) -> nn.Module:
        """Make a fresh network with stochastic depth; drop_path: the share of passes that its last block leaves out."""
        return self._make(side, num_classes=num_classes, drop_path_rate=drop_path)

    def _make(self, side: int, **options: Any) -> nn.Module:
        if self.cfg is not None and self.cfg.fixed_input_size and self.cfg.input_size[-1] != side:
            options["img_size"] = side
        return self.build(lambda: self.library.create_model(self.short, **options))

    def input(self) -> Input | None:
        return self.cfg and Input(self.cfg.input_size[-1], tuple(self.cfg.mean), tuple(self.cfg.std))

    def pretrained(self, num_classes: int, side: int, key: str) -> nn.Module:
        source = self.cfg and (self.cfg.hf_hub_id or self.cfg.url)
        if not source:
            raise UserError(f"timm has no weights of {self.short}; {key} must name a file")
        if not self.cfg.num_classes:
            raise UserError(f"timm's weights of {self.short} ({source}) are of no classes; {key} must name a file")
        place = f"the Hugging Face hub, {source}" if self.cfg.hf_hub_id else source
        return self.fetch(place, key, lambda: self._make(side, pretrained=True))


class Torchvision(Outside):
    """A classification network of torchvision, by its name in torchvision.models."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(name, where)
        names = models.list_models(module=models)
        if self.short not in names:
            raise self.unknown(names)
        enum: Any = models.get_model_weights(self.short)
        self.weights = enum.DEFAULT if len(enum) else None

    def make(self, num_classes: int, side: int) -> nn.Module:
        return self._make(side, num_classes=num_classes)

    def _make(self, side: int, **options: Any) -> nn.Module:
        if self.short.startswith("vit_"):
            options["image_size"] = side
        if self.short.startswith("maxvit"):
            options["input_size"] = (side, side)
        return self.build(lambda: models.get_model(self.short, **options))

    def input(self) -> Input | None:
        if self.weights is None:
            return None
        preset = self.weights.transforms()
        return Input(preset.crop_size[0], tuple(preset.mean), tuple(preset.std))

    def pretrained(self, num_classes: int, side: int, key: str) -> nn.Module:
        if self.weights is None:
            raise UserError(f"torchvision has no weights of {self.short}; {key} must name a file")
        kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(self.weights.url).name
        if kept.is_file():  # torchvision would unpickle it whatever it refers to
            checkpoint.load(kept, f"torchvision's cache of {self.weights.url}")
        return self.fetch(self.weights.url, key, lambda: self._make(side, weights=self.weights))


class Own(Outside):
    """A user's own constructor, called with num_classes= alone."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(name, where)
        module = name.partition(":")[0]
        try:
            self.constructor = operator.attrgetter(self.short)(extensions.bring(module, f"{where} is {shown(name)}"))
        except AttributeError:
            raise UserError(f"{where} is {shown(name)}; the module {module} has no {self.short}") from None
        if not callable(self.constructor):
            raise UserError(f"{where} is {shown(name)}, which cannot be called; it must be a constructor")

    def make(self, num_classes: int, side: int) -> nn.Module:
        return self.build(lambda: self.constructor(num_classes=num_classes))


@functools.cache
def find(name: str, where: str = "the network") -> Outside | None:
    """Find the network that a name means; None if it is one of a zoo, without a colon. Raises UserError for none.

    where: the key that asks for it and where its value came from, for errors.
    """
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[\w.]+", name):
        return None
    kinds: dict[str, type[Outside]] = {"timm": Timm, "torchvision": Torchvision}
    return kinds.get(name.partition(":")[0], Own)(name, where)
