"""`deepkd gsnr`: the gradient signal-to-noise ratio of the streams, measured and drawn."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..config.shipped import find_config
from ..terminal import Parser


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd gsnr",
        description="Train with GSNR.MEASURE True, as tools/train.py does, and draw what was measured into the "
        "run's folder; or draw runs that were measured, which are seeds of one experiment.",
        examples=(
            "--cfg glyphs100/res20_res8/deepkd SOLVER.EPOCHS 10",
            "--runs output/glyphs100/RUN1 output/glyphs100/RUN2 --out output/gsnr",
        ),
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cfg", metavar="FILE", help="train under this config")
    source.add_argument("--runs", metavar="FOLDER", type=Path, nargs="+", help="draw these runs together")
    parser.add_argument("--out", metavar="DIR", type=Path, help="with --runs: where tables and figure go")
    parser.add_run()
    args = parser.parse(words)
    if args.runs and (args.resume or args.overwrite or args.options):
        parser.error("--resume, --overwrite and KEY VALUE go with --cfg, not with --runs")
    if args.runs and args.out is None:
        parser.error("--runs needs --out DIR")
    if args.cfg and args.out is not None:
        parser.error("--out goes with --runs; with --cfg everything goes into the run's folder")
    from .. import launch
    from ..study.gsnr.report import report

    if args.runs:
        print(report(args.runs, args.out))
        return 0
    file = find_config(args.cfg)
    command = shlex.join(["deepkd", "gsnr", "--cfg", file, *args.options])
    # a key without a value stays the last word, for the message that names it
    measure = [] if len(args.options) % 2 else ["GSNR.MEASURE", "True"]
    folder = launch.train(file, [*args.options, *measure], args.resume, args.overwrite, command)
    print(f"\n{report([folder], folder)}")
    return 0
