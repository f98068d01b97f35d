"""MobileNet for ImageNet: Howard et al., 2017 (arXiv:1704.04861), table 1.

State-dict keys, initialisation and outputs follow mdistiller's network of the same name, which papers on distillation
often call MobileNetV2. Pooling is global; mdistiller's covers 7×7 pixels and so takes 224×224 images only.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from ....errors import UserError

# channels and stride of each depthwise separable convolution
_LAYERS = (*((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)), *((512, 1),) * 5, *((1024, 2), (1024, 1)))
_FEATURES = (3, 5, 11, 13)  # the last entries of `model` at H/4, H/8, H/16 and H/32


class MobileNetV1(nn.Module):
    """A 3×3 stem and 13 depthwise separable convolutions.

    forward: (B, 3, H, W) -> logits (B, 1000) and
        feats: after ReLU, (B, 128, H/4, W/4), (B, 256, H/8, W/8), (B, 512, H/16, W/16), (B, 1024, H/32, W/32)
        preact_feats: the same before ReLU
        pooled_feat: (B, 1024)

    Raises UserError if `pretrained`, because nobody publishes weights of it (mdistiller ignores the argument).
    """

    def __init__(self, pretrained: bool = False) -> None:
        super().__init__()
        if pretrained:
            raise UserError(
                "MobileNetV1 has no pretrained ImageNet weights to fetch; DISTILLER.TEACHER_WEIGHTS (-c of "
                "tools/eval.py) must name a checkpoint of it"
            )
        layers: list[nn.Sequential] = [Conv2dNormActivation(3, 32, 3, stride=2)]
        c_in = 32
        for c_out, stride in _LAYERS:
            depthwise = Conv2dNormActivation(c_in, c_in, 3, stride, groups=c_in)
            layers.append(nn.Sequential(*depthwise, *Conv2dNormActivation(c_in, c_out, 1)))
            c_in = c_out
        self.model = nn.Sequential(*layers)
        self.fc = nn.Linear(c_in, 1000)

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Return the last BatchNorm before each of `feats`, from which OFD takes its margins."""
        return [self.model[i][-2] for i in _FEATURES]

    def get_stage_channels(self) -> list[int]:
        """Return the channels of the entries of `feats`."""
        return [bn.num_features for bn in self.get_bn_before_relu()]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        feats, preacts = [], []
        for i, layer in enumerate(self.model):
            if i not in _FEATURES:
                x = layer(x)
                continue
            for module in layer[:-1]:
                x = module(x)
            preacts.append(x)
            feats.append(x := F.relu(x))  # not in place: the tensors before it stay in the dictionary
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(pooled), {"feats": feats, "preact_feats": preacts, "pooled_feat": pooled}
