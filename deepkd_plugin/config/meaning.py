"""What a checked config asks for: momenta by stream, views of an image, and which keys compute."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from yacs.config import CfgNode

from ..distillers import DISTILLERS
from ..distillers.variants import MATCHED, VARIANTS, resolved, variant
from ..errors import UserError
from ..mixture import STREAMS as APART
from ..streams import EXTRA_STREAMS, STREAMS, of_teacher
from ..streams import OF_A_TEACHER as PAIR
from .keys import OF_A_TEACHER
from .tree import get

HOW = (
    *("DATASET.ROOT", "DATASET.DOWNLOAD", "DATASET.TEST.BATCH_SIZE", "DISTILLER.TEACHER_WEIGHTS"),
    "DISTILLER.ANY_TEACHER",
    *("DISTILLER.LOGITS_DIR", "GSNR.MEASURE", "GSNR.LAYERS", "SOLVER.CHECKPOINT_MINUTES"),
)
"""Keys that say where a run finds things and what it looks at, not what it computes. (A teacher's file is
compared by its content.)"""


WORKERS = "DATASET.NUM_WORKERS"
"""Any number of workers gives the same run: an image's random numbers are of seed, epoch and image (data/draws.py).
It is compared as 0 rather than left out, so that hashes of runs without workers stay what they were."""

AUTO = {"DATASET.PIPELINE": "workers"}
"""Keys whose value may be `auto`, which chooses by the machine what gives the same results, and the value that it is
compared as, so that a run's hash is the same on every machine. (Runs had that value before there was `auto`.)"""


MORE_TEACHERS = "DISTILLER.MORE_TEACHERS"


def compared(path: str, value: Any) -> Any:
    """Return a key's value as runs are compared by it; of a list of teachers without their files, as of the first."""
    if path == MORE_TEACHERS and isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return [{name: part for name, part in one.items() if name != "TEACHER_WEIGHTS"} for one in value]
    if path == WORKERS:
        return 0
    return AUTO[path] if path in AUTO and isinstance(value, str) and value == "auto" else value


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a flat config computes, as runs are compared by it: what VARIANT decides is written out."""
    return {path: compared(path, value) for path, value in resolved(settings).items() if computes(path)}


def by_teacher(cfg: CfgNode) -> list[CfgNode]:
    """Return a config for each teacher of a config, whose DISTILLER is as if that were its only one."""
    if not cfg.DISTILLER.MORE_TEACHERS:
        return [cfg]
    cfgs = []
    for one in ({}, *cfg.DISTILLER.MORE_TEACHERS):
        own = cfg.clone()
        own.defrost()
        own.DISTILLER.MORE_TEACHERS = []
        if one:
            fed = {"SIZE": 0, "MEAN": [], "STD": []} | one.get("TEACHER_INPUT", {})
            of_one = {"TEACHER_WEIGHTS": "", "TEACHER_CLASSES": None, "TEACHER_SHARE": 1.0} | one
            for name in OF_A_TEACHER:
                value = CfgNode(fed) if name == "TEACHER_INPUT" else of_one[name]
                # PATHS are expanded as they are read; these stand in a list
                own.DISTILLER[name] = os.path.expanduser(value) if isinstance(value, str) else value
        own.freeze()
        cfgs.append(own)
    return cfgs


def teacher_name(cfg: CfgNode) -> str:
    """Name the teacher of a config, or all of them."""
    return " + ".join([cfg.DISTILLER.TEACHER, *(one["TEACHER"] for one in cfg.DISTILLER.MORE_TEACHERS)])


@contextlib.contextmanager
def naming(number: int) -> Iterator[None]:
    """Let errors about teacher `number`, counted from 0, say that it is one of MORE_TEACHERS."""
    try:
        yield
    except UserError as error:
        if not number:
            raise
        raise UserError(f"{MORE_TEACHERS}, entry {number}: {error}") from None


def streams(cfg: CfgNode) -> tuple[str, ...]:
    """Return the streams of a run: those that its distiller declares, else DeepKD's, then those of LOSS_STREAMS."""
    distiller = DISTILLERS.get(cfg.DISTILLER.TYPE)
    asked = getattr(distiller, "streams_of", None)
    declared = (getattr(distiller, "streams", ()) if asked is None else asked(cfg)) or STREAMS
    assigned = (pair.split(":")[1] for pair in cfg.SOLVER.DECOUPLED.LOSS_STREAMS)
    return tuple(dict.fromkeys((*declared, *(EXTRA_STREAMS if feature(cfg) else ()), *assigned)))


