"""Several configs, each with several learning rates: how the rates of a table's configs were chosen.

    python benchmarks/learning_rates.py CONFIG … --rates 0.05 0.1 0.2 --table tuning.md --options DATASET.HOLDOUT 0.2

Without DATASET.HOLDOUT the rates would be chosen on the test images. A call that was stopped goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepkd_plugin.errors import UserError
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.run.record import read_run
from deepkd_plugin.study.kinds import KINDS
from deepkd_plugin.study.measures import CLASSIFICATION, MEASURES
from deepkd_plugin.study.reproduce.display import for_stream
from deepkd_plugin.study.reproduce.runs import execute
from deepkd_plugin.study.table import Run
from deepkd_plugin.terminal import guarded

KIND = KINDS[CLASSIFICATION]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, help="config files of one data set and pair")
    parser.add_argument("--rates", nargs="+", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY VALUE", help="for every run")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--output", type=Path, default=Path("output/learning_rates"), help="folder of the runs")
    parser.add_argument("--table", type=Path, help="file to write, .md; a .json beside it holds every run")
    args = parser.parse_args()
    cells = {(config.stem, rate): planned(config, rate, args) for config in args.configs for rate in args.rates}
    if missing := KIND.problems(list(cells.values()), prepare=True):
        raise UserError("; ".join(missing))
    teachers = KIND.teachers({cell: cfg for cell, (_, cfg) in cells.items()})
    runs = {cell: replace(run, teacher=teachers[cell]) for cell, (run, _) in cells.items()}
    failures = execute(list(runs.values()), args.jobs, display=for_stream())
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        sys.exit(1)
    rows = [record(method, rate, run) for (method, rate), run in runs.items()]
    text = table(rows)
    print(text)
    if args.table:
        args.table.write_text(text)
        args.table.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


def planned(config: Path, rate: float, args: argparse.Namespace) -> tuple[Run, Any]:
    """Plan the run of a config with a rate, and its resolved config."""
    # every run takes the same teacher, and its config is known before it starts
    options = ["DISTILLER.FOLD_TEACHER", "False", *args.options, "SOLVER.LR", f"{rate:g}"]
    cfg = KIND.read(config, options)
    above, config_hash = args.output.absolute(), KIND.hash(cfg, args.seed)
    name = f"seed{args.seed}-{config_hash[:8]}"
    given = (*options, *KIND.own_options(args.seed, above, config.stem, name))
    folder = above / config.stem / name
    label, lines = f"rate {rate:g}", KIND.lines(cfg)  # in the place of a pair
    return Run(label, config.stem, args.seed, config.absolute(), given, config_hash, lines, folder), cfg


def record(method: str, rate: float, run: Run) -> dict[str, Any]:
    run_json, key = read_run(run.folder), MEASURES[CLASSIFICATION].key
    kept = {
        name: run_json[name]
        for name in ("seed", "commit", "code", "config_hash", "teacher", "teacher_acc", "processor")
    }
    curve = " ".join(f"{line[key]:.2f}" for line in read_metrics(run.folder))
    return {"method": method, "lr": rate, **run_json["result"], **kept, "curve": curve}


def table(rows: list[dict[str, Any]]) -> str:
    """Write the last epoch's top-1 by method and rate, the best of a method in bold."""
    rates = sorted({row["lr"] for row in rows})
    lines = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        last = {row["lr"]: row["last"] for row in rows if row["method"] == method}
        best = max(last.values())
        cells = [f"**{last[rate]:.2f}**" if last[rate] == best else f"{last[rate]:.2f}" for rate in rates]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(guarded(main))
