"""The epoch loop: batches through a distiller, losses into streams, streams into the optimizer."""

import copy
import hashlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import default_collate

from . import card, choice, config, data, device, solver
from .accuracy import correct, evaluate, measure_teacher
from .data import make_mixing
from .data.arrays import passes
from .data.resident import ResidentLoader
from .distillers.terms import classes
from .distributed import collectives, process_group, sharding
from .divided import DividedStep, check_divisible
from .errors import UserError
from .gsnr import GradientMonitor
from .mixture import Teachers
from .optim import StreamOptimizer
from .run import checkpoint, record
from .run import folder as run_folder
from .run.metrics import RunLog, Sums, check_lines, weights_and_biases
from .run.progress import EpochBar, clock, epoch_line, step_text
from .run.resume import check_model, check_optimizer, check_within, read_state, settled, take_up
from .run.schedule import make_scheduler, set_epoch, set_rate, warmup_point
from .speed import make_step
from .step import Batch, Outcome
from .streams import assign_losses
from .teacher_logits import SeveralTeachersLogits, TeacherLogits, open_logits
from .terminal import check_interruption
from .topk import Kept, recorded

READ_EVERY = 20
"""Iterations between two readings of the meters: reading them waits for the device."""

BATCH = ("image", "target", "index", "contrastive_index")
"""mdistiller's names for the parts of a training batch; CRD's has the last one."""


