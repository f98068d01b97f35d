import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import matplotlib
import pytest
from made_up import DEEPKD, KD, make_table

from deepkd_plugin.study.report.cells import assemble
from deepkd_plugin.study.report.collect import collect
from deepkd_plugin.study.report.figures import COLOURS, LINES, curves, dot_plot

PAIR = "res32x4_res8x4"
LOW, HIGH = [73.0, 73.2, 73.4], [76.0, 76.3, 76.6]
NAME = "the comparison"


@pytest.fixture
def cells_of(tmp_path):
    return lambda accuracies, **keywords: assemble(collect(make_table(tmp_path / "table", accuracies, **keywords)))


class Svg:
    """A drawing's elements, parsed as XML."""

    def __init__(self, drawing):
        self.text = str(drawing.content)
        root = ET.fromstring(f'<svg xmlns:xlink="http://www.w3.org/1999/xlink">{self.text}</svg>')
        self.elements = list(root.iter())
        self.letters = ["".join(e.itertext()) for e in self.elements if e.tag == "text"]

    def lines(self, colour):
        """The points of the open paths that are drawn in a colour."""
        drawn = [
            e.get("d")
            for e in self.elements
            if e.tag == "path" and f"stroke: var(--{colour})" in e.get("style", "") and "z" not in e.get("d")
        ]
        return [[tuple(map(float, p)) for p in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", d)] for d in drawn]

    def marks(self, colour):
        """The places of the marks that are drawn in a colour."""
        uses = [e for e in self.elements if e.tag == "use" and f"var(--{colour})" in e.get("style", "")]
        return [(float(e.get("x")), float(e.get("y"))) for e in uses]

    def ticks(self):
        """The labelled ticks of the horizontal axis: value -> place."""
        placed = {}
        for e in self.elements:
            if e.tag == "text" and re.fullmatch(r"[+−]?\d+(\.\d+)?", e.text):
                at = e.get("x") or re.search(r"translate\(([\d.]+)", e.get("transform"))[1]
                placed[float(e.text.replace("−", "-"))] = float(at)
        return placed


def panel(cells, **groups):
    (drawing,) = curves(groups or {"KD and DeepKD": cells}, "top-1 (%), the pair", "pair-1").values()
    return drawing


def test_a_panel_of_curves_names_each_with_its_runs_and_its_ends(cells_of):
    drawing = panel(cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): [76.0]}))
    svg = Svg(drawing)

    assert drawing.title == "KD and DeepKD: top-1 (%), the pair by epoch"
    assert drawing.words == (
        "KD: 3 runs, 52.2 at epoch 1, 73.20 at epoch 4; KD + DeepKD + DTM: 1 run, 54.2 at epoch 1, 76.00 at epoch 4"
    )
    assert {"73.20  KD", "76.00  KD + DeepKD + DTM", "epoch"} <= set(svg.letters)
    # the curve and its line in the legend, in two colours and two styles
    assert (len(svg.lines("ink")), len(svg.lines("blue"))) == (2, 2)
    assert svg.text.count("stroke-dasharray") == 2
    # a band of several runs, none of one
    assert svg.text.count("fill: var(--ink); fill-opacity: 0.15") == 1
    assert "fill: var(--blue); fill-opacity" not in svg.text


def test_a_curve_is_the_mean_of_its_runs_on_a_scale_that_holds_all_of_them(cells_of):
    svg = Svg(panel(cells_of({(PAIR, "kd"): [70.0, 80.0]}, methods=(KD,), epochs=2)))

    # runs of 70.25, 70 and 80.25, 80: an axis from 70 − 6 % to 80.25 + 6 %, of 190 points below 8 of margin
    curve = next(line for line in svg.lines("ink") if line[0][0] != line[1][0] and line[0][1] != line[1][1])
    high, span = 80.25 + 0.06 * 10.25, 1.12 * 10.25
    assert [y for _, y in curve] == pytest.approx([8 + 190 * (high - v) / span for v in (75.25, 75.0)], abs=0.01)
    assert curve[0][0] < curve[1][0]


def test_a_band_goes_from_the_lowest_run_to_the_highest(cells_of):
    cells = cells_of({(PAIR, "kd"): [70.0, 71.0, 80.0]}, methods=(KD,), epochs=2)
    elements = Svg(panel(cells)).elements
    (band,) = [e for e in elements if e.tag == "use" and "fill-opacity: 0.15" in e.get("style")]
    name = band.get("{http://www.w3.org/1999/xlink}href")[1:]
    (path,) = [e.get("d") for e in elements if e.tag == "path" and e.get("id") == name]
    heights = {float(band.get("y")) + float(y) for y in re.findall(r"[ML] [\d.-]+ ([\d.-]+)", path)}

    high, span = 80.25 + 0.06 * 10.25, 1.12 * 10.25
    ends = [8 + 190 * (high - value) / span for value in (80.25, 80.0, 70.25, 70.0)]
    assert sorted(heights) == pytest.approx(ends, abs=0.02)


def test_the_scale_leaves_out_what_is_below_the_second_half(cells_of):
    cells = cells_of({(PAIR, "kd"): [70.0]}, methods=(KD,), runs={(PAIR, "kd"): {"curve": [10.0, 68.0, 70.0, 70.0]}})
    svg = Svg(panel(cells))

    assert {"68.0", "70.0"} <= set(svg.letters)
    assert not {text for text in svg.letters if re.fullmatch(r"[1-5]\d(\.\d)?", text)}


