"""A worker for runs.execute that trains nothing: a run's files, epoch by epoch, in milliseconds.

Its options are SOLVER.EPOCHS and, made up for the tests, FAKE.*: SECONDS an epoch; STATES, a folder of checkpoints
by epoch; FAIL, "code:times" after the first epoch; ALONE, to outlive the parent; DEAF, to ignore SIGTERM; OTHER,
"code:times" for the second of several processes, which meet as those of a run do; BLIND, not to see that it is gone.
"""

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from pathlib import Path


def accuracy(before, epoch):
    """Depends on the epoch before, so that a wrong way of going on shows."""
    return (7.0 * before + 13.0 * epoch) % 101.0


def write(path, text):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def fails(file, asked):
    """Whether "code:times" says that it is to fail, by what `file` counts; the code or None."""
    code, times = map(int, asked.split(":"))
    with open(file, "a") as count:
        if count.tell() < times:
            count.write("x")
            return code
    return None


def meet():
    """The first of several processes waits for the others: its sockets to them."""
    with socket.create_server(("", int(os.environ["MASTER_PORT"]))) as server:
        return [server.accept()[0] for _ in range(int(os.environ["WORLD_SIZE"]) - 1)]


def follow(folder, options):
    """What the others do until the first one ends."""
    while True:
        try:
            first = socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
            break
        except OSError:
            time.sleep(0.05)
    if code := "FAKE.OTHER" in options and fails(folder / "failures of others", options["FAKE.OTHER"]):
        print("the other's reason", file=sys.stderr)
        if code < 0:
            os.kill(os.getpid(), -code)
        return code
    return 0 if first.recv(1) else 1


def main():
    parent, together, code, config, _, cfg, _, how, *pairs = sys.argv[1:]
    assert cfg == "--cfg"
    options = dict(zip(pairs[::2], pairs[1::2]))
    if "FAKE.ALONE" not in options and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != int(parent):
            return 1
    if "FAKE.DEAF" in options:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder = Path(options["LOG.PREFIX"], options["EXPERIMENT.PROJECT"], options["EXPERIMENT.NAME"])
    if int(os.environ.get("RANK", "0")):
        return follow(folder, options)
    others = meet() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else []
    busy = os.open(folder / "busy", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        (folder / "two at once").touch()
        return 2
    states, latest = Path(options["FAKE.STATES"]), folder / "latest"
    epochs, epoch, lines = int(options["SOLVER.EPOCHS"]), 0, []
    if how == "--resume":
        (epoch,) = (int(state.name) for state in states.iterdir() if state.read_bytes() == latest.read_bytes())
        held = (folder / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in held][:epoch]
    else:
        assert how == "--overwrite"
        for name in ("latest", "metrics.jsonl"):
            (folder / name).unlink(missing_ok=True)
        run = {"code": code, "config_hash": config, "finished": False, "minutes": 0.0}
        write(folder / "run.json", json.dumps(run))
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    write(folder / "env.json", json.dumps({name: os.environ.get(name) for name in names} | {"together": together}))
    print(f"from epoch {epoch}")
    while epoch < epochs:
        heard = [] if "FAKE.BLIND" in options else others
        if select.select(heard, [], [], float(options.get("FAKE.SECONDS", "0")))[0]:
            print("deepkd: another process of this run has ended", file=sys.stderr)
            return 1
        epoch += 1
        lines.append({"epoch": epoch, "test_acc": accuracy(lines[-1]["test_acc"] if lines else 1.0, epoch)})
        write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        shutil.copy(states / str(epoch), folder / ".latest.tmp")
        os.replace(folder / ".latest.tmp", latest)
        code = fails(folder / "failures", options["FAKE.FAIL"]) if "FAKE.FAIL" in options else None
        if code is not None:
            print("the reason", file=sys.stderr)
            return code
    accuracies = [line["test_acc"] for line in lines]
    best = {"best": max(accuracies), "best_epoch": 1 + accuracies.index(max(accuracies))}
    run = json.loads((folder / "run.json").read_text())
    run |= {"finished": True, "result": best | {"last": accuracies[-1], "epochs": epochs}, "minutes": 0.1}
    write(folder / "run.json", json.dumps(run))
    for other in others:
        other.sendall(b"0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
