"""Every config key that the plugin adds: path, default, meaning, and which values it takes.

Distillers declare the keys of their own nodes (distillers/); the others are here.
"""

import re
from typing import Any

from ..distillers import DISTILLERS
from ..distillers.variants import BY_VARIANT, MATCHED, VARIANTS
from ..mixture import MIXES, POOLS
from ..rules import (
    ABOVE_ONE,
    AUTO,
    FILE_OR_NONE,
    FLAG,
    FOLDER,
    FRACTION,
    NAME,
    NAME_OR_NONE,
    NOT_NEGATIVE,
    PART_OR_NONE,
    POSITIVE,
    PROBABILITY,
    SHARE,
    TEMPERATURE,
    WHOLE,
    Key,
    Rule,
    one_of,
    whole,
)
from ..streams import EXTRA_STREAMS, STREAMS
from ..streams import OF_A_TEACHER as PAIR

TRAINER, ADAMW = TRAINERS = ("DecoupledMomentumSGD", "DecoupledAdamW")
"""Registry keys of the trainers that read SOLVER.DECOUPLED; the second reads SOLVER.ADAMW too."""

CHANNELS_LAST, FOLD_TEACHER = CHOICES = ("SOLVER.CHANNELS_LAST", "DISTILLER.FOLD_TEACHER")
"""Keys that leave it to a measurement (choice.py) whether they are True or False, unless a config says so."""

MEANING = {"tog": "the task stream", "tcg": "the target-class stream", "ncg": "the non-target-class stream"} | {
    "feat": "a stream of feature losses"
}
"""What some streams are called in words."""

_BATCH = whole(1, 65_536)
_MEAN: Rule = (
    "a list of three numbers from 0 to 1, or []",
    lambda value: len(value) in (0, 3) and all(0 <= part <= 1 for part in value),
)
_STD: Rule = (
    "a list of three numbers above 0, up to 1, or []",
    lambda value: len(value) in (0, 3) and all(0 < part <= 1 for part in value),
)
_CLASSES: Rule = (
    "a list of whole numbers from 0 on, or the path of a file",
    lambda value: (
        value is None
        or (FILE_OR_NONE[1](value) if isinstance(value, str) else all(type(i) is int and i >= 0 for i in value))
    ),
)
_RANDAUGMENT: Rule = (
    "timm's notation, such as rand-m9-mstd0.5-inc1, or no text",
    lambda value: (
        value == "" or bool(re.fullmatch(r"rand(-((m|n|mmax)\d+|(p|mstd)\d+(\.\d+)?|inc[01]|t(weights|3aw?)))*", value))
    ),
)
_SIDE: Rule = (
    "a whole number from 8 to 4,096, or 0",
    lambda value: type(value) is int and (value == 0 or 8 <= value <= 4096),
)
_AREA: Rule = (
    "a list of two numbers, 0 < low <= high <= 1, or []",
    lambda value: len(value) in (0, 2) and (not value or 0 < value[0] <= value[1] <= 1),
)
OF_A_TEACHER = ("TEACHER", "TEACHER_WEIGHTS", "TEACHER_INPUT", "TEACHER_CLASSES", "TEACHER_SHARE")
"""Keys of DISTILLER that say of one teacher which it is; each of DISTILLER.MORE_TEACHERS has its own."""

_DELTA: Rule = ("a number in (-1, 1)", lambda value: -1 < value < 1)

MOST_TEACHERS = 8
"""A mean of more has no use that we know of; each costs a pass in every step."""

_TEACHERS: Rule = (
    f"a list of at most {MOST_TEACHERS - 1} sections, each with the key TEACHER and, as it needs them, "
    f"{', '.join(OF_A_TEACHER[1:])}, DELTA; TEACHER_INPUT has SIZE, MEAN and STD, DELTA numbers in (-1, 1) for "
    f"{' and '.join(name.upper() for name in PAIR)}",
    lambda value: (
        len(value) < MOST_TEACHERS
        and all(
            isinstance(one, dict)
            and isinstance(one["TEACHER"], str)
            and one.keys() <= {*OF_A_TEACHER, "DELTA"}
            and one.get("TEACHER_INPUT", {}).keys() <= {"SIZE", "MEAN", "STD"}
            and one.get("DELTA", {}).keys() <= {name.upper() for name in PAIR}
            and all(_DELTA[1](delta) for delta in one.get("DELTA", {}).values())
            for one in value
        )
    ),
)


