"""From a config file to a trained student: loaders, networks, distiller, trainer."""

import contextlib
import hashlib
import io
import json
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from . import config, data, device, extensions
from .accuracy import measure_teacher
from .config import file as config_file
from .config.shipped import find_config
from .distributed import collectives, process_group
from .errors import UserError
from .hosts.host import Host
from .hosts.mdistiller import check_trainer
from .hosts.networks import check_files, settle_features, student_network, teacher_network
from .hosts.registry import find_host, register
from .rules import LONGEST_NAME
from .run import folder as run_folder
from .run import record
from .run.metrics import check_login, weights_and_biases
from .terminal import Parser, Stopped, check_interruption, exit_code, guarded, open_streams, spoken, used_up, version
from .trainer import Trainer

EXAMPLE = "glyphs100/res20_res8/deepkd"


def main(argv: Sequence[str] | None = None, tool: str = "tools/train.py") -> int:
    """`tools/train.py` and `deepkd train`: train the student of a config. Returns the exit code (2: a mistake)."""
    return process_group.ended(lambda: guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv), tool)))


def _main(words: list[str], tool: str) -> None:
    with process_group.joined():
        args = read_words(words, tool, "Train a student under a config.", EXAMPLE)
        train(**args)
        if not process_group.rank():
            show_sibling(args["file"], args["options"], tool, _planned)


def read_words(words: Sequence[str], tool: str, description: str, example: str) -> dict[str, Any]:
    """Read the arguments of `train` from the command line of `tool`."""
    parser = Parser(
        tool, description=description, examples=(f"--cfg {example}", f"--cfg {example} SOLVER.EPOCHS 2 SOLVER.SEED 1")
    )
    parser.add_argument(
        "--cfg", dest="file", required=True, metavar="FILE", help="a YAML file, or a name of `deepkd configs`"
    )
    parser.add_run()
    args = parser.parse(words)
    args.file = find_config(args.file)
    return vars(args) | {"command": shlex.join([*process_group.command(tool), "--cfg", args.file, *args.options])}


def train(file: str, options: Sequence[str], resume: bool, overwrite: bool, command: str) -> Path:
    """Check everything, then train; nothing is written before the networks and the data are in place.

    Returns the run's folder.
    """
    host = find_host()
    cfg, origin = read_config(host, file, options)
    name = experiment_name(cfg, options)
    folder = Path(cfg.LOG.PREFIX) / name
    make = trainers(host)[cfg.SOLVER.TRAINER]
    device.tune(cfg.SOLVER.DETERMINISTIC)  # before CUDA starts
    process_group.take_card()
    resume, overwrite = run_folder.restarted(folder, resume, overwrite)
    with run_folder.held(folder, resume, overwrite, record_needed=issubclass(make, Trainer)):
        check_files(host, cfg)  # before images are read, which may take minutes
        check_login(cfg)
        target_device = device.pick()
        device.seed_everything(cfg.SOLVER.SEED)
        with collectives.in_turn():
            train_loader, val_loader, num_data, num_classes = data.get_dataset(cfg)
        announce(name, cfg, num_data, target_device)
        distiller = make_distiller(host, cfg, num_data, num_classes)
        distiller = device.place(distiller, target_device, cfg.SOLVER.CHANNELS_LAST)
        if not issubclass(make, Trainer):
            # it tests the teacher itself (see hosts/mdistiller.py), and leaves mdistiller's files
            if cfg.LOG.WANDB:
                weights_and_biases(folder, cfg)
            parallel = device.parallel(distiller, cfg.SOLVER.DATA_PARALLEL, always=True)
            make(name, parallel, train_loader, val_loader, cfg).train(resume=resume)
            return folder
        source = origin.get("DISTILLER.TEACHER_WEIGHTS", "default")
        teacher_acc = measure_teacher(distiller, val_loader, cfg, source)
        if process_group.size() == 1:
            distiller = device.parallel(distiller, cfg.SOLVER.DATA_PARALLEL)
        trainer = make(name, distiller, train_loader, val_loader, cfg)
        trainer.teacher_acc = teacher_acc
        result = run(trainer, resume, overwrite, command)
        if not process_group.rank():
            gained = gains(file, options, result, _planned)
            summarise(cfg, folder, teacher_acc, result, gained)
        return folder


