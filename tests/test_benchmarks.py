"""The benchmark scripts run as their docstrings say, on sizes too small to measure anything."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from captures import Captures
from PIL import Image

from deepkd_plugin import device, tokens
from deepkd_plugin.errors import UserError

ROOT = Path(__file__).parents[1]


CHECKOUTS = {"MDISTILLER_ROOT": "mdistiller", "DEEPKD_RELEASE_ROOT": "the authors' release"}


@pytest.fixture
def script(monkeypatch):
    """script(name) -> a module of benchmarks/; `.cuda()` is as it was afterwards."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.cuda)
    monkeypatch.setattr(torch.nn.Module, "cuda", torch.nn.Module.cuda)
    return importlib.import_module


@pytest.fixture
def run(script, monkeypatch, capsys):
    """run(name, *arguments, **checkouts) -> what a script prints, in this process; no other checkouts are named."""

    def run(name, *arguments, **checkouts):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        for variable in CHECKOUTS:
            monkeypatch.delenv(variable, raising=False)
        for variable, root in checkouts.items():
            monkeypatch.setenv(variable, root)
        capsys.readouterr()
        script(name).main()
        return capsys.readouterr().out

    return run


def start(name, *arguments, **variables):
    """What a script prints as a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_optimizers_speed(run, tmp_path):
    out = run("optimizer", "--rounds", 1, "--widths", 2, "--write", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == out.removesuffix("\n")
    rows = {row["step"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert all(row["ms"] > 0 for row in rows.values())
    assert rows["1 buffer"]["state MiB"] == rows["torch.optim.SGD"]["state MiB"]
    assert rows["2 buffers"]["state MiB"] == pytest.approx(2 * rows["torch.optim.SGD"]["state MiB"])
    assert rows["2 buffers"]["per buffer"] == rows["2 buffers"]["ratio to SGD"] / 2


SMALL = ("--rounds", 1, "--batch", 2, "--imagenet-batch", 2, "--imagenet-size", 32)


METHODS = [("KD", "1 pass"), ("DeepKD, 2 coefficients", "2 passes")]
TABLE_ROWS = [(f"{method}, {kind}", passes) for method, passes in METHODS for kind in ("table", "stored")]
FASTER_ROWS = [(f"{method}, {kind}", passes) for method, passes in METHODS for kind in ("table", "stored", "folded")]


def test_the_steps_of_a_cifar_and_an_imagenet_pair(run, tmp_path):
    options = ("--pairs", "resnet8:resnet8", "ResNet18:ResNet18", "--no-memory")
    out = run("step", *SMALL, *options, "--write", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == out.removesuffix("\n")
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["settings"] == {"memory format": "contiguous", "precision": "float32"}
    assert {"processor", "cores", "device", "python", "torch", "commit"} <= record["machine"].keys()
    rows = record["rows"]
    assert [row["pair"] for row in rows] == ["resnet8 → resnet8"] * 10 + ["ResNet18 → ResNet18"] * 6
    assert [(row["step"], row["gradients"]) for row in rows[:10]] == [
        ("KD", "1 pass"),
        ("two streams", "2 passes"),
        ("DeepKD, 2 coefficients", "2 passes"),
        ("DeepKD, 3 coefficients", "3 passes"),
        *FASTER_ROWS,
    ]
    for part, of_pair in zip(record["parts"], (rows[:10], rows[10:])):
        kd = part["F_t ms"] + part["F_s ms"] + part["B ms"]
        for row in of_pair:
            asked = "F_t folded ms" if "folded" in row["step"] else "F_t ms"
            floor = part["F_s ms"] + int(row["gradients"][0]) * part["B ms"]
            floor += 0 if row["step"].endswith(("table", "stored")) else part[asked]
            assert row["ratio to KD"] == row["ms"] / of_pair[0]["ms"]
            assert row["ratio to floor"] == pytest.approx(row["ms"] / floor)
            assert row["floor ratio"] == pytest.approx(floor / kd)


def test_a_step_with_a_table_is_given_the_teacher_s_logits(script, tmp_path, monkeypatch):
    """It is the step without one, but for the teacher's pass and float16."""
    step = script("step")
    of = step.Setting("resnet8:resnet8", 16, 32)
    with_table, without = (
        step.table_step(of, "DeepKD, 2 coefficients", tmp_path),
        step.our_step(of, "DeepKD, 2 coefficients"),
    )
    passes = []
    hook = step.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: passes.append(module) if hasattr(module, "fc") else None
    )
    with_table()
    first = len(passes)  # compared once, as an epoch's first batch is
    with_table()
    second = len(passes) - first
    without()
    hook.remove()
    assert (first, second, len(passes) - first - second) == (2, 1, 2)


