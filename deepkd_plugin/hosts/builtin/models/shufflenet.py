"""What mdistiller's two CIFAR ShuffleNets share: a 1×1 stem, three stages of 4, 8 and 4 units, pooling."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

STEM = 24  # channels


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Move channel i of group g to i · groups + g: (B, C, H, W) -> the same shape."""
    # written out: torch.nn.functional.channel_shuffle has not always had a derivative
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleNet(nn.Module):
    """The network around a subclass's stages; the subclass adds the classifier, `linear`.

    `stage(c_in, c_out, units)` builds a stage that halves the resolution and leaves out its closing ReLU.

    forward: (B, 3, H, W) -> logits (B, num_classes) and, with c = channels,
        feats: stem and stages after ReLU, (B, 24, H, W), (B, c[0], H/2, W/2), (B, c[1], H/4, W/4),
            (B, c[2], H/8, W/8)
        preact_feats: the same before ReLU, except for the stem, which mdistiller gives after it in both lists
        pooled_feat: (B, c[2]), or as many channels as a subclass's `head` returns
    """

    def __init__(self, stage: Callable[[int, int, int], nn.Module], channels: Sequence[int]) -> None:
        super().__init__()
        self.stage_channels = [STEM, *channels]
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = stage(STEM, channels[0], 4)
        self.layer2 = stage(channels[0], channels[1], 8)
        self.layer3 = stage(channels[1], channels[2], 4)

    def close(self, preact: Tensor) -> Tensor:
        """Apply what a stage leaves out: preact_feats -> feats."""
        return F.relu(preact)  # not in place: the tensors before it stay in the dictionary

    def head(self, x: Tensor) -> Tensor:
        """Map the last feature to what is pooled."""
        return x

    def get_feat_modules(self) -> nn.ModuleList:
        """Return the layers that make the features."""
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Raise NotImplementedError, as mdistiller does: no single BatchNorm makes all channels of a stage."""
        raise NotImplementedError("a ShuffleNet cannot be OFD's teacher: no BatchNorm covers a whole stage")

    def get_stage_channels(self) -> list[int]:
        """Return the channels of the entries of `feats`."""
        return self.stage_channels

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feats, preacts = [x], [x]
        for stage in (self.layer1, self.layer2, self.layer3):
            preacts.append(stage(x))
            feats.append(x := self.close(preacts[-1]))
        pooled = F.adaptive_avg_pool2d(self.head(x), 1).flatten(1)
        return self.linear(pooled), {"feats": feats, "preact_feats": preacts, "pooled_feat": pooled}
