"""Fixtures that several test files use."""

from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parent / "data"


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
def two_threads():
    torch.set_num_threads(2)
