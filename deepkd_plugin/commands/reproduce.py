"""`deepkd reproduce`: a table from its configs to its report."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from ..distributed.environment import one_process
from ..terminal import Parser, count


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd reproduce",
        description="Plan the runs of a table (pair x method x seed), show the plan and an estimate of its time, "
        "run what is not finished yet, and report. The same command goes on after an interruption. Tables: the "
        "folders of configs/ and of configs/detection/, coco (mdistiller's detectors, on detectron2), "
        "ablation-momentum, ablation-steps, ablation-mask, ablation-delta and ablation-phases, and your own: a folder "
        "of configs PAIR/METHOD.yaml.",
        examples=(
            "glyphs100 --methods vanilla kd deepkd --seeds 3",
            "ablation-mask --seeds 3 --dry-run",
        ),
        argument_default=argparse.SUPPRESS,  # Request has the defaults
    )
    add = parser.add_argument
    add("table", metavar="TABLE", help="cifar100, imagenet, glyphs100, glyph_canvas, coco, ..., or a folder")
    add("--pairs", metavar="PAIR", nargs="+", help="some of the table's pairs (default: all)")
    add("--methods", metavar="METHOD", nargs="+", help="some of the table's rows (default: the article's, or all)")
    add("--base", metavar="METHOD", help="of an ablation: the row that DeepKD is put over (default: kd)")
    add("--dataset", metavar="NAME", help="of an ablation: glyphs100 (default), cifar100, ..., or a folder")
    weights = "also train each base under the loss weights of DeepKD over it, and take DeepKD's gain over that"
    add("--matched", action="store_true", help=weights)
    add("--seeds", metavar="N", type=count, help="seeds 0 to N - 1 (default: 5)")
    add("--jobs", metavar="N", type=count, help="runs side by side (default: as many as there are GPUs for, or 1)")
    add("--gpus-per-run", metavar="N", type=count, help="processes that train each run together, on a GPU each")
    add("--out", metavar="DIR", type=Path, help="default: output/TABLE")
    add("--dry-run", action="store_true", help="show the plan, start and write nothing")
    anew = "make runs anew that other code made or another teacher taught, and let those go that had other options"
    add("--overwrite", action="store_true", help=f"{anew}, instead of refusing")
    copied = "whose finished runs of the same config, code and teacher are copied"
    reuse = f"another table's folder, {copied}; may be given several times"
    add("--reuse", metavar="DIR", type=Path, action="append", help=reuse)
    where = "processes here (default), or one array job of a Slurm cluster"
    add("--launcher", choices=("local", "slurm"), help=where)
    add("--slurm", metavar="KEY=VALUE", nargs="+", help="submitit's parameters, for one run")
    parser.add_pairs()
    args = parser.parse(words)
    one_process()
    from ..study.reproduce.command import Request, reproduce

    return reproduce(Request(**vars(args), command=shlex.join(["deepkd", "reproduce", *words])))
