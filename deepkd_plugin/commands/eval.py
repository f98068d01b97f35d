"""`deepkd eval` and tools/eval.py: the accuracy of what a run trained, or of any weights, on test images."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .. import config, data, device
from ..errors import UserError
from ..hosts.host import settle_input
from ..hosts.libraries import FORMS
from ..hosts.networks import trained_network, weights_file
from ..hosts.registry import find_host, register
from ..run import checkpoint, record
from ..students.confusion import Confusion, measure, worst, write
from ..students.load import find_student, make, read_config
from ..terminal import Parser, guarded


def main(words: Sequence[str] | None = None, tool: str = "deepkd eval") -> int:
    """Run the command; returns its exit code. tool: what it is called."""
    return guarded(lambda: _evaluate(_arguments(words, tool)))


def _arguments(words: Sequence[str] | None, tool: str) -> argparse.Namespace:
    parser = Parser(
        tool,
        description="Test what a run trained, by its own config and on the images that it was tested on, and write "
        "accuracy by class and a picture of what is taken for what into its folder. Or test any file of weights by -m.",
        examples=("output/glyphs100/RUN", "-m resnet20 -d glyphs100 -c builtin:glyphs100_resnet20"),
    )
    parser.add_argument("run", metavar="RUN", type=Path, nargs="?", help="a run's folder, or a student file in it")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where tables and picture go (default: RUN, or nowhere)"
    )
    parser.add_argument("--trust", action="store_true", help="let the run's config name a module to import")
    parser.add_argument("-m", "--model", help=f"network, for example resnet8, or {FORMS}")
    parser.add_argument(
        *("-c", "--ckpt"),
        default="pretrain",
        type=os.path.expanduser,
        help="student file; builtin:NAME; pretrain for the zoo's weights",
    )
    parser.add_argument("-d", "--dataset", default="cifar100", help=", ".join(data.names()))
    parser.add_argument("-bs", "--batch-size", type=int, default=64)
    parser.add_argument("--root", default="./data", type=os.path.expanduser, help="folder of the data sets")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-100 if it is missing")
    parser.add_pairs()
    args = parser.parse(sys.argv[1:] if words is None else words)
    if (args.run is None) == (args.model is None):
        parser.error("needs RUN, or -m MODEL")
    given = [flag for flag in ("ckpt", "dataset", "batch_size", "root", "download") if _is_given(parser, args, flag)]
    if args.run and given:
        parser.error(f"--{given[0].replace('_', '-')} goes with -m MODEL; of RUN the config says it, or KEY VALUE")
    return args


def _is_given(parser: Parser, args: argparse.Namespace, name: str) -> bool:
    return bool(getattr(args, name) != parser.get_default(name))


def _evaluate(args: argparse.Namespace) -> None:
    found, name, title = _of_weights(args) if args.run is None else _of_run(args)
    numbers = found.numbers
    print(
        f"{title}: top-1 {numbers['test_acc']:.2f} %, top-5 {numbers['test_acc_top5']:.2f} %, loss "
        f"{numbers['test_loss']:.4f} over {int(found.images.sum())} images"
    )
    print(f"classes   the worst of {len(found.names)}: {worst(found)}")
    folder = args.out or args.run
    if folder is None:
        return
    folder = folder if args.out or folder.is_dir() else folder.parent
    files = write(found, title, folder, name)
    print(f"files     {folder}/ ({', '.join(path.name for path in files)})")


def _of_run(args: argparse.Namespace) -> tuple[Confusion, str, str]:
    student = find_student(args.run, trust=args.trust)
    if student.folder is None:
        raise UserError(f"{args.run}: is no run's folder and in none; RUN must be, or -m and -c name the file")
    cfg = read_config(student.folder, args.options, args.trust)
    loader, num_classes = data.get_test_set(cfg)
    about = student.description
    if num_classes != about.num_classes:
        raise UserError(
            f"{student.weights}: is of {about.num_classes} classes; {cfg.DATASET.TYPE} has {num_classes} here"
        )
    here = data.describe(cfg)
    if (here.size, here.mean, here.std) != (about.size, about.mean, about.std):
        raise UserError(
            f"{student.weights}: was trained on images of another size or normalisation than {here.dataset}'s"
        )
    network = make(student, trust=args.trust)
    found = _measured(network, loader, about.class_names, cfg, str(student.weights))
    best = record.find_run(student.folder).get("result", {}).get("best")
    if best is not None:
        print(f"run.json  best {best:.2f} %")
    title = f"{about.architecture} ({student.name}) on {cfg.DATASET.TYPE}"
    if cfg.DATASET.HOLDOUT:
        title += " (images kept from training, DATASET.HOLDOUT)"
    return found, student.name.removeprefix("student_"), title


def _of_weights(args: argparse.Namespace) -> tuple[Confusion, str, str]:
    host = find_host()
    register(host)
    cfg = host.cfg.clone()
    cfg.DATASET.TYPE, cfg.DATASET.ROOT, cfg.DATASET.DOWNLOAD = args.dataset, args.root, args.download
    cfg.DATASET.TEST.BATCH_SIZE, cfg.SOLVER.CHANNELS_LAST = args.batch_size, False
    cfg.DISTILLER.TYPE, cfg.DISTILLER.STUDENT = "NONE", args.model
    origin = {"DATASET.TEST.BATCH_SIZE": "command line"} | config.merge(cfg, {}, "", args.options)
    config.check(cfg, origin)
    host.check_network(cfg, args.model, "command line: -m")
    settle_input(cfg, origin)
    if isinstance(data.source(cfg), data.OwnImages):
        side, mean, std = data.source(cfg).side, cfg.INPUT.MEAN, cfg.INPUT.STD
        print(f"input     {side} x {side}, mean {mean}, std {std} (INPUT.SIZE, MEAN and STD must be as in training)")
    weights = "" if args.ckpt == "pretrain" else args.ckpt
    if file := weights_file(host, cfg, args.model, weights):
        checkpoint.there(file, "-c")  # before images are read
    loader, num_classes = data.get_test_set(cfg)
    network = trained_network(host, cfg, args.model, num_classes, weights, "-c")
    found = _measured(network, loader, data.describe(cfg).class_names, cfg, args.ckpt)
    return found, args.model.replace(":", "_"), f"{args.model} on {args.dataset}"


def _measured(network: nn.Module, loader: Any, names: Sequence[str], cfg: Any, file: str) -> Confusion:
    found = measure(network, loader, names, device.pick(), cfg.SOLVER)
    if not math.isfinite(found.numbers["test_loss"]):
        raise UserError(f"{file}: its network gives no finite numbers on {cfg.DATASET.TYPE}; it must be trained there")
    return found
