"""Refuse a config whose values cannot be meant, in one line that names the key and where its value came from."""

import importlib.util
from collections.abc import Sequence

from yacs.config import CfgNode

from .. import device
from ..distillers import DISTILLERS, Method, bases
from ..distributed import process_group, sharding
from ..errors import UserError
from ..mixture import STREAMS as APART
from ..rules import NOT_NEGATIVE, PLAIN, Key, plain
from ..terminal import warn
from ..topk import GROWING, classes, count_classes, mask_size
from .keys import ADAMW, FOLD_TEACHER, HOST_KEYS, OF_A_TEACHER, TRAINER, TRAINERS, all_keys, known_streams
from .meaning import (
    by_teacher,
    chunk,
    contrasts,
    deltas,
    feature,
    in_terms,
    mixes,
    modified,
    momenta,
    naming,
    needs_workers,
    on_logits,
    plain_teacher,
    softens,
    streams,
    temperature,
    views,
    warmups,
)
from .tree import flatten, get, wrong


def check(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Raise UserError for the first value that is out of range, naming its key and where it came from."""
    ours = all_keys()
    check_keys(cfg, origin, ours + HOST_KEYS)
    for path, value in flatten(cfg).items():
        if path.endswith("WEIGHT") and type(value) in (int, float) and value < 0:
            raise wrong(origin, path, value, NOT_NEGATIVE[0])
    stages = list(cfg.SOLVER.LR_DECAY_STAGES)
    if any(type(stage) is not int or stage < 0 for stage in stages) or stages != sorted(set(stages)):
        raise wrong(origin, "SOLVER.LR_DECAY_STAGES", stages, "epochs in ascending order")
    if cfg.SOLVER.MIN_LR > cfg.SOLVER.LR:
        raise wrong(origin, "SOLVER.MIN_LR", cfg.SOLVER.MIN_LR, f"at most SOLVER.LR, {cfg.SOLVER.LR}")
    if cfg.SOLVER.WARMUP_EPOCHS > cfg.SOLVER.EPOCHS and cfg.SOLVER.LR_SCHEDULE == "cosine":
        allowed = f"at most SOLVER.EPOCHS, {cfg.SOLVER.EPOCHS}, with the cosine schedule"
        raise wrong(origin, "SOLVER.WARMUP_EPOCHS", cfg.SOLVER.WARMUP_EPOCHS, allowed)
    if cfg.LOG.WANDB and importlib.util.find_spec("wandb") is None:
        raise wrong(origin, "LOG.WANDB", True, "False, for wandb is not installed (pip install wandb)")
    check_pipeline(cfg, origin)
    check_division(cfg, origin)
    check_augmentation(cfg, origin)
    if (modifier := modified(cfg)) and not in_terms(cfg):
        default = next(key.default for key in ours if key.path == modifier)
        allowed = f"{default} with DISTILLER.TYPE {cfg.DISTILLER.TYPE}, which has no distillation terms on logits"
        raise wrong(origin, modifier, get(cfg, modifier), allowed)
    path, method = "DISTILLER.TEACHER_LOGITS", cfg.DISTILLER.TYPE
    kind = cfg.DISTILLER.TEACHER_LOGITS
    if kind != "compute" and method != "NONE" and not on_logits(cfg):
        asked = f"DeepKD.FEATURE {feature(cfg)}" if feature(cfg) else f"DISTILLER.TYPE {method}"
        allowed = f"'compute' with {asked}, which needs more of the teacher than its logits"
        raise wrong(origin, path, kind, allowed)
    if cfg.DISTILLER.FOLD_TEACHER is True and method != "NONE" and (reason := plain_teacher(cfg)):
        raise wrong(origin, FOLD_TEACHER, True, f"auto or False: {reason}")
    check_feature(cfg, origin)
    check_teachers(cfg, origin)
    check_momenta(cfg, origin)
    check_warmups(cfg, origin)
    check_schedules(cfg, origin)
    for key in ours:
        if key.path.startswith("SOLVER.DECOUPLED."):
            own = (TRAINER,) if key.path in OF_SGD else TRAINERS
        else:
            own = (ADAMW,) if key.path.startswith("SOLVER.ADAMW.") else (cfg.SOLVER.TRAINER,)
        if cfg.SOLVER.TRAINER not in own and get(cfg, key.path) != key.default:
            trainer = f"SOLVER.TRAINER {cfg.SOLVER.TRAINER}, which does not read it; {own[0]} does"
            allowed = f"{key.default!r} with {trainer}"
            raise wrong(origin, key.path, get(cfg, key.path), allowed)


OF_SGD = ("SOLVER.DECOUPLED.DAMPENING", "SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM", "SOLVER.DECOUPLED.VARIANT")
"""Keys that mean nothing to AdamW: its first moments are means already, and its decay belongs to no stream."""


def check_keys(cfg: CfgNode, origin: dict[str, str], keys: Sequence[Key]) -> None:
    """Raise UserError for the first value of the tree that none can be, or of `keys` that does not take its value."""
    for key in keys:
        value = get(cfg, key.path)
        try:
            valid = key.valid(value)
        except (TypeError, ValueError, IndexError, AttributeError, OverflowError):  # the check compares another type
            valid = False
        if not valid:
            raise wrong(origin, key.path, value, key.allowed)
    for path, value in flatten(cfg).items():
        if not plain(value):
            raise wrong(
                origin, path, value, {float: "a finite number", int: "a number of 64 bits"}.get(type(value), PLAIN)
            )


def check_feature(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Raise UserError if a loss on features is asked of a method or a training that cannot have it."""
    path, asked = "DeepKD.FEATURE", cfg.DeepKD.FEATURE
    if asked != "none" and not feature(cfg):
        allowed = f"'none' with DISTILLER.TYPE {cfg.DISTILLER.TYPE}; DeepKD has a stream for it"
        raise wrong(origin, path, asked, allowed)
    if feature(cfg) and cfg.SOLVER.ACCUMULATE > 1:
        allowed = f"1 with {path} {asked}, which compares more of a batch than logits"
        raise wrong(origin, "SOLVER.ACCUMULATE", cfg.SOLVER.ACCUMULATE, allowed)
    if feature(cfg) and process_group.size() > 1:
        raise wrong(origin, path, asked, f"'none' in {process_group.size()} processes, which exchange logits alone")
    if feature(cfg) and contrasts(cfg) and softens(cfg):
        allowed = "another with mixed images or soft labels, whose contrast is of one image and its class"
        raise wrong(origin, path, asked, allowed)


def check_teachers(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Raise UserError for teachers that are described wrongly, or whose mixture the method cannot be given."""
    node, keys = cfg.DISTILLER, {key.path: key for key in all_keys()}
    path = "DISTILLER.MORE_TEACHERS"
    if not node.MORE_TEACHERS or node.TYPE == "NONE":
        for name in ("TEACHER_SHARE", "TEACHER_MIX", "TEACHER_POOL"):
            default = keys[f"DISTILLER.{name}"].default
            if node[name] != default and node.TYPE != "NONE":
                raise wrong(
                    origin, f"DISTILLER.{name}", node[name], f"{default!r} with one teacher; {path} adds others"
                )
        return
    said = dict.fromkeys(keys, origin.get(path, "default"))
    own = [key for key in keys.values() if key.path.split(".")[1] in OF_A_TEACHER]
    for number, one in enumerate(by_teacher(cfg)[1:], 1):
        with naming(number):
            check_keys(one, said, own)
    method = f"DeepKD.BASE {cfg.DeepKD.BASE}" if node.TYPE == "DeepKD" else f"DISTILLER.TYPE {node.TYPE}"
    if not on_logits(cfg):
        raise wrong(
            origin, path, node.MORE_TEACHERS, f"[] with {method}, which needs more of a teacher than its logits"
        )
    apart = node.TEACHER_POOL == APART
    if apart and node.TYPE != "DeepKD":
        allowed = f"'probabilities' or 'logits' with DISTILLER.TYPE {node.TYPE}; DeepKD has streams for each teacher"
        raise wrong(origin, "DISTILLER.TEACHER_POOL", node.TEACHER_POOL, allowed)
    if apart and bases()[cfg.DeepKD.BASE].task.__func__ is not Method.task.__func__:  # type: ignore[attr-defined]
        allowed = f"'logits' with {method}, which compares more with a teacher than what falls into its streams"
        raise wrong(origin, "DISTILLER.TEACHER_POOL", node.TEACHER_POOL, allowed)
    if any("DELTA" in one for one in node.MORE_TEACHERS) and not (apart and cfg.SOLVER.TRAINER in TRAINERS):
        allowed = f"without DELTA unless DISTILLER.TEACHER_POOL is streams and SOLVER.TRAINER {' or '.join(TRAINERS)}"
        raise wrong(origin, path, node.MORE_TEACHERS, allowed)
    if node.TEACHER_POOL == "probabilities" and (temperature(cfg) is None or modified(cfg)):
        # softmax(z / T) is the mean of the teachers' at one T alone
        reason = modified(cfg) or f"{method}, which reads logits at several temperatures"
        raise wrong(origin, "DISTILLER.TEACHER_POOL", node.TEACHER_POOL, f"'logits' with several teachers and {reason}")
    if node.TEACHER_LOGITS == "stored" and node.LOGITS_K:
        allowed = "0 with several teachers: their tables keep different classes, of which there is no mixture"
        raise wrong(origin, "DISTILLER.LOGITS_K", node.LOGITS_K, allowed)


def check_momenta(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Raise UserError if SOLVER.DECOUPLED gives a stream a momentum that is none, or its allocation does not fit."""
    solver, node = cfg.SOLVER, cfg.SOLVER.DECOUPLED
    measured = node.ALLOCATION == "gsnr"

    def check_delta(path: str, delta: float, origin: dict[str, str]) -> None:
        # an allocation may give a stream either end of its range
        if not all(0 <= solver.MOMENTUM + d < 1 for d in ((delta, -delta) if measured else (delta,))):
            low, high = -solver.MOMENTUM, 1 - solver.MOMENTUM
            allowed = f"in [{low:g}, {high:g}), so that SOLVER.MOMENTUM {solver.MOMENTUM:g} plus it is in [0, 1)"
            if measured:
                allowed += ", and minus it too with SOLVER.DECOUPLED.ALLOCATION gsnr"
            raise wrong(origin, path, delta, allowed)

    for number, one in enumerate(cfg.DISTILLER.MORE_TEACHERS, 1):
        for name, delta in one.get("DELTA", {}).items():
            path = f"DELTA.{name}"
            with naming(number):
                check_delta(path, delta, {path: origin.get("DISTILLER.MORE_TEACHERS", "default")})
    for stream in known_streams():
        path = f"SOLVER.DECOUPLED.DELTA.{stream.upper()}"
        delta = get(cfg, path)
        check_delta(path, delta, origin)
        if delta and stream not in streams(cfg):
            raise wrong(origin, path, delta, f"0.0: the run's streams are {', '.join(streams(cfg))}")
    if node.VARIANT == "release" and not {"tog", "tcg"} <= set(streams(cfg)):
        allowed = f"'paper': the run's streams are {', '.join(streams(cfg))}, and release ties tog to tcg"
        raise wrong(origin, "SOLVER.DECOUPLED.VARIANT", node.VARIANT, allowed)
    decays = momenta(cfg)[1]
    if cfg.SOLVER.TRAINER == TRAINER and decays not in streams(cfg):
        allowed = f"one of the run's streams, {', '.join(streams(cfg))}"
        raise wrong(origin, "SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM", decays, allowed)
    path = "SOLVER.DECOUPLED.ALLOCATION"
    if measured and node.VARIANT == "release":
        allowed = "'fixed' with SOLVER.DECOUPLED.VARIANT release, which ties two streams together"
        raise wrong(origin, path, node.ALLOCATION, allowed)
    if measured and sum(delta != 0 for delta in deltas(cfg).values()) < 2:
        allowed = "'fixed' if fewer than two of SOLVER.DECOUPLED.DELTA differ from 0: their sizes are its bounds"
        raise wrong(origin, path, node.ALLOCATION, allowed)


def check_warmups(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Warn of a warm-up that is written and changes nothing."""
    solver = cfg.SOLVER
    if solver.WARMUP_UNIT == "iteration":
        return
    for path, epochs in warmups(cfg, DISTILLERS.get(cfg.DISTILLER.TYPE)).items():
        # the cosine schedule begins at the end of the learning rate's
        if epochs == 1 and not (path == "SOLVER.WARMUP_EPOCHS" and solver.LR_SCHEDULE == "cosine"):
            warn(
                f"{origin.get(path, 'default')}: {path} is 1, which changes nothing: by epoch the first has the "
                f"whole factor; with SOLVER.WARMUP_UNIT iteration it rises within the first"
            )


def check_schedules(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Warn of a schedule that the run is too short for: rates that never fall, phases of the mask without an epoch."""
    solver, mask = cfg.SOLVER, cfg.DeepKD.MASK
    late = [stage for stage in solver.LR_DECAY_STAGES if stage >= solver.EPOCHS]
    if solver.LR_SCHEDULE == "step" and late:
        warn(
            f"{origin.get('SOLVER.LR_DECAY_STAGES', 'default')}: SOLVER.LR_DECAY_STAGES has {late[0]}, and the run "
            f"{solver.EPOCHS} epochs: the learning rate does not fall there"
        )
    if cfg.DISTILLER.TYPE != "DeepKD" or mask.TYPE not in GROWING or mask.UNIT != "epoch":
        return
    first, second = mask.PHASES
    points = [epoch / max(solver.EPOCHS - 1, 1) for epoch in range(solver.EPOCHS)]
    phases = {
        "easy": not first or any(point < first for point in points),
        "transition": any(first <= point <= second for point in points),
        "hard": second == 1 or any(point > second for point in points),
    }
    if missing := [name for name, has in phases.items() if not has]:
        warn(
            f"{origin.get('DeepKD.MASK.PHASES', 'default')}: DeepKD.MASK.PHASES [{first:.3g}, {second:.3g}] leave no "
            f"epoch of {solver.EPOCHS} to the phase {' and '.join(missing)} of the mask"
        )


def check_division(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Raise UserError if a batch cannot be divided among processes and micro-batches as it is asked for."""
    solver, several = cfg.SOLVER, process_group.size() > 1
    if process_group.size() > solver.BATCH_SIZE:
        allowed = f"at least {process_group.size()}, an image for each process; it is the batch of all together"
        raise wrong(origin, "SOLVER.BATCH_SIZE", solver.BATCH_SIZE, allowed)
    if solver.ACCUMULATE * process_group.size() > solver.BATCH_SIZE:
        most = solver.BATCH_SIZE // process_group.size()
        each = " for each process" if several else ""
        allowed = f"at most {most}, so that a micro-batch of SOLVER.BATCH_SIZE {solver.BATCH_SIZE} has an image{each}"
        raise wrong(origin, "SOLVER.ACCUMULATE", solver.ACCUMULATE, allowed)
    if solver.DATA_PARALLEL and (several or solver.ACCUMULATE > 1):
        reason = f"{process_group.size()} processes" if several else f"SOLVER.ACCUMULATE {solver.ACCUMULATE}"
        raise wrong(origin, "SOLVER.DATA_PARALLEL", True, f"False with {reason}")
    if solver.SYNC_BATCHNORM and several and device.pick().type == "cpu":
        raise wrong(origin, "SOLVER.SYNC_BATCHNORM", True, "False on a CPU: PyTorch's SyncBatchNorm needs GPUs")


def check_augmentation(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Raise UserError for mixed images, soft labels or single images' augmentation that a run cannot have."""
    node, solver, distiller = cfg.AUGMENT, cfg.SOLVER, cfg.DISTILLER
    method = f"DISTILLER.TYPE {distiller.TYPE}"
    asked = [path for path in ("MIXUP", "CUTMIX", "RANDAUGMENT", "ERASING") if node[path]]
    used = [f"AUGMENT.{name}" for name in asked] + ["SOLVER.LABEL_SMOOTHING"] * (solver.LABEL_SMOOTHING > 0)
    if softens(cfg) and not getattr(DISTILLERS.get(distiller.TYPE), "soft_labels", False):
        path = next(path for path in used if path not in ("AUGMENT.RANDAUGMENT", "AUGMENT.ERASING"))
        raise wrong(
            origin, path, get(cfg, path), f"0.0 with {method}, which does not declare that it takes soft_labels"
        )
    if asked and distiller.TEACHER_LOGITS != "compute" and distiller.TYPE != "NONE":
        allowed = f"'compute' with {used[0]}: such images have no logits of a teacher in a table"
        raise wrong(origin, "DISTILLER.TEACHER_LOGITS", distiller.TEACHER_LOGITS, allowed)
    for name, none in (("RANDAUGMENT", "''"), ("ERASING", "0.0")):
        if node[name] and views(cfg) > 1:
            allowed = f"{none} with {method}: a method of two views has a strong one of its own"
            raise wrong(origin, f"AUGMENT.{name}", node[name], allowed)
    if node.RANDAUGMENT and importlib.util.find_spec("timm") is None:
        allowed = 'no text, for timm is not installed: pip install -e ".[networks]" (or: pip install timm) brings it'
        raise wrong(origin, "AUGMENT.RANDAUGMENT", node.RANDAUGMENT, allowed)
    parts = sharding.shares(solver.BATCH_SIZE, chunk(cfg))
    if mixes(cfg) and process_group.size() > 1 and any(count % 2 for part in parts for count in part):
        least = 2 * process_group.size() * solver.ACCUMULATE
        allowed = f"a multiple of {least} with {used[0]}, so that processes and micro-batches have whole pairs"
        raise wrong(origin, "SOLVER.BATCH_SIZE", solver.BATCH_SIZE, allowed)


def check_pipeline(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Raise UserError if a method needs more of an image than batches have that are made on the device."""
    reason = needs_workers(cfg)
    if cfg.DATASET.PIPELINE == "device" and reason:
        raise wrong(origin, "DATASET.PIPELINE", "device", f"'workers' with {reason}")


def check_kept(cfg: CfgNode, origin: dict[str, str], num_classes: int) -> None:
    """Raise UserError if stored logits of some of `num_classes` classes do not say what the method asks of them."""
    node = cfg.DISTILLER
    kept = node.LOGITS_K or num_classes
    if node.TEACHER_LOGITS != "stored" or node.TYPE == "NONE" or num_classes <= kept:
        return
    several = temperature(cfg) is None
    if several or modified(cfg):
        method = f"DeepKD.BASE {cfg.DeepKD.BASE}" if node.TYPE == "DeepKD" else f"DISTILLER.TYPE {node.TYPE}"
        reason = f"{method}, which reads logits at several temperatures" if several else modified(cfg)
        raise wrong(origin, "DISTILLER.LOGITS_K", kept, f"0, which keeps all {num_classes} classes, with {reason}")
    if node.TYPE == "DeepKD" and cfg.DeepKD.MASK.TYPE == "top_p":
        allowed = f"0, which keeps all {num_classes} classes, with DeepKD.MASK.TYPE top_p: it may ask for any of them"
        raise wrong(origin, "DISTILLER.LOGITS_K", kept, allowed)
    epochs = cfg.SOLVER.EPOCHS
    sizes = [mask_size(cfg.DeepKD.MASK, num_classes, epoch / max(epochs - 1, 1)) for epoch in range(epochs)]
    largest = max((size for size in sizes if size is not None and size < num_classes - 1), default=0)
    if node.TYPE == "DeepKD" and largest >= kept:
        # the classes beyond would have one logit, so which of them are the largest would be chance
        allowed = f"0, or above {largest}: DeepKD.MASK keeps so many classes beside the target"
        raise wrong(origin, "DISTILLER.LOGITS_K", kept, allowed)


def check_mask(cfg: CfgNode, origin: dict[str, str], num_classes: int) -> None:
    """Raise UserError if DeepKD.MASK does not fit a data set of `num_classes` classes."""
    mask = cfg.DeepKD.MASK
    used = {"static": ("K",), "dynamic": ("INITIAL", "OPTIMAL")}.get(mask.TYPE, ())
    sizes: dict[str, float] = {}
    if mask.TYPE == "top_p":
        sizes = {name: mask[name] for name in ("INITIAL", "OPTIMAL")}
        for name, share in sizes.items():
            if share >= 1:
                allowed = "a share of the teacher's non-target mass in (0, 1) with DeepKD.MASK.TYPE top_p"
                raise wrong(origin, f"DeepKD.MASK.{name}", share, allowed)
    for name in used:
        path = f"DeepKD.MASK.{name}"
        try:
            sizes[name] = count_classes(classes(mask[name]), num_classes)
        except ValueError as error:
            raise UserError(f"{origin.get(path, 'default')}: {path}: {error}") from None
    if mask.TYPE in GROWING and sizes["INITIAL"] > sizes["OPTIMAL"]:
        path = next((p for p in ("DeepKD.MASK.INITIAL", "DeepKD.MASK.OPTIMAL") if p in origin), "DeepKD.MASK.INITIAL")
        counted = [f" ({sizes[name]}{unit})" for name, unit in (("INITIAL", " classes"), ("OPTIMAL", ""))]
        first, second = counted if mask.TYPE == "dynamic" else ("", "")
        raise UserError(
            f"{origin.get(path, 'default')}: DeepKD.MASK.INITIAL is {mask.INITIAL}{first} and DeepKD.MASK.OPTIMAL "
            f"{mask.OPTIMAL}{second}; the mask must not shrink"
        )
