"""Faster R-CNNs on a feature pyramid, out of torchvision's parts, by name.

State-dict keys of the first three are torchvision's for the models of the same names, so that its weights load.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.misc import FrozenBatchNorm2d

from ..errors import UserError
from ..hosts.builtin import shipped_weights
from ..hosts.builtin.models.resnet import ResNet
from ..losses import wide
from ..run import checkpoint
from .sampling import draw_by_image

RATIOS = (0.5, 1.0, 2.0)
"""Height over width of anchors."""


def network(name: str, num_classes: int, node: Any, backbone: str = "", trained: bool = False) -> FasterRCNN:
    """Build a detector for num_classes classes, not counting the background.

    node: the config node DETECTION. backbone: a file of ImageNet weights for the backbone. trained: whether a
    detector's weights will be loaded afterwards. With either, the norms are frozen. With a backbone file, only the
    last three stages of torchvision's backbones are trained, as in its models. Raises UserError for a file that does
    not fit.
    """
    norm = FrozenBatchNorm2d if backbone or trained else nn.BatchNorm2d
    body, options = NETWORKS[name](norm, bool(backbone), num_classes + 1)
    if backbone:
        _load_backbone(body, backbone, name)
    detector = FasterRCNN(
        body,
        min_size=list(node.MIN_SIZE),
        max_size=node.MAX_SIZE,
        rpn_pre_nms_top_n_train=node.RANKED_TRAIN,
        rpn_pre_nms_top_n_test=node.RANKED_TEST,
        rpn_post_nms_top_n_train=node.KEPT_TRAIN,
        rpn_post_nms_top_n_test=node.KEPT_TEST,
        box_batch_size_per_image=node.PROPOSALS,
        box_positive_fraction=node.FOREGROUND,
        **options,
    )
    draw_by_image(detector)
    for part in (detector.backbone, detector.rpn.head, detector.roi_heads.box_predictor):
        part.register_forward_hook(_in_float32)
    return detector


def _in_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Return a module's output in float32: under autocast boxes would be bfloat16, which has steps of 4 at 1,000."""
    if isinstance(output, Tensor):
        return wide(output)
    if isinstance(output, dict):
        return {name: wide(value) for name, value in output.items()}
    return type(output)(_in_float32(module, inputs, part) for part in output)


def trained_network(name: str, num_classes: int, node: Any, weights: str, key: str) -> FasterRCNN:
    """Build a detector with the weights of a file or of one that the package ships (builtin:NAME), without gradients.

    Torchvision's files for COCO have a column for each of its 91 category ids. Only 80 of these are classes, and only
    those are kept. key: the config key or option that gave `weights`; the UserError for a file that is missing or does
    not fit names it.
    """
    file = weights_file(name, weights, key)
    tensors = checkpoint.network_weights(checkpoint.load(file, key)) or {}
    # torchvision's files and those with a pretrained backbone have frozen norms, which count no batches
    frozen = bool(tensors) and not any(tensor.endswith("num_batches_tracked") for tensor in tensors)
    scores = tensors.get(SCORES)
    classes = num_classes if scores is None or scores.ndim != 2 else len(scores) - 1
    detector = network(name, max(classes, 1), node, trained=frozen)
    checkpoint.load_weights(detector, file, key, name)
    if (num_classes, classes + 1) == (len(COCO_IDS), COCO_COLUMNS):
        _keep_columns(detector, [0, *COCO_IDS])
    elif classes != num_classes:
        raise UserError(f"{file}: {key} holds a {name} of {classes} classes; this run has {num_classes}")
    if file.stem.endswith(TRAINED_WITHOUT_EPSILON):
        for module in detector.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0
    return detector.requires_grad_(False)


def weights_file(name: str, weights: str, key: str) -> Path:
    """Return the file that `weights` means, as in trained_network; UserError if there is none."""
    if not weights:
        raise UserError(f"{key} names no file; it must name a checkpoint of {name} on this data set")
    return checkpoint.there(shipped_weights(weights) or weights, key)