def test_a_step_in_other_modes(run, tmp_path):
    options = ("--channels-last", "--amp", "--pairs", "resnet8:resnet8")
    run("step", *SMALL, *options, "--write", tmp_path / "table.md")
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["settings"] == {"memory format": "channels last", "precision": "bfloat16 autocast"}
    assert all(row["peak MiB"] > 0 for row in record["rows"])


@pytest.mark.parametrize("execution", ["graphs", pytest.param("compile", marks=pytest.mark.slow)])
def test_a_step_in_other_executions(run, execution, tmp_path):
    """The column names the way that was taken: on a CPU there are no CUDA graphs."""
    options = ("--execution", execution, "--pairs", "resnet8:resnet8", "--no-memory")
    out = run("step", *SMALL, *options, "--write", tmp_path / "table.md")
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["step"] for row in rows[4:8]] == ["KD, one stream", *(row["step"] for row in rows[1:4])]
    assert {row["execution"] for row in rows[:4] + rows[8:]} == {"eager"}
    taken = "eager" if f"{execution}: falls back" in out else execution
    assert {row["execution"] for row in rows[4:8]} == {taken}
    assert taken == "eager" or execution == "compile" or torch.cuda.is_available()


def test_the_cost_of_sampling_gradients(run, tmp_path):
    options = ("--rounds", 2, "--batch", 2, "--pairs", "resnet8:resnet8", "--coordinates", 1000)
    run("gsnr", *options, "--write", tmp_path / "table.md")
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert (row["coordinates"], row["parameters"]) == (1000, 83892)
    assert row["samples"] == 2 + 3  # every step of the row took one, those before the clock too
    # three streams, mean and squares in float64, and the coordinates' numbers
    assert row["memory MiB"] == pytest.approx((3 * 16 + 8) * 1000 / 2**20)
    extra = row["with a sample ms"] - row["step ms"]
    assert row["share at 200 %"] == pytest.approx(extra / (2 * row["step ms"]))


def test_a_step_with_a_folded_teacher_asks_it_alone(script):
    step = script("step")
    of = step.Setting("resnet8:resnet8", 4, 32)
    folded = step.folded_step(of, "DeepKD, 2 coefficients")
    norms = []
    hook = step.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: norms.append(module.training) if isinstance(module, step.nn.BatchNorm2d) else None
    )
    folded()
    hook.remove()
    assert set(norms) == {True}  # the student's


@pytest.mark.filterwarnings("ignore:size_average")
def test_the_steps_of_others(run, tmp_path):
    """Both packages in one process, if both are there."""
    roots = {variable: os.environ[variable] for variable in CHECKOUTS if os.environ.get(variable)}
    if not roots:
        pytest.skip(f"no checkout of mdistiller or of the authors' release: {', '.join(CHECKOUTS)} name none")
    expected = [("mdistiller's KD", "1 pass"), ("mdistiller's DOT", "2 passes")]
    expected = expected * ("MDISTILLER_ROOT" in roots)
    expected += [("the release's DeepKD", "3 passes")] * ("DEEPKD_RELEASE_ROOT" in roots)
    options = ("--pairs", "resnet8:resnet8", "--channels-last", "--amp", "--no-memory")
    out = run("step", *SMALL, *options, "--write", tmp_path / "table.md", **roots)
    assert (tmp_path / "table.md").read_text() == out.removesuffix("\n")
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["step"], row["gradients"]) for row in rows[4:]] == [*TABLE_ROWS, *expected]
    assert {row["memory format"] for row in rows} == {"channels last"}


