"""What a student says of images: its most likely classes by name."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.description import Description
from ..errors import UserError
from .formats import Run
from .images import prepared

BATCH = 32
"""Images that pass through a network at once."""


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of an image, the most likely first: labels, names and probabilities."""

    file: Path
    labels: tuple[int, ...]
    names: tuple[str, ...]
    probabilities: tuple[float, ...]


@torch.no_grad()
def predict(run: Run, about: Description, files: Sequence[Path], top: int = 5) -> Iterator[Prediction]:
    """Yield what a student says of each image, in order; all classes if there are fewer than `top`.

    Raises UserError, with the path, for an image that cannot be read, and for logits that are no numbers.
    """
    for first in range(0, len(files), BATCH):
        chosen = files[first : first + BATCH]
        logits = run(torch.stack([prepared(path, about) for path in chosen]))
        if logits.shape != (len(chosen), about.num_classes) or not bool(torch.isfinite(logits).all()):
            raise UserError(
                f"{chosen[0]}: the network gives logits of the shape {tuple(logits.shape)}, or no finite numbers; they "
                f"must be finite and of the shape ({len(chosen)}, {about.num_classes})"
            )
        best = logits.float().softmax(1).topk(min(top, about.num_classes), dim=1)
        for path, labels, values in zip(chosen, best.indices.tolist(), best.values.tolist()):
            yield Prediction(path, tuple(labels), tuple(about.class_names[label] for label in labels), tuple(values))


def as_text(predictions: Sequence[Prediction]) -> str:
    """Write predictions for the terminal, a block for each image."""
    blocks = []
    for one in predictions:
        rows = (f"  {value:7.2%}  {name}" for name, value in zip(one.names, one.probabilities))
        blocks.append("\n".join([str(one.file), *rows, ""]))
    return "\n".join(blocks)


def as_csv(predictions: Sequence[Prediction]) -> str:
    """Write predictions as CSV, a line for each image: file, class_1, probability_1, class_2, …."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    count = len(predictions[0].names) if predictions else 0
    head = [f"{part}_{place}" for place in range(1, count + 1) for part in ("class", "probability")]
    writer.writerow(["file", *head])
    for one in predictions:
        pairs = zip(one.names, (f"{value:.6f}" for value in one.probabilities))
        writer.writerow([str(one.file), *(part for pair in pairs for part in pair)])
    return file.getvalue()


def as_json(predictions: Sequence[Prediction]) -> str:
    """Write predictions as JSON: a list of {"file", "top": [{"class", "label", "probability"}]}."""
    listed = [
        {
            "file": str(one.file),
            "top": [
                {"class": name, "label": label, "probability": round(value, 6)}
                for name, label, value in zip(one.names, one.labels, one.probabilities)
            ],
        }
        for one in predictions
    ]
    return json.dumps(listed, ensure_ascii=False, indent=1) + "\n"
