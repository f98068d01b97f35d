"""The initialisation that mdistiller's VGGs and its CIFAR MobileNetV2 share."""

import math

from torch import nn


def fan_out_normal_(net: nn.Module) -> None:
    """Fill, in place, convolutions from N(0, 2 / (k² · C_out)), linear layers from N(0, 0.01²) and biases with 0.

    Layers draw in the order of `net.modules()`, so a seed determines the network.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