def known_streams() -> tuple[str, ...]:
    """Return every stream that a run may have: DeepKD's, the extra ones, and those that distillers declare."""
    declared = (name for cls in DISTILLERS.values() for name in getattr(cls, "streams", ()))
    return tuple(dict.fromkeys((*STREAMS, *EXTRA_STREAMS, *declared)))


def all_keys() -> tuple[Key, ...]:
    """Return every key that the plugin adds, of all distillers that are registered by now."""
    streams = known_streams()

    def assigned(value: Any) -> bool:
        return all(isinstance(v, str) and v.count(":") == 1 and v.split(":")[1] in streams for v in value)

    return (
        *(key for cls in DISTILLERS.values() for key in cls.config_keys()),
        *(
            Key(
                f"SOLVER.DECOUPLED.DELTA.{stream.upper()}",
                0.0,
                f"added to MOMENTUM for {MEANING.get(stream, f'the stream {stream}')}",
                *_DELTA,
            )
            for stream in streams
        ),
        Key(
            "SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM",
            BY_VARIANT,
            "the stream that decays the weights; variant: VARIANT's; matched: the same, by as much as plain SGD",
            *one_of(BY_VARIANT, MATCHED, *(stream for stream in streams if stream not in EXTRA_STREAMS)),
        ),
        Key(
            "SOLVER.DECOUPLED.LOSS_STREAMS",
            [],
            "streams of losses not named like one",
            f"a list of 'loss:stream' with a stream of {', '.join(streams)}",
            assigned,
        ),
        *_FIXED,
    )


