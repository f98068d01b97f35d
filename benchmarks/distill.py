"""`deepkd distill` on made JPEGs, from an empty folder to its last line: how long it takes, what the teacher gains.

    python benchmarks/distill.py [--seeds 0 1 2] [--add FILE.json …] [--epochs 20] [--images 40] [--write PATH.md]

12 letters that resemble each other, in 16 fonts, turned, sized and coloured at random on textured ground with noise,
are written as JPEGs of 40 to 96 pixels a side: the same files for all seeds. Networks see 16 pixels of a side, so that
three runs and their tests take less than three minutes. For each seed the command is a process of its own that trains a
resnet14, a resnet8 that it teaches by DeepKD, and a resnet8 alone. "seconds" are the process's whole life, "seconds of
processor" what it and its loaders computed, of all cores together; what the machine had to do beside it is told by the
load of the last minute before it began; that after it has its own part in it. Top-1 in percent on the test images,
after the last epoch.

The defaults take some minutes on 2 cores of which nobody else wants anything.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Rows, machine, report
from PIL import Image

from deepkd_plugin.commands.distill import ALONE, TEACHER
from deepkd_plugin.data.glyphs import ASPECT, FONTS, NOISE, ROTATION, TEXTURE, colours, glyph_masks, textures
from deepkd_plugin.errors import UserError
from deepkd_plugin.run import record
from deepkd_plugin.terminal import Parser, count, guarded

CHARACTERS = "BCDEFGOPQRSU"
SIDES = (40, 96)
"""Pixels of a side, at least and at most."""

SHARE = (0.6, 0.9)
"""Of a glyph in the image's shorter side."""

SHIFT = 0.06
"""Of the shorter side: how far a glyph is off the centre, at most, either way."""

METHOD = "deepkd"
NETWORKS = ("--student", "resnet8", "--train-teacher", "resnet14", "--method", METHOD, "--compare")
SIZES = ("--size", "16", "--batch", "32")
OPTIONS = ("INPUT.FLIP", "0.0", "INPUT.CROP_AREA", "[0.5, 1.0]")
"""A mirrored letter is another one, and so may be a small part of one."""


def draw(rng: np.random.Generator, mask: Image.Image) -> Image.Image:
    """Draw an image of a glyph, of any size."""
    width, height = (int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, 2))
    short = min(width, height)
    side = rng.uniform(*SHARE) * short
    stretch = rng.uniform(*ASPECT) ** 0.5
    turned = mask.rotate(rng.uniform(-ROTATION, ROTATION), Image.Resampling.BILINEAR)
    glyph = turned.resize((max(1, round(side * stretch)), max(1, round(side / stretch))), Image.Resampling.BILINEAR)
    canvas = Image.new("L", (width, height))
    place = np.subtract((width, height), glyph.size) / 2 + rng.uniform(-SHIFT, SHIFT, 2) * short
    canvas.paste(glyph, tuple(place.round().astype(int).tolist()))
    ink = np.asarray(canvas)[:, :, None] / 255
    ground = rng.uniform(0.1, 0.9, (1, 3))
    image = ground + textures(rng, 1, max(width, height))[0, :height, :width] * rng.uniform(*TEXTURE)
    image = image + ink * (colours(rng, ground)[0] - image) + rng.normal(size=image.shape) * rng.uniform(*NOISE)
    return Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))


def write_images(folder: Path, per_class: int) -> None:
    """Write folder/{train,val}/<letter>/<number>.jpg."""
    rng = np.random.default_rng(0)
    masks, _ = glyph_masks(CHARACTERS, FONTS)
    for part in ("train", "val"):
        for label, character in enumerate(CHARACTERS):
            below = folder / part / character
            below.mkdir(parents=True)
            for i in range(per_class):
                image = draw(rng, masks[label][rng.integers(len(FONTS))])
                image.save(below / f"{i:03}.jpg", quality=int(rng.integers(60, 96)))


def words(images: Path, out: Path, epochs: int, seed: int) -> list[str]:
    """Return the command's words behind `deepkd`."""
    pairs = (*OPTIONS, "SOLVER.SEED", str(seed))
    return ["distill", "--images", str(images), *NETWORKS, *SIZES, "--epochs", str(epochs), "--out", str(out), *pairs]


