"""results/ against itself: the pages against the files they are made of, and those against the runs."""

import csv
import importlib
import json
import re
import shutil
from pathlib import Path
from statistics import fmean, stdev

import pytest
from scipy.stats import ttest_ind

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
TABLES = sorted(file.parent for file in RESULTS.glob("*/report.csv"))
BENCHMARKS = sorted(file for file in RESULTS.glob("*.json") if file.with_suffix(".md").is_file())


@pytest.fixture
def results(monkeypatch):
    """tools/results.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("results")


@pytest.fixture
def copy(tmp_path):
    """A copy of what the page is made of."""
    shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*.html"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def rows(file):
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def test_the_pages_are_what_the_tool_makes(results, capsys):
    assert results.main(["--check"]) == 0, capsys.readouterr().out


def exchange_two_rows(page):
    lines = page.splitlines(keepends=True)
    first, second = (next(i for i, line in enumerate(lines) if line.startswith(f"| {m} |")) for m in ("KD", "DKD"))
    numbers = [lines[i].partition(" | ")[2] for i in (first, second)]
    lines[first], lines[second] = f"| KD | {numbers[1]}", f"| DKD | {numbers[0]}"
    return "".join(lines)


@pytest.mark.parametrize(
    ("name", "falsify"),
    [
        ("nine_methods", exchange_two_rows),
        ("nine_methods", lambda page: page.replace("| 0.0039 |", "| 0.0093 |")),
        ("README", lambda page: page.replace("Holm's p 0.0039", "Holm's p 0.0093")),
        ("gsnr", lambda page: page.replace("0.117, 0.202, 0.202", "0.202, 0.117, 0.202")),
        ("ablations", lambda page: page.replace("costs 5.4 points", "costs 4.5 points")),
        ("real_images", lambda page: page.replace("5.68 [4.46, 6.90]", "5.68 [4.64, 6.90]")),
        ("gsnr", lambda page: page.replace("in 26 of 33", "in 7 of 33")),
    ],
    ids=["two rows", "a p value", "another page's", "a row of GSNR", "a gap", "an interval", "a count"],
)
def test_a_falsified_page_is_told(name, falsify, results, copy, capsys):
    page = copy / "results" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    falsified = falsify(text)
    assert falsified != text
    page.write_text(falsified, encoding="utf-8")
    assert results.main(["--check"], copy) == 1
    told = capsys.readouterr().out.splitlines()
    changed = [line for line in text.splitlines() if line not in falsified.splitlines()]
    assert {line[1:] for line in told if re.match(r"\+[^+]", line)} == set(changed)
    assert page.read_text(encoding="utf-8") == falsified
    assert results.main([], copy) == 0
    assert page.read_text(encoding="utf-8") == text
    assert results.main(["--chekc"], copy) == 2


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("glyphs100/report.csv", ",0.0038", ",0.0083"),
        ("cifar100_cpu_24_epochs_ncg2/runs.csv", ",44,44,", ",45,45,"),
        ("gsnr/runs.json", '"last": 89.8', '"last": 98.8'),
        ("glyph_canvas/tuning.json", '"last": 64.47', '"last": 67.44'),
        ("step.json", '"ms": 2', '"ms": 3'),
    ],
)
def test_a_change_of_the_measurements_reaches_the_page(file, old, new, results, copy):
    changed = copy / "results" / file
    text = changed.read_text(encoding="utf-8")
    assert old in text
    changed.write_text(text.replace(old, new), encoding="utf-8")
    assert results.main(["--check"], copy) == 1


SET = "what the runs were set to"
TYPED = {
    **dict.fromkeys(("0.0", "0.05", "0.075", "0.099", "0.1", "0.2", "0.5", "0.9"), SET),
    **dict.fromkeys(("0.825", "0.975", "0.999"), SET),
    "0.57": "(1 - 0.9) / (1 - 0.825)",
    **dict.fromkeys(("0.1.0", "2.15.0", "3.11.7"), "versions"),
    **dict.fromkeys(("31.17", "8.00", "16.50", "89.17", "83.75"), "runs that the page says have no file"),
}


def test_no_measured_number_is_typed_by_hand():
    """A number with a decimal point in the template is an expression, or one of those whose source is named."""
    template = "\n".join(file.read_text(encoding="utf-8") for file in RESULTS.glob("*.md.jinja"))
    prose = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", template, flags=re.DOTALL)
    prose = re.sub(r"`[^`\n]*`|^    .*$|\]\([^)\n]*\)", "", prose, flags=re.MULTILINE)
    assert set(re.findall(r"\d+(?:\.\d+)+", prose)) == TYPED.keys()


def test_no_line_of_prose_is_too_long():
    for template in RESULTS.glob("*.md.jinja"):
        lines = template.with_suffix("").read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if len(line) > 120 and not line.startswith("|")], template
        assert len(lines) <= 150, template


@pytest.mark.parametrize("folder", TABLES, ids=lambda folder: folder.name)
def test_a_report_follows_from_its_runs(folder):
    """Means, deviations, and gains with Welch's intervals and Holm's correction, by SciPy alone."""
    runs = {}
    for run in rows(folder / "runs.csv"):
        if run["status"] == "counted":
            runs.setdefault(run["method"], []).append(run)
    report = rows(folder / "report.csv")
    assert [row["method"] for row in report] == [*runs]
    for epoch in ("last", "best"):
        values = {method: [float(run[epoch]) for run in of] for method, of in runs.items()}
        p_values = {}
        for row in report:
            ours = values[row["method"]]
            assert float(row["n"]) == len(ours)
            assert float(row[f"{epoch}_mean"]) == pytest.approx(fmean(ours), rel=1e-6)
            assert float(row[f"{epoch}_std"]) == pytest.approx(stdev(ours), rel=1e-6)
            if not row["base"]:
                assert row[f"{epoch}_gain"] == ""
                continue
            test = ttest_ind(ours, values[row["base"]], equal_var=False)
            gain = fmean(ours) - fmean(values[row["base"]])
            expected = [gain, *test.confidence_interval(0.95), test.pvalue]
            given = [float(row[f"{epoch}_{name}"]) for name in ("gain", "gain_low", "gain_high", "p")]
            assert given == pytest.approx(expected, rel=1e-6)
            p_values[row["method"]] = test.pvalue
        ordered = sorted(p_values, key=p_values.get)
        largest = 0.0
        for rank, method in enumerate(ordered):
            largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[method]))
            (row,) = (row for row in report if row["method"] == method)
            assert float(row[f"{epoch}_holm_p"]) == pytest.approx(largest, rel=1e-6)


def test_the_windows_of_gsnr_are_those_of_the_csv_files():
    for run in json.loads((RESULTS / "gsnr" / "runs.json").read_text(encoding="utf-8")):
        name, seed = f"{run['data']}_{run['momenta']}", str(run["seed"])
        lines = [row for row in rows(RESULTS / "gsnr" / f"{name}.csv") if row["seed"] == seed]
        angles = [row for row in rows(RESULTS / "gsnr" / f"{name}_angles.csv") if row["seed"] == seed]
        expected = {
            (window["iteration"], stream): (
                values["mean"],
                values["ratio"],
                values["norm"],
                window["momentum"][stream],
            )
            for window in run["windows"]
            for stream, values in window["gsnr"].items()
        }
        names = ("mean", "ratio", "norm", "momentum")
        given = {(int(r["iteration"]), r["stream"]): tuple(float(r[name]) for name in names) for r in lines}
        assert given == expected
        degrees = {(w["iteration"], pair): value for w in run["windows"] for pair, value in w["angle"].items()}
        assert {(int(r["iteration"]), r["pair"]): float(r["degrees"]) for r in angles} == degrees


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_a_benchmark_s_table_is_its_record(file, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    record = json.loads(file.read_text(encoding="utf-8"))
    made = importlib.import_module("common").markdown(record)
    assert file.with_suffix(".md").read_text(encoding="utf-8") == made


def table(page, first):
    """The rows of the table of docs/performance.md whose head begins with these columns."""
    (start,) = (i for i, line in enumerate(page) if line.startswith(first))
    lines = []
    for line in page[start + 2 :]:
        if not line.startswith("|"):
            return lines
        lines.append(line)
    return lines


def test_the_tables_of_the_page_on_performance():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    for name, first in (("optimizer", "| width |"), ("epoch", "| pair | loop |")):
        made = (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines()
        assert table(page, first) == table(made, first)

    def steps(name):
        """Pair -> (step, execution) -> row, of one backward pass after the other."""
        pairs = {}
        for row in json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]:
            if "batched" not in row["gradients"]:
                pairs.setdefault(row["pair"], {}).setdefault((row["step"], row["execution"]), row)
        return pairs

    parts = json.loads((RESULTS / "step.json").read_text(encoding="utf-8"))["parts"]
    worth = {part["pair"]: part["(F_t + F_s + 3B) / (F_t + F_s + 2B)"] for part in parts}
    expected = []
    for pair, rows_of in steps("step").items():
        kd, ours, three, theirs = (
            rows_of[step, "eager"]
            for step in ("KD", "DeepKD, 2 coefficients", "DeepKD, 3 coefficients", "the release's DeepKD")
        )
        numbers = [f"{kd['ms']:.1f}", f"{ours['ms']:.1f}", f"{ours['ms'] / kd['ms']:.2f}"]
        numbers += [f"{ours['floor ratio']:.2f}", f"{ours['ratio to floor']:.2f}", f"{three['ms']:.1f}"]
        numbers += [f"{theirs['ms']:.1f}", f"{theirs['ms'] / ours['ms']:.2f}", f"{worth[pair]:.2f}"]
        expected.append(f"| {pair} | {' | '.join(numbers)} |")
    assert table(page, "| pair | KD | DeepKD | ratio |") == expected

    expected = []
    for name in ("step_ours_res56", "step_ours_res32x4"):
        for pair, rows_of in steps(name).items():
            kd, known, ours = (rows_of[step, "eager"] for step in ("KD", "KD, table", "DeepKD, 2 coefficients, table"))
            numbers = [f"{row['ms']:.1f}" for row in (kd, known, ours)] + [f"{ours['ms'] / kd['ms']:.2f}"]
            columns = ("floor ratio", "ratio to floor", "ratio to mdistiller's KD", "ratio to the release's")
            numbers += [f"{ours[column]:.2f}" for column in columns]
            expected.append(f"| {pair} | {' | '.join(numbers)} | {name} |")
    assert table(page, "| pair | KD | KD, table |") == expected

    images = {
        (row["use"], row["files"], row["way"]): row["images/s"]
        for row in json.loads((RESULTS / "input.json").read_text(encoding="utf-8"))["rows"]
    }
    columns = [(files, way) for files in ("as they are", "shrunk") for way in ("PIL, floats", "bytes")]
    assert table(page, "| use | PIL |") == [
        f"| {use} | {' | '.join(f'{images[(use, *column)]:,.0f}' for column in columns)} |"
        for use in ("training", "test")
    ]

    ways = {
        "step_channels_last": "channels last",
        "step_amp": "channels last, bfloat16",
        "step_compile": "compiled",
    }
    expected = []
    for pair in steps("step_compile"):
        for name, way in ways.items():
            execution = "compile" if name == "step_compile" else "eager"
            rows_of = steps(name)[pair]
            kd = rows_of["KD, one stream" if execution == "compile" else "KD", execution]
            ours = rows_of["DeepKD, 2 coefficients", execution]
            numbers = [f"{kd['ms']:.1f}", f"{ours['ms']:.1f}", f"{ours['ms'] / kd['ms']:.2f}"]
            expected.append(f"| {pair} | {way} | {' | '.join(numbers)} | {ours['floor ratio']:.2f} | {name} |")
    assert table(page, "| pair | way |") == expected


def test_the_table_of_the_page_on_text():
    page = (ROOT / "docs" / "text.md").read_text(encoding="utf-8").splitlines()
    rows = {}
    for row in json.loads((RESULTS / "tokens.json").read_text(encoding="utf-8"))["rows"]:
        rows.setdefault(row["loss"], []).append(row)
    expected = []
    for name, sizes in rows.items():
        numbers = [f"{row[column]:.2f}" for column in ("× logits", "ratio to KL") for row in sizes]
        expected.append(f"| {name} | {' | '.join(numbers)} |")
    assert table(page, "| loss |") == expected


def test_the_simulated_steps_of_the_page_on_scale():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    made = json.loads((RESULTS / "scale.json").read_text(encoding="utf-8"))["rows"]
    rows = {(row["pair"], row["cards"], row["buffers"], row["GB/s"]): row for row in made}
    expected = []
    for pair, cards, buffers in dict.fromkeys(key[:3] for key in rows if key[2] > 1):
        links = [rows[pair, cards, buffers, speed] for speed in (25.0, 100.0, 400.0)]
        waits = " | ".join(f"{row['waiting']:.1%} ({row['waiting if apart']:.0%})" for row in links)
        sent, computing = f"{links[0]['MB sent a step']:.0f}", f"{links[0]['computing ms']:.1f}"
        expected.append(f"| {pair} | {cards} | {buffers} | {sent} | {computing} | {waits} |")
    assert table(page, "| pair | cards | buffers |") == expected
    minutes = {key: f"{row['minutes an epoch']:.2f}" for key, row in rows.items() if key[0].endswith("ResNet18")}
    few, many = ([minutes["ResNet34 → ResNet18", cards, 2, speed] for speed in (25.0, 400.0)] for cards in (8, 32))
    sentence = (
        f"An epoch of ResNet18 with 2 buffers takes {few[0]} minutes on 8 cards at 25 GB/s and {few[1]} at 400, and on "
        f"32 cards {many[0]} and {many[1]};"
    )
    assert sentence in " ".join(page)
