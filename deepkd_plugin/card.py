"""A run's model card: README.md in its folder, in the Hugging Face hub's format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from . import config, extensions
from .data import Description
from .run import record
from .run.checkpoint import write_text
from .run.folder import CARD, CARD_MARK, is_own_card
from .run.metrics import read_metrics

HUB = {"cifar100": "uoft-cs/cifar100", "imagenet": "ILSVRC/imagenet-1k", "tiny_imagenet": "zh-plus/tiny-imagenet"}
"""The data sets that are on the hub, by DATASET.TYPE."""

SHOWN = ("EPOCHS", "BATCH_SIZE", "LR", "LR_SCHEDULE", "WEIGHT_DECAY", "MOMENTUM", "TRAINER", "AMP", "SEED")
"""Keys of SOLVER that a card has; config.yaml has them all."""


def write(
    folder: Path, cfg: Any, about: Description, parameters: int, images: Sequence[int], result: Mapping[str, Any]
) -> None:
    """Write the card of a run that has ended, unless somebody has made the one that is there theirs.

    parameters: how many numbers the student has. images: how many it was trained on, and tested on. result: as
    Trainer.train returns it.
    """
    path = folder / CARD
    if not path.exists() or is_own_card(path):
        run, epochs = record.read_run(folder), read_metrics(folder)
        write_text(path, text(cfg, about, parameters, images, result, run, epochs))


def text(
    cfg: Any,
    about: Description,
    parameters: int,
    images: Sequence[int],
    result: Mapping[str, Any],
    run: Mapping[str, Any],
    epochs: list[dict[str, Any]],
) -> str:
    """Return the card. run: run.json. epochs: metrics.jsonl. No path of the machine is in it."""
    node, data = cfg.DISTILLER, cfg.DATASET
    distilled = node.TYPE != "NONE"
    split = "train" if data.HOLDOUT else "test"
    best, last = epochs[result["best_epoch"] - 1], epochs[-1]
    title = f"{about.architecture} on {about.dataset}" + (
        f", distilled from {config.teacher_name(cfg)}" if distilled else ""
    )
    rows = {
        "student": f"`{about.architecture}`, {parameters:,} parameters",
        "teacher": _teacher(cfg, run) if distilled else "none",
        "method": _method(cfg),
        "data": f"{about.dataset}, {about.num_classes} classes, {images[0]:,} training and {images[1]:,} test images",
        "best epoch": f"{_accuracy(best)} (epoch {result['best_epoch']} of {result['epochs']})",
        "last epoch": _accuracy(last),
    }
    tested = "the test images, by which the best epoch was chosen too"
    if data.HOLDOUT:
        tested = f"images kept from training (`DATASET.HOLDOUT` {data.HOLDOUT}), by which the best epoch was chosen too"
    size = f"{about.size} × {about.size} pixels"
    resize = size if about.resize is None else f"resized to {about.resize} (their shorter side) and cut to {size}"
    if isinstance(about.resize, tuple):
        resize = f"resized to {about.resize} and cut to {size}"
    solver = {name: cfg.SOLVER[name] for name in SHOWN if name in cfg.SOLVER}
    section = {node.TYPE: dict(cfg[node.TYPE])} if distilled and node.TYPE in cfg else {}
    recipe = yaml.safe_dump({"SOLVER": solver, **_plain(section)}, sort_keys=False, allow_unicode=True)
    own = ", trust=True" if extensions.asked_by(about.architecture) else ""
    lines = (
        f"---\n{yaml.safe_dump(_metadata(about, best, split), sort_keys=False, allow_unicode=True)}---",
        f"{CARD_MARK} when the run ended; it writes it again unless this line is gone. -->",
        f"\n# {title}\n\n| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        f"\nAccuracies are of {tested}.",
        "\n## Use\n\n```python\nfrom PIL import Image\nfrom deepkd_plugin import load_student\n",
        f'student = load_student("student_best.safetensors"{own})',
        'image = student.description.prepare(Image.open("image.jpg"))',
        "label = student(image[None]).argmax().item()\nprint(student.description.class_names[label])\n```\n",
        f"The network takes RGB images, {resize}, normalised by the mean {list(about.mean)} and the standard "
        f"deviation {list(about.std)} of pixels in [0, 1]. The file's metadata have this and the names of the classes.",
        *([f"Its code is not in the file: `{about.architecture}` must be importable."] if own else []),
        f"\n## Training\n\n```yaml\n{recipe}```\n",
        f"Trained by deepkd_plugin {about.version} (code {run.get('code', 'unknown')}, config {run['config_hash']}) in "
        f"{run['minutes']:.1f} minutes.\n",
    )
    return "\n".join(lines)


def _teacher(cfg: Any, run: Mapping[str, Any]) -> str:
    """Name a run's teacher, or each of several with its accuracy and then their mixture's."""
    accuracy = f"{run['teacher_acc']:.2f} % top-1"
    each = run.get("teachers")
    if not each:
        return f"`{cfg.DISTILLER.TEACHER}`, {accuracy}"
    parts = ", ".join(f"`{one['name']}` ({one['accuracy']:.2f} %)" for one in each)
    return f"mixture of {parts}: {accuracy}"


def _method(cfg: Any) -> str:
    name = cfg.DISTILLER.TYPE
    if name == "NONE":
        return "trained on labels alone"
    feature = f" and features by {config.feature(cfg)}" if config.feature(cfg) else ""
    return f"DeepKD over {cfg.DeepKD.BASE}{feature} (arXiv 2505.15133)" if name == "DeepKD" else name


def _accuracy(epoch: Mapping[str, Any]) -> str:
    return f"{epoch['test_acc']:.2f} % top-1, {epoch['test_acc_top5']:.2f} % top-5"


def _plain(section: Any) -> Any:
    """Turn config nodes into what YAML writes without tags."""
    if isinstance(section, dict):
        return {name: _plain(value) for name, value in section.items()}
    return [_plain(part) for part in section] if isinstance(section, (list, tuple)) else section


def _metadata(about: Description, best: Mapping[str, Any], split: str) -> dict[str, Any]:
    metrics = [
        {"type": kind, "name": name, "value": round(best[key], 2)}
        for kind, name, key in (("accuracy", "top-1", "test_acc"), ("accuracy", "top-5", "test_acc_top5"))
    ]
    hub = HUB.get(about.dataset)
    measured = {
        "task": {"type": "image-classification"},
        "dataset": {"name": about.dataset, "type": hub or about.dataset, "split": split},
        "metrics": metrics,
    }
    return {
        "library_name": "deepkd_plugin",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "deepkd"],
        **({"datasets": [hub]} if hub else {}),
        "model-index": [{"name": f"{about.architecture} on {about.dataset}", "results": [measured]}],
    }
