"""Training epochs end to end, in images a second: both data pipelines, and mdistiller's own loop.

    python benchmarks/epoch.py [--images 1000] [--epochs 3] [--pairs resnet20:resnet8 …] [--write PATH.md]
    python benchmarks/epoch.py --dataset cifar100 --root DATA --images 50000 --workers 0 2 8 --execution graphs

An epoch is one pass of a trainer over the first images of each class, from asking for the first batch until the
last step is done; tests and checkpoints are left out. Each row trains an untrained pair of its own, and rows take
their epochs in turn, the first of which is not counted. The rows of a pair:

- KD and DeepKD (two distinct coefficients) by our trainers, with DATASET.PIPELINE "workers" for each number of
  --workers, and "device";
- both on the device with the teacher's logits from a table (DISTILLER.TEACHER_LOGITS): a first epoch, for which each
  time a new table is made, and one whose views are all in the table ("teacher computed" is the share that was not).
  "stored" has a few views of each image. In float32 also both with the teacher's BatchNorms folded;
- if MDISTILLER_ROOT names a checkout of mdistiller, KD by its distiller, networks, trainer, transform and
  loader on the same images, for each number of workers. --channels-last, --amp and --execution are ours
  alone.

"waiting" are the seconds of an epoch in which the trainer waits for a batch; the device pipeline makes its batches
in them, on a GPU only their launches. "to reference" is the ratio of images a second to those of the fastest KD of
mdistiller's, or of the workers' if that is not at hand.

The defaults take about a minute on 2 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import others
import torch
from common import Rows, conditions, report
from torch import nn
from torch.utils.data import DataLoader

from deepkd_plugin import data, device
from deepkd_plugin.config.tree import add_deepkd_config
from deepkd_plugin.data.arrays import Training
from deepkd_plugin.distillers import KD, DeepKD
from deepkd_plugin.hosts import builtin
from deepkd_plugin.hosts import mdistiller as adapter
from deepkd_plugin.terminal import Parser, guarded
from deepkd_plugin.trainer import DecoupledMomentumTrainer, Trainer

METHODS = {"KD": (KD, Trainer, 0.0), "DeepKD": (DeepKD, DecoupledMomentumTrainer, 0.075)}
"""name -> distiller, trainer, Δ of DeepKD's recipes: +Δ for two streams, −Δ for the third."""

SOLVER = {"LR": 0.01, "WEIGHT_DECAY": 5e-4}


class Epoch(NamedTuple):
    """What one pass took, in seconds, and how its steps were run."""

    seconds: float
    waiting: float
    steps: str
    computed: float = 1.0
    """Share of the images that went through the teacher."""


class Row(NamedTuple):
    """A loop to be timed; epoch(number) runs one pass."""

    about: dict[str, Any]
    epoch: Callable[[int], Epoch]


