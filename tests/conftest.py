"""Fixtures that several test files use."""

import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deepkd_plugin import choice
from deepkd_plugin.hosts import mdistiller as mdistiller_host
from deepkd_plugin.hosts import registry

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell script starts what it leaves in the background so, and tests send Ctrl-C to their own processes
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start; pytest-xdist fills the cores

# Autograd counts devices at its first backward pass and forbids forks for good if it sees one, which some mutated
# config brings about. small.command forks.
torch.ones(1, requires_grad=True).backward()

DATA = Path(__file__).parent / "data"
MDISTILLER = mdistiller_host.locate()
"""The folder of an installed mdistiller or of the checkout that MDISTILLER_ROOT names; None without one."""


@pytest.fixture(scope="session")
def golden_losses():
    """tests/data/losses.npz as float64 tensors (labels as int64)."""
    with np.load(DATA / "losses.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


@pytest.fixture(scope="session")
def golden_optimizers():
    with np.load(DATA / "optimizers.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


@pytest.fixture(autouse=True)
def one_thread():
    """Networks of these sizes gain nothing by threads, and pytest-xdist has a process for each core."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_choice_by_chance(monkeypatch):
    """What `auto` would measure is equally fast in a test, so that two runs never differ in it."""
    monkeypatch.setattr(choice, "medians", lambda passes, images: dict.fromkeys(passes, 1.0))


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch):
    """No plan says that other programs keep the machine busy, which tests beside it do."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture(autouse=True)
def builtin_host(monkeypatch):
    """Commands run on the built-in host in a test, whatever is installed, unless it asks for mdistiller."""
    monkeypatch.setattr(mdistiller_host, "locate", lambda: None)


@pytest.fixture(scope="session")
def mdistiller_root():
    """mdistiller's folder; skips where there is none."""
    if MDISTILLER is None:
        pytest.skip("mdistiller is neither installed nor named by MDISTILLER_ROOT")
    return MDISTILLER


@pytest.fixture(scope="module")
def mdistiller(mdistiller_root):
    """The real mdistiller as a host, registered; gone from the process when the module's tests are done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", torch.Tensor.cuda)
        patch.setattr(torch.nn.Module, "cuda", torch.nn.Module.cuda)
        patch.setattr(sys, "path", list(sys.path))
        before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mdistiller"}
        for name in before:
            del sys.modules[name]
        host = mdistiller_host.load(mdistiller_root)
        registry.register(host)
        yield host
        for name in [name for name in sys.modules if name.split(".")[0] == "mdistiller"]:
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """A DATASET.ROOT with glyphs100 in its cache, drawn once for all tests."""
    from deepkd_plugin.data.glyphs import load_glyphs100

    root = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        load_glyphs100(root, split)
    return root


@pytest.fixture
def train(data_root, tmp_path, capsys):
    """Run tools/train.py's main in this process: train("kd", "KEY", "VALUE", …) -> (exit code, stdout, stderr).

    A short name stands for a file in configs/glyphs100/res20_res8. The run sees 200 images and 2 epochs.
    """
    from deepkd_plugin.launch import main

    configs = Path(__file__).parents[1] / "configs" / "glyphs100" / "res20_res8"
    small = {
        "SOLVER.EPOCHS": "2",
        "DATASET.TRAIN_PER_CLASS": "2",
        "DATASET.HOLDOUT": "0.02",
        "DATASET.ROOT": str(data_root),
        "LOG.PREFIX": str(tmp_path / "output"),
        "EXPERIMENT.NAME": "run",
        "DISTILLER.FOLD_TEACHER": "False",
    }

    def run(config, *options, flags=()):
        file = config if "/" in str(config) else configs / f"{config}.yaml"
        given = small | dict(zip(options[::2], options[1::2]))
        pairs = [part for pair in given.items() for part in pair]
        code = main(["--cfg", str(file), *flags, *pairs])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    run.folder = tmp_path / "output" / "glyphs100" / "run"
    return run


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory, data_root):
    """Glyphs in torchvision's CIFAR-100 layout: 3 training images and 1 test image of each class.

    As in the official files there are coarse labels, 0 … 19, beside the fine ones.
    """
    from deepkd_plugin.data.glyphs import load_glyphs100

    root = tmp_path_factory.mktemp("cifar")
    (root / "cifar-100-python").mkdir()
    for split, count in (("train", 300), ("test", 100)):
        images, labels = load_glyphs100(data_root, split)
        data = images[:count].transpose(0, 3, 1, 2).reshape(count, 3072)
        coarse, fine = (labels[:count] // 5).tolist(), labels[:count].tolist()
        names = [f"glyph_{i}.png" for i in range(count)]
        content = {"filenames": names, "coarse_labels": coarse, "fine_labels": fine, "data": data}
        (root / "cifar-100-python" / split).write_bytes(pickle.dumps(content, 2))
    return root
