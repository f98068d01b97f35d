"""What the runs of each kind of table measure, and what reports call it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measures:
    """The numbers in a run's metrics.jsonl that a table is of.

    metric: the main one, in headings. key: its name in metrics.jsonl. noun: its name in sentences. further: others'
    names and keys. step: what a line of metrics.jsonl is written after.
    """

    metric: str
    key: str
    noun: str
    further: Mapping[str, str] = field(default_factory=dict)
    step: str = "epoch"


_AP = {"metric": "AP (%)", "key": "test_ap", "noun": "AP", "further": {"AP50": "test_ap50", "AP75": "test_ap75"}}

CLASSIFICATION, DETECTION, DETECTRON2 = "classification", "detection", "detectron2"

MEASURES = {
    CLASSIFICATION: Measures("top-1 (%)", "test_acc", "accuracy"),
    DETECTION: Measures(**_AP),
    DETECTRON2: Measures(**_AP, step="evaluation"),
}
"""By the kind that table.json names; one that names none is of the first."""
