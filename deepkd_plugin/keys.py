"""Every config key that the plugin adds: path, default, meaning, and which values it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .distillers.deepkd import BASES
from .losses import MASKS

STREAMS = ("tog", "tcg", "ncg")
"""DeepKD's streams: task, target class, non-target class."""

EXTRA_STREAMS = ("feat",)
"""Streams that exist where SOLVER.DECOUPLED.LOSS_STREAMS gives them a loss."""

TRAINER = "DecoupledMomentumSGD"
"""Registry key of the trainer that reads SOLVER.DECOUPLED."""


class Key(NamedTuple):
    """One config key: its path, default, meaning (with unit and source), and which values it takes."""

    path: str
    default: Any
    meaning: str
    allowed: str
    valid: Callable[[Any], bool]


def _one_of(*names: str) -> tuple[str, Callable[[Any], bool]]:
    return "one of " + ", ".join(names), lambda value: value in names


_ANY = ("any text", lambda value: True)
_FLAG = ("True or False", lambda value: isinstance(value, bool))
_POSITIVE = ("a number above 0", lambda value: value > 0)
_ABOVE_ONE = ("a number above 1", lambda value: value > 1)
_NOT_NEGATIVE = ("a number from 0 on", lambda value: value >= 0)
_FRACTION = ("a number in [0, 1)", lambda value: 0 <= value < 1)
_PROBABILITY = ("a number in [0, 1]", lambda value: 0 <= value <= 1)
_TEMPERATURES = (
    "a list of numbers above 0",
    lambda value: len(value) > 0 and all(type(t) in (int, float) and t > 0 for t in value),
)
_DELTA = ("a number in (-1, 1)", lambda value: -1 < value < 1)
_CLASSES = (
    "a fraction of the classes in (0, 1), or a whole number of classes from 1 on",
    lambda value: 0 < value < 1 or (value >= 1 and float(value).is_integer()),
)
_PHASES = (
    "two ends in order, 0 <= phi1 < phi2 <= 1",
    lambda value: (
        [type(end) in (int, float) for end in value] == [True, True] and 0 <= value[0] < value[1] <= 1
    ),
)
_ASSIGNMENT = (
    f"a list of 'loss:stream' with a stream of {', '.join(STREAMS + EXTRA_STREAMS)}",
    lambda value: all(
        isinstance(v, str) and v.count(":") == 1 and v.split(":")[1] in STREAMS + EXTRA_STREAMS for v in value
    ),
)

