"""Methods for torchvision's Faster R-CNNs: batches of images and boxes in, named losses out.

The student takes its ordinary training step. The proposals that it samples then go through the teacher's box head, on
the teacher's own features of the same images. Distillation compares both networks' class logits of these proposals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss

from ..distillers.base import Taught, warmup_factor
from ..distillers.variants import variant
from ..distributed import collectives
from ..losses import wide
from ..topk import Kept, mask_size
from .losses import losses_by_stream, proposal_kd, proposal_terms
from .sampling import give_seeds

Target = dict[str, Tensor]
"""One image's boxes (n, 4), x1 y1 x2 y2 in pixels, and labels (n,), from 1 on; n may be 0."""


class Pass(NamedTuple):
    """What distillation needs of a student's training step; N proposals in all, K + 1 classes."""

    losses: dict[str, Tensor]
    """Of the proposal network and the box head; of several processes, this one's part of the batch's."""
    logits: Tensor
    """(N, K + 1)"""
    labels: Tensor
    """(N,), 0 for the background."""
    proposals: list[Tensor]
    """(n, 4) for each image."""
    images: ImageList
    share: Tensor | float = 1.0
    """Of the batch's proposals, which several processes may share; a mean over N, times it, adds up to that of all."""


def training_pass(
    student: FasterRCNN,
    images: Sequence[Tensor],
    targets: Sequence[Target],
    seeds: Sequence[int] = (),
    counted: bool = True,
) -> Pass:
    """Take a training step of torchvision's Faster R-CNN, up to its losses, and keep what it sampled.

    images: (3, H, W) each, in [0, 1]. seeds: what each image's draws are a function of; without them they are from
    PyTorch's generator. counted: False if this process passes an image for nothing, because the others wait for it.
    Without proposals the box head's losses are 0; torchvision's are NaN. Several processes share a batch: all losses
    are means over what is sampled of all its images, so each process has its share of them.
    """
    give_seeds(student, seeds)
    batch, resized = student.transform(list(images), list(targets))
    features = student.backbone(batch.tensors)
    proposals, losses = student.rpn(batch, features, resized)
    heads = student.roi_heads
    proposals, _, labels, offsets = heads.select_training_samples(proposals, resized)
    # the pool infers its levels' strides from the extent of the first batch, which must be one in all processes
    pooled = heads.box_roi_pool(features, proposals, [student.transform.extent])
    logits, regression = heads.box_predictor(heads.box_head(pooled))
    logits, regression = wide(logits), wide(regression)
    if len(logits):
        classifier, box = fastrcnn_loss(logits, regression, labels, offsets)
    else:
        classifier, box = logits.sum(), regression.sum()
    sampled = [student.rpn.fg_bg_sampler.counted, len(logits)] if counted else [0, 0]
    of_anchors, of_proposals = collectives.parts_of_all(sampled)
    losses = {name: of_anchors * loss for name, loss in losses.items()}
    losses |= {"loss_classifier": of_proposals * classifier, "loss_box_reg": of_proposals * box}
    return Pass(losses, logits, torch.cat(labels), proposals, batch, of_proposals)


class Detector(nn.Module):
    """The student alone (`NONE`), under the protocol of deepkd_plugin's trainer."""

    def __init__(self, student: FasterRCNN, cfg: Any) -> None:
        super().__init__()
        self.student = student
        self.cfg = cfg

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    def forward(
        self,
        image: list[Tensor],
        target: list[Target] | None = None,
        seeds: Sequence[int] = (),
        counted: bool = True,
        **batch: Any,
    ) -> Any:
        """Return ((N, K + 1) class logits, {name: loss}) in training, else what torchvision's detectors return.

        seeds, counted: as training_pass takes them.
        """
        if not self.training:
            return self.student(image)
        step = training_pass(self.student, image, target, seeds, counted)
        return step.logits, self.losses(step, **batch)

    def losses(self, step: Pass, **batch: Any) -> dict[str, Tensor]:
        return step.losses


class Distilled(Taught, Detector):
    """What the methods with a teacher have in common."""

    def __init__(self, student: FasterRCNN, teacher: FasterRCNN, cfg: Any) -> None:
        super().__init__(student, cfg)
        self.teacher = teacher

    @torch.no_grad()
    def teach(self, step: Pass) -> Tensor:
        """Return the teacher's class logits (N, K + 1) of the student's proposals."""
        heads = self.teacher.roi_heads
        features = self.teacher.backbone(step.images.tensors)
        pooled = heads.box_roi_pool(features, step.proposals, step.images.image_sizes)
        return wide(heads.box_predictor(heads.box_head(pooled))[0])


class KD(Distilled):
    """CE_WEIGHT · the detection losses + KD_WEIGHT · KD over proposals, from the config node KD."""

    def losses(self, step: Pass, **batch: Any) -> dict[str, Tensor]:
        node = self.cfg.KD
        kd = step.share * proposal_kd(step.logits, self.teach(step), float(node.TEMPERATURE))
        return _weighted(step.losses, node.LOSS.CE_WEIGHT) | {"loss_kd": node.LOSS.KD_WEIGHT * kd}


class DKD(Distilled):
    """CE_WEIGHT · the detection losses + warm-up · (ALPHA · TCKD + BETA · NCKD), from the config node DKD."""

    def losses(self, step: Pass, epoch: float, **batch: Any) -> dict[str, Tensor]:
        node = self.cfg.DKD
        tckd, nckd = proposal_terms(step.logits, self.teach(step), step.labels, temperature=float(node.T))
        dkd = step.share * warmup_factor(epoch, node.WARMUP) * (node.ALPHA * tckd + node.BETA * nckd)
        return _weighted(step.losses, node.CE_WEIGHT) | {"loss_kd": dkd}


class DeepKD(Distilled):
    """DeepKD over KD or DKD on proposals: the streams tog, tcg and ncg, from the config node DeepKD.

    The mask's K, of the K + 1 classes with the background, follows the iterations.
    """

    def losses(self, step: Pass, epoch: float, progress: float, **batch: Any) -> dict[str, Tensor]:
        node = self.cfg.DeepKD
        terms = proposal_terms(
            step.logits,
            self.teach(step),
            step.labels,
            base=node.BASE,
            temperature=node.TEMPERATURE,
            top_k=self.top_k(progress, step.logits.shape[1]),
            mask=variant(self.cfg).reading,
        )
        warmup = warmup_factor(epoch, node.WARMUP)
        return losses_by_stream(
            step.losses,
            (step.share * terms[0], step.share * terms[1]),
            task_weight=node.CE_WEIGHT,
            tcg_weight=warmup * node.TCG_WEIGHT,
            ncg_weight=warmup * node.NCG_WEIGHT,
        )

    def top_k(self, progress: float, num_classes: int) -> Kept:
        """Return which non-target classes count at this share of the training; None without a mask."""
        return mask_size(self.cfg.DeepKD.MASK, num_classes, progress)


def _weighted(losses: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    return {name: weight * loss for name, loss in losses.items()}


DISTILLERS: dict[str, type[Detector]] = {"NONE": Detector, "KD": KD, "DKD": DKD, "DeepKD": DeepKD}
"""By DISTILLER.TYPE."""
