"""Distillers: two networks and a batch in, logits and named losses out (mdistiller's protocol).

One file is one method, and declares all that the package knows of it: its config keys, how many views of an image it
needs, its streams, its terms, its published name. Config checks, tables and reports read these declarations.
"""

from .base import DISTILLERS, Distiller, Losses, Method, bases, register_distiller, warmup_factor
from .crld import CRLD
from .deepkd import DeepKD
from .dist import DIST
from .dkd import DKD
from .kd import KD
from .mlkd import MLKD
from .nkd import NKD
from .rld import RLD
from .terms import Term, View
from .vanilla import Vanilla
from .wttm import WTTM

__all__ = [
    "CRLD",
    "DIST",
    "DISTILLERS",
    "DKD",
    "KD",
    "MLKD",
    "NKD",
    "RLD",
    "WTTM",
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

for _distiller in (Vanilla, KD, DKD, MLKD, CRLD, NKD, RLD, WTTM, DIST, DeepKD):  # in the order of a table's rows
    register_distiller(_distiller)
