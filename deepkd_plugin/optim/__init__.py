"""Optimizers with one momentum buffer for each gradient stream."""

from .adamw import DecoupledAdamW
from .base import StreamOptimizer, backward
from .sgd import DecoupledMomentumSGD, from_sgd, to_sgd

__all__ = ["DecoupledAdamW", "DecoupledMomentumSGD", "StreamOptimizer", "backward", "from_sgd", "to_sgd"]
