"""The config of mdistiller's detection branch with DeepKD's keys: defaults, reading, checks.

detectron2 keeps its settings in a yacs tree of its own. If a classification run has a key too, its meaning and its
allowed values come from deepkd_plugin/config/keys.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import config
from ...config import file as config_file
from ...config import keys
from ...distillers.variants import variant
from ...errors import UserError, shown
from ...rules import FRACTION, NOT_NEGATIVE, POSITIVE, TEMPERATURE, WHOLE, Key, one_of
from ...streams import EXTRA_STREAMS, STREAMS
from ..losses import BASES
from . import require

model = require()

from detectron2.config import CfgNode, get_cfg  # noqa: E402 (require says in one line if there is none)

META_ARCHITECTURE = "RCNNDeepKD"

LOSS_STREAMS = {"loss_tcg": "tcg", "loss_ncg": "ncg", "loss_feat": "feat"}
"""The losses of RCNNDeepKD that have a stream of their own; every other loss belongs to the task stream."""

DECOUPLED = {"DeepKD": (), "ReviewDeepKD": ("feat",)}
"""The values of KD.TYPE whose losses fall into streams, and their streams beside STREAMS."""

TYPES = ("KD", *DECOUPLED)
"""The values of KD.TYPE that RCNNDeepKD adds to mdistiller's."""

CLIP_TYPES = ("value", "norm", "full_model")
"""detectron2's two, parameter by parameter, and the norm of the whole gradient, which its own projects call so."""

_THEIRS = ("DKD", "ReviewKD", "ReviewDKD")
_OFF = ("False: it is not supported here", lambda value: value is False)


def _shared(path: str, ours: str, **changes: Any) -> Key:
    """Return one of the classification's keys under another path; `changes` is what differs here."""
    (key,) = (key for key in keys.all_keys() if key.path == ours)
    return key._replace(path=path, **changes)


_MASK = ("TYPE", "K", "INITIAL", "OPTIMAL", "PHASES", "READING")
_MOMENTA = (
    *(f"DELTA.{stream.upper()}" for stream in (*STREAMS, *EXTRA_STREAMS)),
    *("VARIANT", "WEIGHT_DECAY_STREAM", "DAMPENING"),
)

KEYS = (
    Key("KD.KD.T", 1.0, "softmax temperature of plain KD over proposals", *TEMPERATURE),
    Key("KD.DEEPKD.BASE", "DKD", "the method whose loss is taken apart", *one_of(*BASES)),
    Key("KD.DEEPKD.TASK_WEIGHT", 1.0, "alpha, weight of all detection losses (TOG)", *NOT_NEGATIVE),
    _shared("KD.DEEPKD.TCG_WEIGHT", "DeepKD.TCG_WEIGHT"),
    _shared("KD.DEEPKD.NCG_WEIGHT", "DeepKD.NCG_WEIGHT", default=0.25),
    _shared("KD.DEEPKD.T", "DeepKD.TEMPERATURE", default=1.0),
    *(_shared(f"KD.DEEPKD.MASK.{leaf}", f"DeepKD.MASK.{leaf}") for leaf in _MASK),
    *(_shared(f"SOLVER.DECOUPLED.{leaf}", f"SOLVER.DECOUPLED.{leaf}") for leaf in _MOMENTA),
)
"""Every key that the plugin adds to this tree. Weights and temperature are mdistiller's for DKD on detectors."""