class Timed:
    """A loader that takes the time of a loop over it: `epoch`, from the first ask until the last step is done."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.epoch: Epoch | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        start, waiting = time.perf_counter(), 0.0
        batches = iter(self.loader)
        for _ in range(len(self)):
            asked = time.perf_counter()
            batch = next(batches)
            waiting += time.perf_counter() - asked
            yield batch
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.epoch = Epoch(time.perf_counter() - start, waiting, "eager")


def config_of(args: argparse.Namespace, pipeline: str, workers: int) -> Any:
    cfg = builtin.CFG.clone()
    add_deepkd_config(cfg)
    node = {"TYPE": args.dataset, "ROOT": str(args.root), "TRAIN_PER_CLASS": args.images // 100}
    cfg.DATASET.update(node | {"PIPELINE": pipeline, "NUM_WORKERS": workers})
    cfg.SOLVER.update(SOLVER | {"BATCH_SIZE": args.batch})
    cfg.SOLVER.update({"CHANNELS_LAST": args.channels_last, "AMP": args.amp, "EXECUTION": args.execution})
    return cfg


def networks(zoo: dict[str, Any], pair: str) -> list[nn.Module]:
    """Make teacher and student, untrained."""
    torch.manual_seed(0)
    teacher, student = (zoo[name][0](num_classes=100) for name in pair.split(":"))
    return [teacher.requires_grad_(False), student]


def our_trainer(cfg: Any, method: str, pair: str, loader: Any) -> Trainer:
    distiller, trainer, delta = METHODS[method]
    cfg.SOLVER.DECOUPLED.DELTA.update({"TOG": delta, "TCG": -delta, "NCG": delta})
    teacher, student = networks(builtin.cifar_model_dict, pair)
    placed = device.place(distiller(student, teacher, cfg), device.pick(), cfg.SOLVER.CHANNELS_LAST)
    running = trainer("epoch", placed, loader, [], cfg)
    running.told = True  # its time is what is measured here
    return running


def our_epoch(running: Trainer) -> Callable[[int], Epoch]:
    def epoch(number: int) -> Epoch:
        entry = running.train_epoch(number)
        computed = entry.get("teacher_computed", 1.0)
        return Epoch(entry["seconds"], entry["data_seconds"], entry["execution"], computed)

    return epoch


def table_epoch(running: Trainer, folder: str, full: bool) -> Callable[[int], Epoch]:
    """Make a row that reads logits from a table in `folder`: empty before each epoch, or, if `full`, with its views.

    An epoch's views depend on its number alone, so the same epoch again finds all of them.
    """
    epoch = our_epoch(running)

    def table_epoch(number: int) -> Epoch:
        if running.logits is None or not full:
            if running.logits is not None:
                running.logits.close()
            running.cfg.DISTILLER.LOGITS_DIR = tempfile.mkdtemp(dir=folder)
            with contextlib.redirect_stdout(io.StringIO()):  # the table's place is nobody's concern
                running.logits = running.open_logits()
        running.logits.checked = 0  # a batch of each epoch is compared
        return epoch(1 if full else number)

    return table_epoch


def _theirs(transform: Callable[[Any], Any], image: Any, *draws: Any) -> Any:
    """Make a view by mdistiller's transform, which draws as it likes."""
    return transform(image)


def their_epoch(host: Any, pair: str, loader: Any, workers: int, folder: str) -> Callable[[int], Epoch]:
    """Make a row of mdistiller's KD on the images of one of our loaders; its files go to `folder`."""
    ours = loader.dataset
    transform = importlib.import_module("mdistiller.dataset.cifar100").get_cifar100_train_transform()
    images = Training(ours.images, ours.chosen, partial(_theirs, transform), ours.seed)
    timed = Timed(DataLoader(images, loader.batch_size, shuffle=True, num_workers=workers))
    device.tune()  # as its launcher and our trainers
    cfg = host.cfg.clone()
    cfg.SOLVER.update(SOLVER)
    cfg.LOG.update({"PREFIX": folder, "WANDB": False})
    teacher, student = networks(host.cifar_models, pair)
    distiller = device.place(host.distillers["KD"](student, teacher, cfg), device.pick(), channels_last=False)
    name = f"{pair.replace(':', '_')}_{workers}"
    # no test images, for what follows the pass is not timed
    running = host.trainers["base"](name, device.parallel(distiller, asked=False, always=True), timed, [], cfg)

    def epoch(number: int) -> Epoch:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            running.train_epoch(number)
        return timed.epoch

    return epoch


