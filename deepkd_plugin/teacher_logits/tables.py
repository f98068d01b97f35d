"""Which table a config means, and the tables of a folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import config, data, device
from ..data.arrays import Training, passes
from ..data.own import LOGITS_FOLDER
from ..data.resident import Batchwise, known, view_count, view_index
from ..errors import UserError
from ..mixture import Teachers, members
from .lookup import SeveralTeachersLogits, TeacherLogits, check_teacher
from .table import SUFFIX, Damaged, Key, Table, gigabytes

SAMPLE = 256
"""Files of a set of image files whose content is looked at, at most."""


def open_logits(
    cfg: Any, teacher: nn.Module, fingerprint: str, loader: Any, image: Any
) -> TeacherLogits | SeveralTeachersLogits:
    """Open the table that a config means, or make it; of several teachers, each one's own.

    fingerprint: of the teacher's weights. loader: of the training set, data.get_dataset's. image: some of its images,
    as its batches have them. Raises UserError for a teacher whose logits depend on more than the image, for views that
    cannot be counted, for a loader that may draw views as it likes, and as Table.make does.
    """
    if isinstance(teacher, Teachers):
        each = zip(config.by_teacher(cfg), members(teacher), fingerprint.split("+"))
        return SeveralTeachersLogits([_open(one, network, of_one, loader, image) for one, network, of_one in each])
    return _open(cfg, teacher, fingerprint, loader, image)


def _open(cfg: Any, teacher: nn.Module, fingerprint: str, loader: Any, image: Any) -> TeacherLogits:
    samples, order = loader.dataset, passes(loader)
    if not isinstance(samples, Training) or order is None:
        raise UserError(
            f"config: DISTILLER.TEACHER_LOGITS is {cfg.DISTILLER.TEACHER_LOGITS!r}; it must be 'compute' with a "
            f"training set that get_dataset did not make: only of its images it is known which view an epoch has"
        )
    check_teacher(teacher, image if isinstance(image, Tensor) else image[0])
    stored = cfg.DISTILLER.TEACHER_LOGITS == "stored"
    distortions, seed, views = [] if stored else _distortions(cfg), order.seed, order.views
    key = make_key(cfg, fingerprint, samples)

    chosen = torch.as_tensor(samples.chosen)

    def find(epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        if stored:
            return chosen[index], torch.full_like(index, views.epoch(epoch) - 1)
        return chosen[index], view_index(distortions, seed, epoch, chosen[index])

    return TeacherLogits(key, place(cfg), teacher, find, cfg.SOLVER.AMP, np.asarray(samples.images.targets))


def make_key(cfg: Any, fingerprint: str, samples: Any) -> Key:
    """Return the key of the table that a config means. samples: the training set, as get_dataset's loader has it."""
    source, node = data.source(cfg), cfg.DISTILLER
    images = samples.images  # all of the set, so that runs on parts of it share a table
    stored = node.TEACHER_LOGITS == "stored"
    some = stored and 0 < node.LOGITS_K < source.num_classes
    return Key(
        network=cfg.DISTILLER.TEACHER,
        teacher=fingerprint,
        dataset=cfg.DATASET.TYPE,
        images=_fingerprint_with_labels(images) if stored else _fingerprint(images),
        count=len(images),
        views=node.LOGITS_VIEWS if stored else count_views(cfg),
        view=f"{', '.join(map(_described, source.augmentation))}; mean {source.mean}, std {source.std}, "
        f"side {source.side}",
        classes=source.num_classes,
        precision=device.precision(cfg.SOLVER.AMP),
        dtype=node.LOGITS_DTYPE,
        seed=node.LOGITS_SEED if stored else None,
        kept=node.LOGITS_K if some else None,
        temperature=config.temperature(cfg) if some else None,
    )


def count_views(cfg: Any) -> int:
    """Count the weak views of an image of a config's data set; UserError if there is no end of them."""
    return view_count(_distortions(cfg))


def _distortions(cfg: Any) -> list[Batchwise]:
    """Return what makes the weak views of a config's images, if these can be counted."""
    source = data.source(cfg)
    made = [known(distortion, source.side, source.side) for distortion in source.augmentation]
    if not source.small or None in made or view_count(made) is None:
        raise UserError(
            f"config: DISTILLER.TEACHER_LOGITS is 'table'; it must be 'compute' with DATASET.TYPE {cfg.DATASET.TYPE}, "
            f"whose images have more views than can be counted, or 'stored', which has a few of them"
        )
    return made


