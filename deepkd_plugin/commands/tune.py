"""`deepkd tune`: the settings of a table's methods, chosen on held-out training images with equal effort."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..distributed.environment import one_process
from ..terminal import Parser, count


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd tune",
        description="Search learning rate and warm-up of each method, and of DeepKD also the size of its deltas and "
        "the mask, on a held-out share of the training images, every method with as many trials and seeds; then write "
        "the chosen configs. Test images are not read. The same command goes on after an interruption. A KEY VALUE "
        "pair holds for every trial, and what it sets is not searched.",
        examples=("--cfg glyphs100/res20_res8/deepkd --budget 10 SOLVER.EPOCHS 20",),
        argument_default=argparse.SUPPRESS,  # Request has the defaults
    )
    add = parser.add_argument
    cfg = "a method's config, which may be given several times, or a folder of them, one pair's"
    add("--cfg", dest="files", metavar="FILE", type=Path, action="append", required=True, help=cfg)
    add("--budget", metavar="N", type=count, help="trials of each method (default: 20)")
    add("--methods", metavar="METHOD", nargs="+", help="some of the configs, by name (default: all)")
    add("--seeds", metavar="N", type=count, help="runs of each trial, seeds 0 to N - 1 (default: 1)")
    add("--jobs", metavar="N", type=count, help="runs side by side (default: one for each GPU, or 1)")
    ends = "lower and upper end of the learning rate's range (default: the configs' lowest / 4 and highest x 4)"
    add("--rates", metavar="RATE", type=float, nargs="+", help=ends)
    add("--out", metavar="DIR", type=Path, help="default: output/tune/PAIR")
    add("--dry-run", action="store_true", help="show the plan, start and write nothing")
    parser.add_pairs()
    args = parser.parse(words)
    one_process()
    from ..study.tune.command import tune
    from ..study.tune.plan import Request

    return tune(Request(**vars(args), command=shlex.join(["deepkd", "tune", *words])))
