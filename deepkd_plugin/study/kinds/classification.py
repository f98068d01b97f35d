"""The kind of table that tools/train.py makes: image classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import normpath
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ... import choice, config, data, device, launch
from ...config.shipped import shipped
from ...distillers.base import Distiller
from ...errors import UserError
from ...hosts.networks import network, teacher_network, untrained_teacher, weights_file
from ...hosts.registry import find_host, register
from ...rules import automatic
from ...run import checkpoint
from ...run.metrics import check_login
from ...solver import check_window, samples_gradients
from ...trainer import Trainer
from ..measures import CLASSIFICATION
from ..shared import count
from .kind import Kind
from .timing import Timer

if TYPE_CHECKING:
    from ..table import Cell, Run

TEACHER_KEY = "DISTILLER.TEACHER_WEIGHTS"


class Classification(Kind):
    """Runs of tools/train.py; their configs are in configs/<table>/<pair>/."""

    name = CLASSIFICATION
    tool = "tools/train.py"
    checkpoint = "latest"
    ours: ClassVar[Mapping[str, str]] = {
        "SOLVER.SEED": "--seeds N",
        "LOG.PREFIX": "--out DIR",
        "EXPERIMENT.PROJECT": "--out DIR",
        "EXPERIMENT.NAME": "--out DIR",
    }
    below = "configs"
    """Where the tables' folders are, of what is shipped."""

    def tables(self) -> list[str]:
        """List the folders with a config of a pair."""
        return sorted({file.parents[1].name for file in self._root().glob("*/*/*.yaml")})

    def configs(self, table: str) -> set[str]:
        return {path.stem for path in (self._root() / table).glob("*/*.yaml")}

    def place(self, table: str) -> str:
        return table if Path(table).is_absolute() else f"{self.below}/{table}"

    def pairs(self, table: str) -> list[str]:
        return sorted(path.name for path in (self._root() / table).iterdir() if path.is_dir())

    def file(self, table: str, pair: str, config: str) -> Path | None:
        path = self._root() / table / pair / f"{config}.yaml"
        return path if path.is_file() else None

    def shown(self, file: Path) -> str:
        ours = shipped("configs").parent
        return (file.relative_to(ours) if file.is_relative_to(ours) else file).as_posix()

    def read(self, file: Path, options: Sequence[str]) -> Any:
        return launch.read_config(find_host(), str(file), options)[0]

    def own_options(self, seed: int, above: Path, method: str, name: str) -> tuple[str, ...]:
        ours = ("SOLVER.SEED", str(seed), "LOG.PREFIX", str(above))
        return (*ours, "EXPERIMENT.PROJECT", method, "EXPERIMENT.NAME", name)

    def lines(self, cfg: Any) -> int:
        return cfg.SOLVER.EPOCHS

    def networks(self, pair: str, cfgs: Sequence[Any]) -> tuple[str, str]:
        taught = [config.teacher_name(cfg) for cfg in cfgs if cfg.DISTILLER.TYPE != "NONE"]
        return (taught or [""])[0], cfgs[0].DISTILLER.STUDENT

    def protocol(self, cfg: Any) -> str:
        epochs = cfg.SOLVER.EPOCHS
        return f"{count(epochs, 'epoch')} in batches of {cfg.SOLVER.BATCH_SIZE} images"

    def problems(self, runs: Sequence[tuple[Run, Any]], prepare: bool) -> list[str]:
        """Name data sets that are not there, teachers without a file, and W&B's login; torchvision fetches later."""
        lines = []
        sets = {(cfg.DATASET.TYPE, cfg.DATASET.ROOT): cfg for _, cfg in runs}
        for cfg in sets.values():
            try:
                self.look_at_data(cfg, prepare)
            except UserError as error:
                lines.append(str(error))
        try:
            for _, cfg in runs:
                check_login(cfg)
        except UserError as error:
            lines.append(str(error))
        missing: dict[str, list[str]] = {}
        for run, cfg in runs:
            for one in [] if cfg.DISTILLER.TYPE == "NONE" else config.by_teacher(cfg):
                file = self.teacher_file(one)
                if file is None:
                    missing.setdefault(f"none in the zoo for {one.DISTILLER.TEACHER}", []).append(run.pair)
                elif file and not Path(file).is_file():
                    missing.setdefault(normpath(file), []).append(run.pair)
        if missing:
            files = "; ".join(f"{file} ({', '.join(dict.fromkeys(of))})" for file, of in missing.items())
            lines.append(
                f"{TEACHER_KEY}: files of teachers are missing: {files}; they must be there, or be named by it for the "
                f"pairs of one teacher"
            )
        return lines

    def source(self, cfg: Any) -> Any:
        return data.training_source(cfg)

    def look_at_data(self, cfg: Any, prepare: bool) -> None:
        """Raise UserError if a data set is not there, by the part that is read fastest."""
        source, node = self.source(cfg), cfg.DATASET
        if not prepare and (source.drawn or node.DOWNLOAD):
            return
        # with HOLDOUT a run reads no test image, and nor does who looks after it
        tested = "train" if node.HOLDOUT else "test"
        # one that is drawn would otherwise be drawn by a process of each run
        for split in dict.fromkeys(("train", tested) if source.drawn else (tested,)):
            source.load(node, split)

    def teacher_file(self, cfg: Any) -> str | None:
        """Find the file of a config's teacher; "" if a library or its own constructor has it, None if nobody has."""
        name, weights = cfg.DISTILLER.TEACHER, cfg.DISTILLER.TEACHER_WEIGHTS
        file = weights_file(find_host(), cfg, name, weights)
        return file or ("" if ":" in name or self.source(cfg).zoo == "imagenet" else None)

    def check(self, cfg: Any) -> None:
        if samples_gradients(cfg):
            check_window(cfg, self.source(cfg).steps(cfg))

    def teachers(self, cfgs: Mapping[Cell, Any]) -> dict[Cell, str | None]:
        known: dict[tuple[str, ...], str] = {}
        fingerprints = super().teachers(cfgs)
        for cell, cfg in cfgs.items():
            each = []
            for one in [] if cfg.DISTILLER.TYPE == "NONE" else config.by_teacher(cfg):
                if not (file := self.teacher_file(one)) or not Path(file).is_file():
                    break
                fed = (str(dict(part)) for part in (one.DISTILLER.TEACHER_INPUT, one.INPUT))
                key = (one.DATASET.TYPE, one.DISTILLER.TEACHER, file, str(one.DISTILLER.TEACHER_CLASSES), *fed)
                if key not in known:
                    known[key] = checkpoint.fingerprint(self.load_teacher(one))
                each.append(known[key])
            else:
                fingerprints[cell] = "+".join(each) or None
        return fingerprints

    def load_teacher(self, cfg: Any) -> Any:
        """Load a config's teacher."""
        return teacher_network(find_host(), cfg, data.num_classes(cfg))

    def seconds(self, cfgs: Sequence[Any], threads: int, runs: Sequence[int]) -> list[float]:
        return Timer(self, cfgs, threads, runs).seconds()

    def settle(
        self, cfgs: Mapping[Cell, Any], before: Mapping[Cell, Mapping[str, str]], threads: int | None
    ) -> dict[Cell, dict[str, bool]]:
        """Measure by the first config whose teacher may be folded, if there is one."""
        takes = {cell: self._takes(cfg) for cell, cfg in cfgs.items()}
        left = {key: [cell for cell in cfgs if takes[cell].get(key)] for key in config.CHOICES}
        values = {}
        for key, cells in left.items():
            if said := [before[cell][key] for cell in cells if key in before.get(cell, {})]:
                values[key] = said[0] == "True"
        if any(cells and key not in values for key, cells in left.items()):
            cfg = next(cfgs[cell] for key in reversed(config.CHOICES) for cell in left[key])  # one that folds, if any
            values = (self._measure(cfg, threads) if threads else dict.fromkeys(left, False)) | values
        return {cell: {key: may and values[key] for key, may in keys.items()} for cell, keys in takes.items()}

    def _takes(self, cfg: Any) -> dict[str, bool]:
        """Return the keys that a config leaves open, and whether its run could take True."""
        host = find_host()
        register(host)
        ours = issubclass(launch.trainers(host)[cfg.SOLVER.TRAINER], Trainer)
        folds = ours and not config.plain_teacher(cfg) and issubclass(find_host().distiller(cfg), Distiller)
        takes = dict(zip(config.CHOICES, (ours, folds)))
        return {key: may for key, may in takes.items() if automatic(config.get(cfg, key))}

    def _measure(self, cfg: Any, threads: int) -> dict[str, bool]:
        at, before = device.pick(), torch.get_num_threads()
        node = cfg.DISTILLER
        student = self.network(cfg, node.STUDENT).to(at)
        teacher = self.network(cfg, node.TEACHER, True).eval().to(at) if node.TYPE != "NONE" else None
        images = self.source(cfg).noise(cfg.SOLVER.BATCH_SIZE)[0].to(at)
        torch.set_num_threads(threads)
        try:
            return choice.choose(cfg, student, teacher, images)
        finally:
            torch.set_num_threads(before)
            device.release()

    def network(self, cfg: Any, name: str, teacher: bool = False) -> nn.Module:
        if teacher:
            return untrained_teacher(find_host(), cfg, data.num_classes(cfg))
        return network(find_host(), cfg, name, data.num_classes(cfg))

    def trainer(self, cfg: Any, networks: Sequence[nn.Module], loader: Any) -> Trainer:
        """Ours, if a config asks for one of mdistiller's."""
        distiller = launch.put_together(find_host(), cfg, networks, data.source(cfg).train)
        make = launch.trainers(find_host())[cfg.SOLVER.TRAINER]
        return (make if issubclass(make, Trainer) else Trainer)("", distiller, loader, loader, cfg)

    def words(self, file: str, resume: bool, options: Sequence[str]) -> list[str]:
        return ["--cfg", file, "--resume" if resume else "--overwrite", *options]

    def train(self, file: str, resume: bool, options: Sequence[str]) -> int:
        return launch.main(self.words(file, resume, options))

    def _root(self) -> Path:
        return shipped("configs") / Path(self.below).relative_to("configs")
