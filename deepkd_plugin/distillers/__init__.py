"""Distillers: two networks and a batch in, logits and named losses out (mdistiller's protocol)."""

from .base import Distiller
from .deepkd import DeepKD
from .dkd import DKD
from .kd import KD

__all__ = ["DKD", "KD", "DeepKD", "Distiller"]
