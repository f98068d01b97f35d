"""Training in detectron2's manner, with a momentum for each stream of the losses."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import device
from ...errors import UserError
from ...optim import DecoupledMomentumSGD
from ...run import array_pickle, checkpoint
from ...streams import assign_losses
from . import require
from .config import LOSS_STREAMS, momenta

require()

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.engine import DefaultTrainer, SimpleTrainer  # noqa: E402
from detectron2.engine.train_loop import TrainerBase  # noqa: E402
from detectron2.evaluation import COCOEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator  # noqa: E402
from detectron2.solver.build import get_default_optimizer_params  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from . import rcnn  # noqa: E402, F401 (registers RCNNDeepKD)
from .loader import Batches, build_train_loader  # noqa: E402
from .recorder import Recorder  # noqa: E402

START = {"teacher": ("teacher.",), "student's backbone": ("backbone.bottom_up.",)}
"""What a start file must hold: the student's other parts begin at random numbers, and frozen norms and stages never
would get away from them."""

TRAINED = {"student": ("backbone.", "proposal_generator.", "roi_heads.")}
"""What a file must hold that is to be tested."""

HELD = dict.fromkeys(
    START, "it must hold teacher and student, as `deepkd merge-detector-weights` writes it"
) | {"student": "it must be the checkpoint of a run under this config"}

Clipper = Callable[[list[Tensor]], Any]

EVALUATORS = {
    "coco": lambda name, folder: COCOEvaluator(name, output_dir=folder),
    "lvis": lambda name, folder: LVISEvaluator(name, output_dir=folder),
    "pascal_voc": lambda name, folder: PascalVOCDetectionEvaluator(name),
}
"""By the `evaluator_type` of a data set's metadata."""


