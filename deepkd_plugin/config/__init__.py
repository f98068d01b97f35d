"""Configs: which keys there are, how a file is read into the tree, what its values mean, and what is refused.

keys.py has every key the plugin adds, tree.py reads a file and KEY VALUE pairs into
the host's tree, checks.py refuses values that cannot be meant, meaning.py says what a checked config asks for.
"""

from ..rules import Key
from .checks import check, check_kept, check_keys, check_mask, check_momenta, check_pipeline
from .keys import (
    ADAMW,
    BEFORE,
    CHANNELS_LAST,
    CHOICES,
    FOLD_TEACHER,
    HOST_KEYS,
    REMOVED,
    TRAINER,
    TRAINERS,
    all_keys,
    known_streams,
)
from .meaning import (
    HOW,
    asks_teacher,
    chunk,
    compared,
    computes,
    dampening,
    mixes,
    momenta,
    needs_workers,
    plain_teacher,
    softens,
    streams,
    temperature,
    views,
    warmups,
)
from .tree import add_deepkd_config, add_keys, check_tree, flatten, get, load, merge, set_default, wrong

__all__ = [
    "ADAMW",
    "BEFORE",
    "CHANNELS_LAST",
    "CHOICES",
    "FOLD_TEACHER",
    "HOST_KEYS",
    "HOW",
    "REMOVED",
    "TRAINER",
    "TRAINERS",
    "Key",
    "add_deepkd_config",
    "add_keys",
    "all_keys",
    "asks_teacher",
    "check",
    "check_kept",
    "check_keys",
    "check_mask",
    "check_momenta",
    "check_pipeline",
    "check_tree",
    "chunk",
    "compared",
    "computes",
    "dampening",
    "flatten",
    "get",
    "known_streams",
    "load",
    "merge",
    "mixes",
    "momenta",
    "needs_workers",
    "plain_teacher",
    "set_default",
    "softens",
    "streams",
    "temperature",
    "views",
    "warmups",
    "wrong",
]
