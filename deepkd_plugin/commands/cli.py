"""`deepkd COMMAND …`: everything that the plugin does. A command's module has its arguments."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from ..terminal import Parser, guarded
from . import completion

GROUPS = {
    "train": {
        "train": "train a student under a config",
        "distill": "train a student on a folder of images, from nothing",
        "init": "write the configs that distill trains under",
        "tune": "choose learning rate, warm-up, deltas and mask on held-out images",
        "detect": "train a detector under a config",
        "detect-eval": "test a detector",
    },
    "compare": {
        "reproduce": "train what a table compares, and compare it",
        "report": "compare what reproduce has trained so far",
        "eval": "test what a run trained, or any file of weights",
        "gsnr": "measure and draw the gradient signal-to-noise ratio of the streams",
    },
    "look up": {
        "configs": "list the configs that ship",
        "keys": "list config keys: default, meaning, allowed values",
        "networks": "list networks for teachers and students",
        "doctor": "look for what would keep a run from working",
    },
    "ship": {
        "export": "write a student as safetensors, ONNX or torch.export's program",
        "predict": "print what a student says of images",
        "push": "upload a student with its model card to the Hugging Face hub",
    },
    "prepare": {
        "cache": "list, fill, check and delete tables of teacher logits",
        "shrink": "resize a folder of images once, before it is trained on",
        "apply": "put the plugin into a checkout of mdistiller",
        "merge-detector-weights": "make the start file of mdistiller's detection",
    },
}
"""Commands by what people want. Each is a module beside this one, whose `main` takes the words behind its name."""

COMMANDS = {name: what for group in GROUPS.values() for name, what in group.items()}


def entry() -> NoReturn:
    """Be the console script: run `main` on the command line, and end with its exit code."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code (2: a mistake of the user)."""
    return guarded(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(words: list[str]) -> int:
    parser = Parser(
        "deepkd",
        usage="deepkd COMMAND …",
        description="Knowledge distillation with DeepKD. `deepkd COMMAND --help` says more.",
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deepkd_plugin {_version()}")
    parser.add_argument(
        "--print-completion",
        action=completion.Print,
        commands=COMMANDS,
        choices=completion.SHELLS,
        help="print the script by which a shell completes commands and flags",
    )
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    if not words:
        parser.print_help()
        return 0
    command = parser.parse_args(words[: 1 + words[0].startswith("--")]).command
    if command not in COMMANDS:
        near = get_close_matches(command[:100], COMMANDS, n=1)
        parser.error(f"there is no command {command[:100]!r}" + (f"; did you mean {near[0]}?" if near else ""))
    code: int = import_module(f".{completion.module_of(command)}", __package__).main(words[1:])
    return code


def _version() -> str:
    text: str = sys.modules[__name__.partition(".")[0]].__version__
    return text


def _overview() -> str:
    lines = []
    for group, commands in GROUPS.items():
        lines += [f"{group}:", *(f"    {name:24}{what}" for name, what in commands.items())]
    return "\n".join(lines)