@pytest.mark.filterwarnings("ignore:size_average")
def test_others_in_their_own_memory_format(script, run, tmp_path):
    """The ratios are to their steps of the same run; the floor is of parts in the row's own format."""
    roots = {variable: os.environ[variable] for variable in CHECKOUTS if os.environ.get(variable)}
    if not roots:
        pytest.skip(f"no checkout of mdistiller or of the authors' release: {', '.join(CHECKOUTS)} name none")
    options = ("--pairs", "resnet8:resnet8", "--channels-last", "ours", "--no-memory")
    run("step", *SMALL, *options, "--write", tmp_path / "table.md", **roots)
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["settings"]["memory format"] == "channels last for ours, contiguous for others'"
    rows = {row["step"]: row for row in record["rows"]}
    parts = {part["memory format"]: part for part in record["parts"]}
    named = {"mdistiller's KD": "mdistiller's KD", "the release's": "the release's DeepKD"}
    for row in rows.values():
        theirs = row["step"].startswith(("mdistiller's", "the release's"))
        assert row["memory format"] == ("contiguous" if theirs else "channels last")
        for name, step in named.items():
            assert step not in rows or row[f"ratio to {name}"] == row["ms"] / rows[step]["ms"]
    for step, row in rows.items():
        part = parts[row["memory format"]]
        if step in named.values():
            passes = 1 if step == "mdistiller's KD" else 2
            floor = part["F_t ms"] + part["F_s ms"] + passes * part["B ms"]
            assert row["ratio to floor"] == pytest.approx(row["ms"] / floor)
    of = script("step").Setting("resnet8:resnet8", 2, 32, channels_last=True, ours_alone=True)
    checkouts = {variable: Path(roots[variable]) if variable in roots else None for variable in CHECKOUTS}
    made = script("step").rows_of(of, ["eager"], checkouts, tmp_path)
    assert {row.of.channels_last for row in made if "'s " in row.name} == {False}


@pytest.mark.parametrize("given", [False, True])
def test_memory_format_and_precision_reach_the_networks(given, script):
    step = script("step")
    of = step.Setting("resnet8:resnet8", 2, 32, channels_last=given, amp=given)
    distiller, losses = step.forward_pass(of, step.KD)
    seen = []
    distiller.student.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    assert all(loss.dtype == torch.float32 for loss in losses().values())
    ((image, logits),) = seen
    assert image.is_contiguous(memory_format=torch.channels_last) == given
    assert distiller.student.conv1.weight.is_contiguous(memory_format=torch.channels_last) == given
    assert logits.dtype == (torch.bfloat16 if given else torch.float32)
    assert step.parts(of)["F_s"]().dtype == logits.dtype


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--pairs", "resnet8"], {}, "command line: argument --pairs: 'resnet8'; it must be \"all\" or "),
        (["--rounds", "0"], {}, "command line: argument --rounds: '0'; it must be a whole number from 1 on"),
        (
            [],
            {"DEEPKD_RELEASE_ROOT": "/no"},
            "environment: DEEPKD_RELEASE_ROOT is '/no'; it must name a checkout",
        ),
    ],
)
def test_what_a_step_cannot_be_timed_with(arguments, variables, message, run):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        run("step", *arguments, **variables)


