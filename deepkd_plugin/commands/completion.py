"""`deepkd --print-completion SHELL`: a script by which a shell completes commands, flags and names of files."""

import argparse
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..terminal import Parser, built

SHELLS = ("bash", "zsh")


def script(shell: str, root: Parser, commands: Mapping[str, str]) -> str:
    """Return a shell's script, by shtab. root: the parser of what is in front of a command. commands: name -> meaning.

    Raises UserError without shtab.
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise UserError(
            "command line: --print-completion needs shtab, which is not installed: "
            'pip install "deepkd_plugin[completion]"'
        ) from None
    whole = argparse.ArgumentParser(root.prog, parents=[root], add_help=False)
    for action in whole._get_positional_actions():  # COMMAND, of which the names below take the place
        whole._remove_action(action)
    names = whole.add_subparsers()
    for name, meaning in commands.items():
        module = import_module(f".{module_of(name)}", __package__)
        parser = built(lambda module=module: module.main([]))
        named = names.add_parser(name, help=meaning, parents=[parser], add_help=False)
        for action in named._actions:
            if action.type is Path or action.metavar in ("FILE", "DIR"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(whole, shell))


def module_of(name: str) -> str:
    """Return the name of the module beside this one that has a command."""
    return name.replace("-", "_")


class Print(argparse.Action):
    """What a flag does that prints a script and ends."""

    def __init__(self, *args: Any, commands: Mapping[str, str], **options: Any) -> None:
        super().__init__(*args, **options)
        self.commands = commands

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str | None = None) -> None:
        print(script(value, parser, self.commands))
        parser.exit()
