"""DeepKD for mdistiller: decoupled distillation losses with a momentum for each gradient stream.

The parts are ordinary PyTorch pieces (arXiv 2505.15133)::

    from deepkd_plugin import register, DecoupledMomentumSGD, TopKSchedule, decoupled_kd
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .gsnr import GradientMonitor, GSNRAllocation
from .losses import DecoupledKD, Samples, decoupled_kd, kd_divergence, per_sample
from .optim import DecoupledAdamW, DecoupledMomentumSGD, backward, from_sgd, to_sgd
from .tokens import shared_vocabulary, token_kd
from .topk import TopKSchedule, top_k_index, top_k_mask

__all__ = [
    "DecoupledAdamW",
    "DecoupledKD",
    "DecoupledMomentumSGD",
    "GSNRAllocation",
    "GradientMonitor",
    "Samples",
    "TopKSchedule",
    "backward",
    "decoupled_kd",
    "from_sgd",
    "kd_divergence",
    "load_student",
    "per_sample",
    "register",
    "shared_vocabulary",
    "to_sgd",
    "token_kd",
    "top_k_index",
    "top_k_mask",
    "train",
]
__version__ = "0.2.0"

if TYPE_CHECKING:
    from torch import nn

    from .launch import Result


def load_student(path: "str | Path", network: Any = None, trust: bool = False) -> "nn.Module":
    """Load a run's student, ready to use: a network that maps images (B, 3, H, W) to logits (B, C).

    path: a run's folder, or a student's file. network, trust: see students.load, which does it.
    """
    # here for the same reason as below
    from .students.load import load_student as load

    return load(path, network, trust)


def train(file: "str | Path", *, resume: bool = False, overwrite: bool = False, **sections: Any) -> "Result":
    """Train the student of a config, as `deepkd train` does; returns best and last top-1 in percent, and the folder.

    file: a path, or the name of a config that ships. sections: what to change in it, for example
    SOLVER={"EPOCHS": 2}. resume, overwrite: what to do about a run that is there. Raises UserError for a mistake.
    """
    # here for the same reason as below
    from .launch import train_from_python

    return train_from_python(str(file), resume, overwrite, sections)


def register() -> list[str]:
    """Put the plugin into the host's registries and config tree; returns what was added (see registry)."""
    # here, because the parts above need torch alone and the registries need torchvision and all the rest
    from .hosts.registry import register as register_host

    return register_host()