FAKE = {
    "engine/__init__.py": "from .trainer import Trainer\ntrainer_dict = {'base': Trainer}\n",
    "engine/cfg.py": "from yacs.config import CfgNode\nCFG = CfgNode({'SOLVER': {'LR': 0.1, 'TRAINER': ''}})\n",
    "engine/trainer.py": """
from turtle import st
from scipy.stats import norm
import torch
print("imported")

class Trainer:
    def __init__(self, *args):
        raise AssertionError("makes folders")

    def init_optimizer(self, cfg):
        print("made")
        return torch.optim.SGD(self.distiller.module.student.parameters(), lr=cfg.SOLVER.LR)

    def train_iter(self, data, epoch, meters):
        self.optimizer.zero_grad()
        image, target, index = data
        meters["data_time"].update(0.0)
        self.distiller(image=image.cuda(), target=target, epoch=epoch).backward()
        self.optimizer.step()
        meters["CLOCK"].update(1.0)
        raise AssertionError("reads meters")
""",
    "distillers/__init__.py": """
import torch

class KD(torch.nn.Module):
    root = "NAME"

    def __init__(self, student, teacher, cfg):
        super().__init__()
        self.student = student
        assert cfg.SOLVER.TRAINER == "base"

    def forward(self, image, target, epoch):
        logits = self.student(image)
        KD.precision = logits.dtype
        return logits.sum()

distiller_dict = {"KD": KD}
""",
}


@pytest.fixture
def fake(tmp_path):
    """fake(name, clock="training_time") -> the root of a package that is laid out like mdistiller."""

    def make(name, clock="training_time"):
        for file, text in FAKE.items():
            path = tmp_path / name / "mdistiller" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("NAME", name).replace("CLOCK", clock))
        return tmp_path / name

    return make


def test_packages_of_one_name_are_imported_alone(script, fake, monkeypatch, capfd):
    others = script("others")
    module = object()
    monkeypatch.setitem(sys.modules, "mdistiller.engine", module)
    before, path = dict(sys.modules), list(sys.path)
    loaded = [others.load(fake(name)) for name in ("a", "b")]
    assert [theirs.kd.root for theirs in loaded] == ["a", "b"]
    assert sys.modules["mdistiller.engine"] is module
    new = {name.split(".")[0] for name in sys.modules.keys() - before.keys()}
    assert not {"mdistiller", "turtle", "termios"} & new
    assert sys.path == path
    assert capfd.readouterr().out == ""


def test_another_trainers_step_ends_at_its_clock(script, fake, capfd):
    others = script("others")
    student = torch.nn.Linear(2, 1, bias=False)
    batch = {"image": torch.ones(4, 2), "target": torch.zeros(4, dtype=torch.long)}
    before = student.weight.detach().clone()
    step = others.training_step(fake("one"), "base", student, None, batch, {"LR": 0.5})
    for taken in (1, 2):
        step()
        torch.testing.assert_close(student.weight, before - taken * 0.5 * 4)
    assert capfd.readouterr().out == ""
    others.training_step(fake("one"), "base", student, None, batch, {}, amp=True)()
    assert others.load(fake("one")).kd.precision == torch.bfloat16
    step = others.training_step(fake("two", "other"), "base", student, None, batch, {})
    with pytest.raises(KeyError, match="other"):
        step()


def test_a_package_that_cannot_be_imported(script, fake):
    root, before = fake("broken"), sys.modules.get("mdistiller.engine")
    (root / "mdistiller/engine/cfg.py").write_text("raise TypeError('old')")
    with pytest.raises(UserError, match=r"broken: its mdistiller cannot be imported \(TypeError: old\)"):
        script("others").load(root)
    assert sys.modules.get("mdistiller.engine") is before


def checkout(variable):
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"no checkout of {CHECKOUTS[variable]}: {variable} names none")
    return Path(root).resolve()


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize(
    ("variable", "trainer", "passes", "twin"),
    [
        ("MDISTILLER_ROOT", "base", 1, ("kd_step",)),
        ("MDISTILLER_ROOT", "dot", 2, ("our_step", "two streams")),
        ("DEEPKD_RELEASE_ROOT", "deepkd", 3, None),
    ],
)
def test_their_steps_are_what_the_rows_say(variable, trainer, passes, twin, script, monkeypatch):
    """As many backward passes; mdistiller's KD and DOT arrive at the weights of ours."""
    root = checkout(variable)
    step = script("step")
    of = step.Setting("resnet8:resnet8", 8, 32)
    made, calls = [], []
    networks, backward = step.networks, torch.Tensor.backward
    monkeypatch.setattr(step, "networks", lambda of: made.append(networks(of)) or made[-1])
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *args, **options: calls.append(1) or backward(*args, **options)
    )
    theirs = step.their_step(of, root, trainer)
    student = made[0][1]
    before = [p.detach().clone() for p in student.parameters()]
    theirs()
    assert len(calls) == passes
    theirs()
    assert not any(torch.equal(p, old) for p, old in zip(student.parameters(), before))
    if twin:
        ours = getattr(step, twin[0])(of, *twin[1:])
        ours()
        ours()
        for p, other, old in zip(made[1][1].parameters(), student.parameters(), before):
            torch.testing.assert_close(p - old, other - old, rtol=1e-3, atol=1e-7)


