"""What must be known of a student beside its weights: what it is, which images it takes, its classes' names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from ..errors import UserError, shown
from ..run import record
from .folders import as_seen
from .normalise import Normalise
from .own import ShortSide
from .sources import ZOOS, Source, source

FEWEST, MOST_CLASSES, LARGEST = 2, 1_000_000, 4096
"""Classes and pixels of a side that a description may have: a file must not ask for all of a machine's memory."""


@dataclass(frozen=True)
class Description:
    """A student's architecture (DISTILLER.STUDENT), classes and images. Its files hold it as text (`strings`).

    zoo: of data.sources.ZOOS, where a bare name is one of. class_names: by label; numbers if the data set names none.
    size: pixels of a side of the images that it takes; mean, std: of their channels, for pixels in [0, 1]. resize: what
    becomes of an image's sides before `size` is cut from its centre: the shorter one's pixels, or (height, width); None
    if the data set does something else. version: of this package.
    """

    architecture: str
    zoo: str
    dataset: str
    num_classes: int
    class_names: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | tuple[int, int] | None
    version: str

    def prepare(self, image: Image.Image) -> Tensor:
        """Make of an image of any kind and size what the network takes, as tests do: (3, size, size) float32.

        Raises UserError if the data set's own way to do it is not known.
        """
        if self.resize is None:
            raise UserError(
                f"{self.dataset}: its test images are resized in a way that no file can hold, so others cannot be "
                f"made like them; it must be a Resize, bilinear, and a CenterCrop"
            )
        # a side that is right already stays as it is
        resize = ShortSide(self.resize) if isinstance(self.resize, int) else v2.Resize(self.resize)
        pixels = v2.functional.center_crop(resize(pil_to_tensor(as_seen(image))), [self.size, self.size])
        return Normalise(self.mean, self.std, "cpu")(pixels)

    def strings(self) -> dict[str, str]:
        """Return the description as text by name, as files of networks hold it; numbers and lists are JSON."""
        return {name: part if isinstance(part, str) else json.dumps(part) for name, part in asdict(self).items()}


def describe(cfg: Any) -> Description:
    """Describe the student that a config means; UserError for an unknown data set, or one whose names are damaged."""
    of = source(cfg)
    names = of.class_names(cfg.DATASET.ROOT) if of.class_names else None
    if names is None or len(names) != of.num_classes:
        names = [str(label) for label in range(of.num_classes)]
    return Description(
        *(cfg.DISTILLER.STUDENT, of.zoo, cfg.DATASET.TYPE, of.num_classes, tuple(map(str, names))),
        *(of.side, tuple(of.mean), tuple(of.std), _resize(of)),
        version=record.version_of("deepkd_plugin", "unknown"),
    )


def read(strings: Mapping[str, str], file: str | Path) -> Description | None:
    """Read a description from what a file holds as text; None if it holds none.

    Raises UserError, which begins with `file`, for one that cannot be of a network.
    """
    if "architecture" not in strings:
        return None
    try:
        parts: dict[str, Any] = {name: strings[name] for name in ("architecture", "zoo", "dataset", "version")}
        for name in ("num_classes", "class_names", "size", "mean", "std", "resize"):
            part = json.loads(strings[name])
            parts[name] = tuple(part) if isinstance(part, list) else part
        found = Description(**parts)
        fault = _fault(found)
    except (KeyError, ValueError, RecursionError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise UserError(f"{file}: describes no student ({fault}); it must be as a run or deepkd export wrote it")
    return found


def _fault(found: Description) -> str | None:
    """Say what of a description cannot be meant."""

    def is_size(value: Any) -> bool:
        return type(value) is int and 1 <= value <= LARGEST

    def numbers(value: Any, least: float) -> bool:
        plain = isinstance(value, tuple) and len(value) == 3 and all(type(part) in (int, float) for part in value)
        return plain and all(math.isfinite(part) and part > least for part in value)

    count, names, resize = found.num_classes, found.class_names, found.resize
    pair = isinstance(resize, tuple) and len(resize) == 2 and all(map(is_size, resize))
    checks = {
        "zoo": found.zoo in ZOOS,
        "num_classes": type(count) is int and FEWEST <= count <= MOST_CLASSES,
        "class_names": isinstance(names, tuple) and len(names) == count and all(isinstance(n, str) for n in names),
        "size": is_size(found.size),
        "mean": numbers(found.mean, -math.inf),
        "std": numbers(found.std, 0.0),
        "resize": resize is None or is_size(resize) or pair,
    }
    return next((f"its {name} is {shown(getattr(found, name))}" for name, fine in checks.items() if not fine), None)


def _resize(of: Source) -> int | tuple[int, int] | None:
    """Return a data set's `resize`, see Description."""
    kinds = (v2.Resize, transforms.Resize), (v2.CenterCrop, transforms.CenterCrop)
    if not of.resizing:
        return of.side
    first, *rest = of.resizing
    cut = len(rest) == 1 and isinstance(rest[0], kinds[1]) and tuple(rest[0].size) == (of.side, of.side)
    if (
        not isinstance(first, kinds[0])
        or v2.InterpolationMode(first.interpolation) != v2.InterpolationMode.BILINEAR
        or not first.antialias
    ):
        return None
    if first.max_size is not None or (rest and not cut):
        return None
    sides = [first.size] if isinstance(first.size, int) else list(first.size)
    if len(sides) == 1:
        return int(sides[0]) if rest else None
    return (int(sides[0]), int(sides[1])) if rest or sides == [of.side, of.side] else None
