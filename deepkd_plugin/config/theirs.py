"""What mdistiller's own keys mean that only its methods and trainers read (its distillers/ and engine/, a08d46f).

A value must be of the default's type; loss weights must not be negative. The keys that more is checked of are in
keys.py.
"""

from typing import Any

from ..rules import FLAG, NOT_NEGATIVE

MEANINGS = {
    "SOLVER.LR_DECAY_STAGES": "epochs after which the step schedule multiplies the rate by LR_DECAY_RATE",
    "SOLVER.DOT.DELTA": "mdistiller's trainer dot: added to the distillation loss's momentum, taken from the task's",
    "LOG.TENSORBOARD_FREQ": "mdistiller's; nothing reads it",
    "LOG.WANDB": "log to Weights & Biases too",
    "DATASET.TYPE": "the images",
    "DISTILLER.TYPE": "the method; NONE trains the student alone",
    "DISTILLER.TEACHER": "the teacher's network",
    "DISTILLER.STUDENT": "the student's network",
    "SOLVER.TRAINER": "what takes the steps; base: SGD with one momentum",
    "KD.LOSS.CE_WEIGHT": "weight of the cross-entropy",
    "KD.LOSS.KD_WEIGHT": "weight of the divergence from the teacher",
    "DKD.CE_WEIGHT": "weight of the cross-entropy",
    "RKD.DISTANCE_WEIGHT": "weight of distances between images",
    "RKD.ANGLE_WEIGHT": "weight of angles between images",
    "RKD.PDIST.EPSILON": "least distance between two images",
    "RKD.PDIST.SQUARED": "take squares of distances",
    "FITNET.INPUT_SIZE": "height and width of the images, from which shapes of features are found",
    "KDSVD.K": "singular vectors of the teacher's features that are compared",
    "OFD.CONNECTOR.KERNEL_SIZE": "kernel of the convolutions from the student's features to the teacher's",
    "VID.EPS": "added to the predicted variances",
    "VID.INIT_PRED_VAR": "predicted variance at the start",
    "VID.INPUT_SIZE": "height and width of the images, from which shapes of features are found",
    "CRD.FEAT.DIM": "size of the embeddings that are compared",
    "CRD.FEAT.STUDENT_DIM": "size of the student's pooled features",
    "CRD.FEAT.TEACHER_DIM": "size of the teacher's pooled features",
    "CRD.NCE.MOMENTUM": "share of an embedding that its memory keeps",
    "CRD.NCE.TEMPERATURE": "temperature of the contrast",
    "REVIEWKD.CE_WEIGHT": "weight of the cross-entropy",
    "REVIEWKD.REVIEWKD_WEIGHT": "weight of the loss on features",
    "REVIEWKD.WARMUP_EPOCHS": "W epochs of linear warm-up of the loss on features: epoch e has min(e/W, 1) of it",
    "REVIEWKD.SHAPES": "side of the student's features by stage, the last one first",
    "REVIEWKD.OUT_SHAPES": "side of the teacher's features by stage, the last one first",
    "REVIEWKD.IN_CHANNELS": "channels of the student's features by stage",
    "REVIEWKD.OUT_CHANNELS": "channels of the teacher's features by stage",
    "REVIEWKD.MAX_MID_CHANNEL": "most channels between the two",
    "REVIEWKD.STU_PREACT": "take the student's features before the last activation",
}
"""By key; of the methods' LOSS there is more below."""

METHODS = ("AT", "RKD", "FITNET", "KDSVD", "OFD", "NST", "PKT", "SP", "VID", "CRD")
MEANINGS |= {f"{method}.LOSS.CE_WEIGHT": "weight of the cross-entropy" for method in METHODS}
MEANINGS |= {f"{method}.LOSS.FEAT_WEIGHT": "weight of the method's loss" for method in METHODS}


def allowed(path: str, default: Any) -> str:
    """Say which values a key takes of which only the type is checked, and the sign if it is a loss's weight."""
    if path.endswith("WEIGHT"):
        return NOT_NEGATIVE[0]
    if isinstance(default, bool):
        return FLAG[0]
    return {int: "a whole number", float: "a number", str: "text"}.get(type(default), f"a list, like {default!r}")
