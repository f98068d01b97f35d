import json

import pytest
import torch

WHOLE = ("SOLVER.BATCH_SIZE", "40")  # the last batch too


@pytest.fixture
def learn(train, tmp_path):
    """Train and return the student's weights and the shares of logits that were computed, by epoch."""

    def run(method, *options, flags=("--overwrite",)):
        code, _, err = train(method, *WHOLE, "DISTILLER.LOGITS_DIR", str(tmp_path / "logits"), *options, flags=flags)
        assert code == 0, err
        lines = [json.loads(line) for line in (train.folder / "metrics.jsonl").read_text().splitlines()]
        weights = torch.load(train.folder / "student_latest", weights_only=True)["model"]
        return weights, [line.get("teacher_computed") for line in lines]

    return run
