"""`deepkd COMMAND …`: what the plugin does besides training and testing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .terminal import Parser, guarded


def entry() -> NoReturn:
    """The console script: `main` on the command line, its exit code the process's."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code (2: a mistake of the user)."""
    code = 0

    def work() -> None:
        nonlocal code
        args = _parser().parse_args(argv)
        code = args.run(args)

    return guarded(work) or code


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