class Result(NamedTuple):
    """What a run came to: top-1 on the test images in percent, and where its files are."""

    best: float
    last: float
    folder: Path


def train_from_python(file: str, resume: bool, overwrite: bool, sections: Mapping[str, Any]) -> Result:
    """Train under a config, as deepkd_plugin.train says; sections: of the config, nested as there."""
    open_streams()
    options = [word for path, value in config.flatten(dict(sections)).items() for word in (path, str(value))]
    path = find_config(file)
    command = shlex.join(["deepkd", "train", "--cfg", path, *options])
    folder = train(path, options, resume, overwrite, command)
    result = record.read_run(folder)["result"]
    return Result(result["best"], result["last"], folder)


def _let_loaders_end() -> None:
    """Hear no more of a loader's processes that end: torch raises for each of them, wherever Python is just then.

    A signal to the whole group, as torchrun sends it, ends them while this process says what is left of its run.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def run(trainer: Trainer, resume: bool, overwrite: bool, command: str) -> dict[str, Any]:
    """Train; whatever ends it from outside is told with what is left of the run and the command that goes on.

    Raises Stopped if it is interrupted or a loader's process was killed, and UserError if something is used up.
    """
    try:
        return trainer.train(resume, overwrite, command)
    except (KeyboardInterrupt, Exception) as error:
        _let_loaders_end()
        if isinstance(error, UserError):
            raise
        again = f"Start again with: {command} --overwrite"
        if trainer.has_checkpoint:
            again = f"Resume with: {command} --resume"
        left = f"{trainer.resume_point()} {again}"
        # torch raises it wherever Python is just then, and what is interrupted by it may raise an error of its own
        killed = next((str(one) for one in chain(error) if "DataLoader worker" in str(one)), None)
        try:
            if killed:
                time.sleep(0.5)  # a signal to the whole group ends a loader's processes first
            check_interruption()
        except KeyboardInterrupt as interruption:
            error = interruption
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(f"interrupted in epoch {trainer.epoch + 1}. {left}", exit_code(error)) from None
        if killed:
            workers = f"DATASET.NUM_WORKERS {trainer.cfg.DATASET.NUM_WORKERS}"
            reason = killed.splitlines()[0].strip().rstrip(".")
            message = f"{reason}; if memory was short, here or in /dev/shm, {workers} must be lower. {left}"
            raise Stopped(message, 1) from None
        if isinstance(error, collectives.Lost):
            raise Stopped(f"{error}. {left}", error.code) from None
        refused = used_up(error)
        if refused is None:
            raise
        raise UserError(f"{refused}. {left}") from None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised over."""
    while error is not None:
        yield error
        error = error.__context__


def make_distiller(host: Host, cfg: Any, num_data: int, num_classes: int) -> nn.Module:
    """Make the student, first, so that a seed gives one student whatever the teacher is; then the teacher."""
    student = student_network(host, cfg, num_classes)
    teacher = () if cfg.DISTILLER.TYPE == "NONE" else (teacher_network(host, cfg, num_classes),)
    return put_together(host, cfg, (student, *teacher), num_data)


def put_together(host: Host, cfg: Any, networks: Sequence[nn.Module], num_data: int) -> nn.Module:
    """Make a config's distiller of student and teacher, or of the student alone; num_data: of training images."""
    make = host.distiller(cfg)
    if cfg.DISTILLER.TYPE == "NONE":
        return make(*networks)
    settle_features(cfg, networks)
    rest = (num_data,) if cfg.DISTILLER.TYPE == "CRD" or config.feature(cfg) == "CRD" else ()
    return make(*networks, cfg, *rest)


def trainers(host: Host) -> dict[str, Any]:
    """Return the host's trainers, with ours for "base": the same protocol, and a run's whole record."""
    return host.trainers | {"base": Trainer}


