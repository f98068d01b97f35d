"""A worker for a search's trials that trains nothing: accuracy is a function of the options, by epoch.

The environment: FAKE_SECONDS an epoch; FAKE_DIVERGES, the rate from which on the loss is NaN; FAKE_FAILS, a file whose
first line's method fails for as long as the file is there.
"""

import json
import math
import os
import sys
import time
from pathlib import Path


def accuracy(options):
    rate = float(options.get("SOLVER.LR", 0.1))
    size = abs(float(options.get("SOLVER.DECOUPLED.DELTA.TOG", 0.075)))
    return 90 - 20 * math.log10(rate / 2) ** 2 - 100 * size + int(options["SOLVER.SEED"])


def main():
    _, _, code, config, _, _, _, _how, *pairs = sys.argv[1:]  # the first two: our parent, the number of processes
    options = dict(zip(pairs[::2], pairs[1::2]))
    folder = Path(options["LOG.PREFIX"], options["EXPERIMENT.PROJECT"], options["EXPERIMENT.NAME"])
    run = {"code": code, "config_hash": config, "finished": False, "minutes": 0.1}
    (folder / "run.json").write_text(json.dumps(run))
    fails = os.environ.get("FAKE_FAILS", "")
    if fails and Path(fails).exists() and Path(fails).read_text() == options["EXPERIMENT.PROJECT"]:
        print("the reason", file=sys.stderr)
        return 2
    if float(options.get("SOLVER.LR", 0.1)) >= float(os.environ.get("FAKE_DIVERGES", "inf")):
        print(f"deepkd: error: {folder}: loss 'loss_ce' became nan in epoch 1, at …", file=sys.stderr)
        return 2
    epochs, lines = int(options["SOLVER.EPOCHS"]), []
    for epoch in range(1, epochs + 1):
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        lines.append({"epoch": epoch, "test_acc": accuracy(options) * epoch / epochs})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.tmp").write_text(text)
        os.replace(folder / "metrics.tmp", folder / "metrics.jsonl")
    (folder / "latest").write_text("weights")
    last = lines[-1]["test_acc"]
    result = {"best": last, "best_epoch": epochs, "last": last, "epochs": epochs}
    (folder / "run.json").write_text(json.dumps(run | {"finished": True, "result": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
