"""The kind of table that tools/train_detection.py makes: torchvision's detectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import UserError
from ..measures import DETECTION
from .classification import TEACHER_KEY, Classification

if TYPE_CHECKING:
    from ...trainer import Trainer
    from ..table import Run


class Detection(Classification):
    """Runs of tools/train_detection.py; their configs are in configs/detection/<table>/<pair>/."""

    name = DETECTION
    tool = "tools/train_detection.py"
    below = "configs/detection"

    def read(self, file: Path, options: Sequence[str]) -> Any:
        from ...detection import launch

        return launch.read_config(str(file), options)[0]

    def problems(self, runs: Sequence[tuple[Run, Any]], prepare: bool) -> list[str]:
        from ...detection.average_precision import import_pycocotools

        try:
            import_pycocotools()  # which COCO needs to be read, too
        except UserError as error:
            return [str(error)] if runs else []
        key = "DETECTION.STUDENT_BACKBONE"
        files = dict.fromkeys(cfg.DETECTION.STUDENT_BACKBONE for _, cfg in runs)
        lost = [file for file in files if file and not Path(file).is_file()]
        lines = [f"{key} is {file!r}; it must name a file of ImageNet weights" for file in lost]
        return super().problems(runs, prepare) + lines

    def source(self, cfg: Any) -> Any:
        from ...detection.data import DETECTION_SETS

        return DETECTION_SETS[cfg.DATASET.TYPE]

    def teacher_file(self, cfg: Any) -> str | None:
        return super().teacher_file(cfg) if cfg.DISTILLER.TEACHER_WEIGHTS else None

    def load_teacher(self, cfg: Any) -> Any:
        from ...detection.networks import trained_network

        name, weights = cfg.DISTILLER.TEACHER, cfg.DISTILLER.TEACHER_WEIGHTS
        return trained_network(name, self.source(cfg).num_classes, cfg.DETECTION, weights, TEACHER_KEY)

    def network(self, cfg: Any, name: str, teacher: bool = False) -> nn.Module:
        from ...detection.networks import network

        return network(name, self.source(cfg).num_classes, cfg.DETECTION)

    def trainer(self, cfg: Any, networks: Sequence[nn.Module], loader: Any) -> Trainer:
        from ...detection.distillers import DISTILLERS
        from ...detection.trainer import TRAINERS

        distiller = DISTILLERS[cfg.DISTILLER.TYPE](*networks, cfg)
        return TRAINERS[cfg.SOLVER.TRAINER]("", distiller, loader, loader, cfg)

    def train(self, file: str, resume: bool, options: Sequence[str]) -> int:
        from ...detection import launch

        return launch.main(self.words(file, resume, options))
