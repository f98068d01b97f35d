"""Configs: which keys there are, how a file is read into the tree, what its values mean, and what is refused.

keys.py has every key the plugin adds, rules.py the rules that keys share, tree.py reads a file and KEY VALUE pairs into
the host's tree, checks.py refuses values that cannot be meant, meaning.py says what a checked config asks for.
"""

from .checks import check, check_keys, check_mask, check_momenta, check_pipeline
from .keys import HOST_KEYS, KEYS, TRAINER
from .meaning import HOW, computes, momenta, views
from .rules import Key
from .tree import add_deepkd_config, add_keys, check_tree, flatten, get, load, set_default, wrong

__all__ = [
    "HOST_KEYS",
    "HOW",
    "KEYS",
    "TRAINER",
    "Key",
    "add_deepkd_config",
    "add_keys",
    "check",
    "check_keys",
    "check_mask",
    "check_momenta",
    "check_pipeline",
    "check_tree",
    "computes",
    "flatten",
    "get",
    "load",
    "momenta",
    "set_default",
    "views",
    "wrong",
]
