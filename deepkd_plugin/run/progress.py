"""The progress bar of an epoch."""

from __future__ import annotations

from tqdm import tqdm


def progress_bar(title: str, steps: int) -> tqdm:
    """A bar that is gone when it ends, and that is only drawn in a terminal."""
    layout = "{desc} {bar:16} {n_fmt}/{total_fmt}{postfix}"
    return tqdm(total=steps, desc=title, leave=False, disable=None, bar_format=layout)


def _postfix(means: dict[str, float], top_k: int | None, rate: float, left: float) -> str:
    """What the bar shows: losses, accuracy, K, speed, and the time until the last epoch ends."""
    losses = " ".join(f"{s} {value:.3f}" for s, value in means.items() if not s.startswith("train_"))
    accuracy = f" top-1 {means['train_acc']:.2f}" if "train_acc" in means else ""
    mask = "" if top_k is None else f" K {top_k}"
    time_left = tqdm.format_interval(left)
    return f"{losses}{accuracy}{mask} {rate:.0f} images/s {time_left} left"
