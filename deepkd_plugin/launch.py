"""From a config file to a trained student: loaders, networks, distiller, trainer."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from . import checkpoint, config, device, record
from .errors import UserError
from .registry import BUILTIN, Host, register
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


class Parser(argparse.ArgumentParser):
    """Tells of a mistake in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see {self.prog} --help")


def guarded(work: Callable[[], None]) -> int:
    """Run a command; a UserError becomes one line on stderr and exit code 2, an interruption 130 or 143."""
    try:
        with _terminable():
            work()
    except UserError as error:
        print(f"deepkd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        # SIGTERM comes with its exit code, the trainer's interruption with what is left of the run as well
        code, message = (*interruption.args, 130, "interrupted; the same command starts again")[:2]
        if len(interruption.args) == 1:
            message = "interrupted; the same command starts again"
        print(f"deepkd: {message}", file=sys.stderr)
        return code
    return 0


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
        code = interruption.args[0] if interruption.args else 130
        again = (
            f"Resume with: {command} --resume"
            if trainer.epoch
            else f"Start again with: {command} --overwrite"
        )
        message = f"interrupted in epoch {trainer.epoch + 1}. {trainer.resume_point()} {again}"
        raise KeyboardInterrupt(code, message) from None
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


def network(host: Host, dataset: str, name: str, num_classes: int) -> nn.Module:
    """A fresh network of the host's zoo."""
    make = host.models(dataset)[name]
    return make(pretrained=False) if dataset == "imagenet" else make[0](num_classes=num_classes)


def trained_network(
    host: Host, dataset: str, name: str, num_classes: int, weights: str, key: str
) -> nn.Module:
    """A network with weights: a file, one that the package ships (builtin:NAME), or the zoo's own ("").

    `key` is the config key or option that gave `weights`, for errors.
    """
    path = weights_file(host, dataset, name, weights)
    if not path and dataset == "imagenet":
        try:
            return host.models(dataset)[name](pretrained=True).requires_grad_(False)
        except OSError as error:
            raise UserError(
                f"{key} names no file and torchvision's weights of {name} cannot be fetched ({error}); name a file"
            ) from None
    if not path:
        raise UserError(
            f"{key} names no file and the zoo has no weights of {name}; it must name a checkpoint"
        )
    made = network(host, dataset, name, num_classes)
    checkpoint.load_weights(made, path, key, name)
    return made.requires_grad_(False)


def weights_file(host: Host, dataset: str, name: str, weights: str) -> str:
    """The file that `weights` means, as in trained_network; "" where torchvision provides them or nobody does."""
    if weights.startswith("builtin:"):
        shipped = files("deepkd_plugin.builtin").joinpath("weights")
        return str(shipped.joinpath(weights.removeprefix("builtin:") + ".pt"))
    if weights or dataset == "imagenet":
        return weights
    return host.models(dataset)[name][1] or ""


def sibling(file: str) -> str:
    """The command that trains the same pair with another method, for the end of a run."""
    others = sorted(p.name for p in Path(file).parent.glob("*.yaml") if p.name != Path(file).name)
    preferred = [name for name in ("kd.yaml", "dkd.yaml") if name in others] or others
    return f"python tools/train.py --cfg {Path(file).parent / (preferred or [Path(file).name])[0]}"


class Alone(nn.Module):
    """A network under the protocol of `evaluate`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image)[0]


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, with the exit code that shells expect of it."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
