"""Students from their files, and never any code from there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import config, data, extensions
from ..config import file as config_file
from ..data.description import Description, read
from ..errors import UserError, shown
from ..hosts.adapter import plain
from ..hosts.networks import described_network
from ..hosts.registry import find_host, register
from ..run import checkpoint, record

BEST, LATEST = "student_best", "student_latest"
"""Names of a run's student files; each is there in two forms."""

CONFIG = "config.yaml"

DETECTORS = ("DETECTION", "MODEL")
"""Nodes of the configs of runs that train detectors, ours and detectron2's."""

KEY = "STUDENT"
"""What errors call the argument that names a student, in Python and on the command line."""


@dataclass(frozen=True)
class Found:
    """A student that can be made: where its weights are, and what says what it is.

    folder: the run's folder that the file is in; None if it is in none. source: the file that describes it.
    """

    weights: Path
    description: Description
    source: Path
    folder: Path | None

    @property
    def name(self) -> str:
        """Its files' name without a suffix."""
        return self.weights.name.removesuffix(checkpoint.SAFE)


def load_student(
    path: str | Path, network: nn.Module | Callable[..., nn.Module] | None = None, trust: bool = False
) -> nn.Module:
    """Load a student in evaluation mode on the CPU: a network that maps images (B, 3, size, size) to logits (B, C).

    path: a run's folder (its best epoch), one of its student files, or what `deepkd export --to safetensors` wrote.
    `student.description` says the classes' names, the size and the normalisation; `student.description.prepare(image)`
    makes a PIL image what the network takes. A file never brings code, but it can name a constructor,
    package.module:constructor: its module is imported only if DEEPKD_EXTENSIONS names it or if `trust` is True.
    network: the network to load the weights into, or make(num_classes=C), instead of the one that the file names.
    Raises UserError for a file that is damaged, that nothing describes, or that is another network's.
    """
    found = find_student(path, trust=trust)
    return make(found, network, trust, ways="trust=True, or network= with the network")


def find_student(path: str | Path, file: str = BEST, trust: bool = False) -> Found:
    """Find a student's file and its description, as in load_student. file: which of a run's, if `path` is its folder.

    A file that holds no description, as one of 0.1 does, gets it from the config.yaml of its run, beside it.
    """
    path = Path(path)
    if path.is_dir():
        places = [path / f"{file}{checkpoint.SAFE}", path / file]
        path = next((place for place in places if place.is_file()), places[0])
        if not path.is_file():
            refuse_detector(path.parent)
            raise UserError(f"{path.parent}: holds no {file}, so it is no run that has finished an epoch")
    folder = path.parent if (path.parent / record.FILE).is_file() else None
    if not path.is_file():
        raise UserError(f"{path}: no such file; {KEY} must name a run's folder or a student's file")
    if path.suffix in (".onnx", ".pt2"):
        way = "onnxruntime.InferenceSession" if path.suffix == ".onnx" else "torch.export.load"
        raise UserError(f"{path}: is an exported program, which {way} takes; {KEY} must name a student's file")
    description = read(checkpoint.read_metadata(path, KEY), path)
    if description is not None:
        return Found(path, description, path, folder)
    refuse_detector(path.parent)
    beside = path.parent / CONFIG
    if folder is None or not beside.is_file():
        raise UserError(
            f"{path}: nothing says which network it is of; {KEY} must name a run's folder, a file in it, or a "
            f"{checkpoint.SAFE} file that a run or deepkd export wrote"
        )
    return Found(path, data.describe(read_config(beside.parent, trust=trust)), beside, folder)


def refuse_detector(folder: Path) -> None:
    """Raise UserError if the run of a folder trained a detector, which nothing here can describe or use."""
    file = folder / CONFIG
    if not (folder / record.FILE).is_file() or not file.is_file():
        return
    given = config_file.read(file)
    if isinstance(given, Mapping) and any(node in given for node in DETECTORS):
        raise UserError(
            f"{folder}: its run trained a detector; {KEY} must be of a run that classifies images (deepkd detect-eval, "
            f"or detectron2's --eval-only, tests a detector)"
        )


def make(
    found: Found,
    network: nn.Module | Callable[..., nn.Module] | None = None,
    trust: bool = False,
    ways: str = "--trust",
) -> nn.Module:
    """Make a student that was found, with its weights. ways: how to allow a user's module, for the error."""
    about = found.description
    where = f"{found.source}: the student's architecture"
    weights = checkpoint.read_weights(found.weights, KEY)
    if not any(about.num_classes in value.shape for value in weights.values()):
        raise UserError(f"{found.source}: describes {about.num_classes} classes, and no tensor of its network has them")
    if network is None:
        check_trust(about.architecture, where, trust, ways)
        host = find_host()
        register(host)
        made = described_network(host, about, where)
    else:
        given = network if isinstance(network, nn.Module) else network(num_classes=about.num_classes)
        made = plain(given, type(given).__name__, about.size, about.num_classes)
    checkpoint.fit_weights(made, weights, found.weights, KEY, about.architecture)
    made.description = about  # type: ignore[assignment]
    return made.eval().requires_grad_(False)


def check_trust(name: str, where: str, trust: bool, ways: str = "--trust") -> None:
    """Raise UserError, which begins with `where`, if a name asks for a module that nobody here has allowed.

    A file may come from anybody, and importing a module runs it.
    """
    module = extensions.asked_by(name)
    if module and not trust and not extensions.is_named(module):
        raise UserError(
            f"{where} is {shown(name)}, which would import the module {module}; if you know it, allow it by {ways}, or "
            f"name it in {extensions.VARIABLE}"
        )


def read_config(folder: Path, options: Sequence[str] = (), trust: bool = False) -> Any:
    """Read the config of a run's student and data, config.yaml in its folder; KEY VALUE pairs override it.

    Raises UserError for a config that is not one, and for a data set or student of a module that nobody has allowed.
    """
    host = find_host()
    register(host)
    cfg = host.cfg.clone()
    file = folder / CONFIG
    origin = config.load(cfg, file, options)
    config.check_keys(cfg, origin, config.all_keys() + config.HOST_KEYS)
    for key in ("DATASET.TYPE", "DISTILLER.STUDENT"):
        check_trust(config.get(cfg, key), f"{origin.get(key, file)}: {KEY}", trust)
    return cfg
