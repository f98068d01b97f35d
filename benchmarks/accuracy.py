"""Accuracy of several configs over several seeds, as a table with its protocol.

    python benchmarks/accuracy.py CONFIG … --seeds 0 1 2 3 4 --table results/glyphs100.md
    python benchmarks/accuracy.py CONFIG … --grid 0.02 0.05 0.1 0.2 --options DATASET.HOLDOUT 0.2

Each run is a process of tools/train.py with its share of the cores; finished runs are kept, so a call that
was stopped goes on where it was. With --grid every config is trained once with each learning rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deepkd_plugin.config import flatten
from deepkd_plugin.launch import read_config
from deepkd_plugin.record import config_hash, read_run
from deepkd_plugin.registry import BUILTIN

ROOT = Path(__file__).parents[1]
KEPT = (
    *("result", "minutes", "seed", "teacher_acc", "device", "processor", "python", "versions", "commit"),
    "config_hash",
)
"""What is kept of a run's run.json."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", type=Path, help="config files of one data set and pair")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--grid", nargs="+", help="learning rates to try, each with every config")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY VALUE", help="for every run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("output/accuracy"), help="where the runs lie")
    parser.add_argument(
        "--table", type=Path, help="Markdown file to write; a .json beside it holds every run"
    )
    args = parser.parse_args()
    variants = [("SOLVER.LR", lr) for lr in args.grid] if args.grid else [()]
    wanted = [(c, s, v) for s in args.seeds for v in variants for c in args.configs]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(lambda job: train(*job, args, threads), wanted))
    table = grid_table(runs) if args.grid else seed_table(runs)
    text = protocol(runs, args) + "\n" + table
    print(text)
    if args.table:
        args.table.write_text(text)
        args.table.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n")
    return 0


def train(
    config: Path, seed: int, variant: tuple[str, ...], args: argparse.Namespace, threads: int
) -> dict[str, Any]:
    """One run, unless it is finished already; returns its record."""
    name = "-".join([config.stem, f"seed{seed}", *variant[1:]])
    options = [*args.options, *variant, "SOLVER.SEED", str(seed), "LOG.PREFIX", str(args.output)]
    options += ["EXPERIMENT.NAME", name]
    cfg, _ = read_config(BUILTIN, str(config), options)
    folder = args.output / cfg.EXPERIMENT.PROJECT / name
    if (folder / "run.json").exists() and read_run(folder)["config_hash"] != config_hash(cfg):
        raise SystemExit(f"{folder} holds a run of another config; name another --output")
    if not (folder / "run.json").exists() or not read_run(folder)["finished"]:
        flag = "--resume" if (folder / "latest").exists() else "--overwrite"
        command = [sys.executable, str(ROOT / "tools/train.py"), "--cfg", str(config), flag, *options]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed with exit code {done.returncode}: {done.stderr[-2000:]}")
    run = read_run(folder)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    result = run["result"]
    print(f"{name}: best {result['best']:.2f} last {result['last']:.2f}", file=sys.stderr, flush=True)
    return {
        "method": config.stem,
        "config": flatten(cfg),
        "lr": max(line["lr"] for line in lines),
        "momentum": lines[-1]["momentum"],
        "curve": [line["test_acc"] for line in lines],
    } | {key: run[key] for key in KEPT}


def protocol(runs: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """What the numbers are, and where they were measured."""
    first = runs[0]
    cfg = first["config"]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    teachers = sorted({f"{run['teacher_acc']:.2f} %" for run in runs if run["teacher_acc"] is not None})
    images = "held-out training images" if cfg["DATASET.HOLDOUT"] else "test images"
    per_class = cfg["DATASET.TRAIN_PER_CLASS"] or "all"
    pair = " → ".join([teacher_name(runs), cfg["DISTILLER.STUDENT"]])
    precision = ", bfloat16 autocast" if cfg["SOLVER.AMP"] else ""
    return (
        f"{cfg['DATASET.TYPE']}, {pair}: top-1 in percent on the {images}; {per_class} training images of each "
        f"class, share held out {cfg['DATASET.HOLDOUT']:g}; {first['result']['epochs']} epochs, batch "
        f"{cfg['SOLVER.BATCH_SIZE']}{precision}, seeds {', '.join(map(str, args.seeds))}. best: the best of all "
        f"epochs, last: the last epoch; mean ± standard deviation (n − 1). Teacher "
        f"{', '.join(teachers) or 'none'} on the same images.\n\n"
        f"{first['processor']}, {first['device']}, Python {first['python']}; {versions}; commit "
        f"{', '.join(sorted({run['commit'] for run in runs}))}.\n"
    )


def teacher_name(runs: list[dict[str, Any]]) -> str:
    taught = [run["config"]["DISTILLER.TEACHER"] for run in runs if run["teacher_acc"] is not None]
    return taught[0] if taught else "no teacher"


def seed_table(runs: list[dict[str, Any]]) -> str:
    rows = ["| method | learning rate | n | best | last | minutes a run |", "|---|---|---|---|---|---|"]
    for method in dict.fromkeys(run["method"] for run in runs):
        mine = [run for run in runs if run["method"] == method]
        best, last = ([run["result"][key] for run in mine] for key in ("best", "last"))
        minutes = statistics.median(run["minutes"] for run in mine)
        rates = ", ".join(sorted({f"{run['lr']:g}" for run in mine}))
        rows.append(f"| {method} | {rates} | {len(mine)} | {spread(best)} | {spread(last)} | {minutes:.1f} |")
    return "\n".join(rows) + "\n"


def grid_table(runs: list[dict[str, Any]]) -> str:
    """Last top-1 by method and learning rate, averaged over the seeds; the best rate in bold."""
    rates = list(dict.fromkeys(run["lr"] for run in sorted(runs, key=lambda run: run["lr"])))
    rows = ["| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for method in dict.fromkeys(run["method"] for run in runs):
        means = [
            statistics.mean(r["result"]["last"] for r in runs if (r["method"], r["lr"]) == (method, rate))
            for rate in rates
        ]
        cells = [f"**{mean:.2f}**" if mean == max(means) else f"{mean:.2f}" for mean in means]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
