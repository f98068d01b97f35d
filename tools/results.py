"""Write the pages of results/ from their templates, PAGE.md.jinja, and the measurements beside them.

python tools/results.py           writes the pages
python tools/results.py --check   writes nothing, shows what differs and exits 1 if anything does

Every number that was measured is an expression of a template, in tables and in sentences alike. The methods of Results
are the templates' vocabulary.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import jinja2
import yaml
from scipy.stats import ttest_ind

from deepkd_plugin.study.report.formats import p_value, signed

ROOT = Path(__file__).parents[1]
MOMENTA = ("none", "fixed", "gsnr")


class Results:
    """The measurements in a folder results/, as the pages write them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "results"
        self.gsnr_runs = json.loads((self.folder / "gsnr" / "runs.json").read_text(encoding="utf-8"))

    def cell(self, table: str, method: str, name: str) -> float:
        """Return a number of a table's report.csv."""
        rows = _rows(self.folder / table / "report.csv")
        return float(next(line[name] for line in rows if line["method"] == method))

    def top(self, table: str, method: str, name: str = "last") -> str:
        """Return the mean ± the standard deviation; name: the measure, of the last or of the best epoch."""
        return _spread(*(self.cell(table, method, f"{name}_{part}") for part in ("mean", "std")))

    def gain(self, table: str, method: str) -> str:
        """Return the gain of the last epoch over the base, with its interval."""
        middle, low, high = (signed(self.cell(table, method, f"last_gain{end}")) for end in ("", "_low", "_high"))
        return f"{middle} [{low}, {high}]"

    def p(self, table: str, method: str) -> str:
        """Return Holm's p of that gain."""
        return _p(self.cell(table, method, "last_holm_p"))

    def by(self, table: str, method: str, digits: int = 1) -> str:
        """Say how far the last epoch is from the base, without a sign."""
        return number(*self.gaps(table, method), digits)

    def gaps(self, table: str, *methods: str) -> list[float]:
        """Return how far these methods' last epochs are from their bases, without signs."""
        return [abs(self.cell(table, method, "last_gain")) for method in methods]

    def means(self, table: str, *methods: str) -> list[float]:
        """Return the mean of the last epoch for each of these methods."""
        return [self.cell(table, method, "last_mean") for method in methods]

    def runs(self, table: str, *methods: str) -> list[float]:
        """Return the last epochs of these methods' runs, in order of seeds."""
        rows = _rows(self.folder / table / "runs.csv")
        return [float(line["last"]) for name in methods for line in rows if line["method"] == name]

    def teacher(self, table: str, name: str = "teacher_acc") -> str:
        """Return the teacher's figure, the same in every run that has one."""
        (value,) = {line[name] for line in _rows(self.folder / table / "runs.csv")} - {""}
        return f"{float(value):.2f}"

    def difference(self, table: str, method: str, other: str) -> str:
        """Return the difference between two methods' runs, with the interval of Welch's test."""
        ours, theirs = self.runs(table, method), self.runs(table, other)
        low, high = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
        return f"{fmean(ours) - fmean(theirs):.2f} [{low:.2f}, {high:.2f}]"

    def welch_p(self, table: str, method: str, other: str) -> str:
        """Return the p of that test."""
        return _p(ttest_ind(self.runs(table, method), self.runs(table, other), equal_var=False).pvalue)

    def rate(self, folder: str, method: str) -> str:
        """Return the learning rate of a config file."""
        file = self.root / "configs" / folder / "res20_res8" / f"{method}.yaml"
        return f"{yaml.safe_load(file.read_text(encoding='utf-8'))['SOLVER']['LR']}"

    def tuned(self, file: str, method: str, rate: float) -> str:
        """Return what a learning rate gave; file: the list of the runs that looked for it."""
        return number(self._tried(file, method)[rate])

    def tuning(self, file: str, methods: Sequence[str]) -> str:
        """Write a table of what each learning rate gave, the best in bold."""
        tried = {method: self._tried(file, method) for method in methods}
        rates = sorted({rate for last in tried.values() for rate in last})
        lines = [row("method", *rates), "|---" * (1 + len(rates)) + "|"]
        for method, last in tried.items():
            best = max(last.values())
            texts = {rate: f"**{value:.2f}**" if value == best else number(value) for rate, value in last.items()}
            lines.append(row(method, *(texts.get(rate, "") for rate in rates)))
        return "\n".join(lines)

    def _tried(self, file: str, method: str) -> dict[float, float]:
        runs = json.loads((self.folder / file).read_text(encoding="utf-8"))
        return {run["lr"]: run["last"] for run in runs if run["method"] == method}

    def gsnr_teacher(self, data: str) -> float:
        """Return the teacher's top-1 in all runs on a data set."""
        (value,) = {run["teacher_acc"] for run in self.gsnr_runs if run["data"] == data}
        return value

    def gsnr_top(self, data: str, momenta: str, name: str = "last") -> str:
        """Return the mean ± the standard deviation of the last or the best epoch."""
        values = self._last(data, momenta, name)
        return _spread(fmean(values), stdev(values))

    def gsnr_range(self, data: str) -> str:
        """Say how far the means of the last epoch are apart."""
        means = [fmean(self._last(data, momenta)) for momenta in MOMENTA]
        return number(max(means) - min(means), 1)

    def gsnr_spreads(self, data: str) -> list[float]:
        """Return the standard deviations of the last epoch."""
        return [stdev(self._last(data, momenta)) for momenta in MOMENTA]

    def gsnr_median(self, data: str, momenta: str, *streams: str) -> str:
        """Return the medians of the ratio of sums over all windows."""
        windows = self._windows(data, momenta)
        return ", ".join(number(median(w["gsnr"][s]["ratio"] for w in windows), 3) for s in streams)

    def above(self, data: str, momenta: str, stream: str, other: str, summary: str = "ratio") -> int:
        """Count in how many windows one stream's GSNR is above the other's."""
        windows = self._windows(data, momenta)
        return sum(w["gsnr"][stream][summary] > w["gsnr"][other][summary] for w in windows)

    def count(self, data: str) -> int:
        """Count the windows the runs of a data set and of one setting have together."""
        return len(self._windows(data, "none"))

    def noise(self, summary: str) -> str:
        """Return the GSNR that noise alone gives in a window."""
        (value,) = {line[f"noise_{summary}"] for line in _rows(self.folder / "gsnr" / "glyphs100_none.csv")}
        return number(float(value), 3)

    def angles(self, data: str, momenta: str) -> str:
        """Return the medians over all windows of the angles TOG-TCG, TOG-NCG and TCG-NCG, in degrees."""
        windows = self._windows(data, momenta)
        return ", ".join(f"{median(w['angle'][pair] for w in windows):.0f}°" for pair in windows[0]["angle"])

    def swing(self, data: str) -> str:
        """Say how far TCG's and NCG's momenta by GSNR move from window to window, on average."""
        moves = [
            abs(new["momentum"][stream] - old["momentum"][stream])
            for old, new in self._steps(data)
            for stream in ("tcg", "ncg")
        ]
        return number(fmean(moves), 3)

    def swaps(self, data: str) -> str:
        """Count in how many windows those two momenta change places, of how many."""
        steps = [
            [window["momentum"]["tcg"] > window["momentum"]["ncg"] for window in step] for step in self._steps(data)
        ]
        return f"{sum(old != new for old, new in steps)} of {len(steps)}"

    def tog_ends(self, data: str) -> str:
        """Return the lowest and the highest momentum that TOG ends at by GSNR."""
        return between([run["windows"][-1]["momentum"]["tog"] for run in self._runs(data, "gsnr")], 3)

    def seeds(self, data: str, higher: str, lower: str) -> str:
        """Say how far the last epochs of two settings are apart with each seed: "1.0, 2.0 and 3.0"."""
        differences = zip(self._last(data, higher), self._last(data, lower))
        *texts, last = (number(ours - theirs, 1) for ours, theirs in differences)
        return f"{', '.join(texts)} and {last}"

    def step_ratios(self, name: str, over: str) -> list[float]:
        """Return, for each pair of step.json, how long a step takes in times of another."""
        return [steps[name]["ms"] / steps[over]["ms"] for steps in self._pairs()]

    def floor_ratios(self, name: str) -> list[float]:
        """Return, for each pair of step.json, what the arithmetic of a step costs in times of KD's."""
        return [steps[name]["floor ratio"] for steps in self._pairs()]

    def _pairs(self) -> Iterable[dict[str, dict[str, Any]]]:
        rows = json.loads((self.folder / "step.json").read_text(encoding="utf-8"))["rows"]
        rows = [line for line in rows if line["gradients"].endswith(("pass", "passes"))]
        for pair in dict.fromkeys(line["pair"] for line in rows):
            yield {line["step"]: line for line in rows if line["pair"] == pair}

    def _runs(self, data: str, momenta: str) -> list[dict[str, Any]]:
        runs = [run for run in self.gsnr_runs if (run["data"], run["momenta"]) == (data, momenta)]
        return sorted(runs, key=lambda run: run["seed"])

    def _last(self, data: str, momenta: str, name: str = "last") -> list[float]:
        return [run["result"][name] for run in self._runs(data, momenta)]

    def _windows(self, data: str, momenta: str) -> list[dict[str, Any]]:
        return [window for run in self._runs(data, momenta) for window in run["windows"]]

    def _steps(self, data: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [step for run in self._runs(data, "gsnr") for step in pairwise(run["windows"])]


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _spread(mean: float, std: float) -> str:
    return f"{mean:.2f} ± {std:.2f}"


def _p(value: float) -> str:
    return p_value(value).replace("\u00a0", " ")


def row(*cells: Any) -> str:
    """Write a line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def number(value: float, digits: int = 2) -> str:
    """Write a number with so many decimals, halves away from zero."""
    return str(Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def between(values: Iterable[float], digits: int = 0) -> str:
    """Write the lowest and the highest of some numbers."""
    numbers = sorted(values)
    return f"{number(numbers[0], digits)} to {number(numbers[-1], digits)}"


def bounds(values: Iterable[float]) -> str:
    """Write two whole numbers that all values are between."""
    numbers = sorted(values)
    return f"{math.floor(numbers[0])} and {math.ceil(numbers[-1])}"


def wrap(text: str, width: int = 120) -> str:
    """Break the lines of paragraphs and list items anew; leave tables, code and headings."""
    blocks = re.split(r"(\n\n+|\n(?=- ))", text)
    return "".join(_wrapped(block, width) for block in blocks)


def _wrapped(block: str, width: int) -> str:
    if not block.strip() or block.startswith(("|", "#", "    ", "<!--")):
        return block
    # no line may begin with the + of "KD + DeepKD", which Markdown reads as a list; short code stays whole
    text = " ".join(block.split()).replace(" + ", "\0+\0")
    text = re.sub("`[^`]{,20}`", lambda code: code[0].replace(" ", "\0"), text)
    indent = "  " * block.startswith("- ")
    lines = textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ") + "\n" * block.endswith("\n")


def render(root: Path = ROOT) -> dict[Path, str]:
    """Make each page from its template and the measurements in `root`; returns the text of each file."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"number": number, "between": between, "bounds": bounds}
    environment.globals["row"] = row
    results = Results(root)
    words = {name: getattr(results, name) for name in dir(results) if not name.startswith("_")}
    return {
        template.with_suffix(""): wrap(environment.from_string(template.read_text(encoding="utf-8")).render(words))
        for template in sorted((root / "results").glob("*.md.jinja"))
    }


def main(argv: Sequence[str], root: Path = ROOT) -> int:
    """Write, or with --check compare; returns the exit code."""
    if list(argv) not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    differ = False
    for page, wanted in render(root).items():
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        if text == wanted:
            continue
        differ = True
        if not argv:
            page.write_text(wanted, encoding="utf-8")
            continue
        made = "what tools/results.py makes"
        lines = difflib.unified_diff(
            text.splitlines(), wanted.splitlines(), f"results/{page.name}", made, "", "", 0, ""
        )
        print("\n".join(lines))
    return int(bool(argv) and differ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
