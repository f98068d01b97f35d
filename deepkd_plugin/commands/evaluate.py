"""Accuracy of a network's weights on a data set's test images."""

import argparse
import math
import sys
from collections.abc import Sequence

from .. import config, data, device
from ..accuracy import Alone, evaluate
from ..errors import UserError
from ..hosts.host import settle_input
from ..hosts.libraries import FORMS
from ..hosts.networks import trained_network
from ..hosts.registry import find_host, register
from ..terminal import Parser, guarded


def main(argv: Sequence[str] | None = None) -> int:
    """`tools/eval.py`, with mdistiller's options and the data set's folder. Returns the exit code."""
    return guarded(lambda: _evaluate(_arguments(argv)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("tools/eval.py", description="Test a student file or a teacher.")
    parser.add_argument("-m", "--model", required=True, help=f"network, for example resnet8, or {FORMS}")
    parser.add_argument(
        "-c", "--ckpt", default="pretrain", help="student file; builtin:NAME; pretrain for the zoo's weights"
    )
    parser.add_argument("-d", "--dataset", default="cifar100", help=", ".join(data.names()))
    parser.add_argument("-bs", "--batch-size", type=int, default=64)
    parser.add_argument("--root", default="./data", help="folder of the data sets")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-100 if it is missing")
    parser.add_pairs()
    return parser.parse(sys.argv[1:] if argv is None else argv)


def _evaluate(args: argparse.Namespace) -> None:
    host = find_host()
    register(host)
    cfg = host.cfg.clone()
    cfg.DATASET.TYPE, cfg.DATASET.ROOT, cfg.DATASET.DOWNLOAD = args.dataset, args.root, args.download
    cfg.DATASET.TEST.BATCH_SIZE = args.batch_size
    cfg.DISTILLER.TYPE, cfg.DISTILLER.STUDENT = "NONE", args.model
    origin = {"DATASET.TEST.BATCH_SIZE": "command line"} | config.merge(cfg, {}, "", args.options)
    config.check(cfg, origin)
    host.check_network(cfg, args.model, "command line: -m")
    settle_input(cfg, origin)
    if isinstance(data.source(cfg), data.OwnImages):
        side, mean, std = data.source(cfg).side, cfg.INPUT.MEAN, cfg.INPUT.STD
        print(f"input     {side} x {side}, mean {mean}, std {std} (INPUT.SIZE, MEAN and STD must be as in training)")
    loader, num_classes = data.get_test_set(cfg)
    weights = "" if args.ckpt == "pretrain" else args.ckpt
    torch_device = device.pick()
    network = trained_network(host, cfg, args.model, num_classes, weights, "-c")
    result = evaluate(Alone(device.place(network, torch_device, False)), loader, torch_device, cfg.SOLVER)
    if not math.isfinite(result["test_loss"]):
        raise UserError(f"{args.ckpt}: its network gives no finite numbers on {args.dataset}; it must be trained there")
    print(
        f"{args.model} on {args.dataset}: top-1 {result['test_acc']:.2f} %, top-5 "
        f"{result['test_acc_top5']:.2f} %, loss {result['test_loss']:.4f} over {len(loader.dataset)} images"
    )
