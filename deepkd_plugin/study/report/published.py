"""The published numbers, each with its source and how sure it is, and which of our cells they belong to."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...distillers import bases
from ..table import NOMASK, row_name

FILE = Path(__file__).with_name("published.csv")

SAME_NETWORK = {("imagenet", "MobileNetV2"): "MobileNetV1"}
"""Our names of networks that the published tables call otherwise: see hosts/registry.py for this one."""

LIBRARYS_NAME = {"timm:regnety_160.deit_in1k": "RegNetY-16GF", "timm:deit_tiny_patch16_224": "DeiT-Tiny"}
"""A library's names of networks, and those of the published tables."""


@dataclass(frozen=True)
class Published:
    """One published number: its text and value (None if the text is a range), source and certainty.

    note: how the published variant differs from ours, and how it was trained if that is known to be unusual.
    comparable: whether a difference from ours means anything; False if ours was trained or tested on other images, and
    if nobody who can be named stands for the number.
    """

    method: str
    text: str
    value: float | None
    source: str
    certainty: str
    note: str = ""
    comparable: bool = True

    @property
    def comparable_value(self) -> float | None:
        """The value, if a difference from it means anything."""
        return self.value if self.comparable else None


@cache
def rows() -> tuple[dict[str, str], ...]:
    """Read the file's rows, by column."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def _of_pair(dataset: str, metric: str, teacher: str, student: str) -> list[dict[str, str]]:
    """Choose the rows of a pair, or with two empty names those of none, by a metric like "top-1 (%)"."""
    return [
        row
        for row in rows()
        if (row["dataset"], row["teacher"], row["student"]) == (dataset, teacher, student)
        and metric.replace("-", "").lower().startswith(row["metric"].lower())
    ]


UNLIKE = "not comparable: "
"""How the note begins that says why a difference from ours would mean nothing."""

HEARSAY = "hearsay"
"""How the certainty of a row begins whose source nobody can look up."""

CONTEXT = "context"
"""The table of rows that are no method of ours: other people's, beside which a pair's numbers can be read."""

HARMLESS = (
    *("DATASET.ROOT", "DATASET.DOWNLOAD", "DATASET.NUM_WORKERS", "DATASET.PIPELINE"),
    *("DATASET.TEST.BATCH_SIZE", "SOLVER.EXECUTION", "SOLVER.GRADIENTS", "SOLVER.CHANNELS_LAST"),
    *("SOLVER.DETERMINISTIC", "DISTILLER.FOLD_TEACHER"),
    *("GSNR.MEASURE", "GSNR.LAYERS"),
)
"""Options that do not change the protocol."""


def find(
    dataset: str,
    metric: str,
    teacher: str,
    student: str,
    method: str,
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, str] | None = None,
) -> Published | None:
    """Find the published number of one of our cells; None if there is none.

    method: the row's name. metric: the table's, like "top-1 (%)". settings: the flat config of the cell's runs, None
    if it has none, which is then taken to be as shipped. options: what every run of the table was given beside its
    config file.
    """
    teacher, student = (LIBRARYS_NAME.get(name, name) for name in (teacher, student))
    settings = {"DeepKD.MASK.TYPE": "none" if method.endswith(NOMASK) else "dynamic"} | dict(settings or {})
    masked = settings["DeepKD.MASK.TYPE"] == "dynamic"
    network = SAME_NETWORK.get((dataset, student), student)
    there = {row["method"]: row for row in _of_pair(dataset, metric, teacher, network) if row.get("table") != CONTEXT}
    rows_over = {name: (row_name(name, deepkd=True), f"{row_name(name, deepkd=True)}{NOMASK}") for name in bases()}
    base = next((name for name in bases() if method in (row_name(name), *rows_over[name])), None)
    if base is None:
        return None
    names = [bases()[base].published or base]
    over = method in rows_over[base]
    if over:  # whose mask is the dynamic one
        names = [f"{names[0]}+DeepKD+DTM", f"{names[0]}+DeepKD"]
        names = names if masked else names[::-1]
    name = next((name for name in names if name in there), None)
    if name is None:
        return None
    notes = []
    if over and masked != name.endswith("+DTM"):
        notes.append("published without DTM, ours with it" if masked else "published with DTM, ours without it")
    if over and settings["DeepKD.MASK.TYPE"] not in ("none", "dynamic"):
        notes.append(f"ours with DeepKD.MASK.TYPE {settings['DeepKD.MASK.TYPE']}")
    if network != student:
        notes.append(f"published for {network}, the network that mdistiller has under this name")
    if settings.get("EXPERIMENT.LOGIT_STAND"):
        notes.append("ours with standardised logits")
    if settings.get("DISTILLER.ENTROPY_WEIGHT", "none") != "none":
        notes.append("ours with samples weighted by entropy")
    if base == "MLKD" and settings.get("MLKD.VARIANT") == "formula":
        notes.append("ours with MLKD.VARIANT formula")
    if per_class := settings.get("DATASET.TRAIN_PER_CLASS"):
        notes.append(f"{UNLIKE}ours saw {per_class} training images of each class")
    if settings.get("DATASET.HOLDOUT"):
        notes.append(f"{UNLIKE}ours was tested on training images that were held out")
    for key, value in (options or {}).items():
        if key == "SOLVER.EPOCHS":
            notes.append(f"{UNLIKE}ours trained for {value} epochs, as an option said")
        elif key not in (*HARMLESS, "DATASET.TRAIN_PER_CLASS", "DATASET.HOLDOUT"):
            notes.append(f"ours with {key} {value}")
    row = there[name]
    if row["certainty"].startswith(HEARSAY):
        notes.append(f"{UNLIKE}nobody who can be named stands for it")
    if protocol := row.get("protocol"):
        notes.append(f"published: {protocol}")
    try:
        number: float | None = float(row["value"])
    except ValueError:  # "+47% to +59%"
        number = None
    comparable = not any(note.startswith(UNLIKE) for note in notes)
    return Published(name, row["value"], number, row["source"], row["certainty"], "; ".join(notes), comparable)


def without_pair(dataset: str, metric: str) -> list[str]:
    """Say what is published for a data set without a pair, a sentence each: it is no cell's value."""
    return [
        f"{row['method']}: {row['metric']} {row['value']} ({row['source']}; {row['certainty']})"
        for row in _of_pair(dataset, metric, "", "")
    ]


def context(dataset: str, metric: str, teacher: str, student: str) -> list[str]:
    """Say what other methods are published with for a pair, best first, a sentence each."""
    network = SAME_NETWORK.get((dataset, student), student)
    others = [row for row in _of_pair(dataset, metric, teacher, network) if row["table"] == CONTEXT]
    others.sort(key=lambda row: -float(row["value"]))
    about = ["; ".join(filter(None, (row["source"], row["certainty"], row["protocol"]))) for row in others]
    return [f"{row['method']}: {row['value']} ({text})" for row, text in zip(others, about)]
