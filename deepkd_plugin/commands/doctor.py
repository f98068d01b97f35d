"""What a machine has for the plugin: `deepkd doctor`, `python -m deepkd_plugin.registry`."""

import importlib.util
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from os.path import normpath
from pathlib import Path

from yacs.config import CfgNode

from .. import device
from ..data import DATASETS
from ..errors import UserError
from ..hosts import mdistiller
from ..hosts.host import Host
from ..hosts.networks import weights_file
from ..hosts.registry import TRAINERS, added_distillers, find_host, register
from ..run.record import commit, version_of
from ..terminal import Parser

VERSIONS = ("deepkd_plugin", "torch", "torchvision", "numpy", "yacs", "tensorboardX")
OPTIONAL = {
    "detectron2": "detection",
    "timm": "networks timm:NAME",
    "onnxruntime": "deepkd export --to onnx",
    "huggingface_hub": "deepkd push",
    "scipy": "mdistiller imports it",
    "wandb": "LOG.WANDB True",
    "shtab": "deepkd --print-completion",
}


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    what = "Look for what would keep a run from working."
    parser = Parser("deepkd doctor", description=what, examples=("", "../mdistiller"))
    parser.add_argument("path", metavar="PATH", type=Path, nargs="?", help="a checkout of mdistiller to look into")
    doctor(parser.parse(words).path)
    return 0


def doctor(root: Path | None = None) -> None:
    """Print what is here, one line each; UserError, with what mends it, if the plugin could not work.

    root: a checkout of mdistiller to look into, instead of the host that a run here would find.

    What is only needed by some configs (teachers, data sets, CUDA, extras) is reported and is no failure.
    """
    for name, text in _machine():
        _line(name, text)
    try:
        host = find_host() if root is None else mdistiller.load(root.resolve())
        added = register(host)
    except UserError:
        _line("host", "cannot be used")
        raise
    _line("host", _describe(host))
    _line("distillers", _registry(host.distillers, added_distillers()))
    _line("trainers", _registry(host.trainers, TRAINERS))
    keys = sum("." in name for name in added)
    _line("config", f"{keys} keys added" if added else "all keys were there")
    for name, text in [*_teachers(host), *_data_sets(host.cfg)]:
        _line(name, text)
    print("deepkd_plugin is registered and ready")


def _machine() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()}, {sys.executable}"
    for name in VERSIONS:
        yield name, _version(name) + (f", commit {commit()}" if name == "deepkd_plugin" else "")
    count = device.count()
    yield "device", device.describe(device.pick())
    yield "CUDA", f"{count} device{'' if count == 1 else 's'}" if count else "none"
    for name, purpose in OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        yield name, _version(name) if there else f"not installed ({purpose})"


def _describe(host: Host) -> str:
    if host.root is None:
        return "built-in (no mdistiller: not installed, and MDISTILLER_ROOT is not set)"
    return f"mdistiller in {host.root}, commit {commit(host.root / 'mdistiller' / 'engine', 'cfg.py')}"


def _registry(names: Iterable[str], ours: Iterable[str]) -> str:
    """List the host's names, ours behind a plus sign."""
    return " ".join(f"+{name}" if name in ours else name for name in names)


def _teachers(host: Host) -> Iterator[tuple[str, str]]:
    for dataset in ("cifar100", "tiny_imagenet"):
        files = {name: weights_file(host, dataset, name, "") for name in host.models(dataset)}
        there = [name for name, file in files.items() if file and Path(file).is_file()]
        missing = [name for name, file in files.items() if file and name not in there]
        parts = [f"in place: {', '.join(there)}"] if there else []
        if missing:
            example = normpath(files[missing[0]] or "")
            parts.append(f"missing: {', '.join(missing)} (looked for {example} and so on)")
        yield f"{dataset} teachers", "; ".join(parts) or "none known"
    yield "imagenet teachers", "torchvision's weights, fetched when first used"


def _data_sets(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    node = cfg.DATASET.clone()
    node.defrost()
    node.DOWNLOAD = False
    for name, source in DATASETS.items():
        node.TYPE, text = name, "built in, drawn when first used"
        try:
            if not source.drawn:  # drawing it would write its cache
                text = f"in place, {len(source.load(node, 'test'))} test images"
        except UserError as error:
            text = f"missing: {error}"
        yield f"{name} images", text


def _version(name: str) -> str:
    return version_of(name, "not installed as a package")


def _line(name: str, text: str) -> None:
    print(f"{name:<22} {text}")