def deltas(cfg: CfgNode) -> dict[str, float]:
    """Return what is added to MOMENTUM for each stream of a run.

    Those of another teacher have what its section says in DELTA, else the first one's.
    """
    node = cfg.SOLVER.DECOUPLED.DELTA
    more = cfg.DISTILLER.MORE_TEACHERS if cfg.DISTILLER.TEACHER_POOL == APART else []
    own = {
        of_teacher(name, number): one.get("DELTA", {}).get(name.upper(), node[name.upper()])
        for number, one in enumerate(more, 1)
        for name in PAIR
    }
    return {stream: own[stream] if stream in own else node[stream.upper()] for stream in streams(cfg)}


def feature(cfg: CfgNode) -> str:
    """Return the loss on features that a config adds to its method, the stream `feat`; "" without one."""
    asked = getattr(DISTILLERS.get(cfg.DISTILLER.TYPE), "feature_of", None)
    return "" if asked is None else asked(cfg)


def contrasts(cfg: CfgNode) -> str:
    """Return the key, and its value, that asks for CRD's contrast indices of each image; "" if none does."""
    if feature(cfg) == "CRD":
        return "DeepKD.FEATURE CRD"
    return f"DISTILLER.TYPE {cfg.DISTILLER.TYPE}" if cfg.DISTILLER.TYPE in ("CRD", "CRDKD") else ""


def momenta(cfg: CfgNode) -> tuple[dict[str, float], str]:
    """Return each stream's momentum, and the stream that decays the weights.

    The momentum of a stream is MOMENTUM + DELTA (DeepKD, section 3), its own or that of the stream that VARIANT gives
    it. With ALLOCATION gsnr these are the momenta before the first measurement: all streams have MOMENTUM.
    """
    node, said = cfg.SOLVER.DECOUPLED, variant(cfg)
    decays = VARIANTS[node.VARIANT].decay_stream if said.decay_stream == MATCHED else said.decay_stream
    if node.ALLOCATION == "gsnr":
        return dict.fromkeys(streams(cfg), cfg.SOLVER.MOMENTUM), decays
    own = {stream: cfg.SOLVER.MOMENTUM + delta for stream, delta in deltas(cfg).items()}
    return {stream: own[said.momentum_of.get(stream, stream)] for stream in own}, decays


def dampening(cfg: CfgNode) -> dict[str, str | float | None]:
    """Return DecoupledMomentumSGD's arguments for DAMPENING and a WEIGHT_DECAY_STREAM that is `matched`.

    `matched` keeps the step length, and the decay, of plain SGD with MOMENTUM.
    """
    said = variant(cfg)
    return {
        "dampening": 0.0 if said.dampening == "none" else said.dampening,
        "matched_to": cfg.SOLVER.MOMENTUM if said.dampening == MATCHED else None,
        "decay_matched_to": cfg.SOLVER.MOMENTUM if said.decay_stream == MATCHED else None,
    }


def computes(path: str) -> bool:
    """Tell whether a key says what a run computes, rather than where it finds things and how it goes about it."""
    if path == "EXPERIMENT.LOGIT_STAND":  # its place in the releases of logit standardisation and DeepKD
        return True
    return path.split(".")[0] not in ("LOG", "EXPERIMENT") and path not in HOW


def mixes(cfg: CfgNode) -> bool:
    """Tell whether a config mixes the images of a batch."""
    return bool((cfg.AUGMENT.MIXUP or cfg.AUGMENT.CUTMIX) and cfg.AUGMENT.MIX_PROBABILITY)