def test_panels_of_a_pair_share_their_scale(cells_of):
    kd, deepkd = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})
    both = curves({"one": [kd], "other": [deepkd]}, "top-1 (%)", "pair-1")

    values = [[t for t in Svg(drawing).letters if re.fullmatch(r"\d\d", t)] for drawing in both.values()]
    assert values[0] == values[1] != []


def test_one_epoch_is_a_dot(cells_of):
    svg = Svg(panel(cells_of({(PAIR, "kd"): [70.0]}, methods=(KD,), epochs=1)))

    assert len(svg.marks("ink")) == 2  # the epoch, and the legend's
    assert [text for text in svg.letters if re.fullmatch(r"[01](\.\d+)?", text)] == ["1"]
    assert "fill-opacity" not in svg.text
    assert "nan" not in svg.text


def test_cells_without_runs_have_no_curve(cells_of):
    cells = cells_of({(PAIR, "kd"): [None], (PAIR, "deepkd"): HIGH})

    assert curves({"KD": cells[:1]}, "top-1 (%)", "pair-1") == {}
    assert list(curves({"KD": cells[:1], "both": cells}, "top-1 (%)", "pair-1")) == ["both"]


def test_lines_of_a_panel_differ_in_colour_and_in_style():
    assert len({colour for colour, _ in LINES}) == len({str(dashes) for _, dashes in LINES}) == len(LINES)


@pytest.mark.usefixtures("vouched")
@pytest.mark.parametrize(
    ("ours", "colour", "dot"),
    [
        (HIGH, "blue", "blue"),
        ([70.0, 70.1, 70.2], "red", "red"),
        (LOW, "quiet", "ground"),
        (HIGH[:2], "quiet", None),
    ],
    ids=["higher", "lower", "not distinguishable", "no verdict"],
)
def test_a_mark_and_its_interval_are_where_their_values_are(cells_of, ours, colour, dot):
    cells = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): ours})
    gain = cells[1].numbers["last"].gain
    svg = Svg(dot_plot({"Gain over KD": [(NAME, cells[1])]}, "last", "Gain"))
    ticks = svg.ticks()
    one = (max(ticks.values()) - min(ticks.values())) / (max(ticks) - min(ticks))

    def place(value):
        return pytest.approx(ticks[0] + one * value, abs=0.02)

    (mark,) = svg.marks(colour)
    assert mark[0] == place(gain.value)
    whiskers = [line for line in svg.lines(colour) if line[0][1] == line[1][1] == mark[1]]
    assert whiskers == ([] if gain.low is None else [[(place(end), mark[1]) for end in (gain.low, gain.high)]])
    fills = re.findall(r"<use [^>]*fill: var\(--(\w+)\)", svg.text)
    assert fills == ([dot] if dot else fills)
    (diamond,) = svg.marks("ink")
    assert diamond[0] == place(3.36)
    assert {"Gain over KD", NAME} <= set(svg.letters)


def test_rows_of_the_dot_plot_keep_their_order(cells_of):
    cell = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})[1]
    svg = Svg(dot_plot({"a": [("b", cell), ("c", cell)], "d": [("e", cell)]}, "last", "Gain"))

    assert [text for text in svg.letters if text in "abcde"] == list("abcde")
    places = [y for _, y in svg.marks("blue")]
    assert len(places) == 3
    assert [round(b - a) for a, b in pairwise(places)] == [32, 64]


def test_a_comparison_without_runs_has_no_dot(cells_of):
    cells = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): [None]})

    assert dot_plot({"Gain over KD": [(NAME, cells[1])]}, "last", "Gain") is None
    assert dot_plot({}, "last", "Gain") is None


def test_every_colour_of_a_drawing_follows_the_page(cells_of):
    cells = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})

    for drawing in (panel(cells), dot_plot({"Gain over KD": [(NAME, cells[1])]}, "last", "Gain")):
        # letters in black would have no fill
        assert not re.search(r"<[^>]*(#[0-9a-f]{3,6}\b|rgb)", str(drawing.content))
        assert all("fill: var(--" in e.get("style") for e in Svg(drawing).elements if e.tag == "text")
        assert set(re.findall(r"var\(--(\w+)\)", str(drawing.content))) <= set(COLOURS)


def test_letters_are_taken_as_they_are(cells_of):
    label = '_$\\alpha$ #0072b2 style="#0072b2" 1.23456 <script>&amp;'
    cells = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH}, methods=(KD, DEEPKD | {"label": label}))
    drawing = dot_plot({"Gain over KD": [(label[:48], cells[1])]}, "last", "Gain")

    assert "<script" not in drawing.content
    assert label[:48] in Svg(drawing).letters
    assert "".join(Svg(panel(cells)).letters).count("#0072b2") == 2


def test_drawings_do_not_depend_on_the_reader_s_settings(cells_of):
    cells = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})
    drawing = panel(cells)

    with matplotlib.rc_context({"axes.grid": False, "font.size": 30, "svg.fonttype": "path"}):
        assert panel(cells) == drawing
        assert matplotlib.rcParams["font.size"] == 30
