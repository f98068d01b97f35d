"""`deepkd shrink`: a folder of images once more, so small that a loader need not shrink them in every epoch."""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torchvision.transforms.functional import resize

from ..data.folders import is_image, rgb, visible_files
from ..errors import UserError, shown
from ..run import checkpoint
from ..run.lock import FILE as LOCK
from ..run.lock import locked
from ..run.progress import EpochBar
from ..study.shared import cores
from ..teacher_logits.table import gigabytes
from ..terminal import Parser, check_interruption, count

SIDE, QUALITY = 256, 90
NOTE = ".shrink.json"
"""The file in OUT that says what its images were made of, and how; hidden, so no reader takes it for data."""
ORIENTATION = 0x0112
"""EXIF's tag; nothing else of a file's metadata is kept."""


class Done(NamedTuple):
    """What became of an image: "resized", "as it was", "kept" (from before), or nothing and why; its bytes."""

    what: str
    before: int
    after: int
    problem: str = ""


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code: 2 if an image could not be read, which keeps no other from OUT."""
    parser = Parser(
        "deepkd shrink",
        description="Resize every image below DIR to a short side of --side pixels, into a new folder with the same "
        "names. Smaller images stay as they are. JPEGs are written with 4:2:0 subsampling, all others as PNG. The same "
        "command goes on after an interruption.",
        examples=("imagenet/train --side 256",),
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--to", metavar="OUT", type=Path, help="default: DIR-SIDE, beside DIR")
    parser.add_argument("--side", type=count, default=SIDE, help=f"pixels of the short side (default {SIDE})")
    parser.add_argument("--quality", type=count, default=QUALITY, help=f"of JPEGs, 1 to 100 (default {QUALITY})")
    parser.add_argument("--workers", type=count, default=cores(), help="processes (default: one for each core)")
    args = parser.parse(words)
    if args.quality > 100:
        parser.error(f"--quality is {args.quality}; it must be at most 100")
    folder = args.folder.resolve()
    if not folder.is_dir():
        raise UserError(f"{args.folder}: no such folder; DIR must hold images")
    out = (args.to or folder.with_name(f"{folder.name}-{args.side}")).resolve()
    if out.is_relative_to(folder):
        raise UserError(f"{out}: is in DIR, {folder}; --to must name a folder outside it")
    return _shrink(folder, out, args.side, args.quality, args.workers)


def _shrink(folder: Path, out: Path, side: int, quality: int, workers: int) -> int:
    try:
        files = visible_files(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be looked through ({error.strerror})") from None
    images = [os.path.relpath(path, folder) for path in files if is_image(path)]
    if not images:
        raise UserError(f"{folder}: holds no image")
    print(f"{folder}: {len(images):,} images to {out}, short side {side}, JPEG quality {quality}")
    with locked(out, remove=True):
        _claim(out, {"from": str(folder), "side": side, "quality": quality})
        for place in {(out / name).parent for name in images}:
            place.mkdir(parents=True, exist_ok=True)
            for path, *_ in checkpoint.temporaries(place):  # of processes that were killed
                path.unlink(missing_ok=True)
        results = {what: [0, 0, 0] for what in ("resized", "as it was", "kept", "")}
        made = _in_processes(partial(_make, folder, out, side, quality), images, workers)
        with EpochBar(f"{folder.name} to {side}", len(images)) as bar, contextlib.closing(made):
            for number, (name, done) in enumerate(zip(images, made), 1):
                if done.problem:
                    print(f"{folder / name}: cannot be read ({done.problem})", file=sys.stderr)
                results[done.what] = [a + b for a, b in zip(results[done.what], (1, done.before, done.after))]
                if number % 50 == 0:
                    bar.update(number, "")
    unread = results.pop("")[0]
    there, before, after = (sum(column) for column in zip(*results.values()))
    parts = ", ".join(f"{number:,} {what}" for what, (number, *_) in results.items())
    print(
        f"{out}: {there:,} images ({parts}), {gigabytes(before)} before, {gigabytes(after)} now; "
        f"{len(files) - len(images):,} other files left out"
    )
    if unread:
        raise UserError(f"{folder}: {unread:,} images cannot be read, as told above; {out} has all others")
    return 0


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write into OUT what it is for; UserError if it is for something else, or has what nobody has claimed."""
    note = out / NOTE
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        foreign = sorted(name for name in os.listdir(out) if name != LOCK and not name.startswith("."))
        if foreign:
            raise UserError(f"{out}: holds {shown(foreign[0])}; OUT must be new or empty (--to)") from None
        checkpoint.write_text(note, json.dumps(settings) + "\n")
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{note}: must be what deepkd shrink wrote ({error}); take another OUT (--to)") from None
    if before != settings:
        keys = settings.keys() if isinstance(before, dict) else ()
        differs = ", ".join(
            f"{key} was {shown(before.get(key))}, is {settings[key]!r}"
            for key in keys
            if before.get(key) != settings[key]
        )
        raise UserError(f"{out}: its images were made otherwise ({differs or 'unknown'}); take another OUT (--to)")


def _in_processes(work: Any, names: Sequence[str], workers: int) -> Generator[Done, None, None]:
    """Yield work(name) of all names, in their order. Whatever ends this, no process stays behind."""
    pool = ProcessPoolExecutor(workers, initializer=_begin)
    try:
        yield from pool.map(work, names, chunksize=min(16, -(-len(names) // workers)))
    except BrokenProcessPool:
        check_interruption()
        raise UserError(
            "a process was killed; if memory was short, --workers must be lower; the same command goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Let a process of the pool end with its parent, and not by Ctrl-C in the middle of an image."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _make(folder: Path, out: Path, side: int, quality: int, name: str) -> Done:
    """Make one image of OUT, whole or not at all, unless it is there."""
    source, target = folder / name, out / name
    before = source.stat().st_size
    with contextlib.suppress(FileNotFoundError):
        if size := target.stat().st_size:
            return Done("kept", before, size)
    try:
        with Image.open(source) as file:
            kind = "JPEG" if file.format in ("JPEG", "MPO") else "PNG"
            image = file.copy() if file.mode == "L" else rgb(file)
            turned = _orientation(file)
    except Exception as error:  # a damaged image can raise nearly anything
        return Done("", before, 0, " ".join(f"{error}".split()) or type(error).__name__)
    if min(image.size) <= side:
        _same(source, target)
        return Done("as it was", before, before)
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    options = {"quality": quality, "subsampling": "4:2:0"} if kind == "JPEG" else {}
    kept = {} if turned == 1 else {"exif": exif}
    small = resize(image, [side])  # as a test's Resize: means of pixels, and the long side rounded down
    checkpoint.write_whole(target, lambda file: small.save(file, kind, **options, **kept))
    return Done("resized", before, target.stat().st_size)


def _orientation(image: Image.Image) -> int:
    """Return how other readers turn an image; ours take it as it is stored."""
    with contextlib.suppress(Exception):  # whatever the metadata is, the pixels are good
        turned = image.getexif().get(ORIENTATION, 1)
        return turned if turned in range(1, 9) else 1
    return 1


def _same(source: Path, target: Path) -> None:
    """Put a file at another place too: as a link to its content, or as a copy if the file system has no such link."""
    real = os.path.realpath(source)
    try:
        target.unlink(missing_ok=True)  # an empty one
        os.link(real, target)
    except OSError:
        checkpoint.write_whole(target, lambda file: file.write(Path(real).read_bytes()))
