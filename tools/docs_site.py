"""What MkDocs calls while it builds the site from docs/ (`hooks` in mkdocs.yml).

The pages are written for GitHub too: they link to files outside of docs/, and need no blank line before a list. Pages
of reference have their generated parts between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Pages outside of docs/ that the navigation has, beside those that are linked."""
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)((?:#[^)\s]*)?)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside of docs/ that a page leads to, directly or by way of others."""
    waiting = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()] + [ROOT / page for page in PAGES]
    while waiting:
        page = waiting.pop()
        for file in {page, *_linked(page)}:
            name = _name(file)
            if files.get_file_from_path(name) is None and file.is_file():
                added = File.generated(config, name, abs_src_path=str(file), inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(added)
                waiting += [file] if file.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in what is generated, lead links to where the site has a file, and part lists and tables from text."""
    source = Path(page.file.abs_src_path) if page.file.abs_src_path else ROOT / "docs" / page.file.src_uri
    for name, make in GENERATED.items():
        mark, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        if mark in markdown:
            before, _, rest = markdown.partition(mark)
            markdown = before + "\n".join(make()) + rest.partition(end)[2]
    here = os.path.dirname(page.file.src_uri)

    def led(link: re.Match[str]) -> str:
        target = _target(source, link[1])
        return f"]({os.path.relpath(_name(target), here or '.')}{link[2]})" if target.is_file() else link[0]

    return "\n".join(_parted(LINK.sub(led, markdown).split("\n")))


def keys() -> Iterator[str]:
    """Write a table of the config keys for each of the tree's first names, under the built-in host."""
    from deepkd_plugin.commands.keys import rows
    from deepkd_plugin.hosts.registry import BUILTIN

    node = ""
    for path, default, meaning, allowed in rows(BUILTIN):
        if path.partition(".")[0] != node:
            node = path.partition(".")[0]
            yield from ("", f"## {node}", "", "| key | default | meaning | values |", "|---|---|---|---|")
        shown = f"`{default!r}`" if default not in ("", None) else ""
        yield f"| `{path}` | {shown} | {_cell(meaning)} | {_cell(allowed)} |"
    yield ""


def commands() -> Iterator[str]:
    """Write the help of every command, by group."""
    from deepkd_plugin.commands.cli import GROUPS
    from deepkd_plugin.commands.completion import module_of
    from deepkd_plugin.terminal import built

    os.environ |= {"COLUMNS": "80", "NO_COLOR": "1"}
    for group, names in GROUPS.items():
        yield from ("", f"## {group.capitalize()}")
        for name, meaning in names.items():
            module = import_module(f"deepkd_plugin.commands.{module_of(name)}")
            parser = built(lambda module=module: module.main([]))
            yield from ("", f"### deepkd {name}", "", f"{meaning.capitalize()}.", "", "```text")
            yield from parser.format_help().rstrip().split("\n")
            yield "```"
    yield ""


GENERATED: dict[str, Callable[[], Iterator[str]]] = {"keys": keys, "commands": commands}


def _linked(page: Path) -> set[Path]:
    """Return the files that a page links to."""
    return {_target(page, link[1]) for link in LINK.finditer(page.read_text(encoding="utf-8"))}


def _target(page: Path, link: str) -> Path:
    return Path(os.path.normpath(page.parent / link))


def _name(file: Path) -> str:
    """Return what the site calls a file: docs/ is its root, and everything else keeps its path."""
    within = file.relative_to(ROOT / "docs") if file.is_relative_to(ROOT / "docs") else file.relative_to(ROOT)
    return within.as_posix()


def _cell(text: str) -> str:
    return re.sub(r"([|*_])", r"\\\1", html.escape(text, quote=False))


def _parted(lines: list[str]) -> Iterator[str]:
    """Put an empty line between text and a list or table that follows it at once, outside of code."""
    code = listed = False
    before = ""
    for line in lines:
        if line.startswith("```"):
            code = not code
        if not code:
            item = re.match(r"[-*] |\d+\. ", line) is not None
            row = line.startswith("|") and not before.startswith("|")
            if before and ((item and not listed) or row):
                yield ""
            listed = item or (listed and bool(line))
        yield line
        before = line
