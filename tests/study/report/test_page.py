import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from made_up import DEEPKD, KD, PAIRS, make_table

from deepkd_plugin.study.report import report
from deepkd_plugin.study.report.figures import COLOURS

PAIR = "res32x4_res8x4"
OTHER = {"name": "wrn40_2_wrn_16_2", "teacher": "wrn_40_2", "student": "wrn_16_2"}
LOW, HIGH = [73.0, 73.2, 73.4], [76.0, 76.3, 76.6]
FULL = {
    (PAIR, "kd"): LOW,
    (PAIR, "deepkd"): HIGH,
    (OTHER["name"], "kd"): LOW,
    (OTHER["name"], "deepkd"): [76.0, None],
}


class Page(HTMLParser):
    """A parsed page: every element with its attributes and text; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.elements.append({"tag": name, "in": [e["tag"] for e in self.open], "text": "", **dict(attributes)})
        if name != "meta":
            self.open.append(self.elements[-1])

    def handle_startendtag(self, name, attributes):
        # HTML knows this form inside SVG only
        assert "svg" in [e["tag"] for e in self.open]
        self.handle_starttag(name, attributes)
        self.open.pop()

    def handle_endtag(self, name):
        assert self.open.pop()["tag"] == name

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, name):
        return [element for element in self.elements if element["tag"] == name]


@pytest.fixture
def page_of(tmp_path):
    def make(accuracies=FULL, **keywords):
        folder = make_table(tmp_path / "table", accuracies, **{"pairs": (*PAIRS, OTHER), **keywords})
        return Page(next(path for path in report(folder) if path.suffix == ".html").read_text())

    return make


def test_the_page_has_a_language_a_title_and_one_main_heading(page_of):
    page = page_of()

    assert page.all("html")[0]["lang"] == "en"
    assert page.all("title")[0]["text"] == "DeepKD: cifar100"
    assert [heading["text"] for heading in page.all("h1")] == ["DeepKD: cifar100"]
    assert [heading["text"] for heading in page.all("h2")] == [
        "Result",
        "resnet32x4 → resnet8x4",
        "wrn_40_2 → wrn_16_2",
        "Runs that are not counted",
        "How to read this",
    ]


def test_headings_skip_no_level(page_of):
    levels = [int(e["tag"][1]) for e in page_of().elements if re.fullmatch("h[1-6]", e["tag"])]

    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_nothing_comes_from_anywhere_else(page_of):
    page = page_of()

    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    for element in page.elements:
        assert not {"src", "onclick", "onload"} & element.keys()
        for key in ("href", "xlink:href"):
            assert element.get(key, "#").startswith("#")
        assert set(re.findall(r"url\((.)", str(element.values()))) <= {"#"}
    (style,) = page.all("style")
    for outside in ("url(", "@import", "://"):
        assert outside not in style["text"]


def test_links_and_references_lead_somewhere(page_of):
    page = page_of()
    names = [element["id"] for element in page.elements if "id" in element]

    assert len(names) == len(set(names))
    for element in page.elements:
        for key in ("aria-labelledby", "aria-describedby"):
            assert set(element.get(key, "").split()) <= {*names}
        referred = re.findall(r"url\(#([^)]*)\)", element.get("clip-path", ""))
        referred += [element[key][1:] for key in ("href", "xlink:href") if key in element]
        assert set(referred) <= {*names}


def test_every_drawing_has_a_text_alternative(page_of):
    page = page_of()
    drawings = page.all("svg")

    assert len(drawings) == 3  # the gains, and a panel of curves for each pair
    texts = {e["id"]: e["text"] for e in page.elements if e["tag"] in ("title", "desc") and "svg" in e["in"]}
    assert len(texts) == 2 * len(drawings)
    assert all(texts.values())
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert drawing["aria-labelledby"].split() == [name for name in texts if name in drawing["aria-labelledby"]]


@pytest.mark.usefixtures("vouched")
def test_every_gain_is_there_as_text_beside_its_drawing(page_of):
    page = page_of()
    (table,) = [e for e in page.all("table") if "The same in numbers" in e["text"]]
    text = " ".join(table["text"].split())

    gain = "+3.10 [+2.49, +3.71]paired [+2.85, +3.35]"
    assert f"KD + DeepKD + DTM over KD resnet32x4 → resnet8x4 {gain} ▲ higher" in text
    assert (
        "◇ published +3.36 = KD+DeepKD 76.69 (a note; value and pair inferred) − "
        "KD 73.33 (logit-standardization-KD README; stated); published without DTM, ours with it" in text
    )
    assert "wrn_40_2 → wrn_16_2 +2.80 no verdict 1 of 2 runs " in text
    assert text.endswith("a verdict needs 3 runs, KD + DeepKD + DTM has 1")
    assert "Hollow diamond: the gain by the published numbers" in page.all("figcaption")[0]["text"]


def test_without_published_gains_the_figure_says_nothing_of_them(page_of):
    page = page_of({(OTHER["name"], "kd"): LOW, (OTHER["name"], "deepkd"): LOW[:1]})

    text = page.all("main")[0]["text"]
    assert "cross: no verdict" in text
    assert "diamond" not in text
    assert "◇" not in text


def test_every_figure_has_a_caption_and_every_table_a_caption_and_scopes(page_of):
    page = page_of()

    assert len(page.all("figure")) == len(page.all("figcaption")) == 3
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(caption["text"] for caption in page.all("caption"))
    assert all(head["scope"] in ("col", "row", "rowgroup") for head in page.all("th"))


def test_wide_tables_scroll_in_a_box_that_the_keyboard_reaches(page_of):
    page = page_of()
    boxes = [e for e in page.elements if e.get("class") == "scroll"]

    assert len(boxes) == 6  # the gains, two for each pair, and the runs that are not counted
    assert all(box["tabindex"] == "0" and box["role"] == "region" for box in boxes)


def test_the_verdicts_come_before_the_pairs(page_of):
    page = page_of()
    result, pair = (next(e for e in page.all("section") if e["id"] == name) for name in ("summary", "pair-1"))

    assert "KD + DeepKD + DTM over KD: ▲\u00a0higher; gain +3.10" in result["text"]
    assert "also after Holm's correction; 1 without a verdict" in result["text"]
    assert page.elements.index(result) < page.elements.index(pair)
    assert "a verdict needs 3 runs, KD + DeepKD + DTM has 1" in result["text"]


def test_a_pair_has_its_protocol_both_tables_and_its_curves(page_of):
    pair = next(e for e in page_of().all("section") if e["id"] == "pair-1")

    for text in (
        *(
            "Seeds planned",
            "Epochs",
            "Batch",
            "float32",
            "79.42 %",
            "NVIDIA H200",
            "ae39fbd",
            "c0de00000000c0de",
        ),
        "Last epoch: top-1 (%)",
        "Best of all epochs, chosen on the test images: top-1 (%)",
        "KD; logit-standardization-KD README; stated",
        "Learning curves",
    ):
        assert text in pair["text"]


@pytest.mark.usefixtures("vouched")
def test_the_page_says_how_far_the_published_values_are(page_of):
    text = page_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH}).all("main")[0]["text"]

    assert "2 of 2 published values lie in the 95\u00a0% interval of our mean (ours minus published: " in text


def test_what_was_not_made_alike_is_told_above_the_tables(page_of):
    page = page_of(runs={(PAIR, "kd"): {"teacher_acc": 70.0}})
    (warning,) = [e for e in page.elements if e.get("class") == "caution"]

    assert "Not all alike." in warning["text"]
    assert "Teacher differ: " in warning["text"]


def test_gains_of_one_pair_by_several_methods_are_named_by_the_methods(page_of):
    rows = [{"name": f"d{i}", "label": f"row {i}", "base": "d0" if i else None} for i in range(3)]
    page = page_of({(PAIR, row["name"]): LOW for row in rows}, methods=rows)
    (table,) = [e for e in page.all("table") if "The same in numbers" in e["text"]]

    assert "row 1 0.00" in " ".join(table["text"].split())
    assert "→" not in table["text"]


def test_the_gain_of_one_pair_by_one_method_is_named_by_the_pair(page_of):
    page = page_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})
    (table,) = [e for e in page.all("table") if "The same in numbers" in e["text"]]

    assert "over KD resnet32x4 → resnet8x4 +3.10" in " ".join(table["text"].split())


def test_a_table_without_runs_says_so(page_of):
    page = page_of({(PAIR, "kd"): [None] * 3, (PAIR, "deepkd"): [None] * 3})
    text = page.all("main")[0]["text"]

    assert "no verdict yet" in text
    assert "no runs" in text
    assert "No run that counts has a learning curve yet." in text
    assert len(page.all("figure")) == 0


def test_everything_counted_says_so(page_of):
    assert "Every planned run counts." in page_of({(PAIR, "kd"): LOW}).all("main")[0]["text"]


def test_names_from_configs_files_and_logs_are_escaped(tmp_path):
    evil = '"><script>alert(1)</script>&amp;'
    pair = {"name": "p", "teacher": evil, "student": evil}
    methods = (KD | {"label": evil}, DEEPKD | {"label": f"{evil} DeepKD"})
    folder = make_table(
        tmp_path / "table",
        {("p", "kd"): [*LOW, 70.0], ("p", "deepkd"): HIGH},
        methods=methods,
        pairs=(pair,),
        table=evil,
        dataset=evil,
        metric=evil,
        options=["SOLVER.TYPE", evil],
        runs={("p", "kd"): {"device": evil, "commit": evil, "processor": evil}},
    )
    broken = next((folder / "runs/p/kd").glob("seed3*"))
    (broken / "run.json").unlink()
    (broken / "log.txt").write_text(evil)
    report(folder)
    text = (folder / "report.html").read_text()

    assert "<script" not in text
    assert Page(text).all("h1")[0]["text"] == f"DeepKD: {evil}"
    assert text.count("&lt;script&gt;") > 20


def test_an_ablations_rows_keep_their_order_and_share_panels_by_five(page_of):
    rows = [{"name": f"d{i}", "label": f"|Δ| = {i}", "base": "d0" if i else None} for i in range(7)]
    page = page_of({(PAIR, row["name"]): LOW for row in rows}, methods=rows, table="ablation-delta", over="kd")

    gains = next(e for e in page.all("table") if "The same in numbers" in e["text"])
    assert re.findall(r"\|Δ\| = \d", gains["text"].split("Gain over |Δ| = 0")[1]) == [row["label"] for row in rows[1:]]
    panels = [e["text"] for e in page.all("h4")]
    assert panels == ["|Δ| = 0 and 4 rows over it, part 1", "|Δ| = 0 and 2 rows over it, part 2"]
    assert page.all("h1")[0]["text"] == "DeepKD: ablation-delta over kd on cifar100"


def test_methods_without_a_base_share_a_panel_where_they_train_as_long(page_of):
    methods = [{"name": name, "label": name, "base": None} for name in ("vanilla", "at", "long")]
    page = page_of(
        {(PAIR, name): LOW for name in ("vanilla", "at", "long")},
        methods=methods,
        runs={(PAIR, "long"): {"epochs": 8}},
    )

    assert [e["text"] for e in page.all("h4")] == ["vanilla, at", "long"]
    assert "No method of this table has a base to be compared with." in page.all("main")[0]["text"]


@pytest.fixture
def schemes(page_of):
    """The colours of both schemes by name, as the page has them."""
    text = page_of().all("style")[0]["text"]
    assert re.findall(r"@media (\S+ \S+|print)", text)[0] == "(prefers-color-scheme: dark)"
    light, dark = re.findall(r":root \{(.*?)\}", text, re.DOTALL)[:2]
    colours = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in (light, dark)]
    return {"light": colours[0], "dark": colours[0] | colours[1]}


def contrast(a, b):
    """WCAG's contrast ratio of two colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_contrast_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_from_their_ground(schemes, scheme):
    colours = schemes[scheme]

    for text in ("ink", "quiet", "link"):
        for ground in ("ground", "raised", "warn"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for line in ("ink", "blue", "red", "green", "purple", "quiet"):
        assert contrast(colours[line], colours["ground"]) >= 3.0, line


def test_the_figures_colours_are_those_of_the_style(schemes):
    assert schemes["light"].items() >= COLOURS.items()
    assert schemes["dark"].keys() >= COLOURS.keys()


def test_names_in_another_alphabet_are_no_warning(page_of, recwarn):
    page_of(methods=(KD | {"label": "蒸馏"}, DEEPKD | {"label": "深度蒸馏"}))

    assert [str(warning.message) for warning in recwarn] == []
