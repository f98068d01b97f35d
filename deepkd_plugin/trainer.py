"""The epoch loop: batches through a distiller, losses into streams, streams into the optimizer."""

from __future__ import annotations

import copy
import math
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate
from tqdm import tqdm

from . import config, device
from .accuracy import correct, evaluate, measure_teacher
from .errors import UserError
from .gsnr import GradientMonitor, GSNRAllocation
from .optim import DecoupledMomentumSGD
from .run import checkpoint, record
from .run.metrics import RunLog, Sums
from .run.progress import _postfix, progress_bar
from .run.schedule import make_scheduler
from .speed import choose_gradients, make_step
from .streams import assign_losses

READ_EVERY = 20
"""Iterations between two readings of the meters: reading them waits for the device."""

BATCH = ("image", "target", "index", "contrastive_index")
"""mdistiller's names for the parts of a training batch; CRD's has the last one."""


class Trainer:
    """Trains a distiller under mdistiller's protocol: `Trainer(name, distiller, loaders…, cfg).train(resume)`.

    Losses are summed and take one momentum, SOLVER.MOMENTUM: mdistiller's base trainer. What a run leaves
    in LOG.PREFIX/name is listed in docs/design.md. What is particular to classification lies in prepare, hits,
    test and samples.
    """

    metric = "test_acc"
    """Of what test() gives, the number that the best epoch is chosen by; more is better."""
    shown = "test"
    """What it is called on the terminal."""

    def __init__(
        self, experiment_name: str, distiller: nn.Module, train_loader: Any, val_loader: Any, cfg: Any
    ) -> None:
        self.cfg = cfg
        self.folder = Path(cfg.LOG.PREFIX) / experiment_name
        self.distiller = distiller
        self.module = distiller.module if isinstance(distiller, nn.DataParallel) else distiller
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.device = next(self.module.parameters()).device
        device.tune()
        device.place(self.module, self.device, cfg.SOLVER.CHANNELS_LAST)
        self.optimizer = self.make_optimizer(self.module.get_learnable_parameters())
        self.scheduler = make_scheduler(self.optimizer, cfg.SOLVER)
        self.assignment: dict[str, str] = {}
        self.step = make_step(
            cfg.SOLVER.EXECUTION,
            distiller,
            self.optimizer,
            lambda losses: self.losses_by_stream(losses),
            cfg.SOLVER.AMP,
        )
        self.gradients = ""
        self.monitor = self.step.monitor = self.make_monitor()
        self.windows: list[dict[str, Any]] = []
        teacher = getattr(self.module, "teacher", None)
        self.teacher = checkpoint.fingerprint(teacher) if teacher is not None else None
        self.teacher_acc: float | None = None
        self.epoch = 0
        self.best_acc = -1.0
        self.best_epoch = 0

    def make_optimizer(self, params: Iterable[nn.Parameter]) -> DecoupledMomentumSGD:
        solver = self.cfg.SOLVER
        return DecoupledMomentumSGD(params, solver.LR, {"task": solver.MOMENTUM}, solver.WEIGHT_DECAY)

    def make_monitor(self) -> GradientMonitor | None:
        """What samples the streams' gradients, where the config asks for it."""
        node = self.cfg.GSNR
        if not (node.MEASURE or self.cfg.SOLVER.DECOUPLED.ALLOCATION == "gsnr"):
            return None
        steps, needed = len(self.train_loader) * self.cfg.SOLVER.EPOCHS, node.EVERY * node.WINDOW
        if steps < needed:
            raise UserError(
                f"GSNR.EVERY x GSNR.WINDOW is {node.EVERY} x {node.WINDOW} = {needed} iterations; it must be at most "
                f"{steps}, all that the run has, so that one window ends"
            )
        names = {p: name.removeprefix("student.") for name, p in self.module.named_parameters()}
        params = [(names[p], p) for group in self.optimizer.param_groups for p in group["params"]]
        return GradientMonitor(
            params, self.optimizer.streams, node.EVERY, node.WINDOW, node.COORDINATES, node.LAYERS
        )

    def train(
        self, resume: bool = False, overwrite: bool = False, command: str | None = None
    ) -> dict[str, Any]:
        """Run the epochs that are left; returns {"best", "best_epoch", "last", "epochs"} (top-1 in percent).

        The teacher is tested first, unless `teacher_acc` is set already. resume: go on from the folder's last
        checkpoint. overwrite: start again where the folder holds a run. command: what started the run, for
        its record. Raises UserError, before anything is written, where the folder does not fit.
        """
        solver = self.cfg.SOLVER
        record.check_folder(self.folder, resume, overwrite)
        if self.teacher is not None and self.teacher_acc is None:
            self.teacher_acc = self.test_teacher()
        self.rehearse()
        if resume:
            self.load(self.folder / "latest")
        # one that was ended between its last checkpoint and the note of its result still gets that note
        if self.epoch == solver.EPOCHS and record.read_run(self.folder)["finished"]:
            raise UserError(
                f"{self.folder}: --resume finds all {self.epoch} epochs done; the results are in run.json there"
            )
        if not self.gradients:  # a resumed run keeps its way: the other would round differently
            self.gradients = choose_gradients(
                solver.GRADIENTS,
                self.step,
                lambda: self.samples(solver.BATCH_SIZE),
                apart=solver.DECOUPLED.ALLOCATION == "gsnr",
            )
        self.optimizer.batched = self.gradients == "batched"
        command = command or shlex.join(["python", *sys.argv])
        made_by = {"student": type(self.module.student), "distiller": type(self.module)}
        classes = {part: f"{cls.__module__}.{cls.__qualname__}" for part, cls in made_by.items()}
        record.prepare_folder(
            self.folder, self.cfg, self.device, command, resume, self.teacher, self.teacher_acc, classes
        )
        started = time.perf_counter()
        try:
            result = self.train_epochs()
        finally:
            record.add_minutes(self.folder, (time.perf_counter() - started) / 60)
        with checkpoint.uninterrupted():
            record.note(self.folder, {"result": result, "finished": True})
        return result

    def train_epochs(self) -> dict[str, Any]:
        """The epochs that are left, each logged and saved when it ends."""
        log = RunLog(self.folder, self.epoch, self.cfg)
        try:
            for epoch in range(self.epoch + 1, self.cfg.SOLVER.EPOCHS + 1):
                device.seed_everything(self.cfg.SOLVER.SEED, epoch)
                entry = {"epoch": epoch, "lr": self.scheduler.get_last_lr()[0]}
                entry |= self.train_epoch(epoch)
                entry |= self.test()
                tested = {name: value for name, value in entry.items() if name.startswith("test_")}
                self.check_finite(tested, f"after epoch {epoch}")
                with checkpoint.uninterrupted():
                    self.finish_epoch(epoch, entry, log)
        finally:
            log.close()
        last = log.lines[-1][self.metric]
        return {"best": self.best_acc, "best_epoch": self.best_epoch, "last": last, "epochs": self.epoch}

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the training set; returns the epoch's record."""
        solver = self.cfg.SOLVER
        self.distiller.train()
        sums = Sums()
        self.windows = []
        waited, start = 0.0, time.perf_counter()
        steps = len(self.train_loader)
        with progress_bar(f"epoch {epoch}/{solver.EPOCHS}", steps) as bar:
            batches = iter(self.train_loader)
            for step in range(1, steps + 1):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                parts = self.prepare(batch, epoch, step)
                if self.monitor is not None:
                    self.monitor.tick()
                logits, by_stream = self.step(parts, epoch)
                if self.monitor is not None and self.monitor.full:
                    self.windows.append({"epoch": epoch} | self.finish_window(self.monitor))
                count = len(parts["target"])
                sums.add({s: loss * count for s, loss in by_stream.items()} | self.hits(logits, parts), count)
                if step % READ_EVERY == 0 or step == steps:
                    seconds = time.perf_counter() - start
                    means = self.read(sums, epoch, step)
                    top_k = self.top_k(logits, epoch, parts)
                    bar.update(step - bar.n)
                    left = seconds / step * (steps * (solver.EPOCHS - epoch + 1) - step)
                    bar.set_postfix_str(_postfix(means, top_k, sums.count / seconds, left))
        seconds = time.perf_counter() - start
        hits = {name: means.pop(name) for name in list(means) if name.startswith("train_")}
        momenta = dict(self.optimizer.param_groups[0]["momentum"])
        entry = {"loss": means, "train_loss": sum(means.values())} | hits | {"momentum": momenta}
        if top_k is not None:
            entry["top_k"] = top_k
        if self.windows:
            entry["gsnr"] = self.windows[-1]["gsnr"]
        return entry | {
            "images_per_second": sums.count / seconds,
            "seconds": seconds,
            "data_seconds": waited,
            "execution": f"{self.step.name}, {self.gradients or 'sequential'} gradients",
        }

    def prepare(self, batch: Any, epoch: int, step: int) -> dict[str, Any]:
        """A loader's batch on the device, as the distiller's arguments; `target` has the batch's length."""
        return dict(zip(BATCH, device.place_batch(batch, self.device, self.cfg.SOLVER.CHANNELS_LAST)))

    def hits(self, logits: torch.Tensor, parts: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What a batch says of the student beside the losses: sums over its samples, named train_…."""
        found = correct(logits, parts["target"])
        return {"train_acc": found["top1"], "train_acc_top5": found["top5"]}

    def top_k(self, logits: torch.Tensor, epoch: int, parts: dict[str, Any]) -> int | None:
        """How many non-target classes the method's mask keeps for a batch; None without one."""
        return self.module.top_k(epoch, logits.shape[1]) if hasattr(self.module, "top_k") else None

    def test(self) -> dict[str, float]:
        """The student on the test set, by names test_…."""
        return evaluate(self.distiller, self.val_loader, self.device, self.cfg.SOLVER)

    def test_teacher(self) -> float | None:
        """The teacher's own number of `metric` in percent; UserError for one that knows nothing."""
        return measure_teacher(self.module, self.val_loader, self.cfg)

    def losses_by_stream(self, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return assign_losses(losses, self.optimizer.streams, self.assignment)

    def finish_window(self, monitor: GradientMonitor) -> dict[str, Any]:
        """What a full window of gradient samples says, with the momenta from here on."""
        return monitor.finish() | {"momentum": dict(self.optimizer.param_groups[0]["momentum"])}

    def read(self, sums: Sums, epoch: int, step: int) -> dict[str, float]:
        """The meters' means so far, checked."""
        means = sums.means()
        self.check_finite(means, f"in epoch {epoch}, by iteration {step}")
        return means

    def check_finite(self, values: dict[str, float], when: str) -> None:
        """UserError where a loss is not finite, before anything of the epoch is saved."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{self.folder}: loss '{name}' became {value} {when}, at learning rate "
                    f"{self.optimizer.param_groups[0]['lr']:g}; it must stay finite: lower SOLVER.LR, or look at "
                    f"the images and the teacher. {self.resume_point()}"
                )

    def rehearse(self) -> None:
        """One forward pass of a copy on two images, so that losses without a stream are found before a run."""
        _, losses = copy.deepcopy(self.module).train()(**self.samples(2), epoch=1)
        self.losses_by_stream(losses)

    def samples(self, count: int) -> dict[str, Any]:
        """A training batch of `count` images, spread over the set, as the distiller's arguments."""
        dataset = self.train_loader.dataset
        held = [dataset[i * (len(dataset) - 1) // max(count - 1, 1)] for i in range(count)]
        collate = getattr(self.train_loader, "collate_fn", None) or default_collate
        return self.prepare(collate(held), 1, 1)

    def resume_point(self) -> str:
        """What is left to resume from, in a sentence."""
        if not self.epoch:
            return "No epoch was finished, so there is no checkpoint."
        return f"The last checkpoint is whole: {self.folder / 'latest'} (epoch {self.epoch})."

    def finish_epoch(self, epoch: int, entry: dict[str, Any], log: RunLog) -> None:
        """Log an epoch and save its checkpoints."""
        self.scheduler.step()
        self.epoch = epoch
        better = entry[self.metric] > self.best_acc
        if better:
            self.best_acc, self.best_epoch = entry[self.metric], epoch
        log.add(entry, self.windows)
        student = {"model": self.module.student.state_dict()}
        every = self.cfg.LOG.SAVE_CHECKPOINT_FREQ
        names = [("best", "student_best")] if better else []
        names += [(f"epoch_{epoch}", f"student_{epoch}")] if epoch % every == 0 else []
        # `latest` comes last: an interruption before it resumes from the epoch before and overwrites the rest
        for name, student_name in [*names, ("latest", "student_latest")]:
            checkpoint.save(student, self.folder / student_name)
            checkpoint.save(self.state(), self.folder / name)
        trained = f"  train {entry['train_acc']:.2f}" if "train_acc" in entry else ""
        tqdm.write(
            f"epoch {epoch:3d}  loss {entry['train_loss']:.4f}{trained}  "
            f"{self.shown} {entry[self.metric]:.2f}  best {self.best_acc:.2f}"
            + (f"  K {entry['top_k']}" if "top_k" in entry else "")
            + f"  lr {entry['lr']:.4g}  {entry['images_per_second']:.0f} images/s"
        )

    def state(self) -> dict[str, Any]:
        """A checkpoint: everything a resumed run needs. The teacher, which never changes, is left out."""
        model = {k: v for k, v in self.module.state_dict().items() if not k.startswith("teacher.")}
        monitor = {} if self.monitor is None else {"monitor": self.monitor.state_dict()}
        return monitor | {
            "epoch": self.epoch,
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "best_acc": self.best_acc,
            "best_epoch": self.best_epoch,
            "config": config.flatten(self.cfg),
            "teacher": self.teacher,
            "gradients": self.gradients,
        }

    def load(self, path: Path) -> dict[str, Any]:
        """Take up a checkpoint and return it; UserError where it is of another config."""
        state = checkpoint.load(path, "--resume")
        if not isinstance(state, dict) or "config" not in state:
            raise UserError(f"{path}: --resume needs a checkpoint that this trainer wrote")
        ours = config.flatten(self.cfg)
        # of keys that are newer than the checkpoint
        defaults = {key.path: key.default for key in config.all_keys()}
        for key in sorted(ours.keys() | state["config"].keys()):
            held, given = state["config"].get(key, defaults.get(key)), ours.get(key)
            if config.computes(key) and held != given:
                raise UserError(
                    f"{path}: --resume needs the run's own config: {key} was {held!r}, is {given!r}"
                )
        if state["teacher"] != self.teacher:
            raise UserError(
                f"{path}: --resume needs the run's own teacher: its weights had the fingerprint {state['teacher']}, "
                f"those of DISTILLER.TEACHER_WEIGHTS have {self.teacher}"
            )
        weights = {k: v for k, v in self.module.state_dict().items() if k.startswith("teacher.")}
        self.module.load_state_dict(weights | state["model"])
        self.gradients = state.get("gradients", "sequential")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.best_acc, self.best_epoch = state["epoch"], state["best_acc"], state["best_epoch"]
        if self.monitor is not None and "monitor" in state:
            self.monitor.load_state_dict(state["monitor"])
        elif self.monitor is not None:  # measured only from here on
            self.monitor.iteration = self.epoch * len(self.train_loader)
        return state


class DecoupledMomentumTrainer(Trainer):
    """The trainer of registry key DecoupledMomentumSGD: one momentum for each stream.

    With all deltas 0 the streams share one buffer and one backward pass, and this is the base trainer for
    every distiller. Otherwise a loss belongs to the stream of its own name or to the one that
    SOLVER.DECOUPLED.LOSS_STREAMS gives it.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        node = self.cfg.SOLVER.DECOUPLED
        pairs = (pair.split(":") for pair in node.LOSS_STREAMS)
        self.assignment = {loss: stream for loss, stream in pairs}
        self.allocation: GSNRAllocation | None = None
        if node.ALLOCATION == "gsnr":
            bounds = {stream: node.DELTA[stream.upper()] for stream in self.optimizer.streams}
            self.allocation = GSNRAllocation(bounds, node.SEPARATION, node.SMOOTHING)

    def make_optimizer(self, params: Iterable[nn.Parameter]) -> DecoupledMomentumSGD:
        solver = self.cfg.SOLVER
        momentum, decay_stream = config.momenta(self.cfg)
        dampening = "ema" if solver.DECOUPLED.DAMPENING == "ema" else 0.0
        return DecoupledMomentumSGD(params, solver.LR, momentum, solver.WEIGHT_DECAY, decay_stream, dampening)

    def finish_window(self, monitor: GradientMonitor) -> dict[str, Any]:
        """As the base trainer's, after an allocation has set the momenta by it."""
        record = monitor.finish()
        groups = self.optimizer.param_groups
        if self.allocation is not None:
            measured = {stream: found["ratio"] for stream, found in record["gsnr"].items()}
            offsets = self.allocation.update(measured)
            for group in groups:
                group["momentum"] = {s: self.cfg.SOLVER.MOMENTUM + delta for s, delta in offsets.items()}
        return record | {"momentum": dict(groups[0]["momentum"])}

    def state(self) -> dict[str, Any]:
        allocation = {} if self.allocation is None else {"allocation": self.allocation.state_dict()}
        return super().state() | allocation

    def load(self, path: Path) -> dict[str, Any]:
        state = super().load(path)
        if self.allocation is not None:
            self.allocation.load_state_dict(state["allocation"])
        return state

    def losses_by_stream(self, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        streams = self.optimizer.streams
        assignment = self.assignment
        if self.monitor is None and len(set(self.optimizer.param_groups[0]["momentum"].values())) == 1:
            # no stream differs from another, nor is looked at, so where a loss without a stream goes is all one
            assignment = {name: streams[0] for name in losses if name not in streams} | assignment
        try:
            return assign_losses(losses, streams, assignment)
        except ValueError as error:
            raise UserError(
                f"SOLVER.DECOUPLED.LOSS_STREAMS: {error}; add 'loss:stream' for each of {list(losses)}"
            ) from None
