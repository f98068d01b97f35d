"""Distillers: two networks and a batch in, logits and named losses out (mdistiller's protocol).

One file is one method, and declares all that the package knows of it: its config keys, how many views of an image it
needs, its streams, its terms, its published name. Config checks, tables and reports read these declarations.
"""

from .base import DISTILLERS, Distiller, Losses, Method, bases, register_distiller, warmup_factor
from .crld import CRLD
from .deepkd import DeepKD
from .dkd import DKD
from .kd import KD
from .mlkd import MLKD
from .terms import Term, View
from .vanilla import Vanilla

__all__ = [
    "CRLD",
    "DISTILLERS",
    "DKD",
    "KD",
    "MLKD",
    "DeepKD",
    "Distiller",
    "Losses",
    "Method",
    "Term",
    "Vanilla",
    "View",
    "bases",
    "register_distiller",
    "warmup_factor",
]

for _distiller in (Vanilla, KD, DKD, MLKD, CRLD, DeepKD):  # in the order of a table's rows
    register_distiller(_distiller)
