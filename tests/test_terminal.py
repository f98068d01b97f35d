"""How commands end: one line and an exit code, whatever the terminal is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deepkd_plugin import terminal
from deepkd_plugin.commands import cli
from deepkd_plugin.errors import UserError
from deepkd_plugin.study.reproduce import tables

ROOT = Path(__file__).parents[1]


def run(work, **options):
    """Run lines of Python in guarded(), in a process of its own."""
    code = f"""
import errno, os, signal, sys
from deepkd_plugin.terminal import *
from deepkd_plugin.terminal import check_interruption
def work():
{chr(10).join("    " + line for line in work.splitlines())}
sys.exit(guarded(work))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, **options)


def test_a_closed_stdout_is_nobody_s_file(tmp_path):
    """The file that is opened next must not get what is printed."""
    work = f'file = open({str(tmp_path / "file")!r}, "w"); print("said"); os.write(1, b"said")\nfile.close()'
    ended = run(work, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_terminal_without_such_characters_shows_others():
    ended = run('print("a → b"); raise UserError("Δ")', capture_output=True, env={"PYTHONIOENCODING": "ascii:strict"})
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, b"a ? b\n", b"deepkd: error: ?\n")


def test_a_line_reaches_a_log_when_it_is_said(tmp_path):
    """`deepkd train > log` is looked at while it trains."""
    log = tmp_path / "log"
    ended = run(f"print('epoch 1'); print(open({str(log)!r}).read(), file=sys.stderr)", stdout=log.open("w"), stderr=-1)
    assert ended.stderr == b"epoch 1\n\n"


def test_a_reader_that_has_gone_is_one_line():
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = run('print("x" * 100_000)', stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (141, b"deepkd: error: nobody reads the output any more\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ('OSError(errno.ENOSPC, "No space left on device", "a/b")', "a/b: No space left on device"),
        ('OSError(errno.EMFILE, "Too many open files", "a")', "too many open files ("),
        (
            'RuntimeError("received 0 items of ancdata")',
            "too many open files (received 0 items of ancdata); `ulimit -n`",
        ),
        (
            'RuntimeError("operator torchvision::nms does not exist")',
            "torch and torchvision do not go together: one is for the CPU",
        ),
    ],
)
def test_what_the_system_refuses_is_one_line(error, line):
    ended = run(f"raise {error}", capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"deepkd: error: {line}")
    assert ended.stderr.count("\n") == 1


def test_what_an_import_ends_with_is_one_line_too(tmp_path):
    """As importing torchvision does if it was built for another torch."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    for words in (["tools/train.py", "--cfg", "a.yaml"], ["-m", "deepkd_plugin", "doctor"]):
        ended = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
        )
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("deepkd: error: torch and torchvision do not go together")


def test_other_errors_keep_their_traceback():
    ended = run('raise RuntimeError("a fault of ours")', capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_that_python_drops_is_not_lost(name, code):
    work = f"""
class Dropping:
    def __del__(self):
        signal.raise_signal(signal.{name})
Dropping()
check_interruption()
print("went on")"""
    ended = run(work, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr == "deepkd: interrupted; the same command starts again\n"


def test_a_command_s_signals_are_its_own():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert terminal.guarded(lambda: 3) == 3
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    terminal.check_interruption()


def test_a_flag_must_be_written_out():
    parser = terminal.Parser("tool")
    parser.add_run()
    for word in ("--o", "--over", "--res"):
        with pytest.raises(UserError, match=f"unrecognized arguments: {word}"):
            parser.parse([word])
    assert parser.parse(["--overwrite"]).overwrite


@pytest.mark.parametrize(("error", "shown"), [("ConnectionResetError", False), ("EOFError", False), ("KeyError", True)])
def test_a_thread_says_nothing_of_a_loaders_process_that_is_gone(error, shown):
    """As multiprocessing's thread does: it hands what it caught to sys.excepthook."""
    work = f"""import threading
def serve():
    try:
        raise {error}("gone")
    except Exception:
        sys.excepthook(*sys.exc_info())
thread = threading.Thread(target=serve)
thread.start()
thread.join()"""
    done = run(work, capture_output=True, text=True)
    assert done.returncode == 0
    assert ("Traceback" in done.stderr) == shown


PATHS = {
    "apply": ["~/x"],
    "cache": ["list", "~/x"],
    "export": ["~/x", "--to=torch"],
    "push": ["~/x", "me/mine"],
    "report": ["~/x"],
    "eval": ["~/x"],
    "eval -m": ["-m", "resnet8", "-d", "glyphs100", "-c=~/x"],
    "predict": ["~/x", "~/x"],
    "shrink": ["~/x"],
    "train": ["--cfg=~/x"],
    "gsnr": ["--cfg=~/x"],
    "gsnr --runs": ["--runs=~/x", "--out=~/x"],
    "detect": ["--cfg=~/x"],
    "detect-eval": ["--cfg=detection/glyph_canvas/res20_res8/kd", "--ckpt=~/x"],
    "tune": ["--cfg=~/x", "--budget=1"],
    "distill": ["--images=~/x", "--student=resnet8", "--teacher=resnet8"],
    "doctor": ["~/x"],
    "train LOG": ["--cfg=glyphs100/res20_res8/kd", "DISTILLER.TEACHER_WEIGHTS=~/x"],
}


@pytest.mark.parametrize("name", PATHS)
def test_a_home_s_sign_is_read_in_every_path_of_the_command_line(name, tmp_path, monkeypatch, capsys, data_root):
    """Where nothing is the home, that is what the one line tells of."""
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.chdir(data_root.parent)
    code = cli.main([name.split()[0], *PATHS[name]])
    out, err = capsys.readouterr()
    assert (code, err.count("\n")) == (2, 1), out + err
    assert str(tmp_path / "nobody" / "x") in err
    assert "~" not in err


def test_a_home_s_sign_in_the_name_of_a_table(tmp_path, monkeypatch):
    (tmp_path / "table" / "pair").mkdir(parents=True)
    (tmp_path / "table" / "pair" / "kd.yaml").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tables._source("TABLE", "~/table", ()) == str(tmp_path / "table")


@pytest.mark.parametrize("module", ["launch", "detection.launch", "detection.evaluate"])
def test_a_launcher_s_module_is_the_launcher(module):
    command = [sys.executable, "-m", f"deepkd_plugin.{module}", "--cfg", "nowhere.yaml", "--ckpt", "none"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("deepkd: error: ")
