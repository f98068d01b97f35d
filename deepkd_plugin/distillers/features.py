"""Losses on features: what DeepKD's fourth stream, `feat`, has of two networks beside their logits.

AT and FITNET are here and need nothing else. The other names are mdistiller's methods, which
hosts/mdistiller_features.py puts into FEATURES if mdistiller is there.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..losses import wide
from .base import Said
from .terms import total

KEY = "DeepKD.FEATURE"

THEIRS = ("OFD", "RKD", "KDSVD", "CRD", "NST", "PKT", "SP", "VID", "REVIEWKD")
"""mdistiller's methods on features, but for the two that are here."""

PROBED = ("FITNET", "VID")
"""Those whose connectors are made for what the networks say of an image of INPUT_SIZE, in the node of their name."""


class FeatureLoss(nn.Module):
    """A loss on two networks' features; its connectors, which it trains, are its parameters.

    Made of (student, teacher, cfg, number of training images or None), on their device. forward: what student and
    teacher said of a batch, and the batch (image, target, epoch, …) -> scalar, the method's own weight in it. Raises
    UserError for networks that do not give what it compares.
    """

    needs: ClassVar[tuple[str, ...]] = ("feats",)
    """Names of the features that it reads."""
    by_epoch: ClassVar[bool] = False
    """Whether the epoch is a number in it."""

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """Return the connectors' parameters."""
        return list(self.parameters())

    def forward(self, student: Said, teacher: Said, batch: Mapping[str, Any]) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward")


class AT(FeatureLoss):
    """Attention transfer (Zagoruyko and Komodakis, arXiv 1612.03928): weight · Σ mean (A(s) − A(t))².

    A maps features (B, C, H, W) to the mean over C of their AT.P-th power, as a vector of H · W numbers of length 1.
    The sum is over stages, the mean over images and places. The larger of two maps is averaged to the size of the
    smaller before. Of networks with different numbers of stages the last ones are compared; of none the stem.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, num_data: int | None = None) -> None:
        super().__init__()
        self.power, self.weight = cfg.AT.P, cfg.AT.LOSS.FEAT_WEIGHT

    def forward(self, student: Said, teacher: Said, batch: Mapping[str, Any]) -> Tensor:
        ours, theirs = maps_of(student, "AT", "student")[1:], maps_of(teacher, "AT", "teacher")[1:]
        count = min(len(ours), len(theirs))
        if not count:
            raise UserError(f"config: {KEY} is AT, and one of the networks gives no stage after its stem to compare")
        pairs = [same_size(*pair) for pair in zip(ours[-count:], theirs[-count:])]
        loss: Tensor = self.weight * total((self.attention(s) - self.attention(t)).square().mean() for s, t in pairs)
        return loss

    def attention(self, maps: Tensor) -> Tensor:
        """Map features (B, C, H, W) to (B, H · W)."""
        return F.normalize(wide(maps).pow(self.power).mean(1).flatten(1))


class FitNet(FeatureLoss):
    """A hint (Romero et al., arXiv 1412.6550): weight · mean (ReLU(BN(conv(s))) − t)² of one stage.

    The convolution, of 1 × 1, takes the student's channels to the teacher's. FITNET.HINT_LAYER says which of the
    features, from 0, the stem's, on. The larger of two maps is averaged to the size of the smaller before.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, num_data: int | None = None) -> None:
        super().__init__()
        node = cfg.FITNET
        self.layer, self.weight = node.HINT_LAYER, node.LOSS.FEAT_WEIGHT
        ours, theirs = (
            self.hint(shown_maps(network, node.INPUT_SIZE), who).shape[1]
            for network, who in ((student, "student"), (teacher, "teacher"))
        )
        regressor = nn.Sequential(nn.Conv2d(ours, theirs, 1), nn.BatchNorm2d(theirs), nn.ReLU())
        self.regressor = regressor.to(next(student.parameters()).device)

    def forward(self, student: Said, teacher: Said, batch: Mapping[str, Any]) -> Tensor:
        ours, theirs = same_size(self.hint(student, "student"), self.hint(teacher, "teacher"))
        loss: Tensor = self.weight * F.mse_loss(wide(self.regressor(ours)), wide(theirs))
        return loss

    def hint(self, said: Said, who: str) -> Tensor:
        maps = maps_of(said, "FITNET", who)
        if self.layer >= len(maps):
            raise UserError(
                f"config: FITNET.HINT_LAYER is {self.layer}; it must be at most {len(maps) - 1} with the {who}, which "
                f"gives so many features after the stem's"
            )
        hint: Tensor = maps[self.layer]
        return hint


FEATURES: dict[str, Callable[..., FeatureLoss]] = {"AT": AT, "FITNET": FitNet}
"""What makes the loss of a value of DeepKD.FEATURE."""


def maps_of(said: Said, name: str, who: str) -> list[Tensor]:
    """Return a network's maps of features, (B, C, H, W) each; UserError if it gives none."""
    features = said[1]
    maps = features.get("feats") if isinstance(features, Mapping) else None
    if not maps or not all(isinstance(one, Tensor) and one.ndim == 4 for one in maps):
        raise UserError(
            f"config: {KEY} is {name}, which compares maps of features, and the {who} gives none ('feats'); it must be "
            f"none, or the {who} another network"
        )
    return list(maps)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average the larger of two maps to the size of the smaller, by height."""
    ours, theirs = ((int(maps.shape[2]), int(maps.shape[3])) for maps in (student, teacher))
    if ours > theirs:
        return F.adaptive_avg_pool2d(student, theirs), teacher
    return (student, F.adaptive_avg_pool2d(teacher, ours)) if ours < theirs else (student, teacher)


@torch.no_grad()
def shown_maps(network: nn.Module, size: Any) -> Said:
    """Return what a network says of one grey image, (height, width) `size`, in evaluation mode; it stays as it was."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        said: Said = network(torch.zeros(1, 3, *size, device=next(network.parameters()).device))
    finally:
        for module, mode in modes:
            module.training = mode
    return said
