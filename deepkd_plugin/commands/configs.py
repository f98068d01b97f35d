"""`deepkd configs`: the configs that ship, by the names that --cfg takes."""

from collections.abc import Sequence

from ..config.shipped import config_names
from .listing import show


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return show(words, "configs", "List the configs that ship, as --cfg takes them from anywhere.", "r34", config_names)
