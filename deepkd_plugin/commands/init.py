"""`deepkd init`: the configs of `deepkd distill`, to be changed before training."""

from collections.abc import Sequence

from . import distill


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return distill.main(words, only_write=True)
