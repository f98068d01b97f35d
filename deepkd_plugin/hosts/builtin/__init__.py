"""The host that is used if mdistiller is not installed: its names and protocols, our code.

The dictionaries below have mdistiller's names and shapes, so that `registry` can treat both alike.
"""

from importlib.resources import files

from yacs.config import CfgNode

from ...distillers import DISTILLERS
from ...errors import UserError, shown
from ...terminal import nearest
from ...trainer import Trainer
from .models import cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict

__all__ = [
    "CFG",
    "NATIVE",
    "cifar_model_dict",
    "distiller_dict",
    "imagenet_model_dict",
    "shipped_weights",
    "tiny_imagenet_model_dict",
    "trainer_dict",
]

CFG = CfgNode.load_cfg(files(__package__).joinpath("defaults.yaml").read_text(encoding="utf-8"))
NATIVE = ("NONE", "KD", "DKD")
"""The distillers that every host has itself."""

distiller_dict = {name: DISTILLERS[name] for name in NATIVE}
trainer_dict = {"base": Trainer}


def shipped_weights(name: str) -> str:
    """Return the file that builtin:NAME means, "" for another name; UserError if it does not ship, with those that do.

    They are of classifiers and of detectors.
    """
    if not name.startswith(SHIPPED):
        return ""
    folder = files(__package__).joinpath("weights")
    ours = {SHIPPED + file.name.removesuffix(".pt"): str(file) for file in folder.iterdir()}
    if name not in ours:
        raise UserError(
            f"the weights {shown(name)} do not ship with the package; these do: {', '.join(sorted(ours))}"
            f"{nearest(name, ours)}"
        )
    return ours[name]


SHIPPED = "builtin:"
