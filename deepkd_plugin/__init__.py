"""DeepKD for mdistiller: decoupled distillation losses with a momentum for each gradient stream.

The parts are ordinary PyTorch pieces (arXiv 2505.15133)::

    from deepkd_plugin import register, DecoupledMomentumSGD, TopKSchedule, decoupled_kd
"""

from .gsnr import GradientMonitor, GSNRAllocation
from .losses import DecoupledKD, decoupled_kd, per_sample
from .optim import DecoupledAdamW, DecoupledMomentumSGD, backward, from_sgd, to_sgd
from .topk import TopKSchedule

__all__ = [
    "DecoupledAdamW",
    "DecoupledKD",
    "DecoupledMomentumSGD",
    "GSNRAllocation",
    "GradientMonitor",
    "TopKSchedule",
    "backward",
    "decoupled_kd",
    "from_sgd",
    "per_sample",
    "register",
    "to_sgd",
]
__version__ = "0.2.0"


def register() -> list[str]:
    """Put the plugin into the host's registries and config tree; returns what was added (see registry)."""
    # here, because the parts above need torch alone and the registries need torchvision and all the rest
    from .hosts.registry import register as register_host

    return register_host()
