"""A hook in detectron2's loop that leaves the records of every run of ours."""

import math
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from detectron2.engine.hooks import HookBase
from detectron2.utils import comm

from ... import config
from ...run import checkpoint, record
from ...run import folder as run_folder
from ...run.metrics import RunLog, read_metrics
from ...topk import Kept, recorded

HOW = (
    *("OUTPUT_DIR", "VIS_PERIOD", "VERSION", "CUDNN_BENCHMARK", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS"),
    *("SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"),
)
"""Keys that say how a run works, not what it computes."""

_APS = {"test_ap": "AP", "test_ap50": "AP50", "test_ap75": "AP75"}


class Recorder(HookBase):
    """Leaves run.json, config.yaml, metrics.jsonl and what goes with it in OUTPUT_DIR, as our other runs do.

    metrics.jsonl has one line for each evaluation. Its "epoch" counts the evaluations; its "loss" is the mean since the
    last one, by stream. detectron2's own metrics.json is beside it. This hook must come after the one that evaluates,
    in every process.
    """

    def __init__(self, cfg: Any, command: str = "") -> None:
        self.cfg = cfg
        self.command = command or shlex.join(["python", *sys.argv])
        self.folder = Path(cfg.OUTPUT_DIR)
        self.log: RunLog | None = None

    def before_train(self) -> None:
        trainer = self.trainer
        self.started = time.perf_counter()
        start = trainer.start_iter
        kept = [line for line in read_metrics(self.folder) if line["iteration"] <= start] if start else []
        if kept and kept[-1]["iteration"] == start and start < trainer.max_iter:
            trainer._trainer.totals, trainer._trainer.steps = {}, 0  # the last line has counted them
        kept = [line for line in kept if line["iteration"] < trainer.max_iter]
        if not comm.is_main_process():
            return
        resumed = start > 0 and (self.folder / "run.json").is_file()
        teacher = getattr(trainer.model, "teacher", None)
        record.prepare_folder(
            self.folder,
            Computed(self.cfg),
            next(trainer.model.parameters()).device,
            self.command,
            resumed,
            None if teacher is None else checkpoint.fingerprint(teacher),
            None,
            {"model": f"{type(trainer.model).__module__}.{type(trainer.model).__qualname__}"},
        )
        versions = {name: record.version_of(name) for name in ("detectron2", "pycocotools")}
        record.note(self.folder, {"processes": comm.get_world_size(), "detection": versions})
        self.log = RunLog(self.folder, len(kept))

    def after_step(self) -> None:
        done, period = self.trainer.iter + 1, self.cfg.TEST.EVAL_PERIOD
        if period > 0 and done % period == 0 and done != self.trainer.max_iter:
            self._add(done)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._add(self.trainer.max_iter, finished=True)
        if self.log is not None:
            self.log.close()
            self._add_minutes()

    def _add(self, iteration: int, finished: bool = False) -> None:
        trainer = self.trainer
        losses = trainer._trainer.means()
        if self.log is None:
            return
        entry = {
            "epoch": len(self.log.lines) + 1,
            "iteration": iteration,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "loss": losses,
            "momentum": dict(trainer.optimizer.param_groups[0]["momentum"]),
        }
        entry |= recorded(top_k(self.cfg, trainer.model, iteration))
        self.log.add(entry | average_precisions(getattr(trainer, "_last_eval_results", None)))
        self._add_minutes()
        run_folder.settle_new(self.folder)
        tested = [line for line in self.log.lines if "test_ap" in line]
        if tested:
            best = max(tested, key=lambda line: line["test_ap"])
            result = {"best": best["test_ap"], "best_epoch": best["epoch"], "last": tested[-1]["test_ap"]}
            result |= {"epochs": self.log.lines[-1]["epoch"], "iterations": iteration}
            record.note(self.folder, {"result": result})
        if finished:
            record.note(self.folder, {"finished": True})

    def _add_minutes(self) -> None:
        record.add_minutes(self.folder, (time.perf_counter() - self.started) / 60)
        self.started = time.perf_counter()


def average_precisions(results: Any) -> dict[str, float]:
    """Return the AP, AP50 and AP75 of boxes, in percent, of an evaluation's results.

    If there are several sets, the first counts. Empty if no boxes were evaluated. If nothing was detected, detectron2
    says nan; that is 0 here.
    """
    results = results or {}
    boxes = results.get("bbox") or next((r["bbox"] for r in results.values() if r and "bbox" in r), {})
    numbers = {ours: boxes[theirs] for ours, theirs in _APS.items() if theirs in boxes}
    return {name: 0.0 if math.isnan(value) else float(value) for name, value in numbers.items()}


def top_k(cfg: Any, model: Any, iteration: int) -> Kept:
    """Return what the mask keeps in the last of `iteration` steps; None without a mask."""
    if not hasattr(model, "top_k") or "DeepKD" not in cfg.KD.TYPE:
        return None
    return model.top_k(cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1, iteration - 1)


class Computed(dict):
    """A config in record.py's terms: a mapping of what is computed, the seed, and the whole as text."""

    def __init__(self, cfg: Any) -> None:
        computed = {path: value for path, value in config.flatten(cfg).items() if path not in HOW}
        super().__init__(computed | {"MODEL.WEIGHTS": Path(cfg.MODEL.WEIGHTS).name})
        self.SOLVER = SimpleNamespace(SEED=cfg.SEED)
        self.dump = cfg.dump
