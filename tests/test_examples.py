"""Each example runs as a script; the clients' take the steps of the bare loop in float64."""

import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import in_two_processes

from deepkd_plugin import decoupled_kd
from deepkd_plugin.errors import UserError
from deepkd_plugin.losses import kd_divergence

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARED = ("shared", "made_text", "made_pairs")
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in SHARED)
NEEDS = {
    "lightning_module": "lightning",
    "fabric_loop": "lightning",
    "accelerate_loop": "accelerate",
    **dict.fromkeys(("transformers_trainer", "text_classifier", "causal_lm", "stored_tokens"), "transformers"),
}
MODULES = (*SHARED, *SCRIPTS)

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


@functools.cache
def printed(name):
    """What a script prints."""
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs(name):
    if name in NEEDS:
        load(name)
    assert printed(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 70


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_is_on_a_page(name):
    pages = ((EXAMPLES.parent / "docs" / page).read_text() for page in ("compatibility.md", "text.md"))
    assert any(f"../examples/{name}.py" in page for page in pages)


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
    trained, teacher = example.bert(16).double(), teacher.requires_grad_(False)
    options = {"train_sampling_strategy": "sequential", "max_grad_norm": max_norm}
    example.train(trained, teacher, sentences, logging_steps=1, **options)
    assert_same(trained.state_dict(), student.state_dict())


@pytest.mark.parametrize(
    ("name", "least"),
    [("text_classifier", (90, 45)), ("two_encoders", (30, 15))],  # chance: 25 and 0.7 %
)
def test_teacher_and_student_learn(name, least):
    if name in NEEDS:
        load(name)
    shares = [int(share) for share in re.findall(r"(\d+)%", printed(name).splitlines()[-1])]
    assert len(shares) == 2
    assert all(share >= low for share, low in zip(shares, least))


@pytest.mark.parametrize("name", ["causal_lm", "stored_tokens"])
def test_language_models_learn(name):
    """Equally likely tokens would give 34, or 40 with the padding."""
    load(name)
    assert all(float(number) < 6 for number in re.findall(r"\d+\.\d\d", printed(name).splitlines()[-1]))


def text(count=64):
    """The example, rows, a student and a teacher with float64 weights."""
    example, made = load("causal_lm"), load("made_text")
    rows = made.rows(made.sentences(count), label_of_topic=False)
    student, teacher = (example.qwen(width, 1, classes).double() for width, classes in ((16, 40), (32, 48)))
    return example, rows, student, teacher.eval().requires_grad_(False)


def test_labels_are_shifted_and_padding_is_ignored():
    """The gradient is that of the sum of losses over each token with a next one, taken out by hand."""
    example, rows, student, teacher = text(8)
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask", "labels")}
    assert (batch["labels"] == -100).any()
    logits, teacher_logits = student(**batch).logits, teacher(**batch).logits
    distiller = example.TokenDistiller.__new__(example.TokenDistiller)
    distiller.top_k = lambda: 5
    items = (batch["labels"][:, 1:] != -100).sum()
    losses = distiller.by_stream(logits, teacher_logits, batch["labels"], items)

    places = [(b, i) for b, row in enumerate(rows) for i in range(len(row["labels"]) - 1) if row["labels"][i + 1] >= 0]
    assert len(places) == items
    index = tuple(torch.tensor(places).T)
    target = torch.stack([rows[b]["input_ids"][i + 1] for b, i in places])
    tckd, nckd, p = decoupled_kd(
        logits[index][:, : example.TOKENS], teacher_logits[index][:, : example.TOKENS], target, example.TEMPERATURE, 5
    )
    task = torch.nn.functional.cross_entropy(logits[index], target)
    torch.testing.assert_close(2 * losses["tog"], student(**batch).loss.double())  # Transformers' own
    expected = {"tog": 0.5 * task, "tcg": tckd.mean(), "ncg": ((1 - p) * nckd).mean()}
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
        ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected[name]))
        torch.testing.assert_close(ours, theirs)


def test_micro_batches_of_tokens_are_one_batch():
    """Although their sentences have different numbers of tokens."""
    example, rows, student, teacher = text()
    made = load("made_text")
    options = {"train_sampling_strategy": "sequential", "num_train_epochs": 2, "logging_strategy": "no"}
    example.train(student, teacher, rows, example.TokenDistiller, made.optimizer, **options)
    _, _, other, _ = text()
    options |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    example.train(other, teacher, rows, example.TokenDistiller, made.optimizer, **options)
    assert_same(other.state_dict(), student.state_dict(), 1e-9)


def test_stored_logits_give_the_losses_of_the_teacher(tmp_path):
    """Under a mask of what is stored; a token that was not stored is refused."""
    stored, (example, rows, _, teacher) = load("stored_tokens"), text(8)
    table = stored.store(teacher.float(), rows, tmp_path, "float32")
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask", "index")}
    target = example.of_next(torch.stack([row["labels"] for row in rows]))
    looked_up = stored.Stored(table)(**batch).logits
    computed = teacher(batch["input_ids"], batch["attention_mask"]).logits
    student = torch.randn(*target.shape, 40, generator=torch.Generator().manual_seed(0))
    losses = [
        example.token_kd(student, z, target, example.TEMPERATURE, stored.KEPT - 1, vocabulary=example.TOKENS)
        for z in (looked_up, computed)
    ]
    for ours, theirs in zip(*losses):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    distiller = stored.StoredDistiller.__new__(stored.StoredDistiller)
    distiller.state, distiller.args = (type("", (), {name: 1})() for name in ("epoch", "num_train_epochs"))
    assert distiller.top_k() == stored.KEPT - 1 < example.SCHEDULE(1.0)
    batch["attention_mask"].fill_(1)
    with pytest.raises(UserError, match="lacks tokens of these rows"):
        stored.Stored(table)(**batch)


def test_the_batch_is_the_class_set_of_two_encoders():
    """Without a mask the three losses add up to the task's and the mean of KD in both directions."""
    example, pairs = load("two_encoders"), load("made_pairs")
    torch.manual_seed(0)
    student, teacher = pairs.Encoders(4).double(), pairs.Encoders(8).double().requires_grad_(False)
    images, texts = (part[: example.BATCH] for part in pairs.pairs(seed=3))
    assert len({tuple(row) for row in texts.tolist()}) == example.BATCH
    logits, theirs = student(images.double(), texts), teacher(images.double(), texts)
    losses = example.losses(logits, theirs, example.SCHEDULE(1.0))
    kd = [kd_divergence(s, t, 2.0).mean() for s, t in ((logits, theirs), (logits.T, theirs.T))]
    task = -(logits.log_softmax(0) + logits.log_softmax(1)).diagonal().mean() / 2
    torch.testing.assert_close(sum(losses.values()), 0.5 * task + sum(kd) / 2)
