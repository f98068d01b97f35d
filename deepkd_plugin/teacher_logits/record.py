"""What a table keeps of a view's logits: all of them, or the largest and what the others have in common.

    all     C logits
    some    the rest's logit (float32), K logits, their K classes (uint16, or uint32 above 65,536 classes)

Of some, the target class is always one. The others get one logit, at which their probability in sum is what it was, at
one temperature. So every probability of a kept class is the teacher's own, and docs/teacher_logits.md bounds what a
loss over all classes can differ by.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}

Array = np.ndarray[Any, Any]


class Record(NamedTuple):
    """The form of a view's logits in a table."""

    classes: int
    dtype: str
    """A key of DTYPES."""
    kept: int | None = None
    """How many classes are kept, fewer than there are; None: all."""
    temperature: float = 1.0
    """At which the others' probability is kept."""

    @property
    def type(self) -> np.dtype[Any]:
        """What a table has of a view, in its bytes."""
        if self.kept is None:
            return np.dtype((DTYPES[self.dtype], (self.classes,)))
        numbers = np.dtype("<u2" if self.classes <= 2**16 else "<u4")
        return np.dtype(
            [("rest", "<f4"), ("logits", DTYPES[self.dtype], (self.kept,)), ("classes", numbers, (self.kept,))]
        )

    def pack(self, logits: Array, targets: Array | None) -> tuple[Array, Array]:
        """Turn logits (B, C) float32 into contents (B, …) of `type`; returns them, and which of them hold theirs (B,).

        targets: the classes (B,) that are kept in any case, if not all are. float16 cannot hold logits above 65,504;
        if some are kept, infinite logits cannot be held either.
        """
        dtype = DTYPES[self.dtype]
        if self.kept is None or targets is None:
            with np.errstate(over="ignore"):
                stored = logits.astype(dtype)
            return stored, (np.isinf(stored) == np.isinf(logits)).all(1)
        content = np.zeros(len(logits), self.type)
        ranked = logits.copy()
        ranked[np.arange(len(logits)), targets] = np.inf
        order = np.argsort(-ranked, axis=1, kind="stable")
        kept, others = order[:, : self.kept], order[:, self.kept :]
        with np.errstate(over="ignore", invalid="ignore"):
            content["logits"] = np.take_along_axis(logits, kept, 1)
            rest = np.take_along_axis(logits, others, 1).astype(np.float64) / self.temperature
            top = rest.max(1, keepdims=True)
            content["rest"] = self.temperature * (top[:, 0] + np.log(np.exp(rest - top).mean(1)))
        content["classes"] = kept
        held = np.isfinite(content["logits"]).all(1) & np.isfinite(content["rest"]) & np.isfinite(logits).all(1)
        return content, held

    def unpack(self, content: Array) -> Array:
        """Return the logits (B, C) float32 that contents (B, …) stand for."""
        if self.kept is None:
            return content.astype(np.float32)
        logits = np.repeat(content["rest"][:, None], self.classes, 1)
        np.put_along_axis(logits, content["classes"].astype(np.int64), content["logits"].astype(np.float32), 1)
        return logits

    def of_kept(self, content: Array, logits: Array) -> Array:
        """Choose, of logits (B, C), those of the classes that contents (B, …) keep: (B, K), or all."""
        if self.kept is None:
            return logits
        return np.take_along_axis(logits, content["classes"].astype(np.int64), 1)
