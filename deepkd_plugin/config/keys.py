"""Every config key that the plugin adds: path, default, meaning, and which values it takes."""

from __future__ import annotations

from ..distillers.deepkd import BASES
from ..losses import MASKS
from ..streams import EXTRA_STREAMS, STREAMS
from .rules import (
    ABOVE_ONE,
    ANY,
    FLAG,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    TEMPERATURES,
    Key,
    one_of,
)

TRAINER = "DecoupledMomentumSGD"
"""Registry key of the trainer that reads SOLVER.DECOUPLED."""

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
    Key("DeepKD.BASE", "KD", "the method whose loss is taken apart", *one_of(*BASES)),
    Key("DeepKD.CE_WEIGHT", 1.0, "alpha, weight of the cross-entropy (TOG)", *NOT_NEGATIVE),
    Key("DeepKD.TCG_WEIGHT", 1.0, "beta, weight of the target-class loss (TCG)", *NOT_NEGATIVE),
    Key("DeepKD.NCG_WEIGHT", 1.0, "gamma, weight of the non-target-class loss (NCG)", *NOT_NEGATIVE),
    Key("DeepKD.TEMPERATURE", 4.0, "softmax temperature (over MLKD: MLKD.TEMPERATURES)", *POSITIVE),
    Key("DeepKD.WARMUP", 0, "epochs of linear warm-up of TCG and NCG (DKD: 20)", *NOT_NEGATIVE),
    Key(
        "DeepKD.MASK.TYPE",
        "dynamic",
        "top-K mask on the non-target classes",
        *one_of("none", "static", "dynamic"),
    ),
    Key("DeepKD.MASK.K", 0.5, "classes kept by the static mask", *_CLASSES),
    Key("DeepKD.MASK.INITIAL", 0.05, "classes kept at the start of the dynamic mask (paper)", *_CLASSES),
    Key("DeepKD.MASK.OPTIMAL", 0.5, "classes kept in its middle phase (ours; not published)", *_CLASSES),
    Key("DeepKD.MASK.PHASES", (1 / 3, 2 / 3), "ends of its first two phases, of training", *_PHASES),
    Key("DeepKD.MASK.READING", "renormalise", "how the mask enters NCKD, see losses.py", *one_of(*MASKS)),
    Key("CRLD.CE_WEIGHT", 1.0, "weight of the cross-entropy of both views", *NOT_NEGATIVE),
    Key("CRLD.WV_WEIGHT", 2.0, "weight of the terms within a view", *NOT_NEGATIVE),
    Key("CRLD.CV_WEIGHT", 0.5, "weight of the terms across views", *NOT_NEGATIVE),
    Key("CRLD.TEMPERATURE", 4.0, "softmax temperature", *POSITIVE),
    Key("CRLD.TAU_W", 0.9, "least teacher confidence on the weak view, within views", *PROBABILITY),
    Key("CRLD.TAU_S", 0.2, "least teacher confidence on the strong view, across views", *PROBABILITY),
    Key("MLKD.CE_WEIGHT", 0.1, "weight of the cross-entropy of both views", *NOT_NEGATIVE),
    Key("MLKD.KD_WEIGHT", 0.9, "weight of its three levels", *NOT_NEGATIVE),
    Key("MLKD.TEMPERATURES", [2.0, 3.0, 4.0, 5.0, 6.0], "softmax temperatures", *TEMPERATURES),
    Key("MLKD.VARIANT", "formula", "formula, or its release's arithmetic", *one_of("formula", "release")),
    Key(
        "EXPERIMENT.LOGIT_STAND",
        False,
        "standardised logits in every distillation term (Sun et al., 2024)",
        *FLAG,
    ),
    Key(
        "SOLVER.DECOUPLED.VARIANT",
        "paper",
        "assignment of momenta, see momenta()",
        *one_of("paper", "release"),
    ),
    Key("SOLVER.DECOUPLED.DELTA.TOG", 0.0, "added to MOMENTUM for the task stream", *_DELTA),
    Key("SOLVER.DECOUPLED.DELTA.TCG", 0.0, "added to MOMENTUM for the target-class stream", *_DELTA),
    Key("SOLVER.DECOUPLED.DELTA.NCG", 0.0, "added to MOMENTUM for the non-target-class stream", *_DELTA),
    Key("SOLVER.DECOUPLED.DELTA.FEAT", 0.0, "added to MOMENTUM for a stream of feature losses", *_DELTA),
    Key(
        "SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM",
        "tcg",
        "the stream that decays the weights",
        *one_of(*STREAMS),
    ),
    Key("SOLVER.DECOUPLED.DAMPENING", "none", "none, or ema for 1 - momentum", *one_of("none", "ema")),
    Key(
        "SOLVER.DECOUPLED.ALLOCATION",
        "fixed",
        "DELTA as it stands, or within its size by the measured GSNR (see gsnr.GSNRAllocation)",
        *one_of("fixed", "gsnr"),
    ),
    Key(
        "SOLVER.DECOUPLED.SEPARATION", 2.0, "highest over lowest GSNR that gives the whole DELTA", *ABOVE_ONE
    ),
    Key("SOLVER.DECOUPLED.SMOOTHING", 0.5, "what a window keeps of the GSNR before it", *FRACTION),
    Key("SOLVER.DECOUPLED.LOSS_STREAMS", [], "streams of losses not named like one", *_ASSIGNMENT),
    Key(
        "SOLVER.LR_SCHEDULE",
        "step",
        "step: mdistiller's rule; cosine: the release's",
        *one_of("step", "cosine"),
    ),
    Key("SOLVER.WARMUP_EPOCHS", 0, "epochs of linear warm-up from 0.1 x LR", *NOT_NEGATIVE),
    Key("SOLVER.MIN_LR", 0.0, "the cosine schedule's floor (release: 5e-5)", *NOT_NEGATIVE),
    Key("SOLVER.AMP", False, "bfloat16 autocast of both networks; losses stay in float32", *FLAG),
    Key(
        "SOLVER.GRADIENTS",
        "auto",
        "several backward passes: in turn, stacked, or what measures faster (GPU)",
        *one_of("auto", "sequential", "batched"),
    ),
    Key(
        "SOLVER.EXECUTION",
        "eager",
        "the step: as written, networks compiled, or replayed CUDA graphs",
        *one_of("eager", "compile", "graphs"),
    ),
    Key("SOLVER.CHANNELS_LAST", False, "memory format of networks and images", *FLAG),
    Key("SOLVER.SEED", 0, "seed of weights, order and augmentation", *NOT_NEGATIVE),
    Key("GSNR.MEASURE", False, "measure the streams' gradient signal-to-noise ratio (gsnr.py)", *FLAG),
    Key("GSNR.EVERY", 200, "iterations between two samples of the gradients (paper)", *POSITIVE),
    Key(
        "GSNR.WINDOW",
        10,
        "samples that one measurement takes",
        "a whole number from 2 on",
        lambda value: value > 1,
    ),
    Key("GSNR.COORDINATES", 500_000, "coordinates followed, drawn once; 0: all", *NOT_NEGATIVE),
    Key("GSNR.LAYERS", False, "also by layer", *FLAG),
    Key("DISTILLER.TEACHER_WEIGHTS", "", "teacher file; empty: the zoo's; builtin:NAME: one we ship", *ANY),
    Key("DATASET.ROOT", "./data", "folder of the data sets", *ANY),
    Key("DATASET.DOWNLOAD", False, "fetch CIFAR-100 where DATASET.ROOT has none", *FLAG),
    Key(
        "DATASET.PIPELINE",
        "workers",
        "who makes batches: loader processes, or the device, where a small set then lies whole",
        *one_of("workers", "device"),
    ),
    Key("DATASET.TRAIN_PER_CLASS", 0, "training images of each class, the first ones; 0: all", *NOT_NEGATIVE),
    Key("DATASET.HOLDOUT", 0.0, "share of each class kept from training and tested on instead", *FRACTION),
)

