"""results/README.md against the reports that are committed beside it."""

import csv
import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "results"
SECTIONS = {
    section.splitlines()[0]: section
    for section in (RESULTS / "README.md").read_text(encoding="utf-8").split("\n## ")
    if "/report." in section
}
MEAN = re.compile(r"\d+\.\d\d ± \d+\.\d\d")
GAIN = re.compile(r"[+−]\d+\.\d\d \[[+−]\d+\.\d\d, [+−]\d+\.\d\d\]")


def told():
    """Every mean ± standard deviation and every gain [low, high] of the reports, as the page writes them."""
    found = set()
    for report in RESULTS.glob("*/report.csv"):
        for row in csv.DictReader(report.read_text(encoding="utf-8").splitlines()):
            for name in (column.removesuffix("_mean") for column in row if column.endswith("_mean")):
                mean, spread = row[f"{name}_mean"], row[f"{name}_std"]
                if mean and spread:
                    found.add(f"{float(mean):.2f} ± {float(spread):.2f}")
                gain = [row.get(f"{name}_gain{end}") for end in ("", "_low", "_high")]
                if all(gain):
                    middle, low, high = (f"{float(value):+.2f}".replace("-", "−") for value in gain)
                    found.add(f"{middle} [{low}, {high}]")
    return found


@pytest.mark.parametrize("title", SECTIONS)
def test_the_page_s_numbers_stand_in_a_report(title):
    numbers = MEAN.findall(SECTIONS[title]) + GAIN.findall(SECTIONS[title])
    assert numbers
    assert not set(numbers) - told()
