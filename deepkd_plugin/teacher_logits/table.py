"""The file of a table: one record for each view of each image, which is believed only if its checksum fits.

    header, 4096 bytes   a magic line, crc32 of all the rest of the header, the key as JSON, zeros
    records              crc32 (4 bytes, little-endian; 0: not there yet) and a view's logits as record.py has them,
                         image by image, view by view

A record is written by one call. Its checksum covers the header's and the record's place too, so one that is half
written, damaged, or of another place or table does not fit, and counts as one that is not there. That is why any number
of processes may fill a table at once without a lock, and an interruption leaves no wrong logit. The file is sparse:
what was not written yet takes no space. It is read and written by calls, not mapped into memory: of a full disk or a
truncated file a call says so, where a mapping would end the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, shown
from .record import Array, Record

FORMAT = 2
"""Of the file; a reader refuses a higher one. Tables of views that are counted are of format 1."""

SUFFIX = ".logits"
MAGIC = b"deepkd teacher logits\n"
HEADER = 4096
CHECK = 4
"""Bytes of the header, and of a record's checksum."""


@dataclass(frozen=True)
class Key:
    """What a table's logits are of; tables that differ in any of it are different files."""

    network: str
    """DISTILLER.TEACHER."""
    teacher: str
    """Fingerprint of its weights."""
    dataset: str
    """DATASET.TYPE."""
    images: str
    """Fingerprint of the training images' pixels, in their order."""
    count: int
    """How many these are."""
    views: int
    """How many views an image has."""
    view: str
    """How they are made of it."""
    classes: int
    precision: str
    """What the teacher computes in: float32, bfloat16 or float16."""
    dtype: str
    """What its logits are kept in: a key of record.DTYPES."""
    seed: int | None = None
    """Which seed's first epochs the views are those of; None: all views that there are."""
    kept: int | None = None
    """How many classes a view's logits are kept of; None: all."""
    temperature: float | None = None
    """At which the probability of the others in sum is kept."""

    def content(self) -> dict[str, Any]:
        """Return what the key says, as the header has it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def name(self) -> str:
        """The file's name in a folder of tables."""
        digest = hashlib.sha256(json.dumps(self.content()).encode()).hexdigest()[:12]
        return f"{self.dataset}-{self.network}-{digest}{SUFFIX}"

    @property
    def form(self) -> Record:
        """What a record has behind its checksum."""
        return Record(self.classes, self.dtype, self.kept, self.temperature or 1.0)

    @property
    def record(self) -> int:
        """Bytes of a record."""
        return CHECK + self.form.type.itemsize

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return HEADER + self.count * self.views * self.record

    def header(self) -> bytes:
        """Return the file's header."""
        rest = json.dumps({"format": 1 if self.seed is None else FORMAT} | self.content()).encode()
        rest = rest.ljust(HEADER - len(MAGIC) - CHECK, b"\0")
        return MAGIC + _checksum(rest) + rest

    def differences(self, other: Key) -> str:
        """Say in what another key differs from this one: the other's value, then ours."""
        pairs = [(field.name, getattr(other, field.name), getattr(self, field.name)) for field in fields(Key)]
        return ", ".join(
            f"{name} is {shown(theirs)}, not {shown(ours)}" for name, theirs, ours in pairs if theirs != ours
        )


class Damaged(Exception):  # noqa: N818 (a table's state; the caller decides what it means)
    """A file is no whole header of a table; the message says in which way."""


class Count(NamedTuple):
    """How many records a table has, and in what state they are."""

    all: int
    there: int
    damaged: int