class StreamTrainer(SimpleTrainer):
    """detectron2's training step, whose losses go to the optimizer by stream.

    clipper: clips p.grad of the parameters that it is given, in place. scaler: a GradScaler; the forward pass is then
    under float16 autocast. seed: of what a step draws, proposals for one; None leaves the generators alone.

    Several processes each take the step of their share of the batch and average their gradients before the clipping,
    so `model` is the bare module: DistributedDataParallel's hooks would never fire, because the gradients by stream
    are taken by autograd.grad.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: DecoupledMomentumSGD,
        *,
        clipper: Clipper | None = None,
        scaler: Any = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.clipper, self.scaler, self.seed = clipper, scaler, seed
        self.totals: dict[str, Tensor] = {}
        self.steps = 0

    def run_step(self) -> None:
        """One batch: losses, gradients by stream, their mean over the processes, clipping, the update."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        waited = time.perf_counter() - start
        if self.seed is not None:
            device.seed_everything(self.seed + comm.get_rank(), self.iter)
        self.optimizer.zero_grad()  # first, so that old gradients do not lie beside the new activations
        kind = next(self.model.parameters()).device.type
        with torch.autocast(kind, torch.float16, enabled=self.scaler is not None):
            losses = self.model(data)
        by_stream = losses_by_stream(losses, self.optimizer.streams)
        self._count(by_stream)
        if self.scaler is not None:
            by_stream = {stream: self.scaler.scale(loss) for stream, loss in by_stream.items()}
        self.optimizer.backward(by_stream)
        if comm.get_world_size() > 1:
            self.optimizer.average_gradients()
        self.after_backward()
        self._write_metrics(losses, waited)
        self._update()

    def means(self) -> dict[str, float]:
        """Each stream's mean loss over the steps and processes since the last call; all processes must call it."""
        held = comm.all_gather({name: total.item() / self.steps for name, total in self.totals.items()})
        self.totals, self.steps = {}, 0
        return {name: sum(means[name] for means in held) / len(held) for name in held[0]}

    def state_dict(self) -> dict[str, Any]:
        scaler = {} if self.scaler is None else {"grad_scaler": self.scaler.state_dict()}
        totals = {name: total.item() for name, total in self.totals.items()}
        return super().state_dict() | scaler | {"totals": totals, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.scaler is not None and "grad_scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        self.totals = {
            n: torch.tensor(t, dtype=torch.float64) for n, t in state_dict.get("totals", {}).items()
        }
        self.steps = state_dict.get("steps", 0)

    def _count(self, by_stream: Mapping[str, Tensor]) -> None:
        for name, loss in by_stream.items():
            loss = loss.detach().double()
            self.totals[name] = loss + self.totals[name].to(loss.device) if name in self.totals else loss
        self.steps += 1

    def _update(self) -> None:
        optimizer = self.optimizer
        if self.scaler is not None:
            scale = self.scaler.get_scale()
            optimizer.scale_gradients(1.0 / scale)
            # the scaler knows p.grad alone: it takes the scale out once more, and looks for what is not finite
            held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(held, scale)
            self.scaler.unscale_(optimizer)
        if self.clipper is not None:
            optimizer.clip(self.clipper)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpoints, read without running code, and refused where they lack what is not learned anew.

    needed: beginnings of the names of what a file must have, by what it is.
    """

    needed: Mapping[str, tuple[str, ...]] = START

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            held = array_pickle.load(filename, "MODEL.WEIGHTS")
            if "model" in held and "__author__" in held:
                return held
            weights = {
                name: w for name, w in held.get("blobs", held).items() if not name.endswith("_momentum")
            }
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        held = checkpoint.load(filename, "MODEL.WEIGHTS")
        return held if "model" in held else {"model": held}

    def _load_model(self, held: Any) -> Any:
        found = super()._load_model(held)
        for part, beginnings in self.needed.items():
            for name, theirs, ours in found.incorrect_shapes:
                if name.startswith(beginnings):
                    raise UserError(
                        f"MODEL.WEIGHTS: its {name} has the shape {tuple(theirs)}; "
                        f"this config's {part} needs {tuple(ours)}"
                    )
            lost = [name for name in found.missing_keys if name.startswith(beginnings)]
            if lost:
                raise UserError(
                    f"MODEL.WEIGHTS: the file lacks {len(lost)} tensors of the {part}, {lost[0]} for one; {HELD[part]}"
                )
        return found


class Trainer(DefaultTrainer):
    """detectron2's DefaultTrainer around StreamTrainer: its hooks, schedule, checkpoints and evaluation.

    command: what started the run, for its record. Raises UserError where the data set has more classes than the
    networks.
    """

    def __init__(self, cfg: Any, command: str = "") -> None:
        TrainerBase.__init__(
            self
        )  # DefaultTrainer's own would wrap the model, and needs a GPU for two processes
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg, self.command = cfg, command
        model = self.build_model(cfg)
        loader = self.build_train_loader(cfg)
        check_classes(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = StreamTrainer(
            model,
            loader,
            optimizer,
            clipper=build_clipper(cfg),
            scaler=torch.amp.GradScaler() if cfg.SOLVER.AMP.ENABLED else None,
            seed=None if cfg.SEED < 0 else cfg.SEED,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As detectron2's; then all processes have the first one's weights, and the images go on where they were."""
        super().resume_or_load(resume)
        synchronise(self.model)
        batches = getattr(self.data_loader, "batch_sampler", None)
        if isinstance(batches, Batches):
            batches.start = self.start_iter

    def build_hooks(self) -> list[Any]:
        """detectron2's, and before its writers the one that keeps our records."""
        found = super().build_hooks()
        writers = len(found) - 1 if comm.is_main_process() else len(found)
        found.insert(writers, Recorder(self.cfg, self.command))
        return found

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> DecoupledMomentumSGD:
        """DecoupledMomentumSGD over detectron2's parameter groups: norms and biases have a decay of their own."""
        solver = cfg.SOLVER
        groups = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        momentum, decay_stream = momenta(cfg)
        dampening = "ema" if solver.DECOUPLED.DAMPENING == "ema" else 0.0
        return DecoupledMomentumSGD(
            groups, solver.BASE_LR, momentum, solver.WEIGHT_DECAY, decay_stream, dampening
        )

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        """Ours with detectron2's usual sampler; with another of its samplers, its own."""
        ours = cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler"
        return build_train_loader(cfg) if ours else super().build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str, output_folder: str | None = None) -> Any:
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind not in EVALUATORS:
            known = ", ".join(EVALUATORS)
            raise UserError(
                f"DATASETS.TEST: {dataset_name} is a set of type {kind!r}; it must be one of {known}"
            )
        return EVALUATORS[kind](dataset_name, output_folder or str(Path(cfg.OUTPUT_DIR) / "inference"))


def losses_by_stream(losses: Mapping[str, Tensor], streams: Sequence[str]) -> dict[str, Tensor]:
    """A model's losses summed into the optimizer's streams, the first of which takes all that have none."""
    return assign_losses(losses, streams, {name: LOSS_STREAMS.get(name, streams[0]) for name in losses})


def build_clipper(cfg: Any) -> Clipper | None:
    """The clipper of SOLVER.CLIP_GRADIENTS; None where it is off."""
    node = copy.deepcopy(cfg.SOLVER.CLIP_GRADIENTS)
    if not node.ENABLED:
        return None
    if node.CLIP_TYPE == "value":
        return lambda params: nn.utils.clip_grad_value_(params, node.CLIP_VALUE)
    if node.CLIP_TYPE == "norm":
        return lambda params: [nn.utils.clip_grad_norm_([p], node.CLIP_VALUE, node.NORM_TYPE) for p in params]
    return lambda params: nn.utils.clip_grad_norm_(params, node.CLIP_VALUE, node.NORM_TYPE)


def check_classes(cfg: Any) -> None:
    """Raise UserError where a data set of the config, loaded before, has more classes than the detector."""
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for name in cfg.DATASETS.TRAIN:
        found = len(MetadataCatalog.get(name).get("thing_classes", ()))
        if found > num_classes:
            raise UserError(
                f"config: MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; it must be {found}, the classes of {name}"
            )


def synchronise(model: nn.Module) -> None:
    """Give every process the weights and buffers of the first."""
    if comm.get_world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(tensor.data, 0)
