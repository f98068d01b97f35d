"""Each example runs as a script, and takes the steps of the bare loop in float64."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import in_two_processes

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "shared")
NEEDS = {
    "lightning_module": "lightning",
    "fabric_loop": "lightning",
    "accelerate_loop": "accelerate",
    "transformers_trainer": "transformers",
}
MODULES = ("shared", *SCRIPTS)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """As in a script, the examples' folder is on the path; the modules are gone after the test."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def load(name):
    with pytest.MonkeyPatch.context() as patch:
        # tests/ is on the path, and Transformers would take tests/datasets for the package `datasets`
        patch.setattr(sys, "path", [folder for folder in sys.path if folder != str(Path(__file__).parent)])
        if name in NEEDS:
            pytest.importorskip(NEEDS[name], reason=f'pip install -e ".[examples]" brings {NEEDS[name]}')
        return importlib.import_module(name)


def bare(**options):
    """The weights after the bare loop."""
    shared = load("shared")
    student, teacher = shared.networks(torch.float64)
    load("bare").train(student, teacher, shared.batches(shared.data(torch.float64)), **options)
    return student.state_dict()


def assert_same(state, expected, tolerance=1e-12):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs(name):
    if name in NEEDS:
        load(name)
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_is_on_the_page(name):
    assert f"../examples/{name}.py" in (EXAMPLES.parent / "docs" / "compatibility.md").read_text()


def test_bare_loop_learns():
    shared = load("shared")
    student, teacher = shared.networks()
    loader = shared.batches(shared.data())
    inputs, labels = shared.data().tensors
    before = sum(shared.losses(student(inputs), teacher(inputs), labels, 0).values()).item()
    load("bare").train(student, teacher, loader)
    assert sum(shared.losses(student(inputs), teacher(inputs), labels, 0).values()).item() < 0.7 * before


@pytest.mark.parametrize("name", ["lightning_module", "fabric_loop", "accelerate_loop"])
def test_client_takes_the_bare_loops_steps(name):
    example, shared = load(name), load("shared")
    student, teacher = shared.networks(torch.float64)
    example.train(student, teacher, shared.batches(shared.data(torch.float64)))
    assert_same(student.state_dict(), bare())


def trained_in_a_process(rank, name):
    sys.path.insert(0, str(EXAMPLES))
    example, shared = importlib.import_module(name), importlib.import_module("shared")
    student, teacher = shared.networks(torch.float64)
    example.train(student, teacher, shared.data(torch.float64))
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in student.state_dict().items()}


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_take_the_bare_loops_steps(name, tmp_path):
    for state in in_two_processes(trained_in_a_process, tmp_path, name):
        assert_same(state, bare())


class Logits(torch.nn.Module):
    """A network of Transformers as a function from input_ids to logits."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input_ids):
        return self.net(input_ids=input_ids).logits


@pytest.mark.parametrize("max_norm", [0.05, 0.0])
def test_transformers_trainer_takes_the_bare_loops_steps(max_norm):
    example = load("transformers_trainer")
    sentences = example.sentences()
    student, teacher = (example.bert(width).double() for width in (16, 32))
    loader = [
        (torch.stack([s["input_ids"] for s in part]), torch.stack([s["labels"] for s in part]))
        for part in (sentences[i : i + example.BATCH] for i in range(0, len(sentences), example.BATCH))
    ]
    load("bare").train(Logits(student), Logits(teacher.eval()), loader, max_norm)
    trained = example.bert(16).double()
    options = {"train_sampling_strategy": "sequential", "max_grad_norm": max_norm}
    example.train(trained, teacher, sentences, logging_steps=1, **options)
    assert_same(trained.state_dict(), student.state_dict())