def softens(cfg: CfgNode) -> bool:
    """Tell whether training labels are shares of all classes: of mixed images, or smoothed."""
    return mixes(cfg) or cfg.SOLVER.LABEL_SMOOTHING > 0


def asks_teacher(cfg: CfgNode) -> bool:
    """Tell whether a training step passes images through a teacher."""
    known = cfg.DISTILLER.TEACHER_LOGITS != "compute" and views(cfg) == 1
    return cfg.DISTILLER.TYPE != "NONE" and not known


def plain_teacher(cfg: CfgNode) -> str:
    """Say why a config's teacher stays as it is, whatever FOLD_TEACHER says; "" if it may be folded."""
    method = cfg.DISTILLER.TYPE
    if method == "NONE":
        return "there is no teacher"
    if not on_logits(cfg):
        asked = f"DeepKD.FEATURE {feature(cfg)}" if feature(cfg) else f"DISTILLER.TYPE {method}"
        return f"{asked} needs more of the teacher than its logits"
    if not asks_teacher(cfg):
        return f"DISTILLER.TEACHER_LOGITS {cfg.DISTILLER.TEACHER_LOGITS} keeps the plain teacher's logits"
    return "SOLVER.AMP rounds to fewer bits, folded weights too" if cfg.SOLVER.AMP else ""


def on_logits(cfg: CfgNode) -> bool:
    """Tell whether logits are all that a config's method needs of the teacher."""
    return getattr(DISTILLERS.get(cfg.DISTILLER.TYPE), "on_logits", False) and not feature(cfg)


def in_terms(cfg: CfgNode) -> bool:
    """Tell whether a config's method is a sum of distillation terms."""
    return getattr(DISTILLERS.get(cfg.DISTILLER.TYPE), "in_terms", False)


def modified(cfg: CfgNode) -> str:
    """Return the key by which a config changes the distillation terms of its method, whatever that is; "" if none."""
    if cfg.EXPERIMENT.LOGIT_STAND:
        return "EXPERIMENT.LOGIT_STAND"
    return "" if cfg.DISTILLER.ENTROPY_WEIGHT == "none" else "DISTILLER.ENTROPY_WEIGHT"


def warmups(cfg: CfgNode, method: object) -> dict[str, int]:
    """Return the epochs of the linear warm-ups, by key: of the learning rate, and of the losses if `method` has one.

    method: a distiller or its class.
    """
    own = getattr(method, "warmup_key", "")
    return {path: get(cfg, path) for path in ("SOLVER.WARMUP_EPOCHS", own) if path}


def temperature(cfg: CfgNode) -> float | None:
    """Return the one temperature at which the config's method reads the teacher's logits; None if there is none."""
    asked = getattr(DISTILLERS.get(cfg.DISTILLER.TYPE), "temperature_of", None)
    return None if asked is None else asked(cfg)


def chunk(cfg: CfgNode) -> int:
    """Return how many images a micro-batch of SOLVER.ACCUMULATE has at most, of all processes together."""
    return math.ceil(cfg.SOLVER.BATCH_SIZE / cfg.SOLVER.ACCUMULATE)


def views(cfg: CfgNode) -> int:
    """Return how many views of each training image the config's method needs: 1, or 2 (weak and strong)."""
    distiller = DISTILLERS.get(cfg.DISTILLER.TYPE)
    return 1 if distiller is None else distiller.views_of(cfg)


def needs_workers(cfg: CfgNode) -> str | None:
    """Say what in a config needs more of an image than batches have that are made on the device; None if nothing."""
    method = cfg.DISTILLER.TYPE
    if views(cfg) > 1:
        asked = f"DeepKD.BASE {cfg.DeepKD.BASE}" if method == "DeepKD" else f"DISTILLER.TYPE {method}"
        return f"{asked}: the strong view is drawn by PIL's operations"
    for path in ("AUGMENT.RANDAUGMENT", "AUGMENT.ERASING"):
        if get(cfg, path):
            return f"{path}: it is drawn image by image"
    contrast = contrasts(cfg)
    return f"{contrast}: its contrast indices are drawn image by image" if contrast else None
