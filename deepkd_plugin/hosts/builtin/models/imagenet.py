"""torchvision's ImageNet ResNets, with its state-dict keys and the outputs of mdistiller's networks."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet18_Weights, ResNet34_Weights, ResNet50_Weights, ResNet101_Weights, WeightsEnum

from .staged import BasicBlock, Bottleneck, ResidualNetwork


class ImageNetResNet(ResidualNetwork):
    """He et al., 2016 (arXiv:1512.03385), with torchvision's stride in the 3×3 convolution of a bottleneck.

    The features of `StagedNetwork` have the sizes (H/2, W/2), before pooling, (H/4, W/4), (H/8, W/8), (H/16, W/16) and
    (H/32, W/32). Here preact_feats has the stem before ReLU too.
    """

    def __init__(
        self, block: type[nn.Module], blocks: Sequence[int], weights: WeightsEnum, pretrained: bool = False
    ) -> None:
        stem = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        super().__init__(stem, block, (64, 128, 256, 512), blocks, 1000)
        if pretrained:
            self.load_state_dict(weights.get_state_dict(check_hash=True))

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Return the last BatchNorm of stages 2 to 4, from which OFD takes its margins."""
        return super().get_bn_before_relu()[1:]

    def get_stage_channels(self) -> list[int]:
        """Return the channels of the four stages."""
        return self.stage_channels[1:]

    def stem(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        preact = self.bn1(self.conv1(x))
        feat = F.relu(preact)
        return preact, feat, F.max_pool2d(feat, 3, 2, padding=1)


RESNETS = {
    "ResNet18": partial(ImageNetResNet, BasicBlock, (2, 2, 2, 2), ResNet18_Weights.IMAGENET1K_V1),
    "ResNet34": partial(ImageNetResNet, BasicBlock, (3, 4, 6, 3), ResNet34_Weights.IMAGENET1K_V1),
    "ResNet50": partial(ImageNetResNet, Bottleneck, (3, 4, 6, 3), ResNet50_Weights.IMAGENET1K_V1),
    "ResNet101": partial(ImageNetResNet, Bottleneck, (3, 4, 23, 3), ResNet101_Weights.IMAGENET1K_V1),
}
"""By name."""
