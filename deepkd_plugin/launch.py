"""From a config file to a trained student: loaders, networks, distiller, trainer."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint, config, device, record
from .errors import UserError
from .networks import Alone, network, trained_network
from .registry import BUILTIN, Host, register
from .terminal import Parser, Stopped, exit_code, guarded
from .trainer import evaluate


def main(argv: Sequence[str] | None = None) -> int:
    """`tools/train.py`: train the student of a config. Returns the exit code (2: a mistake of the user)."""
    return guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(words: list[str]) -> None:
    parser = Parser("tools/train.py", description="Train a student under a config.")
    parser.add_argument(
        "--cfg", required=True, metavar="FILE", help="for example configs/glyphs100/res20_res8/kd.yaml"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    how.add_argument("--overwrite", action="store_true", help="start again where a run already lies")
    parser.epilog = "Any number of KEY VALUE pairs sets config keys, after the file's."
    # argparse takes a value such as -7.5e-2 for an option, so the pairs are kept from it
    flags, options = [], []
    for i, word in enumerate(words):
        named = word.startswith("--") or word == "-h" or (i > 0 and words[i - 1] == "--cfg")
        (flags if named else options).append(word)
    args = parser.parse_args(flags)
    command = shlex.join(["python", "tools/train.py", "--cfg", args.cfg, *options])
    train(args.cfg, options, args.resume, args.overwrite, command)


def train(file: str, options: Sequence[str], resume: bool, overwrite: bool, command: str) -> None:
    """Check everything, then train; nothing is written before the networks and the data are in place."""
    host = BUILTIN
    cfg, origin = read_config(host, file, options)
    name = experiment_name(cfg, options)
    folder = Path(cfg.LOG.PREFIX) / name
    if resume and not (folder / "latest").is_file():
        raise UserError(
            f"{folder}: --resume finds no checkpoint 'latest' there; leave it out to start the run"
        )
    if not resume and not overwrite and (folder / "run.json").exists():
        raise UserError(
            f"{folder}: holds a run already; go on with --resume, start again with --overwrite, or set "
            f"EXPERIMENT.NAME"
        )
    at = device.pick()
    device.seed_everything(cfg.SOLVER.SEED)
    train_loader, val_loader, num_data, num_classes = host.get_dataset(cfg)
    config.check_mask(cfg, origin, num_classes)
    student = network(host, cfg.DATASET.TYPE, cfg.DISTILLER.STUDENT, num_classes)
    make = host.distillers[cfg.DISTILLER.TYPE]
    if cfg.DISTILLER.TYPE == "NONE":
        distiller, teacher_acc = make(student), None
    else:
        teacher, teacher_acc = tested_teacher(host, cfg, origin, at, val_loader, num_classes)
        distiller = make(student, teacher, cfg)
    distiller = device.place(distiller, at, cfg.SOLVER.CHANNELS_LAST)
    teacher_line = "none" if teacher_acc is None else f"{cfg.DISTILLER.TEACHER} {teacher_acc:.2f} % top-1"
    print(f"{name}: {cfg.DISTILLER.TYPE} on {cfg.DATASET.TYPE}, {num_data} images, {device.describe(at)}")
    print(f"teacher {teacher_line}")
    trainer = host.trainers[cfg.SOLVER.TRAINER](name, distiller, train_loader, val_loader, cfg)
    trainer.rehearse()
    if resume:
        trainer.load(folder / "latest")
    if trainer.epoch == cfg.SOLVER.EPOCHS:
        raise UserError(
            f"{folder}: --resume finds all {trainer.epoch} epochs done; the results are in run.json there"
        )
    record.prepare_folder(folder, cfg, at, command, resume, trainer.teacher, teacher_acc)
    started = time.perf_counter()
    try:
        result = trainer.train()
    except KeyboardInterrupt as interruption:
        record.add_minutes(folder, (time.perf_counter() - started) / 60)
        again = (
            f"Resume with: {command} --resume"
            if trainer.epoch
            else f"Start again with: {command} --overwrite"
        )
        message = f"interrupted in epoch {trainer.epoch + 1}. {trainer.resume_point()} {again}"
        raise Stopped(message, exit_code(interruption)) from None
    with checkpoint.uninterrupted():
        minutes = record.add_minutes(folder, (time.perf_counter() - started) / 60)
        record.note(folder, {"result": result, "finished": True})
    root = "" if cfg.DATASET.ROOT == "./data" else f" --root {shlex.quote(cfg.DATASET.ROOT)}"
    student_file = shlex.quote(str(folder / "student_best"))
    print(
        f"\nteacher   {teacher_line}\n"
        f"student   {cfg.DISTILLER.STUDENT}: best {result['best']:.2f} % (epoch {result['best_epoch']}), last "
        f"{result['last']:.2f} % (epoch {result['epochs']}), in {minutes:.1f} minutes\n"
        f"files     {folder}/ (student_best, student_latest, metrics.jsonl, train.events)\n"
        f"next      python tools/eval.py -m {cfg.DISTILLER.STUDENT} -c {student_file} -d {cfg.DATASET.TYPE}{root}\n"
        f"          {sibling(file)}"
    )


def read_config(host: Host, file: str, options: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """The host's config tree with a file and options merged, checked and frozen, and its values' origins."""
    register(host)
    cfg = host.cfg.clone()
    origin = config.load(cfg, file, options)
    cfg.LOG.WANDB = False  # this trainer writes TensorBoard events and metrics.jsonl, and no W&B
    config.check(cfg, origin)
    models = host.models(cfg.DATASET.TYPE)
    known = [
        ("DISTILLER.TYPE", host.distillers),
        ("SOLVER.TRAINER", host.trainers),
        ("DISTILLER.STUDENT", models),
    ]
    if cfg.DISTILLER.TYPE != "NONE":
        known.append(("DISTILLER.TEACHER", models))
    for path, names in known:
        if config.get(cfg, path) not in names:
            raise config.wrong(origin, path, config.get(cfg, path), f"one of {', '.join(names)}")
    cfg.freeze()
    return cfg, origin


def experiment_name(cfg: Any, options: Sequence[str] = ()) -> str:
    """PROJECT/NAME, or PROJECT/TAG with the options that change what is computed, as mdistiller names runs."""
    pairs = [
        f"{key}:{value}".replace("/", "_")
        for key, value in zip(options[::2], options[1::2])
        if config.computes(key)
    ]
    name = cfg.EXPERIMENT.NAME or ",".join([cfg.EXPERIMENT.TAG, *pairs])
    return f"{cfg.EXPERIMENT.PROJECT}/{name}"


def tested_teacher(
    host: Host, cfg: Any, origin: dict[str, str], at: Any, val_loader: Any, num_classes: int
) -> tuple[nn.Module, float]:
    """The teacher in place and its top-1 on the test images; UserError where that is no better than chance."""
    key = "DISTILLER.TEACHER_WEIGHTS"
    name, weights = cfg.DISTILLER.TEACHER, cfg.DISTILLER.TEACHER_WEIGHTS
    teacher = trained_network(host, cfg.DATASET.TYPE, name, num_classes, weights, key)
    teacher = device.place(teacher, at, cfg.SOLVER.CHANNELS_LAST)
    accuracy = evaluate(Alone(teacher), val_loader, at, cfg.SOLVER)["test_acc"]
    if accuracy < 2 * 100.0 / num_classes:
        raise UserError(
            f"{origin.get(key, 'default')}: the teacher {name} from {key} is at chance on {cfg.DATASET.TYPE} "
            f"({accuracy:.2f} % top-1); it must be trained on this data set"
        )
    return teacher, accuracy


def sibling(file: str) -> str:
    """The command that trains the same pair with another method, for the end of a run."""
    others = sorted(p.name for p in Path(file).parent.glob("*.yaml") if p.name != Path(file).name)
    preferred = [name for name in ("kd.yaml", "dkd.yaml") if name in others] or others
    return f"python tools/train.py --cfg {Path(file).parent / (preferred or [Path(file).name])[0]}"
