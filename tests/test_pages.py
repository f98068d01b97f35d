"""The pages for people: what they must say alike, and that they fit a terminal."""

import re
from pathlib import Path

import pytest
import yaml

import deepkd_plugin

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "results" / "README.md"]


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    assert citation["version"] == newest == deepkd_plugin.__version__


def test_citation_has_what_the_format_requires():
    """https://github.com/citation-file-format/citation-file-format, schema 1.2.0."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    (paper,) = citation["references"]
    for entry in (citation, paper):
        assert entry["type"]
        assert entry["title"]
        for author in entry["authors"]:
            assert author.keys() in ({"name"}, {"family-names", "given-names"})
    assert [identifier["value"] for identifier in paper["identifiers"]] == ["arXiv:2505.15133"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_are_at_most_120_characters_long(page):
    """Except rows of a table, which cannot be broken."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_are_at_most_150_lines_long(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_page_on_the_api_names_what_the_package_exports():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").partition("## For methods")[0]
    named = [name.strip() for line in re.findall(r"members: \[(.+)\]", page) for name in line.split(",")]
    assert sorted(named) == sorted(deepkd_plugin.__all__)
