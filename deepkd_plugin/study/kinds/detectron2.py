"""The kind of table that mdistiller's detectors make, on detectron2, in mdistiller's checkout after `deepkd apply`."""

from __future__ import annotations

import math
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...detection import detectron2 as host
from ...errors import UserError
from ..measures import DETECTRON2
from .kind import Kind

if TYPE_CHECKING:
    from ..table import Run

PAIRS = {
    "r101_r18": ("ResNet101", "ResNet18", "R18-R101"),
    "r101_r50": ("ResNet101", "ResNet50", "R50-R101"),
    "r50_mv2": ("ResNet50", "MobileNetV2", "MV2-R50"),
}
"""By pair: teacher, student, and what its config files are called by."""

CONFIGS = "detection/configs/DeepKD"
"""Where `deepkd apply` puts configs/detectron2, and their bases can be found."""


class Detectron2(Kind):
    """Runs of mdistiller's detection/train_net.py."""

    name = DETECTRON2
    tool = host.SCRIPT
    checkpoint = "last_checkpoint"
    ours: ClassVar[Mapping[str, str]] = {"SEED": "--seeds N", "OUTPUT_DIR": "--out DIR"}
    timed = False
    several = False

    def require(self) -> None:
        self._launch()

    def tables(self) -> list[str]:
        return ["coco"]

    def place(self, table: str) -> str:
        return CONFIGS

    def pairs(self, table: str) -> list[str]:
        return list(PAIRS)

    def file(self, table: str, pair: str, config: str) -> Path | None:
        """Find a file of mdistiller's checkout; `config` has a place for the pair. UserError before `deepkd apply`."""
        root = host.locate()
        file = root / CONFIGS / f"{config.format(PAIRS[pair][2])}.yaml"
        if not file.is_file():
            raise UserError(
                f"{root}: has no {CONFIGS}/{file.name}; the plugin must be in the checkout: "
                f"deepkd apply {shlex.quote(str(root))}"
            )
        return file

    def shown(self, file: Path) -> str:
        return f"{CONFIGS}/{file.name}"

    def read(self, file: Path, options: Sequence[str]) -> Any:
        self._launch()
        from ...detection.detectron2 import config

        cfg, origin = config.load(file, options)
        config.check(cfg, origin)
        cfg.freeze()
        return cfg

    def computed(self, cfg: Any) -> Any:
        from ...detection.detectron2.recorder import Computed

        return Computed(cfg)

    def own_options(self, seed: int, above: Path, method: str, name: str) -> tuple[str, ...]:
        return "SEED", str(seed), "OUTPUT_DIR", str(above / method / name)

    def lines(self, cfg: Any) -> int:
        """Count the evaluations: each writes a line."""
        period = cfg.TEST.EVAL_PERIOD
        return math.ceil(cfg.SOLVER.MAX_ITER / period) if period > 0 else 1

    def networks(self, pair: str, cfgs: Sequence[Any]) -> tuple[str, str]:
        return PAIRS[pair][:2]

    def protocol(self, cfg: Any) -> str:
        return f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images"

    def problems(self, runs: Sequence[tuple[Run, Any]], prepare: bool) -> list[str]:
        """Say what the launcher would: start files, data sets and devices that are missing."""
        launch = self._launch()
        root, lines = str(host.locate()), []
        for run, _ in runs:
            how = {"root": root, "resume": False, "eval_only": False, "num_gpus": 1}
            try:
                launch.read_config(Namespace(config_file=str(run.config), opts=list(run.options), **how))
            except UserError as error:
                lines.append(str(error))
        return list(dict.fromkeys(lines))

    def words(self, file: str, resume: bool, options: Sequence[str]) -> list[str]:
        return ["--config-file", file, *(["--resume"] if resume else []), *options]

    def train(self, file: str, resume: bool, options: Sequence[str]) -> int:
        from ...detection.detectron2 import launch

        # what is there is to be made anew, which runs.state has seen
        return launch.main(self.words(file, resume, options), overwrite=not resume)

    def _launch(self) -> Any:
        """Import the launcher, with detectron2 and mdistiller's checkout; UserError if one is missing."""
        from ...detection.detectron2 import launch

        launch.find_datasets(host.locate())  # before detectron2 is imported, which then reads where they are
        host.require()
        return launch
