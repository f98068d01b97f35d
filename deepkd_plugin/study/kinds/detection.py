"""The kind of table that tools/train_detection.py makes: torchvision's detectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.shipped import PACKAGE
from ...errors import UserError
from ..measures import DETECTION
from ..table import Cell
from .kind import Timer

if TYPE_CHECKING:
    from ..table import Run
from .classification import TEACHER_KEY, Classification


class Detection(Classification):
    """Runs of tools/train_detection.py; their configs lie in configs/detection/<table>/<pair>/."""

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
        found = [f"{key} is {file!r}; it must name a file of ImageNet weights" for file in lost]
        return super().problems(runs, prepare) + found

    def look_at_data(self, cfg: Any, prepare: bool) -> None:
        from ...detection.data import DETECTION_SETS

        drawn = cfg.DATASET.TYPE == "glyph_canvas"
        if prepare or not drawn:
            for split in ("train", "test") if drawn else ("test",):
                DETECTION_SETS[cfg.DATASET.TYPE](cfg.DATASET, split)

    def teacher_file(self, cfg: Any) -> str | None:
        weights = cfg.DISTILLER.TEACHER_WEIGHTS
        if weights.startswith("builtin:"):
            return str(PACKAGE / "hosts" / "builtin" / "weights" / f"{weights.removeprefix('builtin:')}.pt")
        return weights or None

    def steps(self, cfg: Any) -> int:
        from . import detector_timing as detector_time

        return detector_time.steps(cfg)

    def load_teacher(self, cfg: Any) -> Any:
        from ...detection.data.sizes import SIZES
        from ...detection.networks import trained_network

        name, weights = cfg.DISTILLER.TEACHER, cfg.DISTILLER.TEACHER_WEIGHTS
        return trained_network(name, SIZES[cfg.DATASET.TYPE].classes, cfg.DETECTION, weights, TEACHER_KEY)

    def timer(self, cfgs: Mapping[Cell, Any], threads: int) -> Timer | None:
        from .detector_timing import DetectorTimer

        return DetectorTimer(cfgs, threads)

    def train(self, file: str, resume: bool, options: Sequence[str]) -> int:
        from ...detection import launch

        return launch.main(self.words(file, resume, options))
