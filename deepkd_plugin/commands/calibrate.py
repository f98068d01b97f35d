"""`deepkd calibrate`: how many non-target classes a mask should keep, by the teacher's logits alone."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from ..config.shipped import find_config
from ..errors import UserError
from ..terminal import Parser
from ..topk import classes, count_classes, non_target_index

MASS = 0.9
FRACTIONS = (0.05, 0.1, 0.25, 0.5, 0.75)
"""Of the non-target classes: the K whose share is printed beside K*'s."""
OTHERWISE = ("RLD", "WTTM")
"""The bases whose non-target term has other probabilities than the softmax of the logits."""


class Calibration(NamedTuple):
    """What a pass over the training images found."""

    images: int
    held: np.ndarray
    """(C − 1,): the share of the teacher's non-target mass that a sample's K largest classes hold on average, by K."""
    each: np.ndarray
    """(images,): the smallest K of each sample that holds the asked share."""
    optimal: int
    """K*: the smallest K that holds the asked share on average."""
    right: float
    """The share of the images about which the teacher is right: a file of other classes shows in it."""


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd calibrate",
        description="Ask the teacher about every training image once, and choose DeepKD.MASK.OPTIMAL, K*: the smallest "
        "number of non-target classes that hold a share of the teacher's non-target mass, on average over the images. "
        "No student is trained and no test image is read.",
        examples=(
            "--cfg glyphs100/res20_res8/deepkd",
            "--cfg glyphs100/res20_res8/deepkd --mass 0.95 --write calibrated.yaml",
        ),
    )
    parser.add_argument("--cfg", metavar="FILE", required=True, help="the config of a run with DISTILLER.TYPE DeepKD")
    parser.add_argument("--mass", type=float, default=MASS, help=f"the share, above 0 and below 1 (default {MASS})")
    parser.add_argument(
        "--write", metavar="FILE", type=Path, help="write the config with K* in it; no file is replaced"
    )
    parser.add_pairs()
    args = parser.parse(words)
    if not 0.0 < args.mass < 1.0:
        parser.error(f"--mass is {args.mass:g}; it must be above 0 and below 1")
    if args.write and args.write.exists():
        parser.error(f"--write: {args.write} is there, and stays; name another")
    return _calibrate(find_config(args.cfg), args.options, args.mass, args.write)


def _calibrate(file: str, options: Sequence[str], mass: float, write: Path | None) -> int:
    from .. import config, launch
    from ..config import file as config_file
    from ..hosts.registry import find_host
    from ..run import checkpoint

    host = find_host()
    cfg, _ = launch.read_config(host, file, options)
    if cfg.DISTILLER.TYPE != "DeepKD":
        raise UserError(f"{file}: DISTILLER.TYPE is {cfg.DISTILLER.TYPE!r}; it must be 'DeepKD', which has a mask")
    temperature = config.temperature(cfg)
    if temperature is None or cfg.DeepKD.BASE in OTHERWISE or config.modified(cfg):
        reason = config.modified(cfg) or f"DeepKD.BASE {cfg.DeepKD.BASE}"
        raise UserError(f"{file}: with {reason} the mask does not weigh the softmax of the logits at one temperature")
    found = calibrate(_batches(host, cfg), temperature, mass)
    print(
        f"teacher   {config.teacher_name(cfg)} at temperature {temperature:g}; {found.images:,} training images, and "
        f"it is right about {found.right:.1%} of them"
    )
    print(_told(found, mass))
    if found.optimal < 2:
        raise UserError(f"{file}: a mask of 1 class leaves NCKD nothing to compare; --mass above {mass:g} keeps more")
    pairs = ["DeepKD.MASK.TYPE", "dynamic", "DeepKD.MASK.OPTIMAL", str(found.optimal)]
    if count_classes(classes(cfg.DeepKD.MASK.INITIAL), len(found.held) + 1) > found.optimal:
        pairs += ["DeepKD.MASK.INITIAL", str(found.optimal)]  # a mask does not shrink
    words = [*options, *pairs]
    if write is None:
        print(f"next      {shlex.join(['deepkd', 'train', '--cfg', file, *words])}")
        return 0
    chosen, tree = launch.read_config(host, file, words)[0], config_file.read(file)
    for key in words[::2]:
        config_file.put(tree, key, config.get(chosen, key))
    head = f"# K* is the least K that holds {mass:.0%} of the teacher's non-target mass: deepkd calibrate.\n"
    checkpoint.write_text(write, head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    print(f"next      {shlex.join(['deepkd', 'train', '--cfg', str(write)])}")
    return 0


def _told(found: Calibration, mass: float) -> str:
    """Say what was found, with other K beside K*."""
    number = len(found.held)
    others = sorted({min(max(1, round(part * number)), number) for part in FRACTIONS} - {found.optimal})
    low, middle, high = np.quantile(found.each, (0.1, 0.5, 0.9), method="inverted_cdf")
    return (
        f"K*        {found.optimal} of {number} non-target classes hold {found.held[found.optimal - 1]:.1%} of the "
        f"mass on average (asked: {mass:.1%})\n"
        f"others    {', '.join(f'{k} hold {found.held[k - 1]:.1%}' for k in others)}\n"
        f"samples   a tenth needs at most {low}, half {middle}, nine tenths {high}; DeepKD.MASK.TYPE top_p gives each "
        f"its own K"
    )


def _batches(host: Any, cfg: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the teacher's logits and the labels of every training image, in the weak view of the first epoch."""
    from .. import data, device
    from ..hosts.networks import teacher_network
    from ..run.progress import EpochBar

    device.tune(cfg.SOLVER.DETERMINISTIC)
    at = device.pick()
    loader = data.get_dataset(cfg)[0]
    teacher = teacher_network(host, cfg, data.num_classes(cfg)).to(at).eval()
    with EpochBar("training images", len(loader)) as bar, torch.inference_mode():
        for number, (image, target, *_) in enumerate(loader, 1):
            weak = image if isinstance(image, Tensor) else image[0]
            yield teacher(weak.to(at))[0], target.to(at)
            bar.update(number, "")


def calibrate(batches: Iterable[tuple[Tensor, Tensor]], temperature: float, mass: float) -> Calibration:
    """Find K* from a teacher's logits (B, C) and labels (B,). mass: the share to hold, in (0, 1)."""
    total: Tensor | float = 0.0
    each, right = [], 0
    for logits, target in batches:
        rest = logits.double().gather(1, non_target_index(target, logits.shape[1]))
        shares = (rest / temperature).softmax(1).sort(1, descending=True).values
        held = shares.cumsum(1)
        total = total + held.sum(0)
        each.append(1 + (held[:, :-1] < mass).sum(1))
        right += int((logits.argmax(1) == target).sum())
    needed = torch.cat(each).cpu().numpy()
    held_by_k = (torch.as_tensor(total) / len(needed)).cpu().numpy()
    # all classes hold everything, whatever the sum of rounded shares
    optimal = int(min((held_by_k < mass).sum() + 1, len(held_by_k)))
    return Calibration(len(needed), held_by_k, needed, optimal, right / len(needed))
