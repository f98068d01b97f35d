"""python -m deepkd_plugin COMMAND …: the same as deepkd COMMAND …."""

from .cli import entry

entry()
