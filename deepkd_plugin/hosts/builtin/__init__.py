"""The host that is used if mdistiller is not installed: its names and protocols, our code.

The dictionaries below have mdistiller's names and shapes, so that `registry` can treat both alike.
"""

from importlib.resources import files

from yacs.config import CfgNode

from ...distillers import DISTILLERS
from ...trainer import Trainer
from .models import cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict

__all__ = [
    "CFG",
    "NATIVE",
    "cifar_model_dict",
    "distiller_dict",
    "imagenet_model_dict",
    "tiny_imagenet_model_dict",
    "trainer_dict",
]

CFG = CfgNode.load_cfg(files(__package__).joinpath("defaults.yaml").read_text(encoding="utf-8"))
NATIVE = ("NONE", "KD", "DKD")
"""The distillers that every host has itself."""

distiller_dict = {name: DISTILLERS[name] for name in NATIVE}
trainer_dict = {"base": Trainer}