class Trainer:
    """Trains a distiller under mdistiller's protocol: `Trainer(name, distiller, loaders…, cfg).train(resume)`.

    Losses are summed and take one momentum, SOLVER.MOMENTUM: mdistiller's base trainer. docs/files.md lists what a
    run leaves in LOG.PREFIX/name. What is particular to classification is in prepare, hits, top_k, test and
    test_teacher.
    """

    metric = "test_acc"
    """The number of test() that the best epoch is chosen by; more is better, and of equals the first stays."""
    shown = "test"
    """What it is called on the terminal."""
    by_logits = True
    """Whether several processes exchange logits to share a batch; False: their losses add up to the batch's."""
    make_optimizer: Callable[[Any, Any], StreamOptimizer] = staticmethod(solver.one_momentum)
    """(parameters, config) -> optimizer."""

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
        device.tune(cfg.SOLVER.DETERMINISTIC)
        device.place(self.module, self.device, cfg.SOLVER.CHANNELS_LAST)
        divided = self.by_logits and (process_group.size() > 1 or cfg.SOLVER.ACCUMULATE > 1)
        if divided:
            check_divisible(cfg, self.module, train_loader)
        self.optimizer = self.make_optimizer(self.module.get_learnable_parameters(), cfg)
        self.scheduler = make_scheduler(self.optimizer, cfg.SOLVER)
        self.assignment = dict(pair.split(":") for pair in cfg.SOLVER.DECOUPLED.LOSS_STREAMS)
        self.step = make_step(
            cfg.SOLVER.EXECUTION,
            distiller,
            self.optimizer,
            lambda losses: self.losses_by_stream(losses),
            cfg.SOLVER.AMP,
            chunk=config.chunk(cfg) if divided else None,
        )
        self.step.measure = self.measure
        self.mixing = make_mixing(cfg)
        """What becomes of a batch's images and labels before a step; None if nothing."""
        looked_up = cfg.DISTILLER.TEACHER_LOGITS != "compute"
        if (
            isinstance(train_loader, ResidentLoader)
            and self.step.name == "graphs"
            and not looked_up
            and not self.mixing
        ):
            # a captured step makes its images itself, of numbers that the loader draws
            train_loader.only_draw = True
            self.step.complete = self.complete
        self.monitor = self.step.monitor = solver.make_monitor(self.module, self.optimizer, cfg, len(train_loader))
        self.allocation = solver.make_allocation(self.optimizer, cfg)
        self.windows: list[dict[str, Any]] = []
        teacher = getattr(self.module, "teacher", None)
        self.teacher = checkpoint.fingerprint(teacher) if teacher is not None else None
        self.teacher_acc: float | None = None
        self.num_classes = 0
        """Of the student's logits, once it has been tried."""
        self.described: data.Description | None = None
        """What the student's files say of it."""
        self.logits: TeacherLogits | SeveralTeachersLogits | None = None
        """Where training batches get the teacher's logits of their weak view, if not from the distiller."""
        self.epoch = self.steps_done = 0
        """Epochs that ended, and steps of the next, in the last checkpoint."""
        self.within: dict[str, Any] | None = None
        """What a checkpoint inside an epoch, which is gone on from, says of that epoch."""
        self.saved = time.monotonic()
        self.told = False
        """Whether the terminal has been told how long the run takes."""
        self.best_acc = -1.0
        self.best_epoch = 0

    @device.refusals()
    def train(self, resume: bool = False, overwrite: bool = False, command: str | None = None) -> dict[str, Any]:
        """Run the epochs that are left; returns {"best", "best_epoch", "last", "epochs"} (top-1 in percent).

        The teacher is tested first, unless `teacher_acc` is set already. resume: go on from the folder's last
        checkpoint. overwrite: start again if the folder holds a run. command: what started the run, for
        its record. Raises UserError, before anything is written, if the folder does not fit, or another process is
        at work there.
        """
        with run_folder.held(self.folder, resume, overwrite):
            return self.train_held(resume, command)

    def train_held(self, resume: bool, command: str | None) -> dict[str, Any]:
        """Train as `train` does, in a folder that is this process's."""
        epochs = self.cfg.SOLVER.EPOCHS
        if self.teacher is not None and self.teacher_acc is None:
            self.teacher_acc = self.test_teacher()
        self.rehearse()
        self.described = self.describe()
        changed = self.load() if resume else {}
        chosen = self.settle()
        if self.cfg.SOLVER.SYNC_BATCHNORM and process_group.size() > 1:
            # from here on all processes pass the student equally often
            self.module.student = collectives.synchronised(self.module.student)
        # one that was ended between its last checkpoint and the note of its result still gets that note
        if self.epoch == epochs and record.read_run(self.folder)["finished"]:
            raise UserError(
                f"{self.folder}: --resume finds all {self.epoch} epochs done; the results are in run.json there"
            )
        self.logits = self.open_logits()
        teacher = hashlib.sha256((self.teacher or "").encode()).hexdigest()[:16]
        facts = {"code": record.code_hash(), "config": record.config_hash(self.cfg), "teacher": teacher}
        collectives.check_alike(**{name: int(value, 16) >> 1 for name, value in facts.items()})
        collectives.spread(self.module.student)
        command = command or shlex.join(["python", *sys.argv])
        if not process_group.rank():
            self.prepare_folder(resume, command, changed, chosen)
        device.use_threads(int(collectives.from_first([torch.get_num_threads()])[0]))
        self.saved = started = time.monotonic()
        try:
            result = self.train_epochs()
        finally:
            if not process_group.rank():
                record.add_minutes(self.folder, (time.monotonic() - started) / 60)
        if not process_group.rank():
            if self.described is not None:
                parameters = sum(part.numel() for part in self.module.student.parameters())
                images = [len(loader.dataset) for loader in (self.train_loader, self.val_loader)]
                card.write(self.folder, self.cfg, self.described, parameters, images, result)
            with checkpoint.uninterrupted():
                record.note(self.folder, {"result": result, "finished": True})
        return result

    def prepare_folder(self, resume: bool, command: str, changed: dict[str, list[Any]], chosen: dict[str, str]) -> None:
        """Write what a run's folder holds before its first step; what is not new to one that goes on."""
        made_by = {"student": type(self.module.student), "distiller": type(self.module)}
        classes = {part: f"{cls.__module__}.{cls.__qualname__}" for part, cls in made_by.items()}
        if self.cfg.LOG.WANDB:
            weights_and_biases(self.folder, self.cfg)
        if not resume:
            run_folder.set_aside(self.folder)
        record.prepare_folder(
            *(self.folder, self.cfg, self.device, command, resume, self.teacher, self.teacher_acc, classes),
            *(changed, self.epoch),
        )
        if chosen and not resume:
            record.note(self.folder, {"chosen": chosen})
        if isinstance(teacher := getattr(self.module, "teacher", None), Teachers) and not resume:
            names = config.teacher_name(self.cfg).split(" + ")
            rows = zip(names, (self.teacher or "").split("+"), teacher.tested)
            each = [{"name": name, "weights": weights, "accuracy": accuracy} for name, weights, accuracy in rows]
            record.note(self.folder, {"teachers": each})
        if process_group.size() > 1 and any(isinstance(m, _BatchNorm) for m in self.module.student.modules()):
            whole, synchronised = config.chunk(self.cfg), self.cfg.SOLVER.SYNC_BATCHNORM
            of = f"{whole} images" if synchronised else f"a process's share of {whole} images"
            print(f"BatchNorm takes its means over {of} (SOLVER.SYNC_BATCHNORM {synchronised})")

    def train_epochs(self) -> dict[str, Any]:
        """Train the epochs that are left, and log and save each when it ends."""
        log = None if process_group.rank() else RunLog(self.folder, self.epoch, self.cfg)
        last = 0.0
        try:
            for epoch in range(self.epoch + 1, self.cfg.SOLVER.EPOCHS + 1):
                device.seed_everything(self.cfg.SOLVER.SEED, epoch, process_group.rank())
                entry = {"epoch": epoch, "lr": self.scheduler.get_last_lr()[0]}
                entry |= self.train_epoch(epoch)
                entry |= self.test()
                tested = {name: value for name, value in entry.items() if name.startswith("test_")}
                self.check_finite(tested, f"after epoch {epoch}")
                with checkpoint.uninterrupted():
                    self.finish_epoch(epoch, entry, log)
                last = entry[self.metric]
        finally:
            if log is not None:
                log.close()
            if self.logits is not None:
                self.logits.close()
        if log is not None:  # there may have been no epoch left
            last = log.lines[-1][self.metric]
        return {"best": self.best_acc, "best_epoch": self.best_epoch, "last": last, "epochs": self.epoch}

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Pass once over the training set; returns the epoch's record."""
        epochs, steps = self.cfg.SOLVER.EPOCHS, len(self.train_loader)
        self.distiller.train()
        sums = Sums()
        self.windows = []
        first, waited, start = 1, 0.0, time.perf_counter()
        within, self.within = self.within, None
        if within is not None:
            sums.load_state_dict(within["sums"], self.device)
            self.windows = list(within["windows"])
            first, waited, start = within["step"] + 1, within["waited"], start - within["seconds"]
        with EpochBar(f"epoch {epoch}/{epochs}", steps) as bar:
            batches = self.batches(epoch, first, within)
            for step in range(first, steps + 1):
                check_interruption()
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                parts = self.prepare(batch, epoch, step)
                if self.logits is not None:
                    parts["teacher_logits"] = self.logits(parts["image"], parts["index"], epoch)
                count = self.count(parts, step)
                outcome = self.take_step(parts, epoch, self.advance_warmup(epoch, step))
                sums.add(outcome.sums, count)
                if step % READ_EVERY == 0 or step == steps:
                    seconds = time.perf_counter() - start
                    # all processes judge the first one's numbers, so that they stop together
                    means, minutes = sums.means(), (time.monotonic() - self.saved) / 60
                    *values, minutes = collectives.from_first([*means.values(), minutes])
                    means = dict(zip(means, values))
                    self.check_finite(means, f"in epoch {epoch}, by iteration {step}")
                    if 0 < self.cfg.SOLVER.CHECKPOINT_MINUTES <= minutes and step < steps:
                        self.save_within(step, {"sums": sums.state_dict(), "seconds": seconds, "waited": waited})
                    kept = self.top_k(outcome.logits, epoch, parts)
                    left = seconds / step * (steps * (epochs - epoch + 1) - step)
                    if not self.told and not process_group.rank():
                        bar.say(f"time      about {clock(left)} left, by the first {step} of {steps} steps an epoch")
                        self.told = True
                    bar.update(step, step_text(means, recorded(kept), sums.count / seconds, left, bar.room))
        seconds = time.perf_counter() - start
        hits = {name: means.pop(name) for name in list(means) if name.startswith("train_")}
        momenta = dict(self.optimizer.param_groups[0]["momentum"])
        entry = {"loss": means, "train_loss": sum(means.values())} | hits | {"momentum": momenta}
        entry |= recorded(kept)
        if self.windows:
            entry["gsnr"] = self.windows[-1]["gsnr"]
        if self.logits is not None:
            entry["teacher_computed"] = self.logits.share_computed()
        return entry | {
            "images_per_second": sums.count / seconds,
            "seconds": seconds,
            "data_seconds": waited,
            "execution": self.step.name,
        }

    def batches(self, epoch: int, first: int, within: dict[str, Any] | None) -> Iterator[Any]:
        """Return an epoch's batches from step `first` on; within: what its checkpoint says, if it is gone on with."""
        order, loader = passes(self.train_loader), self.train_loader
        if order is not None:
            order.set_epoch(epoch, (first - 1) * self.cfg.SOLVER.BATCH_SIZE)
        elif hasattr(getattr(loader, "sampler", None), "set_epoch"):  # a loader of somebody else may draw as it likes
            loader.sampler.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(first - 1 if order is None else 0):
            next(batches)
        if within is not None and len(within["generators"]) == process_group.size():
            device.set_generators(self.device, within["generators"][process_group.rank()])
        return batches

    def count(self, parts: dict[str, Any], step: int) -> int:
        """Count the images of a step's batch, of all processes together."""
        order, size = passes(self.train_loader), self.cfg.SOLVER.BATCH_SIZE
        several = process_group.size() > 1 and order is not None
        count = min(len(order) - (step - 1) * size, size) if several else len(parts["target"])
        if isinstance(self.step, DividedStep):
            self.step.count = count
        return count

    def advance_warmup(self, epoch: int, step: int) -> float:
        """Set the learning rate of a step if warm-up changes it within the epoch; returns the epoch for the losses'.

        That is the same number in all steps of an epoch, but while a warm-up by SOLVER.WARMUP_UNIT iteration lasts, and
        for a method that goes by iterations itself.
        """
        node = self.cfg.SOLVER
        # a class that says nothing of its warm-up, as mdistiller's, may have one of any length
        known = hasattr(self.module, "warmup_key")
        longest = max(config.warmups(self.cfg, self.module).values()) if known else math.inf
        steps = len(self.train_loader)
        point = warmup_point(node.WARMUP_UNIT, longest, epoch, step, steps)
        if node.WARMUP_UNIT == "iteration" and node.WARMUP_EPOCHS:
            set_rate(self.scheduler, node, point)
        return epoch - 1 + step / steps if getattr(self.module, "by_iteration", False) else point

    def take_step(self, parts: dict[str, Any], epoch: int, point: float) -> Outcome:
        """Take one training step, at advance_warmup's point; end a window of gradient samples if it is full."""
        if self.monitor is None:
            return self.step(parts, point)
        self.monitor.tick()
        outcome = self.step(parts, point)
        if self.monitor.full:
            self.windows.append({"epoch": epoch} | self.finish_window(self.monitor))
        return outcome

    def finish_window(self, monitor: GradientMonitor) -> dict[str, Any]:
        """Return what a full window of gradient samples says; an allocation sets the momenta by it first."""
        window = monitor.finish()
        if self.allocation is not None:
            measured = {stream: summary["ratio"] for stream, summary in window["gsnr"].items()}
            offsets = self.allocation.update(measured)
            for group in self.optimizer.param_groups:
                group["momentum"] = {s: self.cfg.SOLVER.MOMENTUM + delta for s, delta in offsets.items()}
        return window | {"momentum": dict(self.optimizer.param_groups[0]["momentum"])}

    def losses_by_stream(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum a distiller's losses into streams; UserError for one that belongs to none."""
        streams, assignment = self.optimizer.streams, self.assignment
        declared = getattr(self.module, "streams", ())
        if not declared and self.monitor is None and len(set(self.optimizer.param_groups[0]["momentum"].values())) == 1:
            # no stream differs from another, nor is looked at, so any stream will do for a loss without one
            assignment = {name: streams[0] for name in losses if name not in streams} | assignment
        try:
            return assign_losses(losses, streams, assignment)
        except ValueError as error:
            raise UserError(
                f"SOLVER.DECOUPLED.LOSS_STREAMS: {error}; add 'loss:stream' for each of {list(losses)}"
            ) from None

    def prepare(self, batch: Any, epoch: int, step: int) -> dict[str, Any]:
        """Put a loader's batch on the device, as the distiller's arguments; `target` has the batch's length."""
        if isinstance(batch, Mapping):  # what a ResidentLoader has drawn, for `complete`
            return dict(batch)
        parts = dict(zip(BATCH, device.place_batch(batch, self.device, self.cfg.SOLVER.CHANNELS_LAST)))
        if self.mixing is not None:
            places = self.places(len(parts["target"]), step)
            parts["image"], parts["target"] = self.mixing(parts["image"], parts["target"], epoch, step, places)
        return parts

    def places(self, count: int, step: int) -> Sequence[int]:
        """Return the places of this process's `count` images in a step's batch, of all processes together."""
        order, size = passes(self.train_loader), self.cfg.SOLVER.BATCH_SIZE
        if process_group.size() > 1 and order is not None:
            own = sharding.own(min(len(order) - (step - 1) * size, size), config.chunk(self.cfg))
            if len(own) == count:
                return own
        return range(count)

    def complete(self, parts: Batch) -> Batch:
        """Make the distiller's arguments of what a ResidentLoader has drawn for a batch."""
        image = self.train_loader.make(parts["index"], parts["drawn"])
        image = device.place_batch(image, self.device, self.cfg.SOLVER.CHANNELS_LAST)
        return {"image": image} | {name: parts[name] for name in ("target", "index")}

    def measure(self, logits: Tensor, losses: dict[str, Tensor], parts: Batch) -> dict[str, Tensor]:
        """Return what a batch adds to the epoch's sums: its losses, once for each sample, and its hits."""
        count = len(parts["target"])
        return {stream: loss * count for stream, loss in losses.items()} | self.hits(logits, parts)

    def hits(self, logits: Tensor, parts: Batch) -> dict[str, Tensor]:
        """Return what a batch says of the student beside the losses: sums over its samples, named train_…."""
        right = correct(logits, classes(parts["target"]))
        return {"train_acc": right["top1"], "train_acc_top5": right["top5"]}

    def top_k(self, logits: Tensor, epoch: int, parts: dict[str, Any]) -> Kept:
        """Return which non-target classes the method's mask keeps for a batch; None without one."""
        return self.module.top_k(epoch, logits.shape[1]) if hasattr(self.module, "top_k") else None

    def test(self) -> dict[str, float]:
        """Test the student; returns its numbers by names test_…."""
        collectives.spread_buffers(self.module.student)
        return evaluate(self.distiller, self.val_loader, self.device, self.cfg.SOLVER)

    def test_teacher(self) -> float | None:
        """Return the teacher's own number of `metric` in percent; UserError for one that knows nothing."""
        return measure_teacher(self.module, self.val_loader, self.cfg)

    def open_logits(self) -> TeacherLogits | SeveralTeachersLogits | None:
        """Open the table of DISTILLER.TEACHER_LOGITS; None if every step computes the teacher's logits, or has none."""
        if self.teacher is None or self.cfg.DISTILLER.TEACHER_LOGITS == "compute":
            return None
        image = self.samples(32)["image"]
        return open_logits(self.cfg, self.module.teacher, self.teacher, self.train_loader, image)

    def rehearse(self) -> None:
        """Pass two images through a copy, so that losses without a stream are found before a run."""
        logits, losses = copy.deepcopy(self.module).train()(**self.samples(2), epoch=1)
        self.num_classes = logits.shape[1]
        self.losses_by_stream(losses)
        silent = [stream for stream in getattr(self.module, "streams", ()) if stream not in losses]
        if silent:
            raise UserError(
                f"DISTILLER.TYPE {self.cfg.DISTILLER.TYPE}: it declares the streams {', '.join(silent)} and gives them "
                f"no loss; its losses are {', '.join(losses)}"
            )

    def describe(self) -> data.Description | None:
        """Describe the student for its files; None if its classes are not those of the config's data set."""
        described = data.describe(self.cfg)
        return described if described.num_classes == self.num_classes else None

    def settle(self) -> dict[str, str]:
        """Settle memory format and folded teacher, see choice.settle; returns how they came about."""
        several = isinstance(self.distiller, nn.DataParallel) and len(self.distiller.device_ids or ()) > 1
        reason = "SOLVER.DATA_PARALLEL copies the student and the plain teacher alone" if several else ""

        def images(count: int) -> Tensor:
            image = self.samples(count)["image"]
            return image if isinstance(image, Tensor) else image[0]

        self.cfg, how = choice.settle(self.cfg, self.module, images, reason)
        return how

    def samples(self, count: int) -> dict[str, Any]:
        """Return a training batch of `count` images, spread over the set, as the distiller's arguments."""
        dataset = self.train_loader.dataset
        images = [dataset[i * (len(dataset) - 1) // max(count - 1, 1)] for i in range(count)]
        collate = getattr(self.train_loader, "collate_fn", None) or default_collate
        return self.prepare(collate(images), 1, 1)

    def check_finite(self, values: dict[str, float], when: str) -> None:
        """Raise UserError if a loss is not finite, before anything of the epoch is saved."""
        for name, value in values.items():
            if not math.isfinite(value):
                lower = f" --resume takes a lower SOLVER.LR, with EXPERIMENT.NAME {shlex.quote(self.folder.name)}."
                raise UserError(
                    f"{self.folder}: loss '{name}' became {value} {when}, at learning rate "
                    f"{self.optimizer.param_groups[0]['lr']:g}; it must stay finite: lower SOLVER.LR, or look at "
                    f"the images and the teacher. {self.resume_point()}{lower if self.has_checkpoint else ''}"
                )

    def resume_point(self) -> str:
        """Say in a sentence what is left to resume from."""
        if not self.has_checkpoint:
            return "No epoch was finished, so there is no checkpoint."
        steps = f" and {self.steps_done} steps" if self.steps_done else ""
        return f"The last checkpoint is whole: {self.folder / 'latest'} (epoch {self.epoch}{steps})."

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.epoch > 0 or self.steps_done > 0

    def save_within(self, step: int, within: dict[str, Any]) -> None:
        """Save a checkpoint after a step inside an epoch; within: what goes on with the epoch's record."""
        generators = collectives.rows_of_all(device.generators(self.device))
        collectives.spread_buffers(self.module.student)
        self.saved = time.monotonic()
        if process_group.rank():
            return
        within |= {"step": step, "windows": self.windows, "generators": generators}
        with checkpoint.uninterrupted():
            checkpoint.save(self.state(within), self.folder / "latest")
            self.steps_done = step
            run_folder.settle_new(self.folder)

    def finish_epoch(self, epoch: int, entry: dict[str, Any], log: RunLog | None) -> None:
        """Log an epoch and save its checkpoints; log: None in a process that writes nothing."""
        self.scheduler.step()
        self.epoch, self.steps_done, self.saved = epoch, 0, time.monotonic()
        better = entry[self.metric] > self.best_acc
        if better:
            self.best_acc, self.best_epoch = entry[self.metric], epoch
        if log is None:
            return
        log.add(entry, self.windows)
        weights = self.module.student.state_dict()
        for part, value in weights.items():
            weights[part] = value.contiguous()  # channels last is for training
        about = self.described.strings() if self.described else {}
        student = {"model": weights} | ({checkpoint.DESCRIPTION: about} if about else {})
        every = self.cfg.LOG.SAVE_CHECKPOINT_FREQ
        names = [("best", "student_best")] if better else []
        names += [(f"epoch_{epoch}", f"student_{epoch}")] if epoch % every == 0 else []
        # `latest` comes last: an interruption before it resumes from the epoch before and overwrites the rest
        for name, student_name in [*names, ("latest", "student_latest")]:
            checkpoint.save(student, self.folder / student_name)
            checkpoint.save_weights(weights, self.folder / f"{student_name}{checkpoint.SAFE}", about)
            checkpoint.save(self.state(), self.folder / name)
        run_folder.settle_new(self.folder)
        print(epoch_line(entry, self.cfg.SOLVER.EPOCHS, self.metric, self.shown, self.best_acc))

    def _stateful(self) -> dict[str, Any]:
        """Return what has a state beside the networks, by its name in a checkpoint."""
        parts: dict[str, Any] = {"optimizer": self.optimizer}
        parts |= {} if self.monitor is None else {"monitor": self.monitor}
        parts |= {} if self.step.scaler is None else {"scaler": self.step.scaler}
        return parts | ({} if self.allocation is None else {"allocation": self.allocation})

    def state(self, within: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a checkpoint: everything a resumed run needs. The teacher, which never changes, is left out.

        within: what is to be known of an epoch that has not ended.
        """
        model = {k: v for k, v in self.module.state_dict().items() if not k.startswith("teacher.")}
        state = {name: part.state_dict() for name, part in self._stateful().items()} | {
            "epoch": self.epoch,
            "model": model,
            "best_acc": self.best_acc,
            "best_epoch": self.best_epoch,
            "config": config.flatten(self.cfg),
            "teacher": self.teacher,
        }
        if within is not None:
            state["within"] = within
        return state | {"outline": checkpoint.outline(state)}

    def load(self) -> dict[str, list[Any]]:
        """Take up the folder's last checkpoint; returns the keys that have changed since: before and now.

        Raises UserError if it is damaged, or of another config or teacher.
        """
        path, state, changed = read_state(self.folder, self.cfg, self.teacher)
        for key, value in settled(path, self.cfg, state["config"]).items():
            self.cfg = choice.resolved(self.cfg, key, value)
        check_lines(self.folder, state["epoch"])
        networks = self.module.state_dict()
        teacher = {k: networks.pop(k) for k in list(networks) if k.startswith("teacher.")}
        check_model(path, state["model"], networks)
        self.module.load_state_dict(teacher | state["model"])
        self.epoch, self.best_acc, self.best_epoch = state["epoch"], state["best_acc"], state["best_epoch"]
        made = [dict(group) for group in self.optimizer.param_groups]
        for name, part in self._stateful().items():
            if name in state:
                take_up(path, part.load_state_dict, name, state[name])
            elif part is self.monitor:  # measured only from here on
                part.iteration = self.epoch * len(self.train_loader)
        check_optimizer(path, self.optimizer, made)
        set_epoch(self.scheduler, self.cfg.SOLVER, self.epoch)
        self.within = state.get("within")
        if self.within is not None:
            self.steps_done = self.within["step"]
            check_within(path, self.within, len(self.train_loader))
        return changed


class DecoupledMomentumTrainer(Trainer):
    """The trainer of registry key DecoupledMomentumSGD: one momentum for each stream.

    With all deltas 0 the streams share one buffer and one backward pass, and this is the base trainer for
    every distiller. Otherwise a loss belongs to the stream of its own name or to the one that
    SOLVER.DECOUPLED.LOSS_STREAMS gives it.
    """

    make_optimizer = staticmethod(solver.decoupled_momentum)


class DecoupledAdamWTrainer(DecoupledMomentumTrainer):
    """The trainer of registry key DecoupledAdamW: the same with AdamW, for students that are trained with it."""

    def make_optimizer(self, params: Any, cfg: Any) -> StreamOptimizer:  # type: ignore[override]
        return solver.decoupled_adamw(self.module.student, params, cfg)
