"""detectron2's training with a momentum for each stream of the losses."""

import copy
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import config, device
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
"""What a start file must hold. The student's other parts may start from random numbers, but frozen norms and stages
would keep theirs."""

TRAINED = {"student": ("backbone.", "proposal_generator.", "roi_heads.")}
"""What a file must hold to be tested."""

EXPECTED = dict.fromkeys(START, "it must hold teacher and student, as `deepkd merge-detector-weights` writes it") | {
    "student": "it must be the checkpoint of a run under this config"
}

Clipper = Callable[[list[Tensor]], Any]

EVALUATORS = {
    "coco": lambda name, folder: COCOEvaluator(name, output_dir=folder),
    "lvis": lambda name, folder: LVISEvaluator(name, output_dir=folder),
    "pascal_voc": lambda name, folder: PascalVOCDetectionEvaluator(name),
}
"""By the `evaluator_type` of a data set's metadata."""


class StreamTrainer(SimpleTrainer):
    """detectron2's training step, whose losses go to the optimizer by stream.

    clipper: clips p.grad of the given parameters in place. scaler: a GradScaler; with one, the forward pass is under
    float16 autocast. seed: of what a step draws, such as proposals; None leaves the generators alone.

    Several processes each take the step of their share of the batch and average their gradients before clipping.
    `model` is the bare module: the gradients by stream come from autograd.grad, so DistributedDataParallel's hooks
    would never fire.
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
        """Train on one batch: losses, gradients by stream, their mean over the processes, clipping, the update."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        waited = time.perf_counter() - start
        if self.seed is not None:
            device.seed_everything(self.seed + comm.get_rank(), self.iter)
        self.optimizer.zero_grad()  # first, so that old gradients and new activations do not share the memory
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
        """Return each stream's mean loss over steps and processes since the last call; all processes must call it."""
        means = comm.all_gather({name: total.item() / self.steps for name, total in self.totals.items()})
        self.totals, self.steps = {}, 0
        return {name: sum(mean[name] for mean in means) / len(means) for name in means[0]}

    def state_dict(self) -> dict[str, Any]:
        scaler = {} if self.scaler is None else {"grad_scaler": self.scaler.state_dict()}
        totals = {name: total.item() for name, total in self.totals.items()}
        return super().state_dict() | scaler | {"totals": totals, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.scaler is not None and "grad_scaler" in state_dict:
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        self.totals = {n: torch.tensor(t, dtype=torch.float64) for n, t in state_dict.get("totals", {}).items()}
        self.steps = state_dict.get("steps", 0)

    def _count(self, by_stream: Mapping[str, Tensor]) -> None:
        for name, loss in by_stream.items():
            loss = loss.detach().double()
            self.totals[name] = loss + self.totals[name].to(loss.device) if name in self.totals else loss
        self.steps += 1

    def _update(self) -> None:
        optimizer = self.optimizer
        if self.clipper is not None:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            optimizer.clip(self.clipper)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpoints, read without running code, and refused if they lack what training cannot make up for.

    needed: what a file must have, and the prefixes of its tensors' names.
    """

    needed: Mapping[str, tuple[str, ...]] = START

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            content = array_pickle.load(filename, "MODEL.WEIGHTS")
            if "model" in content and "__author__" in content:
                return content
            weights = {name: w for name, w in content.get("blobs", content).items() if not name.endswith("_momentum")}
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        content = checkpoint.load(filename, "MODEL.WEIGHTS")
        return content if "model" in content else {"model": content}

    def _load_model(self, content: Any) -> Any:
        differences = super()._load_model(content)
        for part, prefixes in self.needed.items():
            for name, theirs, ours in differences.incorrect_shapes:
                if name.startswith(prefixes):
                    raise UserError(
                        f"MODEL.WEIGHTS: its {name} has the shape {tuple(theirs)}; "
                        f"this config's {part} needs {tuple(ours)}"
                    )
            missing = [name for name in differences.missing_keys if name.startswith(prefixes)]
            if missing:
                raise UserError(
                    f"MODEL.WEIGHTS: the file lacks {len(missing)} tensors of the {part}, {missing[0]} for one; "
                    f"{EXPECTED[part]}"
                )
        return differences


class Trainer(DefaultTrainer):
    """detectron2's DefaultTrainer around StreamTrainer: its hooks, schedule, checkpoints and evaluation.

    command: what started the run, for its record. Raises UserError if the data set has more classes than the networks.
    """

    def __init__(self, cfg: Any, command: str = "") -> None:
        # not DefaultTrainer's own, which would wrap the model and needs a GPU for two processes
        TrainerBase.__init__(self)
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
        """Do as detectron2 does, give all processes the first one's weights, and continue with the next images."""
        super().resume_or_load(resume)
        synchronise(self.model)
        batches = getattr(self.data_loader, "batch_sampler", None)
        if isinstance(batches, Batches):
            batches.start = self.start_iter

    def build_hooks(self) -> list[Any]:
        """Return detectron2's hooks with a Recorder before its writers."""
        hooks = super().build_hooks()
        writers = len(hooks) - 1 if comm.is_main_process() else len(hooks)
        hooks.insert(writers, Recorder(self.cfg, self.command))
        return hooks

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> DecoupledMomentumSGD:
        """Build DecoupledMomentumSGD over detectron2's parameter groups; norms and biases have their own decay."""
        solver = cfg.SOLVER
        groups = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        momentum, decay_stream = momenta(cfg)
        return DecoupledMomentumSGD(
            groups, solver.BASE_LR, momentum, solver.WEIGHT_DECAY, decay_stream, **config.dampening(cfg)
        )

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        """Build our loader if the sampler is detectron2's usual one, else detectron2's."""
        ours = cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler"
        return build_train_loader(cfg) if ours else super().build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str, output_folder: str | None = None) -> Any:
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind not in EVALUATORS:
            known = ", ".join(EVALUATORS)
            raise UserError(f"DATASETS.TEST: {dataset_name} is a set of type {kind!r}; it must be one of {known}")
        return EVALUATORS[kind](dataset_name, output_folder or str(Path(cfg.OUTPUT_DIR) / "inference"))