def rows_of(args: argparse.Namespace, folder: str) -> tuple[list[Row], int]:
    """List everything to be timed, and the number of images in an epoch."""
    pipelines = [("workers", workers) for workers in args.workers] + [("device", 0)]
    configs = {key: config_of(args, *key) for key in pipelines}
    loaders = {key: data.get_dataset(cfg)[0] for key, cfg in configs.items()}
    root = others.find(others.MDISTILLER)
    host = None if root is None else adapter.load(root)
    if host is not None:
        device.tolerate_cuda_calls()
    rows = []
    for pair in args.pairs:
        about = {"pair": pair.replace(":", " → ")}
        if host is not None:
            for workers in args.workers:
                theirs = {"loop": "mdistiller", "method": "KD", "pipeline": "workers", "workers": workers}
                made = their_epoch(host, pair, loaders["workers", workers], workers, folder)
                rows.append(Row(about | theirs | {"teacher": "computed"}, made))
        for method in METHODS:
            for (pipeline, workers), loader in loaders.items():
                count = workers if pipeline == "workers" else "–"
                ours = about | {"loop": "deepkd_plugin", "method": method, "pipeline": pipeline, "workers": count}
                cfg = configs[pipeline, workers]
                made = our_epoch(our_trainer(cfg.clone(), method, pair, loader))
                rows.append(Row(ours | {"teacher": "computed"}, made))
            # of the device's loader, the last
            for kind, full in (("table", False), ("table", True), ("stored", True)):
                with_table = cfg.clone()
                with_table.DISTILLER.update({"TEACHER": pair.split(":")[0], "TEACHER_LOGITS": kind})
                own = loader if kind == "table" else data.get_dataset(with_table)[0]  # whose views are few
                made = table_epoch(our_trainer(with_table, method, pair, own), folder, full)
                rows.append(Row(ours | {"teacher": f"{kind}, {'full' if full else 'empty'}"}, made))
            if not args.amp:
                folded = cfg.clone()
                folded.DISTILLER.FOLD_TEACHER = True
                running = our_trainer(folded, method, pair, loader)
                with contextlib.redirect_stdout(io.StringIO()):
                    running.settle()
                rows.append(Row(ours | {"teacher": "folded"}, our_epoch(running)))
    return rows, len(loaders["device", 0].dataset)


def measure(rows: list[Row], images: int, epochs: int) -> Rows:
    """Make the table: medians of the epochs, taken in turn after one that is not counted."""
    taken: list[list[Epoch]] = [[] for _ in rows]
    for number in range(epochs + 1):
        for row, times in zip(rows, taken):
            device.seed_everything(0, number)
            times.append(row.epoch(number + 1))
    table = []
    for row, times in zip(rows, taken):
        seconds = statistics.median(epoch.seconds for epoch in times[1:])
        waiting = statistics.median(epoch.waiting for epoch in times[1:])
        computed = statistics.median(epoch.computed for epoch in times[1:])
        speeds = {"images/s": images / seconds, "s an epoch": seconds, "s waiting": waiting}
        speeds |= {"teacher computed": computed}
        table.append(row.about | {"steps": times[-1].steps} | speeds)
    for row in table:
        reference = {"pair": row["pair"], "method": "KD", "pipeline": "workers"}
        same = [r for r in table if reference.items() <= r.items()]
        theirs = [r for r in same if r["loop"] == "mdistiller"]
        row["to reference"] = row["images/s"] / max(r["images/s"] for r in theirs or same)
    return table


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("glyphs100", "cifar100"), default="glyphs100")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets (./data)")
    parser.add_argument("--images", type=_hundreds, default=1000, help="of the training set (1000)")
    parser.add_argument("--batch", type=_count, default=64)
    parser.add_argument("--epochs", type=_count, default=3, help="counted epochs of each row (3)")
    parser.add_argument("--workers", type=_number, nargs="+", default=[0, 2], help="loader processes (0 2)")
    parser.add_argument("--pairs", type=_pair, nargs="+", default=["resnet20:resnet8"], metavar="T:S")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--execution", choices=("eager", "compile", "graphs"), default="eager")
    parser.add_argument("--write", type=Path, help="Markdown file to write; a .json is written beside it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, images = rows_of(args, folder)
        table = measure(rows, images, args.epochs)
    what = f"{images} images of {args.dataset}, batch {args.batch}"
    title = f"Training epochs of {what}, medians of {args.epochs} in turn"
    report(title, table, args.write, conditions(args.channels_last, args.amp))


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a whole number")
    return int(text)


def _count(text: str) -> int:
    if not _number(text):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a whole number from 1 on")
    return int(text)


def _hundreds(text: str) -> int:
    if _count(text) % 100:
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a multiple of 100, as many of each class")
    return int(text)


def _pair(text: str) -> str:
    names = text.split(":")
    if len(names) != 2 or not all(name in builtin.cifar_model_dict for name in names):
        known = ", ".join(builtin.cifar_model_dict)
        raise argparse.ArgumentTypeError(f"{text!r}; it must be TEACHER:STUDENT, two of {known}")
    return text


if __name__ == "__main__":
    sys.exit(guarded(main))
