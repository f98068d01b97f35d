"""The site of docs/ and its pictures: what is generated, what is current, and that every page can be found."""

import importlib
import re
import shutil
from pathlib import Path

import pytest

from deepkd_plugin import config
from deepkd_plugin.commands.cli import COMMANDS

ROOT = Path(__file__).parents[1]
NAMES = [file.stem for file in (ROOT / "docs" / "figures").glob("*.svg")]


@pytest.fixture
def figures(monkeypatch):
    """tools/figures.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("figures")


@pytest.fixture
def hook(monkeypatch):
    """tools/docs_site.py as a module."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    monkeypatch.syspath_prepend(ROOT / "tools")
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.setenv(name, "80")
    return importlib.import_module("docs_site")


@pytest.fixture
def pages(hook, monkeypatch):
    """pages(name, text) -> what the site makes of a page with this text; name: as the site calls it."""

    class Page:
        def __init__(self, name):
            folder = ROOT if (ROOT / name).is_file() else ROOT / "docs"
            self.file = type("File", (), {"src_uri": name, "abs_src_path": str(folder / name)})

    return lambda name, text: hook.on_page_markdown(text, Page(name), None, None)


def test_every_picture_shows_what_is_measured_today(figures, capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().out
    assert set(NAMES) == set(figures.PICTURES)


@pytest.mark.parametrize(
    ("file", "old", "new", "picture"),
    [("glyphs100/report.csv", ",-6.908,", ",-9.608,", "result"), ("step.json", '"ms": 271.', '"ms": 371.', "cost")],
)
def test_a_change_of_the_measurements_is_told(figures, file, old, new, picture, tmp_path, capsys):
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*.html"))
    shutil.copytree(ROOT / "docs" / "figures", tmp_path / "docs" / "figures")
    changed = tmp_path / "results" / file
    text = changed.read_text(encoding="utf-8")
    assert old in text
    changed.write_text(text.replace(old, new), encoding="utf-8")
    assert figures.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{picture}.svg shows other numbers; python tools/figures.py {picture}"
    ]
    assert figures.main([picture], tmp_path) == 0
    assert figures.main(["--check"], tmp_path) == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_can_be_drawn(figures, name, tmp_path):
    figures.write(name, tmp_path, ROOT)
    assert figures.current(name, tmp_path, ROOT)


def test_a_picture_that_nobody_knows_is_refused(figures, tmp_path, capsys):
    assert figures.main(["ideas"], tmp_path) == 2
    assert "idea, result" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w/]+\.md)$", text[text.index("\nnav:") :], re.MULTILINE))
    there = {page.name for page in (ROOT / "docs").glob("*.md")}
    made = {f"results/{page.stem}" for page in (ROOT / "results").glob("*.md.jinja")}
    assert named - there == {*made, "CONTRIBUTING.md", "CHANGELOG.md"}
    assert there <= named


def test_the_page_of_keys_has_every_key(hook, pages):
    text = pages("keys.md", (ROOT / "docs" / "keys.md").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| `([\w.]+)` \| (?:`.*`)? ?\| (.+) \| (.+) \|$", text, re.MULTILINE)
    assert {key.path for key in config.all_keys()} <= {path for path, *_ in rows}
    assert len(rows) == text.count("\n| `")  # every row has a meaning and values
    assert "`deepkd keys` prints the same" not in text


def test_the_page_of_commands_has_the_help_of_every_command(pages):
    text = pages("commands.md", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"))
    helps = dict(re.findall(r"^### deepkd ([\w-]+)\n.*?```text\nusage: (.*?)\n```", text, re.MULTILINE | re.DOTALL))
    assert helps.keys() == COMMANDS.keys()
    assert all(usage.startswith(f"deepkd {name}") for name, usage in helps.items())


def test_links_lead_to_where_the_site_has_a_file(pages):
    text = "[a](../results/README.md#speed) [b](method.md) ![c](figures/idea.svg) [d](../examples/bare.py) x[0](y)"
    assert pages("how.md", text) == text.replace("../results", "results").replace("../examples", "examples")
    assert pages("results/README.md", "[a](../docs/gsnr.md)") == "[a](../gsnr.md)"


def test_lists_and_tables_are_parted_from_text_but_not_in_code(pages):
    text = "Text:\n- one\n  more\n- two\n\nText\n| a |\n|---|\n| b |\n\n```\nx\n- y\n```"
    parted = "Text:\n\n- one\n  more\n- two\n\nText\n\n| a |\n|---|\n| b |\n\n```\nx\n- y\n```"
    assert pages("how.md", text) == parted