_FIXED = (
    Key("EXPERIMENT.LOGIT_STAND", False, "standardised logits in every distillation term (Sun et al., 2024)", *FLAG),
    Key(
        "DISTILLER.ENTROPY_WEIGHT",
        "none",
        "samples weighted by both networks' entropy in every distillation term (EA-KD); release: as its code bounds it",
        *one_of("none", "formula", "release"),
    ),
    Key("DISTILLER.ENTROPY_TEMPERATURE", 3.0, "softmax temperature of these entropies", *TEMPERATURE),
    Key(
        "SOLVER.DECOUPLED.VARIANT",
        "paper",
        "whose reading of the method: its momenta, dampening, decay stream and mask (docs/method.md)",
        *one_of(*VARIANTS),
    ),
    Key(
        "SOLVER.DECOUPLED.DAMPENING",
        BY_VARIANT,
        "factor of a stream's gradient; none: 1; ema: 1 - momentum; matched: plain SGD's step length "
        "(see DecoupledMomentumSGD); variant: as VARIANT has it",
        *one_of(BY_VARIANT, "none", "ema", MATCHED),
    ),
    Key(
        "SOLVER.DECOUPLED.ALLOCATION",
        "fixed",
        "DELTA as it stands, or within its size by the measured GSNR (see gsnr.GSNRAllocation)",
        *one_of("fixed", "gsnr"),
    ),
    Key("SOLVER.DECOUPLED.SEPARATION", 2.0, "highest over lowest GSNR that gives the whole DELTA", *ABOVE_ONE),
    Key("SOLVER.DECOUPLED.SMOOTHING", 0.5, "what a window keeps of the GSNR before it", *FRACTION),
    Key("SOLVER.LR_SCHEDULE", "step", "step: mdistiller's rule; cosine: the release's", *one_of("step", "cosine")),
    Key(
        "SOLVER.WARMUP_EPOCHS",
        0,
        "W epochs of linear warm-up: epoch e < W has 0.1 + 0.9 e/W of the rate, from 1 on, so W = 1 warms nothing up; "
        "the cosine schedule begins at its end",
        *whole(0),
    ),
    Key(
        "SOLVER.WARMUP_UNIT",
        "epoch",
        "what warm-ups of the rate and of losses rise by: e = 1, 2, … in whole epochs, or e grows by one over the "
        "steps of an epoch in every iteration",
        *one_of("epoch", "iteration"),
    ),
    Key("SOLVER.WARMUP_START", 0.1, "share of the rate that its warm-up rises from (release: 0.1)", *FRACTION),
    Key("SOLVER.MIN_LR", 0.0, "the cosine schedule's floor (release: 5e-5)", *NOT_NEGATIVE),
    Key("SOLVER.ADAMW.BETA2", 0.999, "decay of AdamW's second moment; MOMENTUM is its beta1", *FRACTION),
    Key("SOLVER.ADAMW.EPS", 1e-8, "added to the second moment's root", *NOT_NEGATIVE),
    Key(
        "SOLVER.ADAMW.DECAY",
        "weights",
        "what WEIGHT_DECAY decays: weights: not biases, norms and what the network names, as timm does it; all",
        *one_of("weights", "all"),
    ),
    Key("SOLVER.LABEL_SMOOTHING", 0.0, "share of a label that all classes get in equal parts", *FRACTION),
    Key("AUGMENT.MIXUP", 0.0, "alpha of mixup, whose share is drawn from Beta(alpha, alpha); 0: off", *NOT_NEGATIVE),
    Key("AUGMENT.CUTMIX", 0.0, "alpha of cutmix, likewise; 0: off", *NOT_NEGATIVE),
    Key("AUGMENT.MIX_PROBABILITY", 1.0, "share of batches that are mixed", *PROBABILITY),
    Key("AUGMENT.CUTMIX_SHARE", 0.5, "share of mixed batches that get cutmix, if mixup is on too", *PROBABILITY),
    Key("AUGMENT.RANDAUGMENT", "", "timm's RandAugment of the image after crop and flip; empty: none", *_RANDAUGMENT),
    Key("AUGMENT.ERASING", 0.0, "probability that a rectangle of an image becomes noise", *PROBABILITY),
    Key(
        "SOLVER.AMP",
        False,
        "autocast of both networks, in bfloat16 if True; losses and teacher's logits in float32",
        "True, False or float16",
        lambda value: isinstance(value, bool) or value == "float16",
    ),
    Key("SOLVER.ACCUMULATE", 1, "micro-batches of BATCH_SIZE / ACCUMULATE images in a step", *whole(1, 65_536)),
    Key(
        "SOLVER.EXECUTION",
        "eager",
        "the step: as written, networks compiled, or replayed CUDA graphs",
        *one_of("eager", "compile", "graphs"),
    ),
    Key("SOLVER.DATA_PARALLEL", False, "split each batch over all GPUs; BatchNorm then sees a part", *FLAG),
    Key("SOLVER.SYNC_BATCHNORM", False, "BatchNorm over all processes; otherwise each has its share", *FLAG),
    Key("SOLVER.CHECKPOINT_MINUTES", 0.0, "minutes between checkpoints inside an epoch; 0: none", *NOT_NEGATIVE),
    Key("SOLVER.DETERMINISTIC", False, "only algorithms that repeat their results bit for bit, on a GPU too", *FLAG),
    Key(
        CHANNELS_LAST,
        "auto",
        "memory format of networks and images; auto: what is faster here, measured once at the start",
        *AUTO,
    ),
    Key("SOLVER.SEED", 0, "seed of weights, order and augmentation", *NOT_NEGATIVE),
    Key("GSNR.MEASURE", False, "measure the streams' gradient signal-to-noise ratio (gsnr.py)", *FLAG),
    Key("GSNR.EVERY", 200, "iterations between two samples of the gradients (paper)", *WHOLE),
    Key("GSNR.WINDOW", 10, "samples that one measurement takes", *whole(2)),
    Key("GSNR.COORDINATES", 500_000, "coordinates followed, drawn once; 0: all", *whole(0, 10**9)),
    Key("GSNR.LAYERS", False, "also by layer", *FLAG),
    Key("DISTILLER.TEACHER_WEIGHTS", "", "teacher file; empty: the zoo's; builtin:NAME: one we ship", *FILE_OR_NONE),
    Key(
        "DISTILLER.MORE_TEACHERS",
        [],
        "teachers beside the first, which these keys describe: for each a section of the same keys",
        *_TEACHERS,
    ),
    Key("DISTILLER.TEACHER_SHARE", 1.0, "weight of the teacher among several, over the sum of all", *POSITIVE),
    Key(
        "DISTILLER.TEACHER_MIX",
        "fixed",
        "several teachers' weights: fixed: their shares; or also each sample's, by the teacher's probability of the "
        "target (CA-MKD) or its entropy (see mixture.py)",
        *one_of(*MIXES),
    ),
    Key(
        "DISTILLER.TEACHER_POOL",
        "probabilities",
        "what is averaged: probabilities, at the one temperature of the method, or logits, for methods of several; "
        "streams: nothing, DeepKD has a pair of streams for each teacher, with momenta by DELTA of its section",
        *one_of(*POOLS),
    ),
    Key("DISTILLER.ANY_TEACHER", False, "go on with a teacher that is at chance on the test images", *FLAG),
    Key(
        "DISTILLER.STUDENT_WEIGHTS",
        "",
        "what the student starts from: a file, or pretrained: its library's; a head of other classes stays new",
        *FILE_OR_NONE,
    ),
    Key("DISTILLER.STUDENT_DROP_PATH", 0.0, "stochastic depth of a student of timm: its drop_path_rate", *FRACTION),
    Key(
        "DISTILLER.TEACHER_INPUT.SIZE",
        0,
        "pixels of a side that the teacher's images have; 0: its library's weights' own, for a file the data set's",
        *whole(0, 10_000),
    ),
    Key("DISTILLER.TEACHER_INPUT.MEAN", [], "of the three channels, for pixels in [0, 1]; []: as SIZE 0", *_MEAN),
    Key("DISTILLER.TEACHER_INPUT.STD", [], "of the three channels, for pixels in [0, 1]; []: as SIZE 0", *_STD),
    Key(
        "DISTILLER.TEACHER_CLASSES",
        None,
        "the teacher's classes for those of the data set, in its order: a list of numbers, or a file with the names of "
        "the teacher's classes, one a line; nothing: the same",
        *_CLASSES,
    ),
    Key(
        "DISTILLER.TEACHER_LOGITS",
        "compute",
        "the teacher's logits of an image's weak view: computed in every step, or once and kept on disk, of all views "
        "(table) or of a few (stored)",
        *one_of("compute", "table", "stored"),
    ),
    Key(
        FOLD_TEACHER,
        "auto",
        "BatchNorm folded into the convolutions of a teacher whose logits alone are used; auto: if that is faster here",
        *AUTO,
    ),
    Key("DISTILLER.LOGITS_VIEWS", 4, "stored: weak views of an image, which the epochs see in turn", *whole(1, 10_000)),
    Key("DISTILLER.LOGITS_SEED", 0, "stored: whose first epochs these views are those of", *whole(0)),
    Key("DISTILLER.LOGITS_K", 0, "stored: classes whose logits are kept, the target's among them; 0: all", *whole(0)),
    Key("DISTILLER.LOGITS_DTYPE", "float16", "what such a table rounds them to", *one_of("float16", "float32")),
    Key(
        "DISTILLER.LOGITS_DIR",
        "",
        "folder of such tables, or the file of one; empty: teacher_logits in DATASET.ROOT",
        *FILE_OR_NONE,
    ),
    Key("DATASET.ROOT", "./data", "folder of the data sets", *FOLDER),
    Key("DATASET.DOWNLOAD", False, "fetch CIFAR-100 if DATASET.ROOT has none", *FLAG),
    Key(
        "DATASET.PIPELINE",
        "auto",
        "who makes batches: loader processes, or the device, which then has the whole of a small set; auto: the device "
        "if it is a GPU and can make them",
        *one_of("auto", "workers", "device"),
    ),
    Key("DATASET.TRAIN_PER_CLASS", 0, "training images of each class, the first ones; 0: all", *NOT_NEGATIVE),
    Key("DATASET.HOLDOUT", 0.0, "share of each class kept from training and tested on instead", *FRACTION),
    Key(
        "DATASET.TEST.SPLIT",
        "",
        "your own images: the part that is tested on, by its name; empty: val, valid, validation or test",
        *PART_OR_NONE,
    ),
    Key(
        "DATASET.COLUMNS",
        [],
        "huggingface: the columns of images and of labels; []: the only one of images and the only one of classes",
        "a list of two names, or []",
        lambda value: len(value) in (0, 2) and all(isinstance(name, str) for name in value),
    ),
    Key("INPUT.SIZE", 0, "your own images: pixels of a side as they enter the student; 0: 224", *_SIDE),
    Key("INPUT.MEAN", [], "of the three channels, for pixels in [0, 1]; []: the teacher's own, or ImageNet's", *_MEAN),
    Key("INPUT.STD", [], "of the three channels, for pixels in [0, 1]; []: the teacher's own, or ImageNet's", *_STD),
    Key(
        "INPUT.CROP_AREA",
        [0.08, 1.0],
        "training: least and largest share of an image that a random crop has; []: all of it, squeezed to a square",
        *_AREA,
    ),
    Key("INPUT.FLIP", 0.5, "training: probability that an image is mirrored", *PROBABILITY),
    Key(
        "INPUT.TEST_CROP",
        0.875,
        "tests: share of an image's shorter side that the square in its middle has; 0: all of it, squeezed to a square",
        "a number from 0.25 to 1, or 0",
        lambda value: value == 0 or 0.25 <= value <= 1,
    ),
)

