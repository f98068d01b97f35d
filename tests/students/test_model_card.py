"""Every command and piece of code in the README and the docs that needs a run."""

import re
import shlex
from pathlib import Path

import pytest
from descriptions import Hub
from PIL import Image

from deepkd_plugin.commands import cli
from deepkd_plugin.students import push

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
COMMANDS = sorted(set(re.findall(r"^deepkd (?:eval|export|predict|push) .*", TEXT, re.MULTILINE)))


@pytest.fixture
def here(run, pictures, tmp_path, monkeypatch):
    """A working folder that has what the page speaks of."""
    (tmp_path / "output" / "glyphs100").mkdir(parents=True)
    run.rename(tmp_path / "output" / "glyphs100" / "run")
    (tmp_path / "output" / "flowers").mkdir()
    (tmp_path / "output" / "flowers" / "deepkd").symlink_to(tmp_path / "output" / "glyphs100" / "run")
    Image.open(pictures / "a.png").save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(push, "_api", Hub)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, here):
    if "onnx" in command:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    assert cli.main(shlex.split(command)[1:]) == 0


def test_code(here, capsys):
    (code,) = re.findall(r"```python\n(from PIL .*?)```", TEXT, re.DOTALL)
    exec(code, {})
    assert len(capsys.readouterr().out.strip()) == 1
