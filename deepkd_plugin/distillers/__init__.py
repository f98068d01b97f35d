"""Distillers: two networks and a batch in, logits and named losses out (mdistiller's protocol)."""

from .base import Distiller
from .crld import CRLD
from .deepkd import DeepKD
from .dkd import DKD
from .kd import KD
from .mlkd import MLKD

__all__ = ["CRLD", "DKD", "KD", "MLKD", "DeepKD", "Distiller"]
