"""`deepkd COMMAND …`: what the plugin does besides training and testing. A command's module has its arguments."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from ..terminal import Parser, guarded

COMMANDS = {
    "apply": "put the plugin into a checkout of mdistiller",
    "cache": "list, fill, check and delete tables of teacher logits",
    "distill": "train a student on a folder of images, from nothing",
    "init": "write the configs that distill trains under",
    "doctor": "look for what would keep a run from working",
    "gsnr": "measure and draw the gradient signal-to-noise ratio of the streams",
    "eval": "test what a run trained, or any file of weights",
    "export": "write a student as safetensors, ONNX or torch.export's program",
    "predict": "print what a student says of images",
    "push": "upload a student with its model card to the Hugging Face hub",
    "reproduce": "train what a table compares, and compare it",
    "report": "compare what reproduce has trained so far",
    "tune": "choose learning rate, warm-up, deltas and mask on held-out images",
    "shrink": "resize a folder of images once, before it is trained on",
    "merge-detector-weights": "make the start file of mdistiller's detection",
}
"""Each is a module beside this one, with a `main` that takes the words behind the command's name."""


def entry() -> NoReturn:
    """Be the console script: run `main` on the command line, and end with its exit code."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code (2: a mistake of the user)."""
    return guarded(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(words: list[str]) -> int:
    parser = Parser("deepkd", description="DeepKD for mdistiller.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    command = parser.parse_args(words[:1]).command
    code: int = import_module(f".{command.replace('-', '_')}", __package__).main(words[1:])
    return code