def share_computed(views: int, epochs: int) -> float:
    """Return the share of logits that an empty table lets a teacher compute in so many epochs, of all runs together.

    An image's views are drawn uniformly, so epochs n leave each of the V views unseen with the chance (1 - 1/V)^n.
    """
    return views * (1 - (1 - 1 / views) ** epochs) / epochs


def sharing(cfg: Any) -> tuple[Any, ...]:
    """Return what the runs of one teacher and data set have alike if they share a table."""
    node = cfg.DISTILLER
    own = (node.LOGITS_VIEWS, node.LOGITS_SEED, node.LOGITS_K, config.temperature(cfg))
    return node.TEACHER_LOGITS, node.LOGITS_DTYPE, cfg.SOLVER.AMP, *(own if node.TEACHER_LOGITS == "stored" else ())


def share_of(cfg: Any, epochs: int) -> float:
    """Return that share for a config, of whose table runs of so many epochs together make use."""
    if cfg.DISTILLER.TEACHER_LOGITS == "stored":
        return min(cfg.DISTILLER.LOGITS_VIEWS, cfg.SOLVER.EPOCHS) / epochs
    return share_computed(count_views(cfg), epochs)


def place(cfg: Any) -> Path:
    """Return the folder of a config's tables, or the file of its table."""
    return Path(cfg.DISTILLER.LOGITS_DIR or Path(cfg.DATASET.ROOT) / LOGITS_FOLDER)


def files(path: Path) -> Iterator[Path]:
    """Yield the files of tables in a folder, or the one that is named."""
    if path.is_dir():
        yield from sorted(path.glob(f"*{SUFFIX}"))
    elif path.is_file():
        yield path
    else:
        raise UserError(f"{path}: no such folder; it must hold tables of teacher logits, or be one")


def _fingerprint(images: Any) -> str:
    """Hash the pixels of images, in their order."""
    digest, places = hashlib.sha256(), np.arange(len(images))
    for start in range(0, len(places), 1000):
        # images that were just drawn, or a user's own, may lie in memory in another order
        digest.update(np.ascontiguousarray(images.pixels(places[start : start + 1000])))
    return digest.hexdigest()[:16]


def _fingerprint_with_labels(images: Any) -> str:
    """Hash images and their labels; of files their names below a common folder, their sizes, and what a few hold.

    To read all of ImageNet takes as long as an epoch. This takes as long as asking for the size of each file.
    """
    digest = hashlib.sha256(np.asarray(images.targets, dtype=np.int64).tobytes())
    if hasattr(images, "fingerprinted"):
        for part in images.fingerprinted():
            digest.update(part)
        return digest.hexdigest()[:16]
    paths = getattr(images, "paths", None)
    if paths is None:
        digest.update(_fingerprint(images).encode())
        return digest.hexdigest()[:16]
    start = len(os.path.commonpath([min(paths), max(paths)]))
    for path in paths:
        digest.update(f"{path[start:]}\0{os.stat(path).st_size}\n".encode(errors="surrogateescape"))
    for path in paths[:: -(-len(paths) // SAMPLE)]:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]


def _described(distortion: Any) -> str:
    """Say what a distortion is; what Python says of a function has its place in memory in it."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(distortion))


def describe(path: Path) -> str:
    """Say in a line what a file of a folder of tables is, how large, and how full."""
    size = path.stat()
    try:
        table = Table.open(path)
    except (Damaged, UserError) as error:
        return str(error)
    key, share = table.key, table.share()
    table.close()
    classes = f"{key.classes} classes"
    if key.kept is not None:
        classes = f"{key.kept} of {classes} at temperature {key.temperature:g}"
    if key.seed is not None:
        classes += f" (seed {key.seed})"
    return (
        f"{path}: {key.dataset}, {key.network} {key.teacher} in {key.precision}, {key.count:,} images x {key.views} "
        f"views x {classes} in {key.dtype}; about {share:.0%} filled, {gigabytes(size.st_blocks * 512)} "
        f"of {gigabytes(key.size)}"
    )
