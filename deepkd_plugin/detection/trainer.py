"""The trainer of detectors: the classification trainer's loop with boxes, a warm-up by iteration, and AP."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from .. import config, device
from ..data import draws
from ..distributed import collectives, process_group, sharding
from ..errors import UserError
from ..step import Batch
from ..topk import Kept
from ..trainer import DecoupledMomentumTrainer
from .average_precision import average_precision
from .networks import count_classes

WARMUP_START = 0.001
"""The share of the learning rate that warm-up starts at (torchvision's reference training)."""

LEAST_AP = 1.0
"""A teacher below this AP, in percent, was not trained on the data set."""


class DetectionTrainer(DecoupledMomentumTrainer):
    """Trains one of distillers.DISTILLERS; the best epoch is the one with the highest AP on the test set.

    If all deltas are 0, every stream has one momentum, and this is plain SGD for every method. The learning rate is
    that of the epoch in the schedule, times a factor that rises over DETECTION.WARMUP_ITERATIONS.
    """

    by_logits = False
    metric = "test_ap"
    shown = "AP"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.step.clip_norm = self.cfg.DETECTION.CLIP_NORM

    def test_teacher(self) -> float | None:
        return measure_teacher(self.module, self.val_loader, self.cfg)

    def describe(self) -> None:
        """Return nothing: what a file says of a student is for networks that classify whole images."""

    def prepare(self, batch: Any, epoch: int, step: int) -> dict[str, Any]:
        """Prepare a batch as the base trainer does, add what is drawn and the share that is done, set the rate."""
        images, targets = batch
        done = (epoch - 1) * len(self.train_loader) + step - 1
        self.warm_up(done)
        total = len(self.train_loader) * self.cfg.SOLVER.EPOCHS
        whole = self.count({"target": targets}, step)
        own = sharding.shares(whole, config.chunk(self.cfg))[0][process_group.rank()]
        return {
            "image": device.place_batch(images, self.device, False),
            "target": [{name: value.to(self.device) for name, value in t.items()} for t in targets],
            "seeds": [draws.word(self.cfg.SOLVER.SEED, epoch, int(t["image_id"])) for t in targets],
            "count": whole,
            "counted": own > 0,
            "progress": done / max(total - 1, 1),
        }

    def warm_up(self, done: int) -> None:
        """Set the learning rate of the iteration that follows `done` others."""
        iterations = self.cfg.DETECTION.WARMUP_ITERATIONS
        factor = WARMUP_START + (1 - WARMUP_START) * done / iterations if done < iterations else 1.0
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr()):
            group["lr"] = factor * rate

    def measure(self, logits: Tensor, losses: dict[str, Tensor], parts: Batch) -> dict[str, Tensor]:
        """Return the losses of the whole batch, to which those of the processes add up, once for each image."""
        sums = collectives.added(torch.stack(list(losses.values())))
        return {stream: loss * parts["count"] for stream, loss in zip(losses, sums.unbind())}

    def hits(self, logits: Tensor, parts: Batch) -> dict[str, Tensor]:
        """Return nothing: a high accuracy on proposals means little, because most are background."""
        return {}

    def top_k(self, logits: Tensor, epoch: int, parts: dict[str, Any]) -> Kept:
        module = self.module
        return module.top_k(parts["progress"], logits.shape[1]) if hasattr(module, "top_k") else None

    def test(self) -> dict[str, float]:
        """Return the student's AP, AP50 and AP75 on the test set, in percent, always measured in float32."""
        collectives.spread_buffers(self.module.student)
        return evaluate(self.module.student, self.val_loader, self.device)


@torch.no_grad()
def evaluate(detector: nn.Module, loader: Any, torch_device: torch.device) -> dict[str, float]:
    """Measure "test_ap", "test_ap50" and "test_ap75", in percent, of a torchvision detector.

    loader: of images and targets; several processes have some of its batches each (detection/data), and the numbers
    are of all. torch_device: the one that the detector is on.
    """
    detector.eval()
    found = []
    for images, targets in loader:
        outputs = detector(device.place_batch(images, torch_device, False))
        found.append(([{name: value.float().cpu() for name, value in output.items()} for output in outputs], targets))
    # the processes took the batches in turn
    in_turn = itertools.zip_longest(*collectives.of_all(found))
    batches = [batch for turn in in_turn for batch in turn if batch is not None]
    detections = [one for outputs, _ in batches for one in outputs]
    truths = [one for _, targets in batches for one in targets]
    numbers = average_precision(detections, truths, count_classes(detector))
    return {f"test_{name.lower()}": value for name, value in numbers.items()}


def measure_teacher(distiller: nn.Module, loader: Any, cfg: Any, source: str = "config") -> float | None:
    """Print and return the AP in percent of a distiller's teacher on the test set; None without a teacher.

    Raises UserError, naming `source`, if it is below LEAST_AP.
    """
    teacher = getattr(distiller, "teacher", None)
    if teacher is None:
        return None
    ap = evaluate(teacher, loader, next(teacher.parameters()).device)["test_ap"]
    if ap < LEAST_AP:
        raise UserError(
            f"{source}: the teacher {cfg.DISTILLER.TEACHER} from DISTILLER.TEACHER_WEIGHTS finds nothing on "
            f"{cfg.DATASET.TYPE} (AP {ap:.2f} %); it must be trained on this data set"
        )
    print(f"teacher   {cfg.DISTILLER.TEACHER} AP {ap:.2f} % on the test set")
    return ap


TRAINERS = {"base": DetectionTrainer, "DecoupledMomentumSGD": DetectionTrainer}
"""By SOLVER.TRAINER; base is the same trainer with one momentum."""
