"""Two processes of torch.distributed on this machine, for tests that compare them with one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_two_processes(work: Callable, folder: Path, *args: Any) -> list[Any]:
    """What work(rank, *args) returns in each of two processes joined by gloo; files go to `folder`."""
    torch.multiprocessing.spawn(_process, (work, str(folder), args), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _process(rank: int, work: Callable, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # a thread of gloo that lets its last tensor go while Python shuts down ends the process with SIGABRT (seen with
    # torch 2.14, one process in some twenty), so Python does not shut down
    os._exit(0)