def measure(images: Path, work: Path, epochs: int, seed: int) -> dict[str, Any]:
    """Run the command in a folder that has nothing else; returns its row. UserError if it fails."""
    out, load = work / f"seed{seed}", os.getloadavg()[0]
    before, start = _processor_seconds(), time.perf_counter()
    # the built-in networks: mdistiller's take no images of 16 pixels
    environment = {name: value for name, value in os.environ.items() if name != "MDISTILLER_ROOT"}
    done = subprocess.run(
        [sys.executable, "-m", "deepkd_plugin", *words(images, out, epochs, seed)],
        cwd=work,
        env=environment,
        text=True,
        capture_output=True,
    )
    seconds, used = time.perf_counter() - start, _processor_seconds() - before
    if done.returncode:
        raise UserError(f"deepkd distill: ended with code {done.returncode} ({done.stderr.strip()})")
    results = {name: record.read_run(out / name)["result"] for name in (TEACHER, METHOD, ALONE)}
    row: dict[str, Any] = {"seed": seed, "seconds": seconds, "seconds of processor": used, "load before": load}
    row["load after"] = os.getloadavg()[0]
    row |= {name: results[name]["last"] for name in results}
    row |= {"gain": results[METHOD]["last"] - results[ALONE]["last"]}
    for name, result in results.items():
        row |= {f"{name}, best": result["best"], f"{name}, best epoch": result["best_epoch"]}
    return row | {"gain, best": results[METHOD]["best"] - results[ALONE]["best"]}


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summary(rows: Rows) -> Rows:
    """Return mean and standard deviation (n - 1) over the seeds, of the last epoch and of the best."""
    parts = []
    for name in (TEACHER, METHOD, ALONE, "gain"):
        part: dict[str, Any] = {"top-1": name, "n": len(rows)}
        for epoch, column in (("last", name), ("best", f"{name}, best")):
            values = [row[column] for row in rows]
            part[f"{epoch} epoch"] = statistics.fmean(values)
            part[f"± of the {epoch}"] = statistics.stdev(values) if len(values) > 1 else "–"
        parts.append(part)
    return parts


def added(files: Sequence[Path], title: str, settings: Mapping[str, str]) -> Rows:
    """Return the rows of earlier calls; UserError for a file that is none, or was set up otherwise, or elsewhere."""
    rows: Rows = []
    for file in files:
        try:
            record = json.loads(file.read_text())
            found = {"title": record["title"], "settings": record["settings"], "machine": record["machine"]}
            rows += record["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: --add must name what an earlier call wrote ({error})") from None
        here = {"title": title, "settings": dict(settings), "machine": machine()}
        other = [name for name in here if found[name] != here[name]]
        if other:
            raise UserError(f"{file}: --add names a record with another {other[0]}; all must be of one call's")
    return rows


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="records (.json) of calls for other seeds")
    parser.add_argument("--epochs", type=count, default=20, help="of each run (20)")
    parser.add_argument("--images", type=count, default=40, help="of each class to train on, and to test on (40)")
    parser.add_argument("--write", type=Path, help="Markdown file to write; a .json is written beside it")
    args = parser.parse_args()
    command = shlex.join(["deepkd", *words(Path("images"), Path("out"), args.epochs, 0)]).replace("SEED 0", "SEED N")
    number, classes = len(CHARACTERS) * args.images, len(CHARACTERS)
    title = f"`deepkd distill` on made JPEGs of {classes} classes, {number:,} to train on and as many to test on"
    title += ", from an empty folder"
    settings = {"command": f"`{command}`", "threads": str(torch.get_num_threads())}
    rows = added(args.add, title, settings)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_images(work / "images", args.images)
        for seed in args.seeds:
            rows.append(measure(work / "images", work, args.epochs, seed))
            print(f"seed {seed}: {rows[-1]['seconds']:.0f} s, gain {rows[-1]['gain']:+.2f}", file=sys.stderr)
    report(title, sorted(rows, key=lambda row: row["seed"]), args.write, settings, summary(rows))


if __name__ == "__main__":
    sys.exit(guarded(main))