COCO_COLUMNS = 91
COCO_IDS = tuple(i for i in range(1, COCO_COLUMNS) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""The category ids of COCO's 80 classes."""

SCORES = "roi_heads.box_predictor.cls_score.weight"

TRAINED_WITHOUT_EPSILON = "-258fb6c6"
"""How the name of torchvision's file of fasterrcnn_resnet50_fpn ends: torchvision sets that model's epsilon to 0."""


def _keep_columns(detector: FasterRCNN, columns: list[int]) -> None:
    """Keep only the given classes of a detector, background included, in this order."""
    head = detector.roi_heads.box_predictor
    boxes = [4 * column + i for column in columns for i in range(4)]
    for layer, rows in ((head.cls_score, columns), (head.bbox_pred, boxes)):
        layer.weight, layer.bias = (nn.Parameter(old[rows].clone()) for old in (layer.weight, layer.bias))
        layer.out_features = len(rows)


def count_classes(detector: FasterRCNN) -> int:
    """Return a detector's number of classes, not counting the background."""
    return detector.roi_heads.box_predictor.cls_score.out_features - 1


def _load_backbone(backbone: nn.Module, file: str, name: str) -> None:
    """Load ImageNet weights into a backbone's body, without the classifier's."""
    option = "DETECTION.STUDENT_BACKBONE"
    weights = checkpoint.network_weights(checkpoint.load(file, option)) or {}
    weights = {tensor.removeprefix("features."): value for tensor, value in weights.items()}
    wanted = backbone.body.state_dict()
    missing = [t for t, value in wanted.items() if t not in weights or weights[t].shape != value.shape]
    if missing:
        raise UserError(
            f"{file}: {option} must hold ImageNet weights of the backbone of {name}; {len(missing)} of its "
            f"{len(wanted)} tensors are missing ({missing[0]})"
        )
    backbone.body.load_state_dict({tensor: weights[tensor] for tensor in wanted})


Made = tuple[nn.Module, dict[str, Any]]
"""A backbone with out_channels that returns named maps, and FasterRCNN's other arguments, its classes among them."""

Maker = Callable[[Any, bool, int], Made]
"""(norm layer, whether the backbone starts from ImageNet weights, number of class logits) -> Made."""


def _resnet(depth: int, norm: Any, pretrained: bool, columns: int) -> Made:
    # of 5 stages; the others keep their ImageNet weights
    layers = 3 if pretrained else 5
    name = f"resnet{depth}"
    body = resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=norm, trainable_layers=layers)
    return body, {"num_classes": columns}


def _mobilenet_v3_320(norm: Any, pretrained: bool, columns: int) -> Made:
    layers = 3 if pretrained else 6
    body = mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=norm, trainable_layers=layers
    )
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),) * 3, (RATIOS,) * 3)
    return body, {"num_classes": columns, "rpn_anchor_generator": anchors, "rpn_score_thresh": 0.05}


class SmallFPN(nn.Module):
    """A CIFAR ResNet with a stem of stride 2 under a pyramid of two maps, at strides 4 and 8, for glyph_canvas.

    forward: images (B, 3, H, W) -> {"0": (B, 64, H/4, W/4), "1": (B, 64, H/8, W/8)}
    """

    out_channels = 64

    def __init__(self, depth: int, norm: Any) -> None:
        super().__init__()
        self.body = ResNet(depth, (16, 16, 32, 64))
        del self.body.fc
        self.body.conv1.stride = (2, 2)
        self.fpn = FeaturePyramidNetwork([32, 64], self.out_channels)
        if norm is FrozenBatchNorm2d:
            for name, module in list(self.body.named_modules()):
                if isinstance(module, nn.BatchNorm2d):
                    self.body.set_submodule(name, FrozenBatchNorm2d(module.num_features))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        body = self.body
        x = body.layer1(body.relu(body.bn1(body.conv1(x)))).relu()
        x = body.layer2(x).relu()
        return self.fpn(OrderedDict([("0", x), ("1", F.relu(body.layer3(x)))]))


def _small(depth: int, norm: Any, pretrained: bool, columns: int) -> Made:
    channels, side, width = SmallFPN.out_channels, 5, 128
    return SmallFPN(depth, norm), {
        "rpn_anchor_generator": AnchorGenerator(((14, 20), (28, 38)), (RATIOS,) * 2),
        # glyphs of 28 pixels and more are looked up in the coarser map
        "box_roi_pool": MultiScaleRoIAlign(["0", "1"], side, 2, canonical_scale=28, canonical_level=3),
        "box_head": TwoMLPHead(channels * side**2, width),
        "box_predictor": FastRCNNPredictor(width, columns),
    }


NETWORKS: dict[str, Maker] = {
    "fasterrcnn_resnet50_fpn": partial(_resnet, 50),
    "fasterrcnn_resnet18_fpn": partial(_resnet, 18),
    "fasterrcnn_mobilenet_v3_large_320_fpn": _mobilenet_v3_320,
    "fasterrcnn_resnet20_fpn": partial(_small, 20),
    "fasterrcnn_resnet8_fpn": partial(_small, 8),
}
"""By name. The last two are built on CIFAR ResNets, for images of about 100 pixels."""
