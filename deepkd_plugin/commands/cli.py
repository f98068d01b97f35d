"""`deepkd COMMAND …`: everything that the plugin does. A command's module has its arguments."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from ..terminal import Parser, guarded, nearest, version
from . import completion

GROUPS = {
    "train": {
        "distill": "train a student on a folder of images, from nothing",
        "train": "train a student under a config",
        "init": "write the configs that distill trains under",
        "tune": "choose learning rate, warm-up, deltas and mask by search",
        "calibrate": "choose the mask's K* by the teacher alone",
        "detect": "train a detector under a config",
        "cache": "list, fill, check and delete tables of teacher logits",
        "shrink": "resize a folder of images once, before training",
    },
    "compare": {
        "reproduce": "train what a table compares, and compare it",
        "report": "compare what reproduce has trained so far",
    },
    "inspect": {
        "eval": "test what a run trained, or any file of weights",
        "detect-eval": "test a detector",
        "gsnr": "measure and draw the gradients' signal-to-noise ratio",
        "configs": "list the configs that ship",
        "keys": "list config keys: default, meaning, allowed values",
        "networks": "list networks for teachers and students",
    },
    "ship": {
        "predict": "print what a student says of images",
        "export": "write a student as safetensors, ONNX or a torch program",
        "push": "upload a student to the Hugging Face hub",
    },
    "host": {
        "doctor": "look for what would keep a run from working",
        "apply": "put the plugin into a checkout of mdistiller",
        "merge-detector-weights": "make the start file of mdistiller's detection",
    },
}
"""Commands by what people want. Each is a module beside this one, whose `main` takes the words behind its name."""

COMMANDS = {name: what for group in GROUPS.values() for name, what in group.items()}


class _Root(Parser):
    """The parser of what is in front of a command; its help and the prompt fit 24 lines of 80."""

    def format_help(self) -> str:
        flags = ", ".join(name for name in self._option_string_actions if name.startswith("--"))
        lines = [f"usage: {self.prog} COMMAND [--help]. Also: {flags}"]
        for group, commands in GROUPS.items():
            names = [group, *[""] * (len(commands) - 1)]
            lines += [f"{group:8} {name:11} {what}" for group, (name, what) in zip(names, commands.items())]
        return "\n".join([*lines, ""])


def entry() -> NoReturn:
    """Be the console script: run `main` on the command line, and end with its exit code."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code (2: a mistake of the user)."""
    return guarded(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(words: list[str]) -> int:
    parser = _Root("deepkd", usage="deepkd COMMAND …")
    parser.add_argument("--version", action="version", version=f"deepkd_plugin {version()}")
    parser.add_argument(
        "--print-completion",
        action=completion.Print,
        commands=COMMANDS,
        choices=completion.SHELLS,
        help="print the script by which a shell completes commands and flags",
    )
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words:
        parser.print_help()
        return 0
    command = parser.parse(words[: 1 + words[0].startswith("--")]).command
    if command not in COMMANDS:
        parser.error(f"there is no command {command[:100]!r}{_meant(command)}")
    code: int = import_module(f".{completion.module_of(command)}", __package__).main(words[1:])
    return code


def _meant(word: str) -> str:
    """Name the commands that a wrong word may mean: those that say it of what they do, or one that is written alike."""
    doing = [name for name, what in COMMANDS.items() if word.lower() in what.replace(",", "").split()]
    return f"; did you mean {' or '.join(doing[:3])}?" if doing else nearest(word, COMMANDS)
