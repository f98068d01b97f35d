"""VGGs with BatchNorm for 32×32 images: Simonyan and Zisserman, 2015 (arXiv:1409.1556), table 1, one linear layer.

State-dict keys, initialisation and outputs follow mdistiller's networks of the same names, so its teacher checkpoints
load here.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .staged import fan_out_normal_

_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3×3 convolutions, 64, 128, 256, 512 and 512 channels wide; `depths` says how many each has.

    forward: (B, 3, H, W) -> logits (B, num_classes) and, with s = 16 for images 64 pixels high, else 8,
        feats: stages after ReLU, (B, 64, H, W), (B, 128, H/2, W/2), (B, 256, H/4, W/4), (B, 512, H/8, W/8),
            (B, 512, H/s, W/s)
        preact_feats: the same before ReLU, except for the first, which mdistiller gives after it in both lists
        pooled_feat: (B, 512)
    """

    def __init__(self, depths: Sequence[int], num_classes: int = 100) -> None:
        super().__init__()
        c_in = 3
        for i, (width, depth) in enumerate(zip(_WIDTHS, depths, strict=True)):
            self.add_module(f"block{i}", _stage(c_in, width, depth))
            self.add_module(f"pool{i}", nn.MaxPool2d(2) if i < 4 else nn.AdaptiveAvgPool2d(1))
            c_in = width
        self.classifier = nn.Linear(c_in, num_classes)
        fan_out_normal_(self)

    @property
    def stages(self) -> list[tuple[nn.Module, nn.Module]]:
        """The convolutions and the pooling of each stage."""
        return [(getattr(self, f"block{i}"), getattr(self, f"pool{i}")) for i in range(5)]

    def get_feat_modules(self) -> nn.ModuleList:
        """Return the layers that make the features, without the classifier."""
        return nn.ModuleList(module for stage in self.stages for module in stage)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Return the last BatchNorm of stages 2 to 5, from which OFD takes its margins."""
        return [block[-1] for block, _ in self.stages[1:]]

    def get_stage_channels(self) -> list[int]:
        """Return the channels of the entries of `feats`."""
        return list(_WIDTHS)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        # as in mdistiller: the last two stages have the same resolution on CIFAR, but not on Tiny ImageNet
        pools_before_last = x.shape[2] == 64
        feats, preacts = [], []
        for block, pool in self.stages:
            preacts.append(block(x))
            feats.append(F.relu(preacts[-1]))  # not in place: both sides of it stay in the dictionary
            x = feats[-1] if pool is self.pool3 and not pools_before_last else pool(feats[-1])
        pooled = x.flatten(1)
        features = {"feats": feats, "preact_feats": [feats[0], *preacts[1:]], "pooled_feat": pooled}
        return self.classifier(pooled), features


def _stage(c_in: int, c_out: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(c_out if i else c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(True)]
    return nn.Sequential(*layers[:-1])  # the network applies the last ReLU, which leaves both sides of it


VGGS = {
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
}
"""By name; num_classes is still to be given."""
