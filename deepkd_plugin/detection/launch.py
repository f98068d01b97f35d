"""From a config file to a trained detector: sets, networks, distiller, trainer (torchvision's models)."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from .. import config, device
from ..distributed import collectives, process_group
from ..hosts import builtin
from ..launch import announce, experiment_name, gains, read_words, run, show_sibling
from ..run import checkpoint, record
from ..run import folder as run_folder
from ..run.metrics import check_login
from ..terminal import guarded, spoken
from .average_precision import import_pycocotools
from .data import DETECTION_SETS, get_detection_sets
from .distillers import DISTILLERS, Detector
from .keys import DETECTION_KEYS
from .losses import BASES
from .networks import NETWORKS, network, trained_network, weights_file
from .trainer import TRAINERS, measure_teacher

TOOL = "tools/train_detection.py"
EVALUATION = {TOOL: "tools/eval_detection.py", "deepkd detect": "deepkd detect-eval"}
"""What tests a detector, by what has trained it."""
EXAMPLE = "detection/glyph_canvas/res20_res8/deepkd"


def main(argv: Sequence[str] | None = None, tool: str = TOOL) -> int:
    """`tools/train_detection.py` and `deepkd detect`: train the detector of a config. Returns the exit code."""
    return process_group.ended(lambda: guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv), tool)))


def _main(words: list[str], tool: str) -> None:
    with process_group.joined():
        args = read_words(words, tool, "Train a detector under a config.", EXAMPLE)
        train(**args, test=EVALUATION[tool])
        if not process_group.rank():
            show_sibling(args["file"], args["options"], tool, _planned)


def train(
    file: str, options: Sequence[str], resume: bool, overwrite: bool, command: str, test: str = EVALUATION[TOOL]
) -> None:
    """Check everything, then train. Nothing is written before the networks and the data are in place.

    test: the tool that tests what was trained, for the end.
    """
    cfg, origin = read_config(file, options)
    check_files(cfg)  # before images are read, which may take minutes
    check_login(cfg)
    import_pycocotools()  # now, because AP is first measured after an epoch
    name = experiment_name(cfg, options)
    folder = Path(cfg.LOG.PREFIX) / name
    device.tune(cfg.SOLVER.DETERMINISTIC)  # before CUDA starts
    process_group.take_card()
    resume, overwrite = run_folder.restarted(folder, resume, overwrite)
    with run_folder.held(folder, resume, overwrite):
        torch_device = device.pick()
        device.seed_everything(cfg.SOLVER.SEED)
        with collectives.in_turn():
            train_loader, test_loader, count, classes = get_detection_sets(cfg)
        config.check_mask(cfg, origin, len(classes) + 1)
        announce(name, cfg, count, torch_device)
        if DETECTION_SETS[cfg.DATASET.TYPE].pretrained and not cfg.DETECTION.STUDENT_BACKBONE:
            print("student   starts from random numbers: DETECTION.STUDENT_BACKBONE names no file")
        distiller = device.place(make_distiller(cfg, len(classes)), torch_device, False)
        source = origin.get("DISTILLER.TEACHER_WEIGHTS", "default")
        teacher_ap = measure_teacher(distiller, test_loader, cfg, source)
        trainer = TRAINERS[cfg.SOLVER.TRAINER](name, distiller, train_loader, test_loader, cfg)
        trainer.teacher_acc = teacher_ap
        result = run(trainer, resume, overwrite, command)
        if not process_group.rank():
            again = ["--cfg", file, "--ckpt", str(folder / "student_best"), *options]
            gained = gains(file, options, result, _planned)
            summarise(cfg, folder, teacher_ap, result, gained, shlex.join([*spoken(test), *again]))


def make_distiller(cfg: Any, num_classes: int) -> Detector:
    """Build the student and then the teacher, in this order, so that a seed gives one student for any teacher."""
    node = cfg.DETECTION
    student = network(cfg.DISTILLER.STUDENT, num_classes, node, node.STUDENT_BACKBONE)
    make = DISTILLERS[cfg.DISTILLER.TYPE]
    if cfg.DISTILLER.TYPE == "NONE":
        return make(student, cfg)
    weights, key = cfg.DISTILLER.TEACHER_WEIGHTS, "DISTILLER.TEACHER_WEIGHTS"
    return make(student, trained_network(cfg.DISTILLER.TEACHER, num_classes, node, weights, key), cfg)


def check_files(cfg: Any) -> None:
    """Raise UserError if a file that a config names for its networks is not there."""
    if cfg.DISTILLER.TYPE != "NONE":
        weights_file(cfg.DISTILLER.TEACHER, cfg.DISTILLER.TEACHER_WEIGHTS, "DISTILLER.TEACHER_WEIGHTS")
    if cfg.DETECTION.STUDENT_BACKBONE:
        checkpoint.there(cfg.DETECTION.STUDENT_BACKBONE, "DETECTION.STUDENT_BACKBONE")


def read_config(file: str, options: Sequence[str]) -> tuple[CfgNode, dict[str, str]]:
    """Merge a file and options into the built-in config tree with the node DETECTION; check and freeze it.

    Also returns where each value came from. Raises UserError for a mistake in them.
    """
    cfg = builtin.CFG.clone()
    config.add_deepkd_config(cfg)
    config.add_keys(cfg, DETECTION_KEYS)
    for key in config.CHOICES:
        config.set_default(cfg, key, False)
    origin = config.load(cfg, file, options)
    check(cfg, origin)
    cfg.freeze()
    return cfg, origin


def check(cfg: CfgNode, origin: dict[str, str]) -> None:
    """Raise UserError for the first value that is out of range or has no use in detection."""
    known = {
        "DATASET.TYPE": DETECTION_SETS,
        "DISTILLER.TYPE": DISTILLERS,
        "SOLVER.TRAINER": TRAINERS,
        "DISTILLER.STUDENT": NETWORKS,
    }
    if cfg.DISTILLER.TYPE != "NONE":
        known["DISTILLER.TEACHER"] = NETWORKS
    if cfg.DISTILLER.TYPE == "DeepKD":
        known["DeepKD.BASE"] = BASES
    for path, names in known.items():
        value = config.get(cfg, path)
        if value not in names:
            raise config.wrong(origin, path, value, f"one of {', '.join(names)} for detection")
    config.check(cfg, origin)
    config.check_keys(cfg, origin, DETECTION_KEYS)
    for path, only in ONLY.items():
        value = config.get(cfg, path)
        if config.compared(path, value) != only:
            raise config.wrong(origin, path, value, f"{only!r} for detection")
    if cfg.SOLVER.AMP == "float16":
        raise config.wrong(origin, "SOLVER.AMP", cfg.SOLVER.AMP, "True or False for detection")
    reason = DETECTION_SETS[cfg.DATASET.TYPE].no_mirror
    if reason and cfg.DETECTION.FLIP:
        allowed = f"0.0 for {cfg.DATASET.TYPE}: {reason}"
        raise config.wrong(origin, "DETECTION.FLIP", cfg.DETECTION.FLIP, allowed)
    if max(cfg.DETECTION.MIN_SIZE) > cfg.DETECTION.MAX_SIZE:
        allowed = f"at least the largest of DETECTION.MIN_SIZE, {max(cfg.DETECTION.MIN_SIZE)}"
        raise config.wrong(origin, "DETECTION.MAX_SIZE", cfg.DETECTION.MAX_SIZE, allowed)


ONLY = {
    "SOLVER.EXECUTION": "eager",
    "SOLVER.CHANNELS_LAST": False,
    "DISTILLER.FOLD_TEACHER": False,
    "SOLVER.DATA_PARALLEL": False,
    "SOLVER.ACCUMULATE": 1,
    "SOLVER.SYNC_BATCHNORM": False,
    "SOLVER.CHECKPOINT_MINUTES": 0.0,
    "SOLVER.WARMUP_EPOCHS": 0,
    "SOLVER.LABEL_SMOOTHING": 0.0,
    "AUGMENT.MIXUP": 0.0,
    "AUGMENT.CUTMIX": 0.0,
    "AUGMENT.RANDAUGMENT": "",
    "AUGMENT.ERASING": 0.0,
    "DATASET.PIPELINE": "workers",
    "DATASET.TRAIN_PER_CLASS": 0,
    "EXPERIMENT.LOGIT_STAND": False,
    "DISTILLER.ENTROPY_WEIGHT": "none",
    "DISTILLER.TEACHER_LOGITS": "compute",
    "DISTILLER.STUDENT_WEIGHTS": "",
    "DISTILLER.STUDENT_DROP_PATH": 0.0,
    "DISTILLER.TEACHER_INPUT.SIZE": 0,
    "DISTILLER.TEACHER_INPUT.MEAN": [],
    "DISTILLER.TEACHER_INPUT.STD": [],
    "DISTILLER.TEACHER_CLASSES": None,
    "DeepKD.FEATURE": "none",
    "DISTILLER.MORE_TEACHERS": [],
}
"""Keys that are for classification only, and their value here. (Warm-up is DETECTION.WARMUP_ITERATIONS.)"""


def summarise(cfg: Any, folder: Path, teacher_ap: float | None, result: dict[str, Any], gained: str, then: str) -> None:
    """Print the end of a run: how good it is, what it gained, its files, what to do next (then: the command)."""
    teacher = "none" if teacher_ap is None else f"{cfg.DISTILLER.TEACHER} AP {teacher_ap:.2f} %"
    minutes = record.read_run(folder)["minutes"]
    print(
        f"\nteacher   {teacher}\n"
        f"student   {cfg.DISTILLER.STUDENT}: AP best {result['best']:.2f} % (epoch {result['best_epoch']}), last "
        f"{result['last']:.2f} % (epoch {result['epochs']}), in {minutes:.1f} minutes\n"
        f"gain      {gained}\n"
        f"files     {folder}/ (student_best, student_latest, metrics.jsonl with AP50 and AP75, train.events)\n"
        f"next      {then}"
    )


def _planned(file: str, options: Sequence[str]) -> tuple[Any, Path]:
    cfg = read_config(file, options)[0]
    check_files(cfg)
    return cfg, Path(cfg.LOG.PREFIX) / experiment_name(cfg, options)


if __name__ == "__main__":
    sys.exit(main())
