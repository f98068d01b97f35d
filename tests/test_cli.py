"""deepkd COMMAND: the exit codes that its commands and its mistakes get."""

import subprocess
import sys
import types

import pytest

from deepkd_plugin import cli
from deepkd_plugin.errors import UserError


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "command line: the following arguments are required: COMMAND; see deepkd --help"),
        (["aply"], "invalid choice: 'aply'"),
        (["apply"], "the following arguments are required: PATH; see deepkd apply --help"),
        (["apply", ".", "--check", "--revert"], "not allowed with argument --check"),
        (["apply", ".", "--force"], "unrecognized arguments: --force"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line(capsys, words, complaint):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("deepkd: error: command line: ")
    assert complaint in captured.err
    assert captured.err.count("\n") == 1


@pytest.fixture
def doctor(monkeypatch):
    """A module in doctor.py's place, its doctor() to be set."""
    module = types.ModuleType("deepkd_plugin.doctor")
    monkeypatch.setitem(sys.modules, "deepkd_plugin.doctor", module)
    return module


@pytest.mark.parametrize("code", [0, 1])
def test_a_command_s_exit_code_is_deepkd_s(doctor, monkeypatch, code):
    doctor.doctor = lambda path: code
    assert cli.main(["doctor"]) == code
    monkeypatch.setattr(sys, "argv", ["deepkd", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.entry()
    assert ended.value.code == code


def test_mistakes_and_interruptions_have_codes_of_their_own(doctor, capsys):
    def mistaken(path):
        raise UserError("run.yaml: KEY is 3; it must be 4")

    def interrupted(path):
        raise KeyboardInterrupt

    doctor.doctor = mistaken
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "deepkd: error: run.yaml: KEY is 3; it must be 4\n"
    doctor.doctor = interrupted
    assert cli.main(["doctor"]) == 130


def test_python_m_is_the_same_command(tmp_path):
    command = [sys.executable, "-m", "deepkd_plugin", "apply", str(tmp_path), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"deepkd: error: {tmp_path}: has no tools/train.py; ")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "\n    apply " in out
    assert "\n    doctor " in out
