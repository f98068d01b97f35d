"""The augmentation that a config adds to a data set's own: of single images, and of batches with their labels.

timm's RandAugment, torchvision's random erasing, mixup and cutmix, smoothed labels. All are functions of the seed, the
epoch and the image, or the step.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from ..config import softens
from ..errors import UserError, shown
from . import draws
from .draws import Draw
from .sources import Distortion, Source, source


def training_source(cfg: Any) -> Source:
    """Return the data set of DATASET.TYPE with the augmentation of single images that the node AUGMENT adds."""
    data_set, node = source(cfg), cfg.AUGMENT
    if node.RANDAUGMENT:
        added = rand_augment(node.RANDAUGMENT, data_set)
        data_set = dataclasses.replace(data_set, augmentation=(*data_set.augmentation, added))
    return dataclasses.replace(data_set, erasing=node.ERASING) if node.ERASING else data_set


def rand_augment(notation: str, data_set: Source) -> Distortion:
    """Make timm's RandAugment with what its create_transform gives it: grey of the set's mean, shifts by 0.45 sides.

    Raises UserError if timm is not there or does not know the notation.
    """
    key = "AUGMENT.RANDAUGMENT"
    try:
        module = importlib.import_module("timm.data.auto_augment")
    except ImportError as error:
        raise UserError(f"config: {key} is {shown(notation)}, and timm cannot be imported ({error})") from None
    options = {
        "translate_const": int(0.45 * data_set.side),
        "img_mean": tuple(min(255, round(255 * part)) for part in data_set.mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        made = module.rand_augment_transform(notation, options)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"config: {key} is {shown(notation)}, which timm does not read ({error})") from None
    for operation in made.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterise
    return made


def _posterise(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Keep so many bits of each value. timm asks for 0 at its highest level: black, which Pillow 13 refuses to make."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


class Mixing:
    """Soft labels of a batch and, with mixup or cutmix, its images mixed in pairs.

    The images at places 2k and 2k + 1 of a step's batch are mixed with each other, by torchvision's functions: with the
    share λ the first has λ of its own and 1 − λ of the second, and the second the other way round. All pairs of a step
    have one λ, or one box, which seed, epoch and step decide. An image whose partner another process has, or that has
    none, stays as it is; whole batches have no such image (config.check). Both views of an image are mixed alike.
    """

    def __init__(self, node: Any, smoothing: float, num_classes: int, seed: int) -> None:
        self.smoothing, self.num_classes, self.seed = smoothing, num_classes, seed
        self.probability, self.cutmix_share = node.MIX_PROBABILITY, node.CUTMIX_SHARE
        self.mixup = v2.MixUp(alpha=node.MIXUP) if node.MIXUP else None
        self.cutmix = v2.CutMix(alpha=node.CUTMIX) if node.CUTMIX else None

    def __call__(
        self, image: Tensor | list[Tensor], target: Tensor, epoch: int, step: int, places: Sequence[int]
    ) -> tuple[Tensor | list[Tensor], Tensor]:
        """Return the images mixed and the labels as shares of all classes, (B, C) float32.

        image: (B, C, H, W), or a list of views. target: (B,). places: of each image in the batch of all processes.
        """
        soft = one_hot(target, self.num_classes).float()
        views = list(image) if isinstance(image, list) else [image]
        first = [i for i in range(len(places) - 1) if places[i] % 2 == 0 and places[i + 1] == places[i] + 1]
        second = [i + 1 for i in first]
        if first:
            mixed = [self._mixed(view, soft, first, second, Draw(self.seed, epoch, step)) for view in views]
            views, soft = [view for view, _ in mixed], mixed[0][1]
        soft = soft * (1 - self.smoothing) + self.smoothing / self.num_classes
        return views if isinstance(image, list) else views[0], soft

    def _mixed(
        self, image: Tensor, soft: Tensor, first: list[int], second: list[int], draw: Draw
    ) -> tuple[Tensor, Tensor]:
        with draws.seeded(draw, draws.MIX):
            mix = self._choose()
            if mix is None:
                return image, soft
            # what torchvision mixes are the two rows of a batch of two, each of all the pairs' images side by side
            pairs, labels = (torch.stack([whole[first], whole[second]]) for whole in (image, soft))
            pairs, labels = mix(pairs.flatten(1, 2), labels.flatten(1))
        image, soft = image.clone(), soft.clone()
        for rows, own, shares in zip((first, second), pairs, labels):
            image[rows], soft[rows] = own.unflatten(0, (len(rows), -1)), shares.unflatten(0, (len(rows), -1))
        return image, soft

    def _choose(self) -> v2.Transform | None:
        mixed, cut = torch.rand(2).tolist()
        if mixed >= self.probability:
            return None
        if self.mixup is None or self.cutmix is None:
            return self.mixup or self.cutmix
        return self.cutmix if cut < self.cutmix_share else self.mixup


def make_mixing(cfg: Any) -> Mixing | None:
    """Make what a config does to batches and their labels; None if it leaves both alone."""
    if not softens(cfg):
        return None
    return Mixing(cfg.AUGMENT, cfg.SOLVER.LABEL_SMOOTHING, source(cfg).num_classes, cfg.SOLVER.SEED)
