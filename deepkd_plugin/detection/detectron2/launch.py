"""What mdistiller's detection/train_net.py runs after `deepkd apply`, with detectron2's own arguments."""

import contextlib
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ... import device
from ...config.tree import flatten, get, wrong
from ...errors import UserError, shown
from ...run import folder as run_folder
from ...run import lock, record
from ...terminal import Stopped, exit_code, guarded
from . import SCRIPT, locate, require

DATASETS = "DETECTRON2_DATASETS"


def main(argv: Sequence[str] | None = None, overwrite: bool = False) -> int:
    """Train or test the detector of a config. Returns the exit code (2: a mistake of the user).

    overwrite: start again over a run that is in OUTPUT_DIR, which is no option of detectron2's.
    """
    return guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv), overwrite))


def _main(words: list[str], overwrite: bool) -> None:
    root = locate()
    find_datasets(root)
    require(root)
    from detectron2.engine import default_argument_parser, launch
    from torch.multiprocessing import ProcessRaisedException

    parser = default_argument_parser()
    parser.prog, parser.allow_abbrev = SCRIPT, False
    args = parser.parse_args(words)
    args.command = shlex.join(["python", SCRIPT, *words])
    args.again = shlex.join(["python", SCRIPT, "--resume", *(word for word in words if word != "--resume")])
    args.root = str(root)
    args.config_file = str(find_file(args.config_file, root, "command line: --config-file"))
    cfg = read_config(args)  # here too, so that a mistake ends one process in one line
    several = (args.num_machines, args.machine_rank, args.dist_url)
    trains = not args.eval_only and args.machine_rank == 0
    try:
        with held(cfg, args.resume, overwrite) if trains else contextlib.nullcontext():
            launch(work, args.num_gpus, *several, args=(args,))
    except ProcessRaisedException as error:
        if "UserError: " in str(error):
            raise UserError(str(error)) from None
        raise


def work(args: Namespace) -> Any:
    """Run one process: test, or train to the end. Returns the results of the last evaluation."""
    require(Path(args.root))
    from detectron2.engine import default_setup
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from .trainer import TRAINED, Checkpointer, Trainer

    cfg = read_config(args)
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)
        checkpointer.needed = TRAINED
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg, args.command)
    trainer.resume_or_load(resume=args.resume)
    try:
        return trainer.train()
    except KeyboardInterrupt as interruption:
        if trainer.checkpointer.has_checkpoint():
            left = f"Resume from the last checkpoint with: {args.again}"
        else:
            left = f"No checkpoint was written yet; start again with: {args.command}"
        raise Stopped(f"interrupted at iteration {trainer.iter}. {left}", exit_code(interruption)) from None
    except FloatingPointError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{cfg.OUTPUT_DIR}: {reason}; SOLVER.BASE_LR must be lower, or look at the teacher") from None


def read_config(args: Namespace) -> Any:
    """Read, check and freeze the config of a command line, and find the files that it names."""
    from . import config

    cfg, origin = config.load(args.config_file, args.opts)
    config.check(cfg, origin)
    _check_machine(cfg, origin, args)
    keys = ("DATASETS.TEST",) if args.eval_only else ("DATASETS.TRAIN", "DATASETS.TEST")
    if not get(cfg, keys[0]):
        raise wrong(origin, keys[0], (), "the name of a set that detectron2 knows")
    for key in keys:
        _check_sets(cfg, origin, key)
    resumed = args.resume and (Path(cfg.OUTPUT_DIR) / "last_checkpoint").is_file()
    if cfg.MODEL.WEIGHTS and "://" not in cfg.MODEL.WEIGHTS and not resumed:
        cfg.MODEL.WEIGHTS = str(_find_weights(cfg, origin, Path(args.root)))
    cfg.freeze()
    return cfg


