"""The meta architecture RCNNDeepKD: mdistiller's RCNNKD with plain KD, DeepKD, and DeepKD beside ReviewKD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...topk import Kept, mask_size
from ..losses import losses_by_stream, proposal_kd, proposal_terms
from . import require
from .config import TYPES, check_architecture, reading

model = require()

from detectron2.config import configurable  # noqa: E402
from detectron2.modeling import META_ARCH_REGISTRY  # noqa: E402
from detectron2.utils.events import get_event_storage  # noqa: E402
from model.reviewkd import build_kd_trans, hcl  # noqa: E402


@META_ARCH_REGISTRY.register()
class RCNNDeepKD(model.RCNNKD):
    """RCNNKD with three more values of KD.TYPE; RCNNKD itself handles the others.

    KD: plain KD over the sampled proposals' class logits. DeepKD: KD on the same logits, decoupled: the target-class
    and non-target-class terms are `loss_tcg` and `loss_ncg` beside the detector's own losses, and the top-K mask
    follows the progress of training. ReviewDeepKD: the same, with ReviewKD's loss on the FPN's maps as `loss_feat`.
    config.LOSS_STREAMS says which loss belongs to which stream. What is minimised is the sum of all.

    The teacher stays in inference mode whatever train() says. Raises UserError if the teacher has other classes.
    """

    @configurable
    def __init__(self, *, max_iter: int, reading: str, **rest: Any) -> None:
        """max_iter: iterations of the whole training, by which the mask measures progress. reading: of the mask."""
        super().__init__(**rest)
        self.max_iter, self.reading = max_iter, reading
        if self.kd_args.TYPE == "ReviewDeepKD":
            self.kd_trans = build_kd_trans(self.kd_args)

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        check_architecture(cfg)
        return super().from_config(cfg) | {"max_iter": cfg.SOLVER.MAX_ITER, "reading": reading(cfg)}

    def train(self, mode: bool = True) -> RCNNDeepKD:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Return losses by name in training and detections in inference, in detectron2's formats."""
        if not self.training or self.kd_args.TYPE not in TYPES:
            return super().forward(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        truths = [image["instances"].to(self.device) for image in batched_inputs]
        features = self.backbone(images.tensor)
        proposals, proposal_losses = self.proposal_generator(images, features, truths)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        predictions: list[Any] = []
        with self.roi_heads.box_predictor.register_forward_hook(lambda *call: predictions.append(call[-1])):
            sampled, box_losses = self.roi_heads(images, features, proposals, truths)
        logits, _ = predictions[0]  # RCNNKD runs the box head again for them
        with torch.no_grad():
            teacher_features = self.teacher.backbone(self.teacher_preprocess_image(batched_inputs).tensor)
            teacher_logits, _ = self.forward_pure_roi_head(self.teacher.roi_heads, teacher_features, sampled)
        task = {**box_losses, **proposal_losses}
        if self.kd_args.TYPE == "KD":
            return task | {"loss_kd": proposal_kd(logits, teacher_logits, self.kd_args.KD.T)}
        target = torch.cat([image.gt_classes for image in sampled])
        feature_losses = {}
        if self.kd_args.TYPE == "ReviewDeepKD":
            feature_losses = {"feat": self.review_loss(features, teacher_features)}
        return self.decoupled(task, logits, teacher_logits, target, feature_losses)

    def decoupled(
        self,
        task: dict[str, Tensor],
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        feature_losses: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return a step's losses by name under DeepKD.

        task, feature_losses: name → scalar; logits: (N, K + 1) of both networks; target: (N,), K for the background.
        """
        node = self.kd_args.DEEPKD
        terms = proposal_terms(
            logits,
            teacher_logits,
            target,
            base=node.BASE,
            temperature=node.T,
            top_k=self.top_k(logits.shape[1], get_event_storage().iter),
            mask=self.reading,
        )
        weighted = {name: node.TASK_WEIGHT * loss for name, loss in task.items()}
        by_stream = losses_by_stream(
            weighted, terms, tcg_weight=node.TCG_WEIGHT, ncg_weight=node.NCG_WEIGHT, feature_losses=feature_losses
        )
        del by_stream["tog"]  # the sum of the weighted losses, which a log should show one by one
        return weighted | {f"loss_{stream}": loss for stream, loss in by_stream.items()}

    def review_loss(self, features: dict[str, Tensor], teacher_features: dict[str, Tensor]) -> Tensor:
        """Return ReviewKD's loss on the maps of both FPNs, weighted."""
        fused = self.kd_trans(list(features.values()))
        return self.kd_args.REVIEWKD.LOSS_WEIGHT * hcl(fused, list(teacher_features.values()))

    def top_k(self, num_logits: int, iteration: int) -> Kept:
        """Return which non-target classes the mask keeps in an iteration, counted from 0; None without a mask."""
        progress = min(iteration / max(self.max_iter - 1, 1), 1.0)
        return mask_size(self.kd_args.DEEPKD.MASK, num_logits, progress)
