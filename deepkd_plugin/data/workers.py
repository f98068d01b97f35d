"""Worker processes of a loader, which must end with the process that has started them."""

import multiprocessing
import os


def end_if_left(worker: int) -> None:
    """Be a DataLoader's worker_init_fn: end this worker if the process that has started it is gone by now.

    torch's own watch begins later than this: it asks for the parent once the worker is at work, so it takes whoever
    adopts an orphan for its parent. Of a run that is killed just then, a worker would live for good, and hold what it
    has inherited: a pipe that torchrun's reader waits for. A fork server is every worker's parent and is not looked at.
    """
    parent = multiprocessing.parent_process()
    forked = multiprocessing.get_start_method() != "forkserver"
    if forked and parent is not None and parent.pid != os.getppid():
        os._exit(1)