KEYS = (
    Key("DeepKD.BASE", "KD", "the method whose loss is taken apart", *_one_of(*BASES)),
    Key("DeepKD.CE_WEIGHT", 1.0, "alpha, weight of the cross-entropy (TOG)", *_NOT_NEGATIVE),
    Key("DeepKD.TCG_WEIGHT", 1.0, "beta, weight of the target-class loss (TCG)", *_NOT_NEGATIVE),
    Key("DeepKD.NCG_WEIGHT", 1.0, "gamma, weight of the non-target-class loss (NCG)", *_NOT_NEGATIVE),
    Key("DeepKD.TEMPERATURE", 4.0, "softmax temperature (over MLKD: MLKD.TEMPERATURES)", *_POSITIVE),
    Key("DeepKD.WARMUP", 0, "epochs of linear warm-up of TCG and NCG (DKD: 20)", *_NOT_NEGATIVE),
    Key(
        "DeepKD.MASK.TYPE",
        "dynamic",
        "top-K mask on the non-target classes",
        *_one_of("none", "static", "dynamic"),
    ),
    Key("DeepKD.MASK.K", 0.5, "classes kept by the static mask", *_CLASSES),
    Key("DeepKD.MASK.INITIAL", 0.05, "classes kept at the start of the dynamic mask (paper)", *_CLASSES),
    Key("DeepKD.MASK.OPTIMAL", 0.5, "classes kept in its middle phase (ours; not published)", *_CLASSES),
    Key("DeepKD.MASK.PHASES", (1 / 3, 2 / 3), "ends of its first two phases, of training", *_PHASES),
    Key("DeepKD.MASK.READING", "renormalise", "how the mask enters NCKD, see losses.py", *_one_of(*MASKS)),
    Key("CRLD.CE_WEIGHT", 1.0, "weight of the cross-entropy of both views", *_NOT_NEGATIVE),
    Key("CRLD.WV_WEIGHT", 2.0, "weight of the terms within a view", *_NOT_NEGATIVE),
    Key("CRLD.CV_WEIGHT", 0.5, "weight of the terms across views", *_NOT_NEGATIVE),
    Key("CRLD.TEMPERATURE", 4.0, "softmax temperature", *_POSITIVE),
    Key("CRLD.TAU_W", 0.9, "least teacher confidence on the weak view, within views", *_PROBABILITY),
    Key("CRLD.TAU_S", 0.2, "least teacher confidence on the strong view, across views", *_PROBABILITY),
    Key("MLKD.CE_WEIGHT", 0.1, "weight of the cross-entropy of both views", *_NOT_NEGATIVE),
    Key("MLKD.KD_WEIGHT", 0.9, "weight of its three levels", *_NOT_NEGATIVE),
    Key("MLKD.TEMPERATURES", [2.0, 3.0, 4.0, 5.0, 6.0], "softmax temperatures", *_TEMPERATURES),
    Key("MLKD.VARIANT", "formula", "formula, or its release's arithmetic", *_one_of("formula", "release")),
    Key(
        "EXPERIMENT.LOGIT_STAND",
        False,
        "standardised logits in every distillation term (Sun et al., 2024)",
        *_FLAG,
    ),
    Key(
        "SOLVER.DECOUPLED.VARIANT",
        "paper",
        "assignment of momenta, see momenta()",
        *_one_of("paper", "release"),
    ),
    Key("SOLVER.DECOUPLED.DELTA.TOG", 0.0, "added to MOMENTUM for the task stream", *_DELTA),
    Key("SOLVER.DECOUPLED.DELTA.TCG", 0.0, "added to MOMENTUM for the target-class stream", *_DELTA),
    Key("SOLVER.DECOUPLED.DELTA.NCG", 0.0, "added to MOMENTUM for the non-target-class stream", *_DELTA),
    Key("SOLVER.DECOUPLED.DELTA.FEAT", 0.0, "added to MOMENTUM for a stream of feature losses", *_DELTA),
    Key(
        "SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM",
        "tcg",
        "the stream that decays the weights",
        *_one_of(*STREAMS),
    ),
    Key("SOLVER.DECOUPLED.DAMPENING", "none", "none, or ema for 1 - momentum", *_one_of("none", "ema")),
    Key(
        "SOLVER.DECOUPLED.ALLOCATION",
        "fixed",
        "DELTA as it stands, or within its size by the measured GSNR (see gsnr.GSNRAllocation)",
        *_one_of("fixed", "gsnr"),
    ),
    Key(
        "SOLVER.DECOUPLED.SEPARATION", 2.0, "highest over lowest GSNR that gives the whole DELTA", *_ABOVE_ONE
    ),
    Key("SOLVER.DECOUPLED.SMOOTHING", 0.5, "what a window keeps of the GSNR before it", *_FRACTION),
    Key("SOLVER.DECOUPLED.LOSS_STREAMS", [], "streams of losses not named like one", *_ASSIGNMENT),
    Key(
        "SOLVER.LR_SCHEDULE",
        "step",
        "step: mdistiller's rule; cosine: the release's",
        *_one_of("step", "cosine"),
    ),
    Key("SOLVER.WARMUP_EPOCHS", 0, "epochs of linear warm-up from 0.1 x LR", *_NOT_NEGATIVE),
    Key("SOLVER.MIN_LR", 0.0, "the cosine schedule's floor (release: 5e-5)", *_NOT_NEGATIVE),
    Key("SOLVER.AMP", False, "bfloat16 autocast of both networks; losses stay in float32", *_FLAG),
    Key(
        "SOLVER.GRADIENTS",
        "auto",
        "several backward passes: in turn, stacked, or what measures faster (GPU)",
        *_one_of("auto", "sequential", "batched"),
    ),
    Key(
        "SOLVER.EXECUTION",
        "eager",
        "the step: as written, networks compiled, or replayed CUDA graphs",
        *_one_of("eager", "compile", "graphs"),
    ),
    Key("SOLVER.CHANNELS_LAST", False, "memory format of networks and images", *_FLAG),
    Key("SOLVER.SEED", 0, "seed of weights, order and augmentation", *_NOT_NEGATIVE),
    Key("GSNR.MEASURE", False, "measure the streams' gradient signal-to-noise ratio (gsnr.py)", *_FLAG),
    Key("GSNR.EVERY", 200, "iterations between two samples of the gradients (paper)", *_POSITIVE),
    Key(
        "GSNR.WINDOW",
        10,
        "samples that one measurement takes",
        "a whole number from 2 on",
        lambda value: value > 1,
    ),
    Key("GSNR.COORDINATES", 500_000, "coordinates followed, drawn once; 0: all", *_NOT_NEGATIVE),
    Key("GSNR.LAYERS", False, "also by layer", *_FLAG),
    Key("DISTILLER.TEACHER_WEIGHTS", "", "teacher file; empty: the zoo's; builtin:NAME: one we ship", *_ANY),
    Key("DATASET.ROOT", "./data", "folder of the data sets", *_ANY),
    Key("DATASET.DOWNLOAD", False, "fetch CIFAR-100 where DATASET.ROOT has none", *_FLAG),
    Key(
        "DATASET.PIPELINE",
        "workers",
        "who makes batches: loader processes, or the device, where a small set then lies whole",
        *_one_of("workers", "device"),
    ),
    Key(
        "DATASET.TRAIN_PER_CLASS", 0, "training images of each class, the first ones; 0: all", *_NOT_NEGATIVE
    ),
    Key("DATASET.HOLDOUT", 0.0, "share of each class kept from training and tested on instead", *_FRACTION),
)

