"""Where a run's step gets its teacher's logits from: a table, and the teacher for what is not there yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import device
from ..errors import UserError
from ..terminal import warn
from .table import Damaged, Key, Table, gigabytes

"""Of the tables, in DATASET.ROOT, unless DISTILLER.LOGITS_DIR names another."""

LEAST = 16
"""Images that the teacher is given at once, if the batch has so many: in fewer, their logits round otherwise."""

TOLERANCE = 0.05
"""Difference between two computations of a logit that rounding explains, as a share of the largest logit."""

Find = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(epoch, index of a batch (B,)) -> the images' places in the table, and which of its views each has, (B,) int64."""


class TeacherLogits:
    """A teacher's logits of the views that a run sees: `logits(image, index, epoch)`.

    They come from the table, or from the teacher, and then into the table. Either way they are rounded to its dtype, so
    a run does not depend on what the table has. If the table cannot be used, this is said once and all are computed.
    """

    def __init__(
        self, key: Key, place: Path, teacher: nn.Module, find: Find, amp: bool | str, targets: np.ndarray | None = None
    ) -> None:
        """Open or make the table. targets: the labels of the set's images, which a table of some classes needs.

        Raises UserError as Table.make does.
        """
        self.key, self.teacher, self.find, self.amp, self.targets = key, teacher, find, amp, targets
        if key.kept is not None and targets is None:
            raise ValueError("a table of some classes needs the targets, which are always among them")
        self.table: Table | None = None
        self.checked = 0
        """The last epoch of which a batch was compared with the table."""
        self.asked = self.computed = 0
        """Images since the last call of `share_computed`."""
        print(f"logits    {key.count:,} images x {key.views} views x {key.record} bytes: up to {gigabytes(key.size)}")
        try:
            self.table = Table.make(place, key)
        except (Damaged, OSError) as error:
            kind = "table" if key.seed is None else "stored"
            warn(f"{error}; the teacher's logits are computed in every step (DISTILLER.TEACHER_LOGITS {kind})")
            return
        print(f"logits    {self.table.path}: {self.table.share():.0%} of {gigabytes(key.size)}")
        if not self.table.writable:
            warn(f"{self.table.path}: cannot be written; logits that are not there are computed each time")

    def __call__(self, image: Any, index: Tensor, epoch: int) -> Tensor:
        """Return the teacher's logits of a batch's weak views, (B, C) float32 on the images' device.

        image: (B, 3, H, W), or a list of views with the weak one first. index: (B,), of the batch.
        In each epoch's first batch that has some in the table these are computed too. Raises UserError if they differ.
        """
        image = image if isinstance(image, Tensor) else image[0]
        places, views = (part.numpy() for part in self.find(epoch, index.cpu()))
        form = self.key.form
        if self.table is None:
            stored, there = np.zeros(len(places), form.type), np.zeros(len(places), bool)
        else:
            stored, there = self.table.read(places, views)
        missing = np.flatnonzero(~there)
        self.asked += len(places)
        self.computed += len(missing)
        result = form.unpack(stored)
        compare = bool(there.any()) and epoch != self.checked
        if compare or len(missing):
            rows = np.arange(len(places))
            if not compare and len(missing) < len(places):
                rows = np.concatenate([missing, rows[there]])[: max(len(missing), LEAST)]
            logits = np.zeros_like(result)
            logits[rows] = self.compute(image, rows)
            if compare:
                # of the classes that the table keeps
                self.compare(*(form.of_kept(stored[there], both[there]) for both in (result, logits)))
                self.checked = epoch
            result[missing] = self.keep(places[missing], views[missing], logits[missing])
        if self.table is not None and self.table.damaged:
            warn(f"{self.table.path}: has damaged logits; they are not used, and computed again")
        return torch.from_numpy(result).to(image.device)

    def compute(self, image: Tensor, rows: np.ndarray) -> np.ndarray:
        """Return the teacher's logits of some images of a batch: (n, C) float32."""
        if len(rows) < len(image):
            memory_format = torch.channels_last if image.is_contiguous(memory_format=torch.channels_last) else None
            image = image[torch.from_numpy(rows).to(image.device)]
            image = image.contiguous(memory_format=memory_format or torch.contiguous_format)
        # a compiled teacher would be compiled for each number of images
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.inference_mode(), device.autocast(image.device, self.amp):
            return self.teacher(image)[0].float().cpu().numpy()

    def keep(self, places: np.ndarray, views: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """Bring logits into the table's form and put them there; returns them. Those it cannot hold stay."""
        form = self.key.form
        stored, held = form.pack(logits, None if self.targets is None else self.targets[places])
        if not held.all():
            endless = self.key.kept is not None and not np.isfinite(logits).all()
            what, can = ("LOGITS_K", "all classes") if endless else (f"LOGITS_DTYPE {self.key.dtype}", "float32")
            warn(
                f"DISTILLER.{what}: cannot hold the logits of {self.key.network}, which reach "
                f"{np.abs(logits).max():.0f}; they are computed in every step; {can} can"
            )
        if self.table is not None and self.table.writable:
            try:
                self.table.write(places[held], views[held], stored[held])
            except OSError as error:
                self.table.writable = False
                warn(f"{self.table.path}: {error.strerror}; logits that are not there are computed each time")
        return np.where(held[:, None], form.unpack(stored), logits)

    def compare(self, stored: np.ndarray, computed: np.ndarray) -> None:
        """Raise UserError if logits of the table are not those of the images."""
        finite = np.isfinite(computed)
        scale = float(np.abs(computed[finite]).max(initial=0))
        difference = float(np.abs(stored[finite] - computed[finite]).max(initial=0))
        if not difference <= TOLERANCE * scale:
            raise UserError(
                f"{self.table.path if self.table else self.key.name}: its logits are not those of the images of this "
                f"run (they differ by {difference:.3g}, the largest is {scale:.3g}); views must depend on the seed, "
                f"the epoch and the image alone; set DISTILLER.TEACHER_LOGITS to compute, and delete the table"
            )

    def share_computed(self) -> float:
        """Return which share of the images since the last call went through the teacher."""
        share = self.computed / max(self.asked, 1)
        self.asked = self.computed = 0
        return share

    def close(self) -> None:
        if self.table is not None:
            self.table.close()


class SeveralTeachersLogits:
    """The logits of several teachers, each from its own table: `logits(image, index, epoch)`, (B, M, C)."""

    def __init__(self, each: Sequence[TeacherLogits]) -> None:
        self.each = each

    def __call__(self, image: Any, index: Tensor, epoch: int) -> Tensor:
        return torch.stack([logits(image, index, epoch) for logits in self.each], dim=1)

    def share_computed(self) -> float:
        """Return the mean of the teachers' share_computed."""
        return sum(logits.share_computed() for logits in self.each) / len(self.each)

    def close(self) -> None:
        for logits in self.each:
            logits.close()


def check_teacher(teacher: nn.Module, image: Tensor) -> None:
    """Raise UserError if a teacher's logits of an image depend on anything else.

    image: some images, (B, 3, H, W). Dropout and BatchNorm in training mode make them depend on chance and on the
    other images of a batch.
    """
    training = [name or type(teacher).__name__ for name, module in teacher.named_modules() if module.training]
    with torch.inference_mode():
        together = teacher(image)[0].float()
        again = torch.cat([teacher(part)[0].float() for part in image.split(max(len(image) // 2, 1))])
    scale = together.abs().max()
    if training or not bool((together - again).abs().max() <= TOLERANCE * scale):
        what = f"{training[0]} is in training mode" if training else "the same images gave others"
        raise UserError(
            f"DISTILLER.TEACHER_LOGITS must be 'compute' with this teacher: a table's logits must depend on the image "
            f"alone, and {what}"
        )
