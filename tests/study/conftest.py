"""Runs that train nothing, for the tests of what starts and watches runs."""

import sys
from pathlib import Path

import pytest
import torch
from fake_worker import accuracy

from deepkd_plugin.study.table import Run

FAKE = (sys.executable, "-S", str(Path(__file__).parent / "fake_worker.py"))
EPOCHS = 4


@pytest.fixture(scope="session")
def fake_states(tmp_path_factory):
    """A folder of what `latest` holds after each epoch of a fake run."""
    folder = tmp_path_factory.mktemp("states")
    accuracies = [1.0]
    for epoch in range(1, EPOCHS + 1):
        accuracies.append(accuracy(accuracies[-1], epoch))
        best = max(accuracies[1:])
        state = {"epoch": epoch, "best_acc": best, "best_epoch": accuracies[1:].index(best) + 1}
        torch.save(state, folder / str(epoch))
    return folder


@pytest.fixture
def fake_run(tmp_path, fake_states):
    """fake_run(seed, SECONDS="0.1", …) -> Run, for execute(…, worker=fake_run.worker)."""

    def make(seed=0, out="out", **options):
        above, name = tmp_path / out / "runs" / "pair", f"seed{seed}-0123abcd"
        given = {"SOLVER.EPOCHS": str(EPOCHS), "LOG.PREFIX": str(above), "EXPERIMENT.PROJECT": "kd"}
        given |= {"EXPERIMENT.NAME": name, "FAKE.STATES": str(fake_states)}
        given |= {f"FAKE.{key}": value for key, value in options.items()}
        words = tuple(word for pair in given.items() for word in pair)
        config = Path("kd.yaml").absolute()
        return Run("pair", "kd", seed, config, words, "0123abcd", EPOCHS, above / "kd" / name)

    make.worker = FAKE
    return make
