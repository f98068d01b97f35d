"""How many non-target classes a mask should keep, by the teacher's logits alone."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import config, data, device
from ..errors import UserError
from ..hosts.networks import teacher_network
from ..hosts.registry import find_host
from ..run.progress import EpochBar
from ..topk import classes, count_classes, non_target_index

MASS = 0.9
"""The share of the teacher's non-target mass that K* holds, unless another is asked for."""

OTHERWISE = ("RLD", "WTTM")
"""The bases whose non-target term has other probabilities than the softmax of the logits."""


class Calibration(NamedTuple):
    """What a pass over the training images found."""

    images: int
    held: np.ndarray
    """(C − 1,): the share of the teacher's non-target mass that a sample's K largest classes hold on average, by K."""
    each: np.ndarray
    """(images,): the smallest K of each sample that holds the asked share."""
    optimal: int
    """K*: the smallest K that holds the asked share on average."""
    right: float
    """The share of the images about which the teacher is right: a file of other classes shows in it."""


def measure(cfg: Any, mass: float) -> tuple[Calibration, float]:
    """Ask a config's teacher about every training image; returns what was found, and at which temperature.

    No student is trained and no test image is read. Raises UserError for a config without DeepKD's mask, or whose mask
    does not weigh the softmax of the logits at one temperature, and if K* would be 1.
    """
    if cfg.DISTILLER.TYPE != "DeepKD":
        raise UserError(f"DISTILLER.TYPE is {cfg.DISTILLER.TYPE!r}; it must be 'DeepKD', which has a mask")
    temperature = config.temperature(cfg)
    if temperature is None or cfg.DeepKD.BASE in OTHERWISE or config.modified(cfg):
        reason = config.modified(cfg) or f"DeepKD.BASE {cfg.DeepKD.BASE}"
        raise UserError(f"with {reason} the mask does not weigh the softmax of the logits at one temperature")
    found = calibrate(_batches(cfg), temperature, mass)
    if found.optimal < 2:
        raise UserError(f"a mask of 1 class leaves NCKD nothing to compare; a mass above {mass:g} keeps more")
    return found, temperature


def mask_options(cfg: Any, found: Calibration) -> list[str]:
    """Return the KEY VALUE pairs that make a config's mask the dynamic one with this K*."""
    pairs = ["DeepKD.MASK.TYPE", "dynamic", "DeepKD.MASK.OPTIMAL", str(found.optimal)]
    if count_classes(classes(cfg.DeepKD.MASK.INITIAL), len(found.held) + 1) > found.optimal:
        pairs += ["DeepKD.MASK.INITIAL", str(found.optimal)]  # a mask does not shrink
    return pairs


def _batches(cfg: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the teacher's logits and the labels of every training image, in the weak view of the first epoch."""
    device.tune(cfg.SOLVER.DETERMINISTIC)
    at = device.pick()
    loader = data.get_dataset(cfg)[0]
    teacher = teacher_network(find_host(), cfg, data.num_classes(cfg)).to(at).eval()
    with EpochBar("training images", len(loader)) as bar, torch.inference_mode():
        for number, (image, target, *_) in enumerate(loader, 1):
            weak = image if isinstance(image, Tensor) else image[0]
            yield teacher(weak.to(at))[0], target.to(at)
            bar.update(number, "")


def calibrate(batches: Iterable[tuple[Tensor, Tensor]], temperature: float, mass: float) -> Calibration:
    """Find K* from a teacher's logits (B, C) and labels (B,). mass: the share to hold, in (0, 1)."""
    total: Tensor | float = 0.0
    each, right = [], 0
    for logits, target in batches:
        rest = logits.double().gather(1, non_target_index(target, logits.shape[1]))
        shares = (rest / temperature).softmax(1).sort(1, descending=True).values
        held = shares.cumsum(1)
        total = total + held.sum(0)
        each.append(1 + (held[:, :-1] < mass).sum(1))
        right += int((logits.argmax(1) == target).sum())
    needed = torch.cat(each).cpu().numpy()
    held_by_k = (torch.as_tensor(total) / len(needed)).cpu().numpy()
    # all classes hold everything, whatever the sum of rounded shares
    optimal = int(min((held_by_k < mass).sum() + 1, len(held_by_k)))
    return Calibration(len(needed), held_by_k, needed, optimal, right / len(needed))
