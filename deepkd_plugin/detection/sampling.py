"""What a detector draws in training, of each image on its own: its size, and the anchors and proposals it is judged by.

Torchvision draws all of these from one generator in the order of the batch, so that an image's depend on who else is
passed. Here they are a function of the image's seed, so several processes that share a batch draw what one would.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ..data import draws
from ..distributed import collectives, process_group

SIZE, ANCHORS, PROPOSALS = range(3)
"""What is drawn of an image."""


class Sampler(BalancedPositiveNegativeSampler):
    """Torchvision's sampler, with a generator for each image; without seeds it is torchvision's."""

    seeds: Sequence[int] = ()
    counted = 0
    """How many it has chosen in the last batch."""

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self.seeds:
            pairs = [self.of_image(*one) for one in zip(matched_idxs, self.seeds, strict=True)]
            chosen = [positive for positive, _ in pairs], [negative for _, negative in pairs]
        else:
            chosen = super().__call__(matched_idxs)
        if process_group.size() > 1:
            self.counted = int(sum(mask.sum() for masks in chosen for mask in masks))
        return chosen

    def of_image(self, matched: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Choose some of an image's candidates (n,): > 0 are positive, 0 negative; returns two masks (n,) uint8."""
        generator = torch.Generator(matched.device).manual_seed(seed)
        masks, left = [], self.batch_size_per_image
        for candidates, most in ((matched >= 1, int(left * self.positive_fraction)), (matched == 0, left)):
            places = torch.where(candidates)[0]
            count = min(len(places), most, left)
            left -= count
            order = torch.randperm(len(places), generator=generator, device=places.device)[:count]
            mask = torch.zeros_like(matched, dtype=torch.uint8)
            mask[places[order]] = 1
            masks.append(mask)
        return masks[0], masks[1]


class Resizing(GeneralizedRCNNTransform):
    """Torchvision's transform, with a draw for each image; a batch is as large as that of all processes together."""

    seeds: Sequence[int] = ()
    turn = 0
    extent: tuple[int, int] = (0, 0)
    """Of the largest image of the last batch, before it is padded."""

    def torch_choice(self, k: list[int]) -> int:
        """Choose a size for the next image."""
        if not self.seeds:
            return super().torch_choice(k)
        seed = self.seeds[self.turn]
        self.turn += 1
        return k[seed % len(k)]

    def max_by_axis(self, the_list: list[list[int]]) -> list[int]:
        """Return the largest extent of the batch's images, which are padded to it."""
        largest: list[int] = super().max_by_axis(the_list)
        if self.training:
            largest = [int(number) for number in collectives.largest(largest)]
        self.extent = (largest[1], largest[2])
        return largest


def draw_by_image(detector: FasterRCNN) -> None:
    """Let a detector draw for each image on its own, once it is given `seeds`."""
    before = detector.transform
    detector.transform = Resizing(before.min_size, before.max_size, before.image_mean, before.image_std)
    for part in (detector.rpn, detector.roi_heads):
        sampler = part.fg_bg_sampler
        part.fg_bg_sampler = Sampler(sampler.batch_size_per_image, sampler.positive_fraction)


def give_seeds(detector: FasterRCNN, seeds: Sequence[int]) -> None:
    """Say of each image of the next batch what its draws are a function of; without seeds they are torchvision's."""
    detector.transform.turn = 0
    for kind, part in enumerate((detector.transform, detector.rpn.fg_bg_sampler, detector.roi_heads.fg_bg_sampler)):
        part.seeds = [draws.word(seed, kind) >> 1 for seed in seeds]
