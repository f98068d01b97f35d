"""What the process of a run says of those that it has started; test_together.py trains with real ones."""

from types import SimpleNamespace

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from deepkd_plugin.study.reproduce import worker


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        # a survivor was seen to have ended before the process that was killed
        ({0: 1, 1: -9}, 137, "deepkd: process 1 of 2 was killed by SIGKILL\n"),
        ({0: -9, 1: 1}, 137, "deepkd: process 0 of 2 was killed by SIGKILL\n"),
        # torchrun ends the others by SIGTERM
        ({0: -15, 1: -11}, 139, "deepkd: process 1 of 2 was killed by SIGSEGV\n"),
        ({0: 1, 1: 2}, 2, ""),
        ({0: 1, 1: -15}, 1, ""),
    ],
)
def test_a_killed_process_is_named_whichever_was_seen_first(monkeypatch, capfd, codes, code, said):
    failures = {rank: SimpleNamespace(exitcode=codes[rank], timestamp=rank) for rank in codes}

    def fail(arguments):
        raise ChildFailedError("worker", failures)

    monkeypatch.setattr(ChildFailedError, "__init__", lambda error, name, found: setattr(error, "failures", found))
    monkeypatch.setattr(torchrun, "run", fail)
    monkeypatch.setattr(worker.logging, "disable", lambda level: None)
    argv = ["1", "2", "code", "config", "classification", "--cfg", "x.yaml", "--resume"]
    monkeypatch.setattr(worker.sys, "orig_argv", ["python", "-c", "pass", *argv])
    assert worker.lead(2, argv) == code
    assert capfd.readouterr().err == said
