"""`deepkd report DIR`: a table's runs as report.md, report.csv, runs.csv and report.html in its folder."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...run.checkpoint import write_text
from ..shared import csv_text
from .cells import NUMBERS, Cell, assemble
from .collect import NOT_STARTED, UNFINISHED, Record, Results, collect
from .page import markdown, page
from .statistics import Difference


def report(folder: Path) -> list[Path]:
    """Write the report of a table's folder and return its files: report.md, report.csv, runs.csv, report.html.

    Each is written whole. Finished runs that do not count are told of on stderr. Raises UserError if the folder holds
    no table or cannot be written.
    """
    folder = Path(folder)
    table = collect(folder)
    cells = assemble(table)
    texts = {
        "report.md": markdown(table, cells),
        "report.csv": _csv(cell_rows(table, cells)),
        "runs.csv": _csv(run_rows(table)),
        "report.html": page(table, cells),
    }
    for name, text in texts.items():
        try:
            write_text(folder / name, text)
        except OSError as error:
            raise UserError(f"{folder / name}: must be a file that can be written ({error})") from None
    lost = [left for left in table.left_out if left.kind not in (NOT_STARTED, UNFINISHED)]
    if lost:
        first = lost[0]
        print(
            f"{folder}: {len(lost)} of the runs there do not count, the first {first.run.folder}: {first.reason}; "
            f"report.md has all",
            file=sys.stderr,
        )
    return [folder / name for name in texts]


def cell_rows(table: Results, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Make the rows of report.csv, one for each pair and method; a number that does not exist is an empty field."""
    rows = []
    for cell in cells:
        value = cell.published
        row: dict[str, Any] = {
            "table": table.name,
            "dataset": table.dataset,
            "metric": table.metric,
            "pair": cell.pair.name,
            "teacher": cell.pair.teacher,
            "student": cell.pair.student,
            "method": cell.method.name,
            "label": cell.method.label,
            "base": cell.method.base,
            "n": len(cell.records),
            "planned": len(cell.planned),
            "missing": len(cell.planned) - len(cell.records),
            "epochs": cell.planned[0].epochs,
            "published_method": value and value.method,
            "published_value": value and value.text,
            "published_source": value and value.source,
            "published_certainty": value and value.certainty,
            "published_note": value and value.note,
            "published_gain": cell.published_gain,
        }
        for name in NUMBERS:
            number = cell.numbers[name]
            row |= {f"{name}_mean": number.summary.mean, f"{name}_std": number.summary.std}
            for other, summary in number.further.items():
                measure = f"{name}_{other.lower()}"
                row |= {f"{measure}_mean": summary.mean, f"{measure}_std": summary.std}
            for what, one in (("minus_published", number.minus_published), ("gain", number.gain)):
                row[f"{name}_{what}"] = one and one.value
                row |= _interval(f"{name}_{what}", one)
            row |= _interval(f"{name}_paired", number.paired)
            row[f"{name}_p"] = number.gain and number.gain.p
            row[f"{name}_holm_p"] = number.holm_p
            row[f"{name}_verdict"] = number.gain and number.gain.verdict
            row[f"{name}_verdict_after_holm"] = number.after_holm
        rows.append(row)
    return rows


def _interval(name: str, one: Difference | None) -> dict[str, float | None]:
    return {f"{name}_low": one and one.low, f"{name}_high": one and one.high}


def run_rows(table: Results) -> list[dict[str, Any]]:
    """Make the rows of runs.csv, one for each planned run: what it measured, or why it does not count."""
    rows = []
    for run in table.runs:
        one = table.outcomes[run]
        record, left = (one, None) if isinstance(one, Record) else (None, one)
        values = vars(record) if record else {}
        row: dict[str, Any] = {"pair": run.pair, "method": run.method, "seed": run.seed}
        row |= {"status": left.kind if left else "counted", "reason": left and left.reason}
        for number in NUMBERS:
            row[number] = values.get(number)
            for name in table.measures.further:
                row[f"{number}_{name.lower()}"] = record and record.further[number][name]
        row |= {name: values.get(name) for name in ("best_epoch", "epochs", "minutes", "teacher")}
        row[table.measures.key.replace("test", "teacher")] = values.get("teacher_acc")
        row["execution"] = record and "; ".join(record.execution)
        row |= {name: values.get(name) for name in ("device", "processor", "python", "commit", "started")}
        row["processes"] = record and " ".join(map(str, record.processes))
        row["code"] = record and record.codes[0]
        row["versions"] = record and ", ".join(map(" ".join, record.versions.items()))
        row["config_hash"] = run.hash
        row["taken_from"] = values.get("taken_from")
        row["folder"] = Path(os.path.relpath(run.folder, table.folder)).as_posix()
        rows.append(row)
    return rows


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    # ten digits: more than was measured, fewer than the sums' rounding
    return csv_text([{k: f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])
