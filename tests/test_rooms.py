"""The order of the package's rooms: no circle of imports, and none that runs upwards.

Lazy imports and those for type-checking count: they tie modules together as much as any other.
"""

import ast
from pathlib import Path

import pytest

import deepkd_plugin

PACKAGE = Path(deepkd_plugin.__file__).parent

ROOMS = (
    *("errors", "device", "terminal", "distributed", "rules", "extensions"),
    *("topk", "losses", "tokens", "streams", "ledger", "updates", "optim", "gsnr", "fold", "mixture"),
    *("distillers", "config", "run", "data", "teacher_logits"),
    *("step", "divided", "speed", "choice", "solver", "accuracy", "card", "trainer"),
    *("hosts", "launch", "detection", "study", "students", "commands"),
    *("registry", "mdistiller", "__main__", "__init__"),
)
"""From the ground up: a room may import those before it."""


def modules():
    """Dotted name below the package -> file; a package's own is its __init__'s."""
    names = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = file
    return names


MODULES = modules()


def imports(name):
    """The modules that a module names in its import statements, wherever these stand."""
    file = MODULES[name]
    here = name.split(".") if file.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = here[: len(here) - node.level + 1]
        target = [*above, *(node.module or "").split(".")] if node.module else above
        for alias in node.names:
            module = ".".join([*target, alias.name])
            if module not in MODULES:
                module = ".".join(target) or "__init__"
            found.add(module)
    return found - {name}


IMPORTS = {name: imports(name) for name in MODULES}


def room(name):
    return name.split(".")[0]


def test_every_room_has_its_place():
    assert {room(name) for name in MODULES} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_runs_upwards(name):
    place = ROOMS.index(room(name))
    assert [other for other in sorted(IMPORTS[name]) if ROOMS.index(room(other)) > place] == []


def test_no_module_is_in_a_circle():
    left = {name: set(others) for name, others in IMPORTS.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_no_file_imports_the_package_by_its_own_name():
    """Imports inside the package are relative, so that the tests above see every one."""
    for file in MODULES.values():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
        names += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
        assert not [name for name in names if name.split(".")[0] == "deepkd_plugin"], file