def losses_by_stream(losses: Mapping[str, Tensor], streams: Sequence[str]) -> dict[str, Tensor]:
    """Sum a model's losses into the optimizer's streams; the first takes all losses without a stream of their own."""
    return assign_losses(losses, streams, {name: LOSS_STREAMS.get(name, streams[0]) for name in losses})


def build_clipper(cfg: Any) -> Clipper | None:
    """Build the clipper of SOLVER.CLIP_GRADIENTS; None if it is off."""
    node = copy.deepcopy(cfg.SOLVER.CLIP_GRADIENTS)
    if not node.ENABLED:
        return None
    if node.CLIP_TYPE == "value":
        return lambda params: nn.utils.clip_grad_value_(params, node.CLIP_VALUE)
    if node.CLIP_TYPE == "norm":
        return lambda params: [nn.utils.clip_grad_norm_([p], node.CLIP_VALUE, node.NORM_TYPE) for p in params]
    return lambda params: nn.utils.clip_grad_norm_(params, node.CLIP_VALUE, node.NORM_TYPE)


def check_classes(cfg: Any) -> None:
    """Raise UserError if a data set of the config, which must be loaded, has more classes than the detector."""
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    for name in cfg.DATASETS.TRAIN:
        classes = len(MetadataCatalog.get(name).get("thing_classes", ()))
        if classes > num_classes:
            raise UserError(
                f"config: MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; it must be {classes}, the classes of {name}"
            )


def synchronise(model: nn.Module) -> None:
    """Give every process the weights and buffers of the first."""
    if comm.get_world_size() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(tensor.data, 0)
