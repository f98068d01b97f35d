"""HTML and SVG from Python, with everything escaped that is not markup of ours."""

from __future__ import annotations

from html import escape
from typing import Any

VOID = ("meta", "link", "br", "line", "circle", "path", "polygon", "rect")
"""Elements without content."""


class Markup(str):
    """Text that is markup already. Any other string is escaped where it enters an element."""

    __slots__ = ()


def tag(element: str, *content: Any, **attributes: Any) -> Markup:
    """An element: its content in order (None is nothing), its attributes by name.

    In an attribute's name "_" stands for "-" and a last "_" is dropped (class_); None or False leaves it out,
    True writes its bare name.
    """
    written = []
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {name}")
        elif value is not None and value is not False:
            written.append(f' {name}="{escape(str(value))}"')
    opening = f"<{element}{''.join(written)}>"
    if element in VOID:
        # SVG's own are only closed by the slash
        return Markup(f"{opening[:-1]}/>")
    return Markup(f"{opening}{join(*content)}</{element}>")


def join(*content: Any) -> Markup:
    """Several pieces of content one after the other, lists of them too."""
    return Markup("".join(_write(one) for one in content))


def _write(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, Markup):
        return content
    if isinstance(content, (list, tuple)):
        return join(*content)
    return escape(str(content))
