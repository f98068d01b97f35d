"""Worker processes that are left alone before torch watches their parent."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import deepkd_plugin

KILLED = """import os, signal, sys, time
from torch.utils.data import DataLoader
from deepkd_plugin.data.workers import end_if_left

if __name__ == "__main__":
    os.register_at_fork(after_in_child=lambda: time.sleep(1))  # a worker of a busy machine begins late
    workers = iter(DataLoader(range(8), num_workers=2, worker_init_fn=eval(sys.argv[1])))
    print(*next(workers).tolist(), flush=True) if "go on" in sys.argv else os.kill(os.getpid(), signal.SIGKILL)
"""


def run(tmp_path, *words, **more):
    (tmp_path / "killed.py").write_text(KILLED)
    words = [sys.executable, str(tmp_path / "killed.py"), *words]
    return subprocess.run(words, stdout=subprocess.PIPE, timeout=120, cwd=Path(__file__).parents[2], **more)


@pytest.mark.skipif(sys.platform != "linux", reason="the signal and the fork are Linux's")
def test_a_worker_whose_parent_is_killed_at_once_ends(tmp_path):
    # the reader of the pipe, which the workers have inherited, waits for their end
    assert run(tmp_path, "end_if_left").returncode == -9
    assert run(tmp_path, "end_if_left", "go on").stdout == b"0\n"


def test_every_loader_of_the_package_watches():
    calls = 0
    for file in Path(deepkd_plugin.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DataLoader":
                calls += 1
                words = [word.arg for word in node.keywords]
                given = "worker_init_fn" in words or (None in words and '["worker_init_fn"] = end_if_left' in text)
                assert given, f"{file}:{node.lineno}: a worker of this loader may be left behind"
    assert calls >= 6