HOST_KEYS = (
    Key("SOLVER.LR", 0.05, "learning rate", *POSITIVE),
    Key("SOLVER.LR_DECAY_RATE", 0.1, "decay", *POSITIVE),
    Key("LOG.SAVE_CHECKPOINT_FREQ", 40, "epochs", *POSITIVE),
    Key("SOLVER.EPOCHS", 240, "epochs", *POSITIVE),
    Key("SOLVER.BATCH_SIZE", 64, "images in a step", *POSITIVE),
    Key("SOLVER.MOMENTUM", 0.9, "momentum", *FRACTION),
    Key("SOLVER.WEIGHT_DECAY", 1e-4, "weight decay", *NOT_NEGATIVE),
    Key("SOLVER.TYPE", "SGD", "optimizer", *one_of("SGD")),
    Key("DATASET.NUM_WORKERS", 2, "loader processes", *NOT_NEGATIVE),
    Key("DATASET.TEST.BATCH_SIZE", 64, "images in a test batch", *POSITIVE),
    Key("KD.TEMPERATURE", 4, "temperature", *POSITIVE),
    Key("DKD.T", 4.0, "temperature", *POSITIVE),
    Key("DKD.WARMUP", 20, "epochs", *NOT_NEGATIVE),
    Key("CRD.MODE", "exact", "the positive sample", *one_of("exact", "relax")),
    Key("CRD.NCE.K", 16384, "negative samples", *POSITIVE),
)
"""mdistiller's own keys that would break a run far from where they were written."""
