"""A folder that Hugging Face's `datasets` wrote by save_to_disk: DATASET.TYPE huggingface."""

import functools
import importlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, shown
from .folders import ImageTensors, check_classes, in_order
from .own import PARTS, OwnImages, check_names, holdout_needed, own_images
from .sources import MADE


class Rows(ImageTensors):
    """Images of a column, from bytes in its rows or from files that they name. where: what it is, for errors."""

    def __init__(self, column: Any, targets: Sequence[int], where: str) -> None:
        super().__init__(range(len(targets)), targets, None)
        self.column, self.where = column, where

    def named(self, path: Any) -> str:
        return f"{self.where}, row {path}"

    def opened(self, path: Any) -> Any:
        return io.BytesIO(self.data(path))

    def data(self, path: Any) -> bytearray:
        (image,) = self.column[path].values()
        if image is None:
            raise ValueError("it has none")
        return bytearray(image["bytes"]) if image["bytes"] is not None else super().data(image["path"])

    def fingerprinted(self) -> Iterator[bytes]:
        """Yield what tells these images from others."""
        return (bytes(self.data(path)) for path in self.paths)


def hugging_face(cfg: Any) -> OwnImages:
    """Make the source of such a folder: one with parts, or one part and DATASET.HOLDOUT.

    Its columns are the only one of images and the only one of classes, or those of DATASET.COLUMNS. Raises UserError
    if they cannot be told. Nothing that the folder holds is run.
    """
    node = cfg.DATASET
    parts, where = _loaded(node.ROOT), f"{node.ROOT}: DATASET.ROOT"
    tests = [node.TEST.SPLIT] if node.TEST.SPLIT else PARTS
    test = next((name for name in tests if name in parts), None)
    first = "train" if "train" in parts else test
    if first is None or (node.TEST.SPLIT and test is None):
        raise UserError(f"{where} has the parts {', '.join(parts)}; there must be train, and {' or '.join(tests)}")
    image, label = _columns(parts[first], node.COLUMNS, where)
    names, labels = _classes(parts[first], label, f"{node.ROOT}, {first}")

    def read(root: str, split: str) -> tuple[Rows, np.ndarray]:
        part = "train" if split == "train" else test
        if part not in parts:
            raise holdout_needed(f"{where} has the part {', '.join(parts)} alone")
        place = f"{root}, {part}"
        theirs, numbers = (names, labels) if part == first else _classes(parts[part], label, place)
        if _is_text(parts[part], label):
            check_classes(Path(place), theirs or [], Path(f"{root}, {first}"), names or [])
        check_names(theirs, names, place)
        column = parts[part].select_columns([image]).with_format(None)
        return Rows(column.cast_column(image, _library().Image(decode=False)), numbers.tolist(), place), numbers

    return own_images(cfg, read, names, len(names) if names else int(labels.max()) + 1, where)


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"DATASET.TYPE is 'huggingface', and datasets cannot be imported ({error}); "
            f'pip install -e ".[datasets]" (or: pip install datasets) brings it'
        ) from None


@functools.cache
def _loaded(root: str) -> dict[str, Any]:
    """Open a folder; returns its parts by name, of one without parts {"train": it}. No image is read."""
    library = _library()
    try:
        found = library.load_from_disk(str(Path(root).resolve()))  # which has no scheme of a file system elsewhere
    except Exception as error:  # whatever is in the folder
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{root}: DATASET.ROOT must be a folder that save_to_disk of Hugging Face's datasets wrote ({reason})"
        ) from None
    parts: dict[str, Any] = dict(found) if isinstance(found, dict) else {"train": found}
    if not parts:
        raise UserError(f"{root}: DATASET.ROOT has no part; there must be train")
    return parts


def _columns(part: Any, asked: Sequence[str], where: str) -> tuple[str, str]:
    """Return the names of the columns of images and of labels."""
    kinds = {name: type(feature).__name__ for name, feature in part.features.items()}
    columns = []
    for kind, given in zip(("Image", "ClassLabel"), asked or (None, None)):
        of_kind = [name for name, its in kinds.items() if its == kind] if given is None else [given]
        if len(of_kind) != 1 or of_kind[0] not in kinds:
            have = ", ".join(f"{name} ({its})" for name, its in kinds.items())
            raise UserError(
                f"{where} has the columns {have}; DATASET.COLUMNS must be two of them, of images and of labels"
            )
        columns += of_kind
    if kinds[columns[0]] != "Image":
        raise UserError(f"{where}: the column {columns[0]} is {kinds[columns[0]]}; that of images must be Image")
    return columns[0], columns[1]


def _is_text(part: Any, label: str) -> bool:
    return getattr(part.features[label], "dtype", "") == "string"


def _classes(part: Any, label: str, where: str) -> tuple[list[str] | None, np.ndarray]:
    """Return the names of the classes in the order of their labels, if they have any, and the labels (N,)."""
    values = part.select_columns([label]).with_format(None)[:][label]
    if not values:
        raise UserError(f"{where}: has no image; it must have some")
    if _is_text(part, label) and None not in values:
        names = in_order(set(values))
        numbers = {name: number for number, name in enumerate(names)}
        return names, np.array([numbers[value] for value in values])
    labels = np.array(values)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        bad = next((value for value in values if type(value) is not int), values[0])
        raise UserError(f"{where}: the column {label} has {shown(bad)}; it must have whole numbers or names of classes")
    return getattr(part.features[label], "names", None), labels


MADE["huggingface"] = hugging_face
