"""Config files: what YAML would hide, or let grow, is one line with the file and the line."""

import os
import time

import pytest
from yacs.config import CfgNode

from deepkd_plugin.config import file as config_file
from deepkd_plugin.errors import UserError


def refused(path, content=None):
    if content is not None:
        path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        config_file.read(path)
    assert time.monotonic() - start < 5
    return str(error.value).replace(str(path), "some.yaml")


@pytest.fixture
def some(tmp_path):
    return tmp_path / "some.yaml"


@pytest.mark.parametrize(
    "content",
    [
        b"SOLVER: {LR: 0.1, STAGES: [1, 2]}\n",
        b"SOLVER:\r\n  LR: 0.1\r\n  STAGES: [1, 2]\r\n",
        b"\xef\xbb\xbfSOLVER:\n  LR: 0.1\n  STAGES:\n  - 1\n  - 2\n",
        b"# text\n---\nSOLVER: {'LR': .1, \"STAGES\": [0x1, 2]} # text\n...\n",
    ],
)
def test_plain_files_are_read(some, content):
    some.write_bytes(content)
    assert config_file.read(some) == {"SOLVER": {"LR": 0.1, "STAGES": [1, 2]}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"SOLVER: {LR: 0.1}\nDKD:\n  T: 1\nSOLVER: {EPOCHS: 3}\n",
            "some.yaml: line 4: is not valid YAML ('SOLVER' stands in line 1 already)",
        ),
        (b"A:\n  B: 1\n  C: 2\n  B: 1\n", "some.yaml: line 4: is not valid YAML ('B' stands in line 2 already)"),
        (
            b"A: &a [1]\nB: *a\n",
            "some.yaml: line 2: is not valid YAML (an alias; a config says each value where it stands)",
        ),
        (
            b"A:\n  B: 1\n  <<: {B: 2}\n",
            "some.yaml: line 3: is not valid YAML (a merge key; a config says each value where it stands)",
        ),
        (b"A: 010\n", "some.yaml: line 1: is not valid YAML ('010' is another number in YAML than it looks like)"),
        (b"A: 1:30\n", "some.yaml: line 1: is not valid YAML ('1:30' is another number in YAML than it looks like)"),
        (b"A: 1\nB: " + b"[" * 1500 + b"]" * 1500, "some.yaml: line 2: is not valid YAML (more than 20 levels)"),
        (
            b"\n".join(b" " * i + b"a:" for i in range(300)),
            "some.yaml: line 20: is not valid YAML (more than 20 levels)",
        ),
        (b"A: 2020-99-99\n", "some.yaml: line 1: is not valid YAML ('2020-99-99' is no value of its kind)"),
        (b"A:\n- !!int x\n", "some.yaml: line 2: is not valid YAML ('x' is no value of its kind)"),
        (b"A: !!float x\n", "some.yaml: line 1: is not valid YAML ('x' is no value of its kind)"),
        (b"A: !!timestamp x\n", "some.yaml: line 1: is not valid YAML ('x' is no value of its kind)"),
        (
            b"A:\n  !!python/object/apply:os.system [echo]\n",
            "some.yaml: line 2: is not valid YAML (could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system')",
        ),
        (b"A: 1\n? [a]\n: 1\n", "some.yaml: line 2: is not valid YAML (a key that is no name)"),
        (b"A: 1\nB: \x00\n", r"some.yaml: line 2: is not valid YAML (the character '\x00')"),
        (
            b"A: 1\nB:\n\t- 1\n",
            r"some.yaml: line 3: is not valid YAML (found character '\t' that cannot start any token)",
        ),
        (b"a: [", "some.yaml: line 1: is not valid YAML (expected the node content, but found '<stream end>')"),
        (b"a: 1\n---\nb: 1\n", "some.yaml: line 2: is not valid YAML (but found another document)"),
        (
            b"A: '" + b"x" * 200_000 + b"'",
            "some.yaml: cannot be read as a config file (it has more than 100,000 bytes)",
        ),
    ],
)
def test_what_a_file_must_not_hide(some, content, expected):
    assert refused(some, content) == expected


def test_a_number_of_5000_digits(some):
    line = refused(some, b"A: 1\nSEED: " + b"9" * 5000 + b"\n")
    assert line.startswith("some.yaml: line 2: is not valid YAML ('9999")
    assert len(line) < 300


def test_lists_that_name_each_other(some):
    """Nine names of nine names, 30 times: written out they would not end."""
    rows = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
    assert refused(some, "\n".join(rows).encode()).startswith("some.yaml: line 2: is not valid YAML (an alias")
    rows = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 30))]
    assert "(an alias" in refused(some, "\n".join(rows).encode())


def test_what_is_no_file(some, tmp_path):
    none = "some.yaml: cannot be read as a config file (it is none)"
    some.mkdir()
    assert refused(some) == none
    some.rmdir()
    os.mkfifo(some)  # reading would wait for ever
    assert refused(some) == none
    some.unlink()
    some.symlink_to("/dev/zero")
    assert refused(some) == none
    some.unlink()
    some.symlink_to(some)
    assert "cannot be read as a config file" in refused(some)
    for name in ("missing.yaml", "x" * 300, "a\0b", "\ud800"):
        assert "cannot be read as a config file" in refused(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(some):
    some.touch(0)
    assert "Permission denied" in refused(some)


def test_a_config_that_was_written_can_be_read(some):
    shared = [32, 1.0e-05]
    cfg = CfgNode({"A": {"SIZE": shared, "NONE": None}, "B": {"SIZE": shared, "TEXT": "010"}})
    cfg.B.SIZE = cfg.A.SIZE
    assert "*id001" in cfg.dump()
    some.write_text(config_file.without_aliases(cfg.dump()))
    assert config_file.read(some) == {
        "A": {"SIZE": shared, "NONE": None},
        "B": {"SIZE": shared, "TEXT": "010"},
    }