def test_curves_of_a_table(tmp_path, monkeypatch, script, run):
    monkeypatch.syspath_prepend(ROOT / "tests" / "study" / "report")
    make_table = importlib.import_module("made_up").make_table
    cells = {("res32x4_res8x4", "kd"): [70.0, 71.0, 73.0], ("res32x4_res8x4", "deepkd"): [72.0, 74.0, None]}
    folder = make_table(tmp_path / "table", cells)
    run("curves", folder, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    curves = script("curves")
    (axes,) = curves.draw(folder).axes
    assert [(line.get_label(), line.get_ydata()[-1]) for line in axes.get_lines()] == [
        ("KD, 3 runs", pytest.approx(214 / 3)),
        ("KD + DeepKD + DTM, 2 runs", 73.0),
    ]
    assert len(axes.collections) == 2  # a band each
    lonely = make_table(tmp_path / "lonely", {("res32x4_res8x4", "kd"): [70.0]})
    with pytest.raises(UserError, match="must hold finished runs of a method and of its base"):
        curves.write(lonely, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    for picture in ("curves.xyz", "away/curves.png"):
        with pytest.raises(UserError, match=f"command line: picture is {tmp_path / picture}; "):
            curves.write(folder, tmp_path / picture)


def test_the_contact_sheet(tmp_path):
    start("contact_sheet", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (1280, 960)


EPOCHS = ("--images", 200, "--epochs", 1, "--batch", 60, "--workers", 0, "--pairs", "resnet8:resnet8")


def epochs_of(run, data_root, path, *options, **variables):
    """(loop, method, pipeline) -> row of epoch.py; those with a table have a fourth name."""
    out = run("epoch", *EPOCHS, "--root", data_root, *options, "--write", path, **variables)
    assert path.read_text() == out.removesuffix("\n")
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["title"].startswith("Training epochs of 200 images of glyphs100, batch 60, medians of 1 ")
    for row in record["rows"]:
        assert 0 < row["s waiting"] < row["s an epoch"]
        assert row["images/s"] == pytest.approx(200 / row["s an epoch"])
    kinds = ("loop", "method", "pipeline")
    return record, {tuple(row[kind] for kind in kinds) + teacher_of(row): row for row in record["rows"]}


def teacher_of(row):
    """("table, full",) or so for a row with a table, whose name it is part of."""
    return () if row["teacher"] == "computed" else (row["teacher"],)


@pytest.mark.parametrize(
    ("amp", "precision"),
    [
        # minutes on a processor without bfloat16
        pytest.param(True, "bfloat16 autocast", marks=pytest.mark.slow),
        (False, "float32"),
    ],
)
def test_epochs_of_both_pipelines(run, data_root, tmp_path, amp, precision):
    options = ("--channels-last", "--amp") if amp else ("--channels-last",)
    record, rows = epochs_of(run, data_root, tmp_path / "table.md", *options)
    assert record["settings"] == {"memory format": "channels last", "precision": precision}
    ours = "deepkd_plugin"
    teachers = ("table, empty", "table, full", "stored, full") + (() if amp else ("folded",))
    ways = (("workers",), ("device",), *(("device", teacher) for teacher in teachers))
    assert [*rows] == [(ours, method, *way) for method in ("KD", "DeepKD") for way in ways]
    assert [row["teacher computed"] for row in rows.values()] == ([1, 1, 1, 0, 0] + [1] * (not amp)) * 2
    assert rows[ours, "KD", "workers"]["to reference"] == 1
    for row in rows.values():
        reference = rows[ours, "KD", "workers"]["images/s"]
        assert row["to reference"] == pytest.approx(row["images/s"] / reference)
        assert row["steps"] == "eager"


@pytest.mark.slow
def test_distilling_from_an_empty_folder(script, run, tmp_path, monkeypatch):
    monkeypatch.setattr(script("distill"), "OPTIONS", ("DISTILLER.ANY_TEACHER", "True", "DATASET.NUM_WORKERS", "0"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = run("distill", "--seeds", 3, 4, "--epochs", 1, "--images", 3, "--write", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == out.removesuffix("\n")
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["title"] == (
        "`deepkd distill` on made JPEGs of 12 classes, 36 to train on and as many to test on, from an empty folder"
    )
    assert "--compare" in record["settings"]["command"]
    assert "SOLVER.SEED N" in record["settings"]["command"]
    assert [row["seed"] for row in record["rows"]] == [3, 4]
    for row in record["rows"]:
        assert row["seconds"] > 1
        assert row["seconds of processor"] > 1
        assert row["gain"] == row["deepkd"] - row["alone"]
        assert row["gain, best"] == row["deepkd, best"] - row["alone, best"]
        assert all(0 <= row[name] <= row[f"{name}, best"] <= 100 for name in ("teacher", "deepkd", "alone"))
    (gain,) = (part for part in record["parts"] if part["top-1"] == "gain")
    gains = [row["gain"] for row in record["rows"]]
    assert gain["n"] == 2
    assert gain["last epoch"] == pytest.approx(sum(gains) / 2)
    assert gain["± of the last"] == pytest.approx(abs(gains[0] - gains[1]) / 2**0.5)
    # rows of calls for some seeds each make one table
    short = ("--epochs", 1, "--images", 3)
    run("distill", "--seeds", "--add", tmp_path / "table.json", *short, "--write", tmp_path / "again.md")
    assert (tmp_path / "again.md").read_text() == (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match=r"table.json: --add names a record with another title"):
        run("distill", "--seeds", "--add", tmp_path / "table.json", "--images", 4)


def test_reading_large_images(run, tmp_path):
    threads = torch.get_num_threads()
    try:
        out = run("input", "--images", 2, "--rounds", 1, "--write", tmp_path / "table.md")
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "table.md").read_text() == out.removesuffix("\n")
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    ways = [
        (use, files, way)
        for use in ("training", "test")
        for files in ("as they are", "shrunk")
        for way in ("PIL, floats", "bytes")
    ]
    assert [(row["use"], row["files"], row["way"]) for row in rows[:-1]] == ways
    assert rows[-1]["way"] == "bytes, normalised on the device"
    for row in rows:
        assert row["images/s"] == pytest.approx(1e3 / row["ms an image"])
    assert rows[1]["to PIL"] == pytest.approx(rows[1]["images/s"] / rows[0]["images/s"])


ON_A_CPU = ("optimizer_ways", "grad_scaler", "amp_in_threads", "teacher_top_50", "deterministic_twice")
ON_A_CPU += ("pipeline_device", "large_test_batches", "accumulation", "float16", "processes")


@pytest.fixture
def checks(script, monkeypatch, capsys, data_root, tmp_path):
    """checks(*words) -> the exit code of gpu_checks.py, its lines by name, what it printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    module = script("gpu_checks")

    def run(*words):
        file = tmp_path / "checks.json"
        code = module.main([*words, "--write", str(file), "--root", str(data_root)])
        record = json.loads(file.read_text()) if file.exists() else {"rows": []}
        return code, {line["name"]: line for line in record["rows"]}, capsys.readouterr()

    run.module = module
    return run


def test_the_rows_that_need_no_gpu(checks):
    code, lines, printed = checks("--device", "cpu")
    assert [*lines] == [*checks.module.ROWS]
    assert code == 0, printed.out
    for name, line in lines.items():
        assert list(line) == ["name", "claimed", "measured", "ok", "seconds"]
        if name in ON_A_CPU:
            assert (line["ok"], line["seconds"] > 0) == (True, True)
        else:
            assert (line["ok"], line["measured"]) == (None, "skipped: needs CUDA")
    assert f"{len(ON_A_CPU)} of {len(ON_A_CPU)} rows as claimed, {len(lines) - len(ON_A_CPU)} skipped" in printed.out
    assert not torch.are_deterministic_algorithms_enabled()


BY_STAND_INS = ("graphs_equal_eager", "graphs_beside_a_loader", "one_pool", "compile_equals_eager")
BY_STAND_INS += ("buffers_not_overwritten", "peak_memory", "step_times")


@pytest.mark.slow
def test_the_rows_of_a_gpu_by_stand_ins(checks, monkeypatch):
    """That they run to their end and see a way that is as claimed; not what a GPU does."""
    monkeypatch.setattr(device, "Captures", Captures)
    monkeypatch.setattr(device, "compile_options", lambda of: {"backend": "aot_eager"})
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**20)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    module = checks.module
    for name in BY_STAND_INS:
        monkeypatch.setitem(module.ROWS, name, module.ROWS[name]._replace(needs_cuda=False))
    small = importlib.import_module("gpu_case").SMALL
    for name, value in {"LARGE": small, "ROUNDS": 1, "REPEAT": 1}.items():
        monkeypatch.setattr(module, name, value)
    _, lines, printed = checks("--device", "cpu", "--rows", *BY_STAND_INS)
    times = lines.pop("step_times")["measured"]
    assert all(line["ok"] for line in lines.values()), printed.out
    assert {key: of["way"] for key, of in times.items()} == {
        f"{method}, {way}": way for way in ("eager", "compile", "graphs") for method in ("KD", "DeepKD")
    }
    assert lines["graphs_equal_eager"]["measured"]["captures"] == 3


def test_a_row_that_fails_does_not_stop_the_others(checks, monkeypatch):
    def broken(case):
        raise RuntimeError("no such\nthing")

    rows = checks.module.ROWS
    monkeypatch.setitem(rows, "amp_in_threads", rows["amp_in_threads"]._replace(check=broken))
    monkeypatch.setitem(rows, "grad_scaler", rows["grad_scaler"]._replace(check=lambda case: ("too much", False)))
    code, lines, _ = checks("--device", "cpu", "--rows", "amp_in_threads", "grad_scaler", "optimizer_ways")
    assert code == 1
    assert [(line["measured"], line["ok"]) for line in lines.values()][:2] == [
        ("RuntimeError: no such thing", False),
        ("too much", False),
    ]
    assert lines["optimizer_ways"]["ok"]


def test_no_row_begins_when_the_time_is_up(checks, monkeypatch):
    monkeypatch.setattr(checks.module, "BUDGET", 0.0)
    code, lines, _ = checks("--device", "cpu", "--rows", "optimizer_ways", "step_times")
    assert code == 1
    assert [line["measured"] for line in lines.values()] == ["not begun in 0 seconds", "skipped: needs CUDA"]


def test_without_a_gpu_its_checks_end_in_one_line(checks):
    code, lines, printed = checks()
    assert (code, lines, printed.out) == (2, {}, "")
    assert printed.err == (
        "deepkd: error: gpu_checks.py needs CUDA, and PyTorch finds none here; --device cpu runs the rows without it\n"
    )


@pytest.mark.slow
def test_epochs_of_mdistillers_own_loop(data_root, tmp_path, mdistiller_root):
    _, rows = epochs_of(start, data_root, tmp_path / "table.md", MDISTILLER_ROOT=str(mdistiller_root))
    assert len(rows) == 9
    assert rows["mdistiller", "KD", "workers"]["to reference"] == 1


def test_waiting_is_told_from_working(script):
    """A loop that mdistiller runs: 3 batches that take 20 ms each to get and 50 ms to use."""

    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.02)
                yield batch

    timed = script("epoch").Timed(Slow("abc"))
    assert len(timed) == 3
    assert [(time.sleep(0.05), batch)[1] for batch in timed] == ["a", "b", "c"]
    assert timed.epoch.waiting >= 0.06
    assert timed.epoch.seconds - timed.epoch.waiting >= 0.15


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (("--images", "250"), "argument --images: '250'; it must be a multiple of 100"),
        (("--pairs", "resnet8"), "argument --pairs: 'resnet8'; it must be TEACHER:STUDENT, two of"),
        (("--pairs", "resnet8:r"), "argument --pairs: 'resnet8:r'; it must be TEACHER:STUDENT"),
        (("--workers", "-1"), "argument --workers: '-1'; it must be a whole number"),
        (("--epochs", "0"), "argument --epochs: '0'; it must be a whole number from 1 on"),
    ],
)
def test_mistaken_options_of_epoch(run, option, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        run("epoch", *option)


def test_the_simulation_of_many_cards_in_cases_that_a_hand_can_add_up(script):
    scale = script("scale")
    cluster = scale.Cluster(4, 10.0, 0.0)
    assert cluster.seconds(40) == 6.0  # 2 · 3/4 · 40 / 10
    network = scale.Network(1.0, ((0.25, 10), (0.5, 30), (1.0, 40)))
    parts = scale.buckets(network, 40)
    assert parts == [(0.5, 40), (1.0, 40)]
    assert scale.buckets(network, 10**9) == [(1.0, 80)]
    # forward until 2, passes until 12 and 22; the first's 12 s are sent from 12 to 24, the last's 6 and 6 until 36
    assert scale.step_seconds(2, 10, 2, parts, cluster, overlap=True) == 36
    assert scale.step_seconds(2, 10, 2, parts, cluster, overlap=False) == 22 + 12 + 12
    # with links ten times as fast: the first until 13.2, the buckets from 17 to 17.6 and from 22 to 22.6
    fast = scale.Cluster(4, 100.0, 0.0)
    assert scale.step_seconds(2, 10, 2, parts, fast, overlap=True) == pytest.approx(22.6)
    assert scale.Cluster(4, 100.0, 0.5).seconds(0) == 3  # 2 · 3 messages


def test_the_simulation_knows_a_network_by_its_layers(script):
    """ResNet18's published size and operations; the classifier's gradients are the first to be finished."""
    network = script("scale").look_at("ResNet18")
    assert network.bytes == 4 * 11_689_512
    assert network.forward == pytest.approx(2 * 1.814e9, rel=1e-3)
    assert network.gradients[0][1] in (4 * 1000, 4 * 512_000)
    shares = [done for done, _ in network.gradients]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_the_losses_on_tokens(run, script, tmp_path, monkeypatch):
    """Peaks are exact: KL holds five tensors of the size of the logits, and the whole of a step is told by its own."""

    def missing():
        raise ImportError("No module named 'trl'")

    monkeypatch.setattr(script("tokens"), "trl", missing)
    options = ("--vocabularies", 3000, "--tokens", 64, "--top-k", 10, "--rounds", 1)
    out = run("tokens", *options, "--write", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == out.removesuffix("\n")
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["settings"]["TRL"] == "left out"
    rows = {row["loss"]: row for row in record["rows"]}
    assert not [name for name in rows if name.startswith("TRL")]
    assert rows["KL"]["× logits"] == pytest.approx(5, abs=0.05)
    assert rows["KL"]["ratio to KL"] == 1
    assert [row["passes"] for row in rows.values()] == [1, 1, 1, 2, 2]
    monkeypatch.setattr(tokens, "PARTS", 64)
    monkeypatch.setattr(tokens, "CELLS", 3000)
    by_token = script("tokens").measure(["KL", "token_kd, top K"], 3000, 64, 10, 1)[1]
    assert 1 < by_token["× logits"] < 1.3  # the gradient and one token's share