@contextlib.contextmanager
def held(cfg: Any, resume: bool, overwrite: bool) -> Iterator[None]:
    """Be the only process in OUTPUT_DIR, as run.folder.held, and set aside a run that starts again there."""
    folder = Path(cfg.OUTPUT_DIR)
    with lock.ours(folder):
        run_folder.settle(folder)
        if not overwrite:
            check_folder(cfg, resume)
        if not (resume and (folder / "last_checkpoint").is_file()):
            run_folder.set_aside(folder)
        try:
            yield
        finally:
            run_folder.settle(folder)


def check_folder(cfg: Any, resume: bool) -> None:
    """Raise UserError if OUTPUT_DIR holds a run that this one would overwrite or cannot resume."""
    from .recorder import Computed

    folder = Path(cfg.OUTPUT_DIR)
    if not (folder / "run.json").is_file():
        return
    if not resume:
        raise UserError(f"{folder}: OUTPUT_DIR holds a run already; go on with --resume, name another, or remove it")
    if not (folder / "last_checkpoint").is_file():  # interrupted before the first checkpoint: it starts again
        return
    ours = Computed(cfg)
    if record.read_run(folder).get("config_hash") == record.config_hash(ours):
        return
    before = flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    for key, value in flatten(yaml.safe_load(cfg.dump())).items():
        if key in ours and key != "MODEL.WEIGHTS" and before.get(key) != value:
            raise UserError(
                f"{folder}: --resume needs the run's own config: {key} was {shown(before.get(key))}, is {shown(value)}"
            )
    raise UserError(f"{folder}: --resume needs the run's own config; its config_hash is another")


def find_file(name: str, root: Path, source: str) -> Path:
    """Find a file named relative to the current folder or to mdistiller's detection/. Raises UserError without one."""
    for folder in (Path(), root / "detection"):
        if name and (folder / name).is_file():
            return folder / name
    raise UserError(f"{source} is {name!r}; it must name a file, here or in {root / 'detection'}")


def _find_weights(cfg: Any, origin: dict[str, str], root: Path) -> Path:
    name = cfg.MODEL.WEIGHTS
    try:
        return find_file(name, root, "MODEL.WEIGHTS")
    except UserError:
        allowed = f"a file, here or in {root / 'detection'}"
        if cfg.MODEL.META_ARCHITECTURE.startswith("RCNN"):
            allowed += f"; make it with `deepkd merge-detector-weights TEACHER STUDENT {name}`"
        raise wrong(origin, "MODEL.WEIGHTS", name, allowed) from None


def _check_machine(cfg: Any, origin: dict[str, str], args: Namespace) -> None:
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        return
    if device.count() == 0:
        allowed = "cpu on a machine without CUDA: add `MODEL.DEVICE cpu` to the command line"
        raise wrong(origin, "MODEL.DEVICE", cfg.MODEL.DEVICE, allowed)
    if args.num_gpus > device.count():
        raise UserError(
            f"command line: --num-gpus is {args.num_gpus}; it must be at most {device.count()}, what there is"
        )


def _check_sets(cfg: Any, origin: dict[str, str], key: str) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    names = get(cfg, key)
    for name in names:
        if name not in DatasetCatalog.list():
            raise wrong(origin, key, names, f"names of sets that detectron2 knows, and {name} is none")
        file = MetadataCatalog.get(name).get("json_file")
        if file is not None and not Path(file).is_file():
            raise UserError(
                f"{origin.get(key, 'default')}: {key} names {name}, whose {file} is missing; {DATASETS} must name the "
                f"folder with coco/ in it (by default datasets/, here or in mdistiller's detection/)"
            )


def find_datasets(root: Path) -> None:
    """Tell detectron2, which asks once when it is imported, that mdistiller's data are in detection/datasets."""
    theirs = root / "detection" / "datasets"
    if DATASETS not in os.environ and not Path("datasets").is_dir() and theirs.is_dir():
        os.environ[DATASETS] = str(theirs)
