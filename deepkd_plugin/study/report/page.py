"""report.html: one page that holds everything, opens from disk, needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .cells import NUMBERS, Cell, agreement, by_base, headline, number_name
from .collect import Table
from .columns import Column, columns, title
from .curves import LINES, curves
from .dots import dot_plot
from .markup import Markup, join, tag
from .notes import left_out, notes, published_without_pair, what_was_run
from .protocol import cautions, protocol
from .statistics import EQUAL, HIGHER, LOWER

STYLE = Path(__file__).with_name("page.css")

SIGNS = {HIGHER: "▲ ", LOWER: "▼ ", EQUAL: "≈ "}
"""Before a verdict, for those who do not see its colour; a screen reader reads the word."""


def page(table: Table, cells: Sequence[Cell]) -> str:
    """The whole page of a table."""
    heading = f"DeepKD: {table.title}"
    by_pair = {pair: [cell for cell in cells if cell.pair is pair] for pair in table.pairs}
    sections = [
        ("summary", "Result", join(_summary(cells), _published(table))),
        *(
            (f"pair-{i}", pair.label, _pair(held, table.metric, f"pair-{i}"))
            for i, (pair, held) in enumerate(by_pair.items(), 1)
            if held
        ),
        ("missing", "Runs that are not counted", _left_out(table)),
        ("notes", "How to read this", tag("ul", [tag("li", note) for note in notes(cells)])),
    ]
    links = [tag("li", tag("a", name, href=f"#{anchor}")) for anchor, name, _ in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", heading),
        tag("style", Markup(STYLE.read_text(encoding="utf-8"))),
    )
    body = tag(
        "body",
        tag("header", tag("h1", heading), tag("p", what_was_run(table), class_="lead")),
        tag("nav", tag("ol", links), aria_label="Contents"),
        tag(
            "main",
            [
                tag(
                    "section",
                    tag("h2", name, id=f"{anchor}-title"),
                    content,
                    id=anchor,
                    class_="pair" if anchor.startswith("pair-") else None,
                    aria_labelledby=f"{anchor}-title",
                )
                for anchor, name, content in sections
            ],
        ),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _summary(cells: Sequence[Cell]) -> Markup:
    groups = by_base(cells)
    if not groups:
        return join(tag("p", "No method of this table has a base to be compared with."), _agreement(cells))
    results = [tag("li", tag("b", f"{heading}: "), headline(group)) for heading, group in groups.items()]
    figure = None
    if any(cell.numbers["last"].gain is not None for cell in cells):
        figure = dot_plot(groups, "last", f"Gain over the base, {number_name('last', cells[0].measures)}")
    return join(tag("ul", results, class_="verdicts"), _agreement(cells), figure)


def _agreement(cells: Sequence[Cell]) -> Markup | None:
    text = agreement(cells)
    return tag("p", f"{text[0].upper()}{text[1:]}.") if text else None


def _published(table: Table) -> Markup | None:
    said = published_without_pair(table)
    if not said:
        return None
    return join(tag("p", said[0]), tag("ul", [tag("li", one) for one in said[1:]]))


def _pair(cells: Sequence[Cell], metric: str, anchor: str) -> Markup:
    told = [
        tag("div", tag("dt", what), tag("dd", [tag("span", one) for one in answers]))
        for what, answers in protocol(cells)
    ]
    warned = [tag("li", text) for text in cautions(cells)]
    pair = cells[0].pair
    return join(
        tag("p", tag("code", pair.name), class_="name") if pair.name != pair.label else None,
        tag("h3", "Protocol"),
        tag("dl", told, class_="protocol", id=f"{anchor}-protocol"),
        tag("div", tag("b", "Not all alike. "), tag("ul", warned), class_="caution") if warned else None,
        [_table(cells, number, metric, anchor) for number in NUMBERS],
        tag("p", f"* {number_name('best', cells[0].measures)}", class_="footnote"),
        _curves(cells, metric),
    )


def _table(cells: Sequence[Cell], number: str, metric: str, anchor: str) -> Markup:
    shown = columns(cells, number)
    caption = f"{anchor}-{number}"
    heads = [tag("th", column.title, scope="col", class_=column.kind) for column in shown]
    rows = [tag("tr", _fields(cell, shown)) for cell in cells]
    table = tag(
        "table",
        tag("caption", tag("span", title(number, metric, cells[0].measures)), id=caption),
        tag("thead", tag("tr", heads)),
        tag("tbody", rows),
        class_="numbers",
        aria_describedby=f"{anchor}-protocol",
    )
    # what scrolls sideways must be reachable by keyboard
    return tag("div", table, class_="scroll", role="region", tabindex=0, aria_labelledby=caption)


def _fields(cell: Cell, shown: Sequence[Column]) -> list[Markup]:
    first, *others = shown
    fields = [tag("th", first.words(cell), scope="row")]
    for column in others:
        said, *small = column.words(cell)
        sign = SIGNS.get(said)
        fields.append(
            tag(
                "td",
                tag("span", sign, aria_hidden="true") if sign else None,
                said,
                [tag("small", text) for text in small],
                class_=column.kind,
            )
        )
    return fields


def _curves(cells: Sequence[Cell], metric: str) -> Markup:
    figure = curves(_panels(cells), metric, cells[0].pair.label)
    return join(
        tag("h3", "Learning curves"), figure or tag("p", "No run that counts has a learning curve yet.")
    )


def _panels(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells that share a panel of curves: a base with the methods over it, as many as can be told apart."""
    panels: dict[str, list[Cell]] = {}
    bases = {cell.base.name for cell in cells if cell.base is not None}
    for base in cells:
        over = [cell for cell in cells if cell.base is not None and cell.base.name == base.method.name]
        for i in range(0, len(over), LINES - 1):
            some = over[i : i + LINES - 1]
            what = some[0].method.label if len(some) == 1 else f"{len(some)} rows over it"
            part = f", part {i // (LINES - 1) + 1}" if len(over) >= LINES else ""
            panels[f"{base.method.label} and {what}{part}"] = [base, *some]
    alone = [cell for cell in cells if cell.base is None and cell.method.name not in bases]
    for length in dict.fromkeys(cell.planned[0].epochs for cell in alone):
        alike = [cell for cell in alone if cell.planned[0].epochs == length]
        for i in range(0, len(alike), LINES):
            some = alike[i : i + LINES]
            panels[", ".join(cell.method.label for cell in some)] = some
    return panels


def _left_out(table: Table) -> Markup:
    rows = left_out(table)
    if not rows:
        return tag("p", "Every planned run counts.")
    heads = ("Pair", "Method", "Seeds", "Why")
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", text) for text in row[1:]]) for row in rows]
    listed = tag(
        "table",
        tag(
            "caption",
            tag("span", "Planned runs without a number in the tables, and why"),
            id="missing-caption",
        ),
        tag("thead", tag("tr", [tag("th", head, scope="col") for head in heads])),
        tag("tbody", body),
        class_="reasons",
    )
    return tag("div", listed, class_="scroll", role="region", tabindex=0, aria_labelledby="missing-caption")
