"""`deepkd COMMAND …`: what the plugin does besides training and testing."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..terminal import Parser, guarded


def entry() -> NoReturn:
    """The console script: `main` on the command line, its exit code the process's."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code (2: a mistake of the user)."""
    code = 0

    def work() -> None:
        nonlocal code
        words = list(sys.argv[1:] if argv is None else argv)
        args = _parser().parse_args(_words(words))
        args.command = shlex.join(["deepkd", *words])
        code = args.run(args)

    return guarded(work) or code


def _words(words: list[str]) -> list[str]:
    """A command line with the KEY VALUE pairs of a run to train behind "--"."""
    if words[:1] == ["reproduce"]:
        return ["reproduce", *_words_of_a_table(words[1:])]
    if words[:1] != ["gsnr"] or "--runs" in words:
        return words
    from ..launch import split_words

    flags, options = split_words(words[1:], ("--cfg", "--out"))
    return ["gsnr", *flags, "--", *options]


_KEY = re.compile(r"[A-Za-z]\w*(\.[A-Za-z_]\w*)+")
"""A config key; no name of a table, pair or method is like it."""

_WITH_VALUE = ("--base", "--dataset", "--seeds", "--jobs", "--out", "--reuse", "--launcher")
_WITH_VALUES = ("--pairs", "--methods", "--slurm")


def _words_of_a_table(words: Sequence[str]) -> list[str]:
    """reproduce's words: flags with what belongs to them, "--", the table, KEY VALUE pairs.

    A KEY ends the values of a flag that takes several.
    """
    flags: list[str] = []
    rest: list[str] = []
    options: list[str] = []
    flag = ""
    for word in words:
        if len(options) % 2:  # the value of a KEY, however it looks
            options.append(word)
        elif flag in _WITH_VALUE:
            flags.append(word)
            flag = ""
        elif word.startswith("--") or word == "-h":
            flags.append(word)
            flag = word
        elif _KEY.fullmatch(word):
            options.append(word)
            flag = ""
        elif flag in _WITH_VALUES:
            flags.append(word)
        else:
            rest.append(word)
    return [*flags, "--", *rest, *options]


