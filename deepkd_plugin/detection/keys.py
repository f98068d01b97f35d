"""The config keys of a detection run beside the classification ones: the node DETECTION."""

from __future__ import annotations

from typing import Any

from ..rules import Key

_WHOLE = ("a whole number above 0", lambda value: value > 0)
_FROM_ZERO = ("a number from 0 on", lambda value: value >= 0)
_SHARE = ("a number in (0, 1]", lambda value: 0 < value <= 1)
_PROBABILITY = ("a number in [0, 1]", lambda value: 0 <= value <= 1)
_TEXT = ("any text", lambda value: True)


def _sizes(value: Any) -> bool:
    return len(value) > 0 and all(type(size) is int and size > 0 for size in value)


DETECTION_KEYS = (
    Key(
        "DETECTION.MIN_SIZE",
        [800],
        "pixels of an image's shorter side; of several, one is drawn in training and the last is tested with",
        "a list of whole numbers above 0",
        _sizes,
    ),
    Key("DETECTION.MAX_SIZE", 1333, "most pixels of its longer side", *_WHOLE),
    Key("DETECTION.FLIP", 0.5, "probability of a mirrored image in training", *_PROBABILITY),
    Key("DETECTION.PROPOSALS", 512, "proposals that a step samples of an image (N of the losses)", *_WHOLE),
    Key("DETECTION.FOREGROUND", 0.25, "most of them that hold an object, as a share", *_SHARE),
    Key("DETECTION.RANKED_TRAIN", 2000, "best proposals of a map before suppression in training", *_WHOLE),
    Key("DETECTION.RANKED_TEST", 1000, "best proposals of a map before suppression in tests", *_WHOLE),
    Key("DETECTION.KEPT_TRAIN", 2000, "proposals kept after suppression in training", *_WHOLE),
    Key("DETECTION.KEPT_TEST", 1000, "proposals kept after suppression in tests", *_WHOLE),
    Key(
        "DETECTION.WARMUP_ITERATIONS", 1000, "iterations of linear warm-up from 0.001 x the rate", *_FROM_ZERO
    ),
    Key("DETECTION.CLIP_NORM", 0.0, "largest norm of the whole gradient; 0: any", *_FROM_ZERO),
    Key(
        "DETECTION.STUDENT_BACKBONE",
        "",
        "file of ImageNet weights that the student's backbone starts from (its norms are then frozen); empty: none",
        *_TEXT,
    ),
)
"""Defaults are torchvision's (its reference training of detectors)."""
