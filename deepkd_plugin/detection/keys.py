"""The config keys of a detection run beside the classification ones: the node DETECTION."""

from typing import Any

from ..rules import FILE_OR_NONE, NOT_NEGATIVE, PROBABILITY, SHARE, WHOLE, Key, whole


def _sizes(value: Any) -> bool:
    return len(value) > 0 and all(type(size) is int and 0 < size <= 10_000 for size in value)


DETECTION_KEYS = (
    Key(
        "DETECTION.MIN_SIZE",
        [800],
        "pixels of an image's shorter side; training draws one of several, tests use the last",
        "a list of whole numbers from 1 to 10,000",
        _sizes,
    ),
    Key("DETECTION.MAX_SIZE", 1333, "most pixels of an image's longer side", *whole(1, 10_000)),
    Key("DETECTION.FLIP", 0.5, "probability of a mirrored image in training", *PROBABILITY),
    Key("DETECTION.PROPOSALS", 512, "proposals that a step samples of an image (N of the losses)", *WHOLE),
    Key("DETECTION.FOREGROUND", 0.25, "largest share of them that hold an object", *SHARE),
    Key("DETECTION.RANKED_TRAIN", 2000, "best proposals of a map before suppression in training", *WHOLE),
    Key("DETECTION.RANKED_TEST", 1000, "best proposals of a map before suppression in tests", *WHOLE),
    Key("DETECTION.KEPT_TRAIN", 2000, "proposals kept after suppression in training", *WHOLE),
    Key("DETECTION.KEPT_TEST", 1000, "proposals kept after suppression in tests", *WHOLE),
    Key("DETECTION.WARMUP_ITERATIONS", 1000, "iterations of linear warm-up from 0.001 x the rate", *whole(0)),
    Key("DETECTION.CLIP_NORM", 0.0, "largest norm of the whole gradient; 0: no limit", *NOT_NEGATIVE),
    Key(
        "DETECTION.STUDENT_BACKBONE",
        "",
        "file of ImageNet weights that the student's backbone starts from (its norms are then frozen); empty: none",
        *FILE_OR_NONE,
    ),
)
"""Defaults are torchvision's (its reference training of detectors)."""
