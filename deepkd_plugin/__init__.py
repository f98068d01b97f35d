"""DeepKD for mdistiller: decoupled distillation losses with a momentum for each gradient stream.

The parts are ordinary PyTorch pieces (arXiv 2505.15133)::

    from deepkd_plugin import register, DecoupledMomentumSGD, TopKSchedule, decoupled_kd
"""

from .losses import DecoupledKD, decoupled_kd
from .optim import DecoupledMomentumSGD
from .registry import register
from .topk import TopKSchedule

__all__ = ["DecoupledKD", "DecoupledMomentumSGD", "TopKSchedule", "decoupled_kd", "register"]
__version__ = "0.1.0"
