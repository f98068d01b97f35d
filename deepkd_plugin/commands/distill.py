"""`deepkd distill` and `deepkd init`: from a folder of images to a student that a teacher has taught."""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .. import config, data, extensions, launch
from ..config import file as config_file
from ..config import theirs
from ..data.folders import ImageFiles, is_image, visible_files
from ..distributed.environment import one_process
from ..errors import UserError
from ..hosts.libraries import FORMS
from ..hosts.registry import find_host
from ..run import checkpoint, record
from ..run.metrics import check_login
from ..study.kinds import KINDS
from ..study.shared import busy, cores, duration, entry
from ..study.table import CLASSIFICATION
from ..terminal import Parser, Stopped, count, guarded, spoken

DELTAS = {"TOG": 0.075, "TCG": -0.075, "NCG": 0.075}
"""Of SOLVER.DECOUPLED.DELTA: the paper's."""

METHODS: dict[str, dict[str, Any]] = {
    "kd": {"DISTILLER.TYPE": "KD", "KD.LOSS.CE_WEIGHT": 0.1, "KD.LOSS.KD_WEIGHT": 0.9, "KD.TEMPERATURE": 4},
    "dkd": {"DISTILLER.TYPE": "DKD", "DKD.CE_WEIGHT": 1.0, "DKD.ALPHA": 1.0, "DKD.BETA": 8.0, "DKD.T": 4.0},
    "deepkd": {
        **{"DISTILLER.TYPE": "DeepKD", "DeepKD.BASE": "KD", "DeepKD.CE_WEIGHT": 0.1, "DeepKD.TCG_WEIGHT": 0.9},
        **{"DeepKD.NCG_WEIGHT": 0.9, "DeepKD.TEMPERATURE": 4.0, "DeepKD.MASK.TYPE": "dynamic"},
    },
    "deepkd_dkd": {
        **{"DISTILLER.TYPE": "DeepKD", "DeepKD.BASE": "DKD", "DeepKD.CE_WEIGHT": 1.0, "DeepKD.TCG_WEIGHT": 1.0},
        **{"DeepKD.NCG_WEIGHT": 8.0, "DeepKD.TEMPERATURE": 4.0, "DeepKD.MASK.TYPE": "dynamic"},
    },
}
"""What a config says of each method, with the loss weights of most of configs/cifar100/."""

FLAGS = {
    **{"DISTILLER.STUDENT": "--student", "DISTILLER.TEACHER": "--teacher", "DATASET.ROOT": "--images"},
    **{"DISTILLER.TEACHER_WEIGHTS": "--teacher-weights", "DATASET.HOLDOUT": "--holdout", "INPUT.SIZE": "--size"},
    **{"SOLVER.BATCH_SIZE": "--batch", "SOLVER.EPOCHS": "--epochs"},
}
"""Config keys, and what sets them on the command line."""

NAMED = 10
"""How many damaged images an error names."""

TEACHER, ALONE = "teacher", "alone"
"""Names of the runs beside the method's."""


