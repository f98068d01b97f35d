"""`deepkd detect-eval`: tools/eval_detection.py without a checkout."""

from collections.abc import Sequence

from ..detection import evaluate


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return evaluate.main(words, "deepkd detect-eval")