HOST_KEYS = (
    Key("KD.TYPE", "DKD", "method", *one_of(*_THEIRS, *TYPES)),
    Key("KD.DKD.ALPHA", 1.0, "weight", *NOT_NEGATIVE),
    Key("KD.DKD.BETA", 0.25, "weight", *NOT_NEGATIVE),
    Key("KD.DKD.T", 1.0, "temperature", *TEMPERATURE),
    Key("KD.REVIEWKD.LOSS_WEIGHT", 1.0, "weight", *NOT_NEGATIVE),
    Key("SOLVER.BASE_LR", 0.001, "learning rate", *POSITIVE),
    Key("SOLVER.MAX_ITER", 40000, "iterations", *WHOLE),
    Key("SOLVER.IMS_PER_BATCH", 16, "images in a step, of all processes", *WHOLE),
    Key("SOLVER.MOMENTUM", 0.9, "momentum", *FRACTION),
    Key("SOLVER.WEIGHT_DECAY", 1e-4, "weight decay", *NOT_NEGATIVE),
    Key("SOLVER.NESTEROV", False, "", *_OFF),
    Key("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value", "clipping", *one_of(*CLIP_TYPES)),
    Key("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0, "its bound", *POSITIVE),
    Key("TEST.AUG.ENABLED", False, "", *_OFF),
    Key("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "one set of logits", *one_of("StandardROIHeads")),
    Key("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", False, "", *_OFF),
)
"""Keys of detectron2 and mdistiller whose wrong values would break a run far from where they were written."""


def add_deepkd_config(cfg: CfgNode) -> None:
    """Add mdistiller's detection keys and KEYS to detectron2's tree.

    TEACHER gets the keys and values of today's tree beside its own: it lists detectron2's keys of 2021, and today's
    builders ask for more.
    """
    model.add_distillation_cfg(cfg)
    cfg.TEACHER.set_new_allowed(True)
    cfg.TEACHER.merge_from_other_cfg(get_cfg())
    cfg.TEACHER.set_new_allowed(False)
    cfg.TEACHER.MODEL.MOBILENETV2 = cfg.MODEL.MOBILENETV2.clone()
    config.add_keys(cfg, KEYS)


def load(file: str | Path, options: Sequence[str] = ()) -> tuple[CfgNode, dict[str, str]]:
    """Merge a YAML file, the files that its _BASE_ names and KEY VALUE pairs into a new tree, without checking it.

    Also returns where each value that was set came from. Raises UserError for a file that cannot be read, an unknown
    key and a value of another type.
    """
    cfg = get_cfg()
    add_deepkd_config(cfg)
    tree = _read(Path(file))
    if isinstance(tree, dict) and tree.get("VERSION", cfg.VERSION) != cfg.VERSION:
        raise UserError(f"{file}: VERSION is {shown(tree['VERSION'])}; it must be {cfg.VERSION}, detectron2's of today")
    return cfg, config.merge(cfg, tree, str(file), options)


def _read(file: Path, levels: int = 10) -> Any:
    """Read a file over those that its _BASE_ names, relative to it, as detectron2 does."""
    tree = config_file.read(file)
    if not isinstance(tree, dict) or "_BASE_" not in tree:
        return tree
    named = tree.pop("_BASE_")
    merged: dict[str, Any] = {}
    for base in named if isinstance(named, list) else [named]:
        path = file.parent / Path(base).expanduser() if isinstance(base, str) else None
        if path is None or not path.is_file() or not levels:
            raise UserError(f"{file}: _BASE_ is {shown(base)}; it must name a config file, with 10 above it at most")
        below = _read(path, levels - 1)
        if not isinstance(below, dict):
            raise UserError(f"{path}: must hold a YAML mapping of config keys, holds {type(below).__name__}")
        _put(below, merged, file)
    _put(tree, merged, file)
    return merged


def _put(tree: Mapping[str, Any], into: dict[str, Any], file: Path) -> None:
    """Merge a file's mapping into that of its bases."""
    for name, value in tree.items():
        if isinstance(value, dict) and name in into:
            if not isinstance(into[name], dict):
                raise UserError(f"{file}: {name} is a section; it must be a value, as in _BASE_")
            _put(value, into[name], file)
        else:
            into[name] = value


def check(cfg: CfgNode, origin: Mapping[str, str]) -> None:
    """Raise UserError for the first value that is out of range, naming its key and where it came from."""
    config.check_keys(cfg, origin, KEYS + HOST_KEYS)
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        raise config.wrong(origin, "SOLVER.AMP.ENABLED", True, "False with MODEL.DEVICE cpu")
    check_architecture(cfg, origin)
    _check_momenta(cfg, origin)
    if cfg.KD.TYPE in DECOUPLED:
        _check_mask(cfg, origin)


def check_architecture(cfg: CfgNode, origin: Mapping[str, str] | None = None) -> None:
    """Raise UserError if the meta architecture does not know KD.TYPE, or teacher and student differ in classes."""
    origin, meta = origin or {}, cfg.MODEL.META_ARCHITECTURE
    if meta == "RCNNKD" and cfg.KD.TYPE in TYPES:
        raise config.wrong(origin, "MODEL.META_ARCHITECTURE", meta, f"{META_ARCHITECTURE} with KD.TYPE {cfg.KD.TYPE}")
    student, teacher = cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.TEACHER.MODEL.ROI_HEADS.NUM_CLASSES
    if meta in ("RCNNKD", META_ARCHITECTURE) and student != teacher:
        path = "TEACHER.MODEL.ROI_HEADS.NUM_CLASSES"
        raise config.wrong(origin, path, teacher, f"{student}, the student's MODEL.ROI_HEADS.NUM_CLASSES")


def streams(cfg: CfgNode) -> tuple[str, ...]:
    """Return the streams of a step. If a method is not decoupled, all its losses belong to the task stream."""
    decoupled = cfg.MODEL.META_ARCHITECTURE == META_ARCHITECTURE and cfg.KD.TYPE in DECOUPLED
    return STREAMS + DECOUPLED[cfg.KD.TYPE] if decoupled else STREAMS[:1]


def momenta(cfg: CfgNode) -> tuple[dict[str, float], str]:
    """Return each stream's momentum and the stream that decays the weights, as config.momenta does."""
    names = streams(cfg)
    if len(names) == 1:
        return {names[0]: cfg.SOLVER.MOMENTUM}, names[0]
    return config.momenta(_as_classification(cfg))


def reading(cfg: CfgNode) -> str:
    """Return how the mask enters the non-target loss: as the config says, or as its VARIANT has it."""
    return variant(_as_classification(cfg)).reading


def _as_classification(cfg: CfgNode) -> CfgNode:
    """Return what this tree shares with that of a classification run, under the keys of the latter."""
    assigned = [f"{loss}:{stream}" for loss, stream in LOSS_STREAMS.items() if stream in streams(cfg)]
    # users' distillers may have brought streams that this tree has no key for
    delta = {name.upper(): 0.0 for name in config.known_streams()} | cfg.SOLVER.DECOUPLED.DELTA
    decoupled = {**cfg.SOLVER.DECOUPLED, "DELTA": delta, "ALLOCATION": "fixed", "LOSS_STREAMS": assigned}
    solver = {"TRAINER": config.TRAINER, "MOMENTUM": cfg.SOLVER.MOMENTUM, "DECOUPLED": decoupled}
    deepkd = {"MASK": cfg.KD.DEEPKD.MASK.clone(), "FEATURE": "none"}
    distiller = {"TYPE": "DeepKD", "MORE_TEACHERS": [], "TEACHER_POOL": "probabilities"}
    return CfgNode({"SOLVER": solver, "DISTILLER": distiller, "DeepKD": deepkd})


def _check_momenta(cfg: CfgNode, origin: Mapping[str, str]) -> None:
    names = streams(cfg)
    for name, delta in cfg.SOLVER.DECOUPLED.DELTA.items():
        if delta and (len(names) == 1 or name.lower() not in names):
            allowed = f"0.0 with KD.TYPE {cfg.KD.TYPE} on {cfg.MODEL.META_ARCHITECTURE}, which has no such stream"
            raise config.wrong(origin, f"SOLVER.DECOUPLED.DELTA.{name}", delta, allowed)
    config.check_momenta(_as_classification(cfg), dict(origin))


def _check_mask(cfg: CfgNode, origin: Mapping[str, str]) -> None:
    theirs = {path.replace("KD.DEEPKD.", "DeepKD."): source for path, source in origin.items()}
    try:
        config.check_mask(_as_classification(cfg), theirs, cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1)
    except UserError as error:
        raise UserError(str(error).replace("DeepKD.MASK.", "KD.DEEPKD.MASK.")) from None
