"""How a process joins the others of its run, and what it says of itself."""

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import as_process

from deepkd_plugin import device
from deepkd_plugin.distributed import process_group
from deepkd_plugin.errors import UserError


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_that_is_no_launchers_is_refused(monkeypatch, missing):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", *process_group.MEETING):
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"WORLD_SIZE is 2 and {missing} is missing"), process_group.joined():
        pass


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("RANK", "-1"), ("RANK", "2"), ("LOCAL_RANK", "x")])
def test_a_number_of_a_launcher_that_is_none_is_refused(monkeypatch, name, value):
    """WORLD_SIZE too, which would else be one process, and so one of several that train the same."""
    for one in ("WORLD_SIZE", *process_group.MEETING):
        monkeypatch.setenv(one, "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"environment: {name} is '?{value}'?; it must be"), process_group.joined():
        pass


def test_a_process_has_the_card_of_its_number(monkeypatch):
    taken = []
    monkeypatch.setattr(device, "take", taken.append)
    process_group.take_card()  # on a CPU there is none
    here = process_group._ALONE._replace(local=1, size=2, device=torch.device("cuda", 1))
    monkeypatch.setattr(process_group, "_here", here)
    process_group.take_card()
    assert taken == [1]


@pytest.mark.parametrize(
    ("size", "local", "words"),
    [(1, "1", "python"), (4, "4", "torchrun --nproc_per_node 4"), (8, "4", "torchrun --nproc_per_node 4 --nnodes 2")],
)
def test_a_command_says_how_the_run_was_started(monkeypatch, size, local, words):
    as_process(monkeypatch, 0, size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert " ".join(process_group.command("tool.py")) == f"{words} tool.py"


def test_what_an_earlier_attempt_left_in_the_store_is_not_taken():
    """A launcher may give all attempts one store; a process that is early must not read its predecessor's peer."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    for attempt in range(2):
        parts = {}

        def meet(number, parts=parts):
            parts[number] = process_group._of_this_attempt(store, number, 3)

        # the first process comes last, as one does whose predecessor takes its time to end
        threads = [threading.Thread(target=meet, args=(number,)) for number in (2, 1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(parts) == 3
        assert not parts[1].check(["address 0"])
        parts[0].set("address 0", str(attempt))
        assert parts[1].get("address 0") == parts[2].get("address 0") == str(attempt).encode()