class Table:
    """An open table: `read` and `write` logits by the places of images and their views; close it at the end."""

    def __init__(self, path: Path, key: Key, descriptor: int, writable: bool) -> None:
        self.path, self.key, self.writable = path, key, writable
        self._file = descriptor
        self._salt = zlib.crc32(key.header())
        self.damaged = 0
        """Records that were read so far and had a checksum that does not fit."""

    @classmethod
    def open(cls, path: Path) -> Table:
        """Open a table to read it, whatever it is of. Raises Damaged, OSError, and UserError for a newer format."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return cls(path, read_key(path, os.pread(descriptor, HEADER, 0)), descriptor, writable=False)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def make(cls, place: Path, key: Key) -> Table:
        """Open the table of a key, and make its file if there is none: `place`, or in the folder of that name.

        A table that cannot be written is opened to read it. Raises UserError for a file of another key or a newer
        format, and if a new one has no room on the disk; Damaged; and OSError for what the system refuses.
        """
        place_is_table = place.suffix == SUFFIX and not place.is_dir()
        path = place if place_is_table else place / key.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _check_room(path, key)
        writable = os.access(path if path.exists() else path.parent, os.W_OK)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY, 0o666)
        try:
            with _locked(descriptor) if writable else contextlib.nullcontext():
                block = os.pread(descriptor, HEADER, 0)
                if writable and not block.strip(b"\0"):  # new, or its making was interrupted
                    os.ftruncate(descriptor, key.size)
                    block = key.header()
                    os.pwrite(descriptor, block, 0)
            held = read_key(path, block)
            if held != key:
                raise UserError(
                    f"{path}: DISTILLER.LOGITS_DIR has a table of other logits ({key.differences(held)}); name a folder"
                )
            return cls(path, key, descriptor, writable)
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        os.close(self._file)

    def read(self, images: Array, views: Array) -> tuple[Array, Array]:
        """Return contents (B, …) of the key's form, and which of them are there (B,) bool; the others are 0.

        images, views: int64 (B,), the places of images in the set and of views among an image's.
        """
        record = self.key.record
        rows = np.zeros((len(images), record), np.uint8)
        there = np.zeros(len(images), bool)
        for row, place in enumerate((images * self.key.views + views).tolist()):
            with contextlib.suppress(OSError):  # a record that cannot be read is one that is not there
                if os.preadv(self._file, [rows[row]], HEADER + place * record) == record:
                    there[row] = self._fits(place, rows[row].data)
        rows[~there] = 0
        return np.frombuffer(rows[:, CHECK:].tobytes(), self.key.form.type), there

    def write(self, images: Array, views: Array, contents: Array) -> None:
        """Put contents (B, …) of the key's form at their places. Raises OSError, for example on a full disk."""
        contents = contents.astype(self.key.form.type.base)
        for place, row in zip((images * self.key.views + views).tolist(), contents):
            content = row.tobytes()
            os.pwrite(self._file, self._check(place, content) + content, HEADER + place * self.key.record)

    def share(self, sample: int = 4000) -> float:
        """Estimate which share of the records is there, from some that are drawn; of few all are looked at."""
        total = self.key.count * self.key.views
        places = range(total) if total <= sample else np.random.default_rng(0).integers(total, size=sample).tolist()
        starts = (os.pread(self._file, CHECK, HEADER + place * self.key.record) for place in places)
        return sum(bool(start.strip(b"\0")) for start in starts) / len(places)

    def counts(self) -> Iterator[Count]:
        """Read the whole table, image by image, and yield the counts so far."""
        views, record = self.key.views, self.key.record
        there = damaged = 0
        for image in range(self.key.count):
            first = image * views
            block = os.pread(self._file, views * record, HEADER + first * record).ljust(views * record, b"\0")
            if block.strip(b"\0"):
                before = self.damaged
                rows = (memoryview(block)[view * record : (view + 1) * record] for view in range(views))
                there += sum(self._fits(first + view, row) for view, row in enumerate(rows))
                damaged += self.damaged - before
            yield Count((image + 1) * views, there, damaged)

    def _fits(self, place: int, row: memoryview) -> bool:
        check = bytes(row[:CHECK])
        if check == bytes(CHECK):
            return False
        fits = check == self._check(place, row[CHECK:])
        self.damaged += not fits
        return fits

    def _check(self, place: int, content: bytes | memoryview) -> bytes:
        return _checksum(content, zlib.crc32(place.to_bytes(8, "little"), self._salt))


def read_key(path: Path, block: bytes) -> Key:
    """Read the key in a table's header; Damaged if that is none, UserError if it is of a newer format."""
    check, rest = block[len(MAGIC) : len(MAGIC) + CHECK], block[len(MAGIC) + CHECK :]
    if len(block) != HEADER or not block.startswith(MAGIC) or check != _checksum(rest):
        raise Damaged(f"{path}: is no table of teacher logits, or its header is damaged")
    content = json.loads(rest.rstrip(b"\0"))
    if (number := content.pop("format")) > FORMAT:
        raise UserError(
            f"{path}: is a table of teacher logits of format {number}, and this version reads up to {FORMAT}; use the "
            f"version that made it, or another folder"
        )
    return Key(**content)


def _checksum(content: bytes | memoryview, start: int = 0) -> bytes:
    """Return a crc32 as its bytes, and never 0, which stands for a record that is not there."""
    return (zlib.crc32(content, start) or 1).to_bytes(CHECK, "little")


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    """Keep other processes from making the same file meanwhile."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _check_room(path: Path, key: Key) -> None:
    free = shutil.disk_usage(path.parent).free
    if key.size > free:
        raise UserError(
            f"{path}: the table of teacher logits takes up to {gigabytes(key.size)}, and the disk has "
            f"{gigabytes(free)} left; set DISTILLER.LOGITS_DIR to another, or DISTILLER.TEACHER_LOGITS to compute"
        )


def gigabytes(size: int) -> str:
    """Say a number of bytes in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
