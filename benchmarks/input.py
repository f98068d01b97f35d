"""Reading images as large as ImageNet's, in images a second of one core: PIL's way, bytes, and shrunk files.

    python benchmarks/input.py [--images 64] [--rounds 9] [--write PATH.md]

Synthetic JPEGs (500 x 375, quality 90, 4:2:0; smooth patches with noise) go through a training loader's work for each,
from the file to what leaves the worker: read, decode, random crop and flip, and with PIL also ToTensor and Normalize.
What bytes leave to the device is timed as a row of its own: the normalisation of a batch, on the device of this
machine. "shrunk" are the same files after `deepkd shrink`. Rows take the images in turn, by one thread of one process.

The defaults take about 10 seconds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import medians_in_turn, report
from PIL import Image
from torchvision import transforms
from yacs.config import CfgNode

from deepkd_plugin import device
from deepkd_plugin.commands import shrink
from deepkd_plugin.data import Source, source
from deepkd_plugin.data.arrays import Training
from deepkd_plugin.data.folders import visible_files
from deepkd_plugin.data.normalise import Normalise
from deepkd_plugin.terminal import Parser, count, guarded

SIZE, QUALITY = (500, 375), 90
PLAIN = {
    "augmentation": (transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()),
    "resizing": (transforms.Resize(256), transforms.CenterCrop(224)),
}
"""Of PIL images, as mdistiller has them."""


def write_images(folder: Path, number: int) -> None:
    rng = np.random.default_rng(0)
    width, height = SIZE
    for i in range(number):
        patches = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(patches).resize(SIZE, Image.Resampling.BICUBIC)).astype(int)
        pixels = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04}.jpeg", quality=QUALITY, subsampling="4:2:0")


def samples(imagenet: Source, folder: Path, training: bool) -> Any:
    """Make the samples of a loader over a folder's files: of training, or of tests."""
    files = sorted(visible_files(folder))
    read = replace(imagenet, read=lambda root, split: (files, np.zeros(len(files), int)))
    node = CfgNode({"ROOT": str(folder), "TYPE": "imagenet", "DOWNLOAD": False})
    if not training:
        return read.load(node, "test", read.test_transform())
    return Training(read.load(node, "train"), np.arange(len(files)), read.training_views(1), 0)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=count, default=64, help="files, and images of a reading of the clock (64)")
    parser.add_argument("--rounds", type=count, default=9, help="readings of each row (9)")
    parser.add_argument("--write", type=Path, help="Markdown file to write; a .json is written beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ours = source("imagenet")
    ways = {"PIL, floats": replace(ours, **PLAIN), "bytes": ours}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "images"
        plain.mkdir()
        write_images(plain, args.images)
        with redirect_stdout(StringIO()):
            shrink.main([str(plain)])
        folders = {"as they are": plain, "shrunk": plain.with_name(f"images-{shrink.SIDE}")}
        rows, steps = {}, {}
        for use, training in (("training", True), ("test", False)):
            for files, place in folders.items():
                for way, imagenet in ways.items():
                    made = samples(imagenet, place, training)
                    steps[f"{use}, {files}, {way}"] = partial(_read, made)
                    rows[f"{use}, {files}, {way}"] = {"use": use, "files": files, "way": way}
        batch = torch.randint(256, (args.images, 3, ours.side, ours.side), dtype=torch.uint8).to(device.pick())
        steps["normalise"] = partial(Normalise(ours.mean, ours.std, device.pick()), batch)
        rows["normalise"] = {"use": "both", "files": "–", "way": "bytes, normalised on the device"}
        times = medians_in_turn(steps, args.rounds, warmup=1)
    table = []
    for name, about in rows.items():
        milliseconds = times[name] / args.images
        reference = times.get(f"{about['use']}, as they are, PIL, floats")
        ratio = reference / times[name] if reference else "–"
        table.append(about | {"ms an image": milliseconds, "images/s": 1e3 / milliseconds, "to PIL": ratio})
    width, height = SIZE
    what = f"{args.images} JPEGs of {width} x {height}, quality {QUALITY}"
    report(f"Images read by one core: {what}, medians of {args.rounds} in turn", table, args.write)


def _read(samples: Any) -> None:
    for i in range(len(samples)):
        samples[i]


if __name__ == "__main__":
    sys.exit(guarded(main))
