"""The settings of runs of mdistiller's detectors, under the names that other runs have for them."""

from collections.abc import Mapping
from typing import Any

from ..measures import DETECTRON2

SEED = "SOLVER.SEED"

NAMES = {
    "SEED": SEED,
    "SOLVER.IMS_PER_BATCH": "SOLVER.BATCH_SIZE",
    "SOLVER.AMP.ENABLED": "SOLVER.AMP",
    "KD.TYPE": "DISTILLER.TYPE",
    "KD.DEEPKD.TASK_WEIGHT": "DeepKD.CE_WEIGHT",
}
"""detectron2's name -> ours, beside those of SECTIONS."""

SECTIONS = {"KD.DEEPKD.": "DeepKD.", "KD.DKD.": "DKD."}
"""detectron2's sections -> ours."""

WITHOUT_KEY = {"SOLVER.WARMUP_UNIT": "epoch", "DeepKD.WARMUP": 0, "DKD.WARMUP": 0, "DKD.CE_WEIGHT": 1.0}
WITHOUT_KEY |= {"KD.LOSS.CE_WEIGHT": 1.0, "KD.LOSS.KD_WEIGHT": 1.0}
"""What mdistiller's detectors have without a key: weights of 1 and no warm-up of a loss."""

HOW = (
    *("OUTPUT_DIR", "VIS_PERIOD", "VERSION", "CUDNN_BENCHMARK", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS"),
    *("SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD", "MODEL.WEIGHTS"),
)
"""Keys that do not say what a run computes: those of detection.detectron2.recorder.HOW, which needs detectron2 to be
imported, and the start file, whose place may differ (teachers are compared by their weights)."""


def settings(kind: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's flat config as the report reads it; another kind's as it is."""
    if kind != DETECTRON2:
        return dict(flat)
    return {_name(path): value for path, value in flat.items() if path not in HOW}


def _name(path: str) -> str:
    if path not in NAMES and (section := next(filter(path.startswith, SECTIONS), None)):
        return path.replace(section, SECTIONS[section], 1)
    return NAMES.get(path, path)