def read_config(host: Host, file: str, options: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """Read a config into the host's tree, check and freeze it; returns it and where its values came from."""
    register(host)
    cfg = host.cfg.clone()
    # the same on every host, whatever folder mdistiller has its data in
    cfg.DATASET.ROOT, cfg.DATASET.DOWNLOAD = "./data", False
    origin = config.load(cfg, file, options)
    host.check(cfg, origin)
    make = trainers(host)[cfg.SOLVER.TRAINER]
    check_trainer(cfg, origin, make)
    if process_group.size() > 1 and not issubclass(make, Trainer):
        allowed = f"{', '.join(config.TRAINERS)} or base in {process_group.size()} processes: it is mdistiller's"
        raise config.wrong(origin, "SOLVER.TRAINER", cfg.SOLVER.TRAINER, allowed)
    cfg.freeze()
    return cfg, origin


def experiment_name(cfg: Any, options: Sequence[str] = ()) -> str:
    """Name a run: PROJECT/NAME, or PROJECT/TAG, with a hash of the options that change what is computed.

    The hash is of the values that these keys have in the config, whatever their order, and of the tag. The options
    themselves are in config.yaml. (mdistiller writes them into the name, which soon is longer than a name can be.)
    """
    node = cfg.EXPERIMENT
    given = {key: config.compared(key, config.get(cfg, key)) for key in options[::2] if config.computes(key)}
    if node.NAME or not given:
        return f"{node.PROJECT}/{node.NAME or node.TAG}"
    digest = hashlib.sha256(json.dumps([node.TAG, given], sort_keys=True).encode()).hexdigest()[:8]
    *above, last = re.sub(r"[^\w./-]+", "_", node.TAG).split("/")
    last = last.encode()[: LONGEST_NAME - 9].decode(errors="ignore")  # a character may be several bytes
    return "/".join([node.PROJECT, *above, f"{last}-{digest}"])


def announce(name: str, cfg: Any, count: int, torch_device: Any) -> None:
    """Print what a run will be, of how many training images, and by which code on which device."""
    print(
        f"{name}: {cfg.DISTILLER.TYPE} on {cfg.DATASET.TYPE}, {count} images, {cfg.SOLVER.EPOCHS} "
        f"epoch{'s' * (cfg.SOLVER.EPOCHS > 1)}\n"
        f"by        deepkd_plugin {version()} in {record.PACKAGE}; {device.describe(torch_device)}"
    )


def summarise(cfg: Any, folder: Path, teacher_acc: float | None, result: dict[str, Any], gained: str) -> None:
    """Print the end of a run: how good it is, what it gained (see `gains`), the files, what to do next."""
    teacher = "none" if teacher_acc is None else f"{config.teacher_name(cfg)} {teacher_acc:.2f} % top-1"
    minutes = record.read_run(folder)["minutes"]
    trust = ["--trust"] if any(map(extensions.asked_by, (cfg.DISTILLER.STUDENT, cfg.DATASET.TYPE))) else []
    print(
        f"\nteacher   {teacher}\n"
        f"student   {cfg.DISTILLER.STUDENT}: best {result['best']:.2f} % (epoch {result['best_epoch']}), last "
        f"{result['last']:.2f} % (epoch {result['epochs']}), in {minutes:.1f} minutes\n"
        f"gain      {gained}\n"
        f"files     {folder}/ (student_best, student_latest, README.md, metrics.jsonl, train.events)\n"
        f"next      {shlex.join([*spoken('deepkd eval'), str(folder), *trust])}"
    )


Planned = Callable[[str, Sequence[str]], tuple[Any, Path]]
"""A config file and options -> its config, checked with the files that it names, and its run's folder."""


def show_sibling(file: str, options: Sequence[str], tool: str, planned: Planned) -> None:
    """Print the command of `tool` that trains the same student under another config of the folder, or one it teaches.

    It has this run's options, for they may say where the images are. A config whose run is there already, that names a
    file which is not, or that would import a module which this run has not is passed over; there may be none.
    """
    given = _given(options)
    with _silent():
        ours = planned(file, options)
        found = next((path for path in _beside(file) if _trains(path, given, ours, planned)), None)
    if found:
        print(f"          {shlex.join([*process_group.command(tool), '--cfg', str(found), *given])}")


def gains(file: str, options: Sequence[str], result: Mapping[str, Any], planned: Planned) -> str:
    """Say how far a run's last epoch is above those of its student's finished runs under other configs of the folder.

    They have this run's options, so also its seed and its epochs. Those that are not there are passed over.
    """
    with _silent():
        ours = planned(file, options)[0]
        found = {}
        for path in _beside(file):
            with contextlib.suppress(UserError):
                if _would_import(path):
                    continue
                cfg, folder = planned(str(path), _given(options))
                there = record.find_run(folder)
                alike = _shared(cfg) == _shared(ours)
                if alike and there.get("finished") and "last" in (there.get("result") or {}):
                    found[path.stem] = result["last"] - there["result"]["last"]
    if not found:
        return "not known: no run of this student under another config is there yet"
    words = ", ".join(f"{gain:+.2f} over {name}".replace("-", "−", gain < 0) for name, gain in found.items())
    return f"{words} (last epoch, one run each; `deepkd reproduce` tells how sure)"


ALIKE = ("DATASET.", "INPUT.", "DISTILLER.STUDENT", "SOLVER.EPOCHS", "SOLVER.SEED")
"""How keys begin that runs must share, for the difference of their accuracies to be a gain."""


def _shared(cfg: Any) -> dict[str, Any]:
    """Return the values of these keys, as far as they compute."""
    settings = config.flatten(cfg).items()
    return {
        path: config.compared(path, value)
        for path, value in settings
        if path.startswith(ALIKE) and config.computes(path)
    }


UNSHARED = ("EXPERIMENT.NAME", "EXPERIMENT.TAG", "DISTILLER.TYPE", "SOLVER.TRAINER")
"""Options of a run that are not for another config: its folder's name and its method."""


def _given(options: Sequence[str]) -> list[str]:
    return [word for pair in zip(options[::2], options[1::2]) if pair[0] not in UNSHARED for word in pair]


def _beside(file: str) -> list[Path]:
    """List the other configs of a config's folder: first the one that DeepKD is over in it, then other bases."""
    others = sorted(path for path in Path(file).parent.glob("*.yaml") if path.name != Path(file).name)
    over = Path(file).stem.removeprefix("deepkd").removeprefix("_").partition("_")[0]
    first = (over, "kd", "dkd")
    return sorted(others, key=lambda path: first.index(path.stem) if path.stem in first else len(first))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Let nothing be said: warnings of another config are for who runs it."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def _would_import(path: Path) -> bool:
    """Tell whether a config names a module that this run has not imported."""
    tree = config_file.read(path)
    settings = config.flatten(tree) if isinstance(tree, dict) else {}
    named = [settings.get(key) for key in ("DISTILLER.STUDENT", "DISTILLER.TEACHER", "DATASET.TYPE")]
    asked = {extensions.asked_by(name) for name in named if isinstance(name, str)} - {None}
    return not all(map(extensions.is_named, asked))


def _trains(path: Path, options: Sequence[str], ours: tuple[Any, Path], planned: Planned) -> bool:
    """Tell whether a config trains the student of `ours`, or is taught by it, on the same images, as things are."""
    try:
        if _would_import(path):
            return False
        cfg, folder = planned(str(path), options)
    except UserError:
        return False
    taught = cfg.DISTILLER.TYPE != "NONE" and Path(cfg.DISTILLER.TEACHER_WEIGHTS).parent == ours[1]
    alike = cfg.DISTILLER.STUDENT == ours[0].DISTILLER.STUDENT
    return cfg.DATASET.TYPE == ours[0].DATASET.TYPE and (alike or taught) and not run_folder.is_run(folder)


def _planned(file: str, options: Sequence[str]) -> tuple[Any, Path]:
    host = find_host()
    cfg = read_config(host, file, options)[0]
    check_files(host, cfg)
    return cfg, Path(cfg.LOG.PREFIX) / experiment_name(cfg, options)


if __name__ == "__main__":
    sys.exit(main())