HOST_KEYS = (
    Key("SOLVER.LR", 0.05, "learning rate", *_POSITIVE),
    Key("SOLVER.LR_DECAY_RATE", 0.1, "decay", *_POSITIVE),
    Key("LOG.SAVE_CHECKPOINT_FREQ", 40, "epochs", *_POSITIVE),
    Key("SOLVER.EPOCHS", 240, "epochs", *_POSITIVE),
    Key("SOLVER.BATCH_SIZE", 64, "images in a step", *_POSITIVE),
    Key("SOLVER.MOMENTUM", 0.9, "momentum", *_FRACTION),
    Key("SOLVER.WEIGHT_DECAY", 1e-4, "weight decay", *_NOT_NEGATIVE),
    Key("SOLVER.TYPE", "SGD", "optimizer", *_one_of("SGD")),
    Key("DATASET.NUM_WORKERS", 2, "loader processes", *_NOT_NEGATIVE),
    Key("DATASET.TEST.BATCH_SIZE", 64, "images in a test batch", *_POSITIVE),
    Key("KD.TEMPERATURE", 4, "temperature", *_POSITIVE),
    Key("DKD.T", 4.0, "temperature", *_POSITIVE),
    Key("DKD.WARMUP", 20, "epochs", *_NOT_NEGATIVE),
    Key("CRD.MODE", "exact", "the positive sample", *_one_of("exact", "relax")),
    Key("CRD.NCE.K", 16384, "negative samples", *_POSITIVE),
)
"""mdistiller's own keys that would break a run far from where they were written."""
