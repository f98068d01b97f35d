"""What a detection set says of itself, and the sets by name."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from ...data.sources import Facts, Sources
from .samples import AnnotatedImages


@dataclass(frozen=True)
class DetectionSource(Facts):
    """A detection set; num_classes is without the background, train without the images that are not trained on.

    read: (DATASET.ROOT, "train" or "test") -> AnnotatedImages. size: width and height of an image, on average.
    no_mirror: why its images must not be mirrored; "" if they may be. pretrained: whether students usually start from
    ImageNet weights, so that the user is told if one does not.
    """

    _: KW_ONLY
    size: tuple[int, int]
    no_mirror: str = ""
    pretrained: bool = False

    def load(self, node: Any, split: str) -> AnnotatedImages:
        """Read a part of the set, "train" or "test". node: the config node DATASET."""
        return self.read(node.ROOT, split)

    def images(self, cfg: Any) -> tuple[int, int]:
        """Count the images that a run trains on in an epoch, and those that it tests on."""
        kept_out = round(cfg.DATASET.HOLDOUT * self.train)
        return self.train - kept_out, kept_out or self.test

    def noise(self, count: int, views: int = 1) -> tuple[list[Any], list[Any]]:
        """Make a training batch of noise: images and targets, with three boxes in each image."""
        width, height = self.size
        boxes = torch.tensor([[0.2, 0.2, 0.5, 0.5]] * 3) * torch.tensor([width, height] * 2)
        target = {"boxes": boxes, "labels": torch.ones(3, dtype=torch.int64)}
        targets = [target | {"image_id": torch.tensor(number)} for number in range(count)]
        return [torch.rand(3, height, width) for _ in range(count)], targets


DETECTION_SETS: Sources[DetectionSource] = Sources("for detection ")
"""By DATASET.TYPE."""
