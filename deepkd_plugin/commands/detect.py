"""`deepkd detect`: tools/train_detection.py without a checkout."""

from collections.abc import Sequence

from ..detection import launch


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return launch.main(words, "deepkd detect")
