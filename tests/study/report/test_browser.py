"""The page in headless Chromium: axe-core, a phone's width, both colour schemes, keyboard, tap and print.

Needs Chromium on the machine and the extra `browser`; .ci/run installs both.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from made_up import DEEPKD, KD, PAIRS, make_detection_table, make_table

from deepkd_plugin.study.report import report

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
PAIR = PAIRS[0]["name"]
OTHER = {"name": "wrn40_2_wrn_16_2", "teacher": "wrn_40_2", "student": "wrn_16_2"}
LOW, HIGH = [73.0, 73.2, 73.4], [76.0, 76.3, 76.6]
ROWS = [{"name": f"d{i}", "label": f"|Δ| = 0.0{i}", "base": "d0" if i else None} for i in range(7)]
TABLES = {
    "classification": lambda folder: make_table(
        folder,
        {(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH, (OTHER["name"], "kd"): HIGH, (OTHER["name"], "deepkd"): [75, None]},
        methods=(KD, DEEPKD),
        pairs=(*PAIRS, OTHER),
    ),
    "one pair": lambda folder: make_table(folder, {(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH}),
    "detection": lambda folder: make_detection_table(
        folder, {("res20_res8", "kd"): [30.0, 30.5, 31.0], ("res20_res8", "deepkd"): [20.2, 21.0, 21.2]}
    ),
    "ablation": lambda folder: make_table(
        folder,
        {(PAIR, row["name"]): [73.0 + i, 73.1 + i, 73.2 + i] for i, row in enumerate(ROWS)},
        methods=ROWS,
        table="ablation-delta",
        over="kd",
    ),
    "nothing": lambda folder: make_table(folder, {(PAIR, "kd"): [None], (PAIR, "deepkd"): [None]}),
}


@pytest.fixture(scope="module")
def axe():
    """axe-core's source, of the PyPI package that carries it."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None:
        pytest.skip('axe-core is not here: pip install "deepkd_plugin[browser]"')
    return Path(found.origin).with_name("axe.min.js").read_text()


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """A context of Chromium that nobody has used, without a sandbox if root asks."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason='needs pip install "deepkd_plugin[browser]"')
    with api.sync_playwright() as playwright:
        flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        profile = str(tmp_path_factory.mktemp("profile"))
        opened = playwright.chromium.launch_persistent_context(profile, executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Each table's page, as an address."""
    folder = tmp_path_factory.mktemp("tables")
    files = {name: report(make(folder / name.replace(" ", "_"))) for name, make in TABLES.items()}
    return {name: next(f for f in some if f.suffix == ".html").as_uri() for name, some in files.items()}


@pytest.fixture
def page(context):
    opened = context.new_page()
    yield opened
    opened.close()


VIOLATIONS = """() => axe.run().then(result => result.violations
    .filter(one => ['serious', 'critical'].includes(one.impact))
    .map(one => [one.id, ...one.nodes.map(node => node.html)]))"""


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", TABLES)
def test_axe_finds_no_serious_fault_and_nothing_is_too_wide(page, pages, axe, name, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 740})
    page.goto(pages[name])
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.evaluate(axe)
    assert page.evaluate(VIOLATIONS) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_axe_would_find_a_serious_fault(page, pages, axe):
    page.goto(pages["one pair"])
    page.evaluate("document.documentElement.lang = ''; document.querySelector('.won').style.color = '#ddd'")
    page.evaluate(axe)
    assert {one[0] for one in page.evaluate(VIOLATIONS)} == {"html-has-lang", "color-contrast"}


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 800)])
@pytest.mark.parametrize("name", ["classification", "one pair", "detection", "ablation"])
def test_the_first_screen_says_who_won_by_how_much_and_how_sure(page, pages, name, width, height):
    page.set_viewport_size({"width": width, "height": height})
    page.goto(pages[name])
    told = [page.locator("#summary .won").first, page.locator("#summary .verdicts li").first]
    text = " ".join(one.inner_text() for one in told)
    assert all(one.bounding_box()["y"] + one.bounding_box()["height"] <= height for one in told)
    assert "irst" in text
    assert "gain " in text
    assert any(word in text for word in ("higher", "lower", "not distinguishable"))
    assert "Holm" in text


@pytest.mark.parametrize("name", ["classification", "detection", "ablation"])
def test_n_seeds_and_protocol_come_by_hover_tap_and_keyboard(page, pages, name):
    page.goto(pages[name])
    summary = page.locator("#summary details.facts summary").first
    hover = summary.get_attribute("title")
    for text in ("n: 3 of 3 runs", "Seeds: 0, 1, 2", "Batch: "):
        assert text in hover or (name == "detection" and text == "Batch: ")
    inside = page.locator("#summary details.facts dl").first
    assert not inside.is_visible()
    summary.click()
    assert inside.is_visible()
    assert "0, 1, 2" in inside.inner_text()
    summary.focus()
    page.keyboard.press("Enter")
    assert not inside.is_visible()


def test_the_keyboard_reaches_every_link_table_and_number(page, pages):
    page.goto(pages["classification"])
    count = page.locator("a, [tabindex='0'], summary").count()
    reached = set()
    for _ in range(count):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert len(reached) == count


def test_without_colour_a_verdict_has_its_word_and_its_sign(page, pages):
    page.goto(pages["detection"])
    assert "▼" in page.locator("#summary .verdicts li").first.inner_text()
    assert "lower" in page.locator("#summary .verdicts li").first.inner_text()


def test_it_prints_on_a_few_sheets_in_dark_ink(page, pages):
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(pages["one pair"])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not page.locator("nav").is_visible()
    assert 1 <= page.pdf(prefer_css_page_size=True).count(b"/Type /Page\n") <= 5
