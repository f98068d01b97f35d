"""Reading a config file: YAML without what would make one file mean more, or cost more, than it shows."""

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, shown

LARGEST = 100_000
"""Bytes of a config file; ours have about 1,000."""
DEEPEST = 20
"""Levels of a config file; ours have 4."""


def read(file: str | Path) -> Any:
    """Read a YAML file of plain values.

    Raises UserError, with the line, for what is no such file, for a key that stands twice in one section, for
    aliases, merge keys and numbers that YAML reads in base 8 or 60, and for what is larger or deeper than a config
    can be.
    """
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{file}: cannot be read as a config file (it is none)")
        with open(path, "rb") as stream:
            content = stream.read(LARGEST + 1)
        text = content.decode("utf-8-sig")  # some editors begin a file with a mark
    except (OSError, ValueError) as error:  # a name with a NUL, bytes that are no UTF-8
        raise UserError(f"{file}: cannot be read as a config file ({error})") from None
    if len(content) > LARGEST:
        raise UserError(f"{file}: cannot be read as a config file (it has more than {LARGEST:,} bytes)")
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{file}: line {line}: is not valid YAML (the character {shown(chr(error.character))})"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{file}: line {mark.line + 1}: is not valid YAML ({error.problem})") from None


def without_aliases(text: str) -> str:
    """Write a dumped config anew as `read` takes it: yacs names a list that two keys share, as mdistiller's do."""
    return yaml.dump(yaml.safe_load(text), Dumper=_Dumper)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; it tells of a key that stands twice, and neither follows aliases nor goes deep."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem("an alias; a config says each value where it stands", event)
        if self.depth == DEEPEST:
            raise _problem(f"more than {DEEPEST} levels", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a key that is no name", key)
            if key.tag == "tag:yaml.org,2002:merge":
                raise _problem("a merge key; a config says each value where it stands", key)
            if key.value in first:
                raise _problem(f"{shown(key.value)} stands in line {first[key.value]} already", key)
            first[key.value] = key.start_mark.line + 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and re.match(r"[-+]?(0[0-9_]+$|[0-9_]+:)", node.value):  # octal, or minutes and seconds
            raise _problem(f"{shown(node.value)} is another number in YAML than it looks like", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, TypeError, AttributeError, LookupError):  # YAML's kinds check little
            raise _problem(f"{shown(getattr(node, 'value', ''))} is no value of its kind", node) from None


def _problem(text: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=at.start_mark)


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a value of a config file's content, by its dotted key."""
    *parents, leaf = key.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = list(value) if isinstance(value, tuple) else value