def _count(text: str) -> int:
    """argparse's type of a number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}; it must be a whole number from 1 on")
    return int(text)


def _parser() -> Parser:
    parser = Parser("deepkd", description="DeepKD for mdistiller.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    apply = commands.add_parser(
        "apply",
        help="put the plugin into a checkout of mdistiller",
        description="Put the plugin into a checkout of mdistiller: two lines on top of tools/train.py and of "
        "tools/eval.py, and the plugin's configs beside mdistiller's own. All or nothing.",
    )
    apply.add_argument("path", metavar="PATH", type=Path, help="the checkout's root folder")
    how = apply.add_mutually_exclusive_group()
    how.add_argument(
        "--check", action="store_true", help="change nothing; exit 0: in place, 1: not yet, 2: cannot be"
    )
    how.add_argument("--revert", action="store_true", help="take out what apply put in")
    apply.set_defaults(run=_apply)

    doctor = commands.add_parser("doctor", help="look for what would keep a run from working")
    doctor.add_argument(
        "path", metavar="PATH", type=Path, nargs="?", help="a checkout of mdistiller to look into"
    )
    doctor.set_defaults(run=_doctor)

    gsnr = commands.add_parser(
        "gsnr",
        help="measure and draw the gradient signal-to-noise ratio of the streams",
        description="Train with GSNR.MEASURE True, as tools/train.py does, and draw what was measured into the "
        "run's folder; or draw runs that were measured, which are seeds of one experiment.",
        allow_abbrev=False,
    )
    source = gsnr.add_mutually_exclusive_group(required=True)
    source.add_argument("--cfg", metavar="FILE", help="train under this config")
    source.add_argument("--runs", metavar="FOLDER", type=Path, nargs="+", help="draw these runs together")
    gsnr.add_argument("--out", metavar="DIR", type=Path, help="with --runs: where tables and figure go")
    how = gsnr.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    how.add_argument("--overwrite", action="store_true", help="start again where a run already lies")
    gsnr.add_argument("options", metavar="KEY VALUE", nargs="*", help="config keys, after the file's")
    gsnr.set_defaults(run=_gsnr, error=gsnr.error)

    reproduce = commands.add_parser(
        "reproduce",
        help="train what a table compares, and compare it",
        description="Plan the runs of a table (pair x method x seed), show the plan and an estimate of its time, "
        "run what is not finished yet, and report. The same command goes on after an interruption. Tables: the "
        "folders of configs/ and of configs/detection/, coco (mdistiller's detectors, on detectron2), and "
        "ablation-momentum, ablation-mask, ablation-delta and ablation-phases.",
        allow_abbrev=False,
    )
    reproduce.add_argument(
        "table", metavar="TABLE", help="cifar100, imagenet, glyphs100, glyph_canvas, coco, ..."
    )
    reproduce.add_argument(
        "--pairs", metavar="PAIR", nargs="+", help="some of the table's pairs (default: all)"
    )
    reproduce.add_argument(
        "--methods", metavar="METHOD", nargs="+", help="some of the table's rows (default: all)"
    )
    reproduce.add_argument("--base", metavar="METHOD", help="of an ablation: kd (default), dkd, mlkd or crld")
    reproduce.add_argument(
        "--dataset", metavar="NAME", help="of an ablation: glyphs100 (default), cifar100, ..."
    )
    reproduce.add_argument(
        "--seeds", metavar="N", type=_count, default=5, help="seeds 0 to N - 1 (default: 5)"
    )
    reproduce.add_argument(
        "--jobs", metavar="N", type=_count, help="runs side by side (default: one for each GPU, or 1)"
    )
    reproduce.add_argument("--out", metavar="DIR", type=Path, help="default: output/TABLE")
    reproduce.add_argument("--dry-run", action="store_true", help="show the plan, start and write nothing")
    reproduce.add_argument(
        "--overwrite",
        action="store_true",
        help="make runs anew that other code made or another teacher taught, and let those go that had other "
        "options, instead of refusing",
    )
    reproduce.add_argument(
        "--reuse",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="another table's folder, whose finished runs of the same config, code and teacher are copied; may be "
        "given several times",
    )
    reproduce.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="processes here (default), or one array job of a Slurm cluster",
    )
    reproduce.add_argument(
        "--slurm", metavar="KEY=VALUE", nargs="+", default=(), help="submitit's parameters, for one run"
    )
    reproduce.add_argument(
        "options", metavar="KEY VALUE", nargs="*", default=(), help="config keys, for every run"
    )
    reproduce.set_defaults(run=_reproduce)

    report = commands.add_parser(
        "report",
        help="compare what reproduce has trained so far",
        description="Write report.md, report.csv and report.html, which needs no other file, from the runs of a "
        "table.",
    )
    report.add_argument("folder", metavar="DIR", type=Path, help="where reproduce put a table")
    report.set_defaults(run=_report)

    merge = commands.add_parser(
        "merge-detector-weights",
        help="make the start file of mdistiller's detection",
        description="Put a teacher's detector and a student's ImageNet backbone into one file, which "
        "MODEL.WEIGHTS of mdistiller's detection configs names.",
    )
    merge.add_argument(
        "teacher", metavar="TEACHER", type=Path, help="a Faster R-CNN with FPN of detectron2, .pth or .pkl"
    )
    merge.add_argument(
        "student",
        metavar="STUDENT",
        type=Path,
        help="a resnet18, resnet50 or mobilenet_v2 of torchvision (.pth), or MSRA's R-50.pkl",
    )
    merge.add_argument("out", metavar="OUT", type=Path, help="the file to write, .pth")
    merge.add_argument(
        "--classes", metavar="N", type=_count, help="refuse a teacher of another number of classes"
    )
    merge.set_defaults(run=_merge)
    return parser


def _apply(args: argparse.Namespace) -> int:
    from . import apply

    if args.check:
        return apply.check(args.path)
    if args.revert:
        apply.revert(args.path)
    else:
        apply.apply(args.path)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor(args.path)


def _reproduce(args: argparse.Namespace) -> int:
    from ..study.reproduce.command import Request, reproduce

    given = {name: value for name, value in vars(args).items() if name != "run"}
    return reproduce(Request(**given))


def _report(args: argparse.Namespace) -> int:
    from ..study.report import report

    for path in report(args.folder):
        print(path)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from ..detection.detectron2.merge import merge

    print(merge(args.teacher, args.student, args.out, args.classes))
    return 0


def _gsnr(args: argparse.Namespace) -> int:
    from .. import launch
    from ..study.gsnr.report import report

    if args.runs:
        if args.resume or args.overwrite or args.options:
            args.error("--resume, --overwrite and KEY VALUE go with --cfg, not with --runs")
        if args.out is None:
            args.error("--runs needs --out DIR")
        print(report(args.runs, args.out))
        return 0
    if args.out is not None:
        args.error("--out goes with --runs; with --cfg everything goes into the run's folder")
    command = shlex.join(["deepkd", "gsnr", "--cfg", args.cfg, *args.options])
    # a key without a value stays the last word, for the message that names it
    measure = [] if len(args.options) % 2 else ["GSNR.MEASURE", "True"]
    folder = launch.train(args.cfg, [*args.options, *measure], args.resume, args.overwrite, command)
    print(f"\n{report([folder], folder)}")
    return 0
