"""python -m deepkd_plugin COMMAND …: the same as deepkd COMMAND …."""

from .commands.cli import entry

entry()