class Planned(NamedTuple):
    """One run: its config's file and what the config sets."""

    name: str
    file: Path
    settings: dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What the command line asks for; the words of the options of the same names."""

    images: Path
    student: str
    teacher: str
    train_teacher: bool
    weights: str
    method: str
    compare: bool
    epochs: int
    batch: int
    size: int
    holdout: float
    out: Path

    def planned(self) -> list[Planned]:
        """List the runs, in the order in which they are to be trained."""
        names = [TEACHER] * self.train_teacher + [self.method] + [ALONE] * self.compare
        return [Planned(name, self.out / f"{name}.yaml", self.settings(name)) for name in names]

    def settings(self, name: str) -> dict[str, Any]:
        """Return the keys that a run's config sets, and their values."""
        taught = name == self.method
        decoupled = taught and name.startswith("deepkd")
        parts = {"DISTILLER.TYPE": "NONE"} | (METHODS[name] if taught else {})
        networks = {"DISTILLER.STUDENT": self.teacher if name == TEACHER else self.student}
        if taught:
            trained = self.out / TEACHER / "student_best"
            networks |= {"DISTILLER.TEACHER": self.teacher}
            networks |= {"DISTILLER.TEACHER_WEIGHTS": str(trained) if self.train_teacher else self.weights}
        return {
            **{"EXPERIMENT.PROJECT": self.out.name, "EXPERIMENT.NAME": name, "LOG.PREFIX": str(self.out.parent)},
            **{"DATASET.TYPE": "folder", "DATASET.ROOT": str(self.images), "DATASET.HOLDOUT": self.holdout},
            **{"INPUT.SIZE": self.size, "DISTILLER.TYPE": parts.pop("DISTILLER.TYPE"), **networks},
            **{"SOLVER.TRAINER": config.TRAINER if decoupled else "base", "SOLVER.BATCH_SIZE": self.batch},
            **{"SOLVER.EPOCHS": self.epochs, "SOLVER.LR": 0.05, "SOLVER.LR_SCHEDULE": "cosine"},
            **{"SOLVER.WARMUP_EPOCHS": self.epochs // 20, "SOLVER.WEIGHT_DECAY": 5e-4},
            **({f"SOLVER.DECOUPLED.DELTA.{stream}": delta for stream, delta in DELTAS.items()} if decoupled else {}),
            **parts,
        }


def main(words: Sequence[str], only_write: bool = False) -> int:
    """Run the command; returns its exit code. only_write: as `deepkd init`."""
    name = "init" if only_write else "distill"
    does = (
        "Write the configs that `deepkd distill` trains under."
        if only_write
        else (
            "Train a student on a folder of images, taught by a teacher that is trained first or has weights. The same "
            "command goes on after an interruption."
        )
    )
    again = shlex.join([*spoken(f"deepkd {name}"), *(word for word in words if word != "--overwrite")])
    return guarded(lambda: _distill(_arguments(words, name, does), only_write, again))


def _arguments(words: Sequence[str], name: str, description: str) -> argparse.Namespace:
    small = "--images pictures --student resnet8 --train-teacher resnet20"
    large = "--images pictures --student timm:mobilenetv3_small_100 --teacher torchvision:resnet34 --epochs 30"
    parser = Parser(f"deepkd {name}", description=description, examples=(f"{small} --compare", large))
    add = parser.add_argument
    add("--images", metavar="DIR", type=Path, required=True, help="{train,val}/<class>/*, or <class>/*")
    add("--student", metavar="NAME", required=True, help=f"the network to train, for example resnet8, or {FORMS}")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--teacher", metavar="NAME", help="a network with weights: its library's, or --teacher-weights")
    who.add_argument("--train-teacher", metavar="NAME", help="a network that is trained on the images first")
    add("--teacher-weights", metavar="FILE", default="", help="a file of weights for --teacher")
    add("--method", choices=METHODS, default="deepkd", help="default: deepkd")
    add("--compare", action="store_true", help="train the student alone too, and say what the teacher gained")
    add("--epochs", metavar="N", type=count, default=100, help="of each run (default: 100)")
    add("--batch", metavar="N", type=count, default=64, help="images in a step (default: 64)")
    add("--size", metavar="N", type=count, help="pixels of a side (default: 224, or 32 for the zoo's networks)")
    add("--holdout", metavar="SHARE", type=float, help="of each class, tested on (default: 0.2 if nothing else is)")
    add("--out", metavar="DIR", type=Path, help="folder of configs and runs (default: output/<name of DIR>)")
    add("--overwrite", action="store_true", help="write configs and train anew what is there")
    parser.add_pairs()
    args = parser.parse(words)
    if args.teacher_weights and args.teacher is None:
        parser.error("--teacher-weights goes with --teacher")
    return args


def _distill(args: argparse.Namespace, only_write: bool, again: str) -> None:
    """Write the configs, show the plan and train. again: the command, for whoever interrupts it."""
    one_process()
    request = _request(args)
    planned, cfgs = request.planned(), {}
    for one in sorted(planned, key=lambda one: one.name != request.method):
        if one.name == ALONE:  # it sees the images that the taught student sees
            one.settings.update({"INPUT.MEAN": list(cfgs[request.method].INPUT.MEAN)})
            one.settings.update({"INPUT.STD": list(cfgs[request.method].INPUT.STD)})
        with _by_flag(request, one, args.options):
            cfgs[one.name] = _checked(one, args.options)
            if not request.train_teacher:
                launch.check_files(find_host(), cfgs[one.name])
            if not only_write:
                check_login(cfgs[one.name])
    with _by_flag(request, next(one for one in planned if one.name == request.method), args.options):
        source = data.source(cfgs[request.method])
        counts = source.images(cfgs[request.method])
        _check_images(source, cfgs[request.method].DATASET)
    _write(planned, args.options, args.overwrite)
    _show(request, planned, cfgs, source.num_classes, counts)
    if only_write:
        print("next      " + "\n          ".join(_command(one.file) for one in planned))
        return
    try:
        for one in planned:
            with _by_flag(request, one, args.options):
                _train(one, args.overwrite)
    except Stopped as stopped:
        raise Stopped(f"{stopped}\ndeepkd: or go on with all runs: {again}", stopped.code) from None
    _summarise(request, planned)


@contextlib.contextmanager
def _by_flag(request: Request, one: Planned, options: Sequence[str]) -> Iterator[None]:
    """Let an error name the flag that was typed, and not the key that a run's config makes of it."""
    try:
        yield
    except UserError as error:
        flags = dict(FLAGS)
        if request.train_teacher:
            trained = "--train-teacher"
            # its file is one that the command itself writes
            flags |= {"DISTILLER.STUDENT" if one.name == TEACHER else "DISTILLER.TEACHER": trained}
            del flags["DISTILLER.TEACHER_WEIGHTS"]
        text = str(error)
        for key, flag in flags.items():
            if key not in options:
                text = re.sub(rf"(?<![\w.]){re.escape(key)}(?!\w|\.\w)", flag, text)
        if text == str(error):
            raise
        raise UserError(text.replace(f"{one.file}: --", "command line: --", 1)) from None


def _check_images(source: data.Source, node: Any) -> None:
    """Raise UserError that names the images which cannot be opened, before any training would meet the first."""
    names: list[str] = []
    for split in ("train", "test")[: 1 + (not node.HOLDOUT)]:
        images = source.load(node, split)
        names += images.damaged() if isinstance(images, ImageFiles) else []
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        said = ", ".join(name.removeprefix(f"{node.ROOT}/") for name in names[:NAMED])
        one = len(names) == 1
        raise UserError(
            f"{node.ROOT}: DATASET.ROOT has {len(names)} {'image' if one else 'images'} that cannot be read: "
            f"{said}{more}; {'it' if one else 'they'} must be whole, or be taken out of the folder"
        )


def _request(args: argparse.Namespace) -> Request:
    images = args.images
    if not images.is_dir():
        raise UserError(f"command line: --images is {str(images)!r}; it must be a folder of images")
    small = all(":" not in name for name in (args.student, args.teacher or args.train_teacher))
    holdout = args.holdout
    if holdout is None:
        holdout = 0.0 if (images / "train").is_dir() else 0.2
    return Request(
        images.resolve(),
        args.student,
        args.teacher or args.train_teacher,
        args.train_teacher is not None,
        str(Path(args.teacher_weights).expanduser().resolve()) if args.teacher_weights else "",
        args.method,
        args.compare,
        args.epochs,
        args.batch,
        args.size or (32 if small else 224),
        holdout,
        (args.out or Path("output") / images.resolve().name).resolve(),
    )


def _checked(one: Planned, options: Sequence[str]) -> Any:
    """Check a run's config as training does, before its file is written; returns it."""
    host = find_host()
    launch.register(host)
    cfg = host.cfg.clone()
    cfg.DATASET.ROOT, cfg.DATASET.DOWNLOAD = "./data", False
    origin = config.merge(cfg, _nested(one.settings), str(one.file), options)
    host.check(cfg, origin)
    cfg.freeze()
    return cfg


def _write(planned: Sequence[Planned], options: Sequence[str], overwrite: bool) -> None:
    """Write the configs that are not there; UserError for one that says something else than this call."""
    for one in planned:
        tree: dict[str, Any] = dict(one.settings)
        for key, text in zip(options[::2], options[1::2]):
            tree[key] = yaml.safe_load(text)
        text = commented(tree)
        if one.file.exists() and not overwrite and config_file.read(one.file) != yaml.safe_load(text):
            raise UserError(
                f"{one.file}: is of another plan; this one needs --overwrite, another --out, or the options of before"
            )
    for one in planned:
        one.file.parent.mkdir(parents=True, exist_ok=True)
        tree = dict(one.settings) | {key: yaml.safe_load(text) for key, text in zip(options[::2], options[1::2])}
        checkpoint.write_text(one.file, commented(tree))


def commented(settings: Mapping[str, Any]) -> str:
    """Write a config as YAML, with the meaning of each key that the package adds beside it."""
    meanings = theirs.MEANINGS | {key.path: key.meaning for key in (*config.HOST_KEYS, *config.all_keys())}
    return "\n".join(_lines(_nested(settings), meanings)) + "\n"


def _lines(tree: Mapping[str, Any], meanings: Mapping[str, str], path: str = "", indent: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield f"{indent}{key}:"
            yield from _lines(value, meanings, f"{path}{key}.", indent + "  ")
            continue
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n")
        meaning = meanings.get(path + key)
        comment = f" # {meaning.split(';')[0]}" if meaning else ""
        yield f"{indent}{key}: {text.strip()}{comment}"


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make of dotted keys the tree that a config file holds."""
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        config_file.put(tree, path, value)
    return tree


def _show(
    request: Request, planned: Sequence[Planned], cfgs: Mapping[str, Any], classes: int, counts: tuple[int, int]
) -> None:
    """Print the plan; counts: of images to train on and to test on."""
    train, tested = counts
    weights = "trained first" if request.train_teacher else request.weights or "its library's weights"
    disturbed = busy()
    timed = KINDS[CLASSIFICATION].seconds([cfgs[one.name] for one in planned], cores(), [1] * len(planned))
    files = ", ".join(one.file.name for one in planned)
    entries = {
        "images": f"{classes} classes, {train} to train on, {tested} to test on, in {request.images}",
        "teacher": f"{request.teacher}, {weights}",
        "student": f"{request.student}, by {request.method}{', and alone' if request.compare else ''}",
        "runs": f"{len(planned)} of {cfgs[request.method].SOLVER.EPOCHS} epochs, about {duration(sum(timed))} here, "
        f"timed on noise; reading images comes on top",
        "busy": disturbed,
        "configs": f"{files} in {request.out}",
    }
    print("\n".join(entry(name, text) for name, text in entries.items() if text))


def _train(one: Planned, overwrite: bool) -> None:
    """Train one run, go on with it, or leave it if it is finished."""
    folder = one.file.with_suffix("")
    begun = not overwrite and (folder / "latest").is_file()
    run = record.find_run(folder)
    if begun and run.get("finished"):
        print(f"\n{one.name}: finished before")
        return
    overwrite = overwrite or (bool(run) and not begun)  # an interrupted first epoch leaves nothing to go on from
    print(f"\n== {one.name}")
    launch.train(str(one.file), [], resume=begun, overwrite=overwrite, command=_command(one.file))


def _command(file: Path) -> str:
    return shlex.join([*spoken("deepkd train"), "--cfg", str(file)])


def _summarise(request: Request, planned: Sequence[Planned]) -> None:
    """Print what the student became, and by how much the teacher helped."""
    results = {one.name: record.read_run(one.file.with_suffix(""))["result"] for one in planned}
    taught = results[request.method]
    print(
        f"\nstudent   {request.student} by {request.method}: last {taught['last']:.2f} %, best {taught['best']:.2f} %"
    )
    if request.compare:
        alone = results[ALONE]
        print(
            f"alone     last {alone['last']:.2f} %, best {alone['best']:.2f} %\n"
            f"gain      {taught['last'] - alone['last']:+.2f} points in the last epoch, "
            f"{taught['best'] - alone['best']:+.2f} in the best; one seed, so chance is in it (SOLVER.SEED 1, --out …)"
        )
    image = next(visible for visible in visible_files(request.images) if is_image(visible))
    trust = ["--trust"] if extensions.asked_by(request.student) else []
    print(f"next      {shlex.join([*spoken('deepkd predict'), str(request.out / request.method), str(image), *trust])}")
