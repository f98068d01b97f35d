"""`deepkd calibrate`: how many non-target classes a mask should keep, by the teacher's logits alone."""

import csv
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..config.shipped import find_config
from ..errors import UserError, shown
from ..study.calibration import MASS, Calibration, mask_options, measure
from ..terminal import Parser
from ..topk import classes, count_classes

FRACTIONS = (0.05, 0.1, 0.25, 0.5, 0.75)
"""Of the non-target classes: the K whose share is printed beside K*'s."""


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
    parser.add_argument(
        "--trials", metavar="FILE", type=Path, help="trials.csv of deepkd tune: also compare K* with what it chose"
    )
    parser.add_pairs()
    args = parser.parse(words)
    if not 0.0 < args.mass < 1.0:
        parser.error(f"--mass is {args.mass:g}; it must be above 0 and below 1")
    if args.write and args.write.exists():
        parser.error(f"--write: {args.write} is there, and stays; name another")
    return _calibrate(find_config(args.cfg), args.options, args.mass, args.write, args.trials)


def _calibrate(file: str, options: Sequence[str], mass: float, write: Path | None, trials: Path | None) -> int:
    from .. import config, launch
    from ..config import file as config_file
    from ..hosts.registry import find_host
    from ..run import checkpoint

    host = find_host()
    cfg, _ = launch.read_config(host, file, options)
    try:
        found, temperature = measure(cfg, mass)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    print(
        f"teacher   {config.teacher_name(cfg)} at temperature {temperature:g}; {found.images:,} training images, and "
        f"it is right about {found.right:.1%} of them"
    )
    print(_told(found, mass))
    if trials is not None:
        print(against(trials, Path(file).stem, cfg.DeepKD.MASK, found))
    words = [*options, *mask_options(cfg, found)]
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


def against(file: Path, method: str, mask: Any, found: Calibration) -> str:
    """Compare K* with the complete trials of a method that `deepkd tune` left in trials.csv.

    mask: the config's, for what a trial did not choose. A trial without a mask has all non-target classes. Told are the
    best trial's K, and Spearman's correlation of a trial's distance from K* with its held-out top-1: below 0 if trials
    near K* are the better ones. Raises UserError for another file, or one without such a trial.
    """
    number, tried = len(found.held), []
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if row["method"] == method and row["held_out"]:
                    given = dict(re.findall(r"DeepKD\.MASK\.(TYPE|K|OPTIMAL) (\S+)", row["options"]))
                    kind = given.get("TYPE", mask.TYPE)
                    share = {"static": given.get("K", mask.K), "dynamic": given.get("OPTIMAL", mask.OPTIMAL)}.get(kind)
                    kept = number if share is None else count_classes(classes(float(share)), number + 1)
                    tried.append((float(row["held_out"]), kept, kind))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--trials: {file} must be a trials.csv of deepkd tune ({shown(str(error))})") from None
    if not tried:
        raise UserError(f"--trials: {file} has no complete trial of {method}; it must be of this config")
    top, kept, kind = max(tried)
    apart = [abs(k - found.optimal) for _, k, _ in tried]
    line = f"tuned     the best of {len(tried)} trials keeps {kept} of {number} (mask {kind}, {top:.2f} % held out)"
    if len(set(apart)) < 2 or len({value for value, *_ in tried}) < 2:
        return line
    correlation = _spearman(apart, [value for value, *_ in tried])
    return f"{line};\n          rank correlation of a trial's distance from K* with its top-1: {correlation:+.2f}"


def _spearman(first: Any, second: Any) -> float:
    """Return the correlation of two lists' ranks, of equal values the mean rank."""

    def ranks(values: Any) -> Any:
        values = np.asarray(values)
        return [(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values]

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])
