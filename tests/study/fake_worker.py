"""A worker for runs.execute that trains nothing: a run's files, epoch by epoch, in milliseconds.

Its options are SOLVER.EPOCHS and, made up for the tests, FAKE.*: SECONDS an epoch; STATES, a folder of checkpoints
by epoch; FAIL, "code:times" after the first epoch; ALONE, to outlive the parent; DEAF, to ignore SIGTERM.
"""

import ctypes
import fcntl
import json
import os
import shutil
import signal
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


def main():
    _, parent, code, config, _, cfg, _, how, *pairs = sys.argv[1:]
    assert cfg == "--cfg"
    options = dict(zip(pairs[::2], pairs[1::2]))
    if "FAKE.ALONE" not in options and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        if os.getppid() != int(parent):
            return 1
    if "FAKE.DEAF" in options:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder = Path(options["LOG.PREFIX"], options["EXPERIMENT.PROJECT"], options["EXPERIMENT.NAME"])
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
    write(folder / "env.json", json.dumps({name: os.environ.get(name) for name in names}))
    print(f"from epoch {epoch}")
    while epoch < epochs:
        time.sleep(float(options.get("FAKE.SECONDS", "0")))
        epoch += 1
        lines.append({"epoch": epoch, "test_acc": accuracy(lines[-1]["test_acc"] if lines else 1.0, epoch)})
        write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        shutil.copy(states / str(epoch), folder / ".latest.tmp")
        os.replace(folder / ".latest.tmp", latest)
        if "FAKE.FAIL" in options:
            with open(folder / "failures", "a") as failures:
                number, times = map(int, options["FAKE.FAIL"].split(":"))
                if failures.tell() < times:
                    failures.write("x")
                    print("the reason", file=sys.stderr)
                    return number
    accuracies = [line["test_acc"] for line in lines]
    best = {"best": max(accuracies), "best_epoch": 1 + accuracies.index(max(accuracies))}
    run = json.loads((folder / "run.json").read_text())
    run |= {"finished": True, "result": best | {"last": accuracies[-1], "epochs": epochs}, "minutes": 0.1}
    write(folder / "run.json", json.dumps(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