BEFORE = {CHANNELS_LAST: False, FOLD_TEACHER: False}
"""What runs did that are older than a key, if that is not its default."""

PATHS = (
    *("LOG.PREFIX", "DATASET.ROOT", "DISTILLER.TEACHER_WEIGHTS", "DISTILLER.STUDENT_WEIGHTS", "DISTILLER.LOGITS_DIR"),
    *("DISTILLER.TEACHER_CLASSES", "DETECTION.STUDENT_BACKBONE", "MODEL.WEIGHTS", "OUTPUT_DIR"),
)
"""Keys that name files and folders, in which ~ is the user's home; the last two are detectron2's."""

MIXED = ("SOLVER.AMP", "KD.TEMPERATURE")
"""Keys that take values of several types."""

REMOVED = {"SOLVER.GRADIENTS": "backward passes are made in turn, which was the faster way"}
"""Keys of older configs, and what is done instead."""

HOST_KEYS = (
    Key("EXPERIMENT.PROJECT", "distill", "folder of a run's folder, below LOG.PREFIX", *NAME),
    Key("EXPERIMENT.NAME", "", "a run's folder; empty: named by TAG and options", *NAME_OR_NONE),
    Key("EXPERIMENT.TAG", "default", "start of the name of a run without NAME", *NAME),
    Key("LOG.PREFIX", "./output", "folder of all runs", *FOLDER),
    Key("SOLVER.LR", 0.05, "learning rate", *POSITIVE),
    Key("SOLVER.LR_DECAY_RATE", 0.1, "decay", *SHARE),
    Key("LOG.SAVE_CHECKPOINT_FREQ", 40, "epochs", *whole(1, 10**9)),
    Key("SOLVER.EPOCHS", 240, "epochs", *WHOLE),
    Key("SOLVER.BATCH_SIZE", 64, "images in a step", *_BATCH),
    Key("SOLVER.MOMENTUM", 0.9, "momentum", *FRACTION),
    Key("SOLVER.WEIGHT_DECAY", 1e-4, "weight decay", *NOT_NEGATIVE),
    Key("SOLVER.TYPE", "SGD", "optimizer", f"SGD (SOLVER.TRAINER {ADAMW} brings AdamW)", lambda value: value == "SGD"),
    Key("DATASET.NUM_WORKERS", 2, "loader processes", *whole(0, 256)),
    Key("DATASET.TEST.BATCH_SIZE", 64, "images in a test batch", *_BATCH),
    Key("KD.TEMPERATURE", 4, "temperature", *TEMPERATURE),
    Key("DKD.ALPHA", 1.0, "weight of the target-class loss", *NOT_NEGATIVE),
    Key("DKD.BETA", 8.0, "weight of the non-target-class loss", *NOT_NEGATIVE),
    Key("DKD.T", 4.0, "temperature", *TEMPERATURE),
    Key("DKD.WARMUP", 20, "W epochs of linear warm-up: epoch e has min(e/W, 1) of it, so 1 is none", *whole(0)),
    Key("AT.P", 2, "power that activations are raised to before their mean over channels", *whole(1, 16)),
    Key("FITNET.HINT_LAYER", 2, "which of the features, from 0 on, is compared", *whole(0, 1000)),
    Key("CRD.MODE", "exact", "the positive sample", *one_of("exact", "relax")),
    Key("CRD.NCE.K", 16384, "negative samples", *WHOLE),
)
"""mdistiller's own keys that would break a run far from where they were written."""
