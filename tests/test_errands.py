"""The package's extension points, by the files that docs/extending*.md show: each works from outside the package."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from deepkd_plugin import extensions
from deepkd_plugin.config import flatten
from deepkd_plugin.data import sources
from deepkd_plugin.distillers import DISTILLERS, DeepKD, bases, register_distiller
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import builtin, networks, registry
from deepkd_plugin.launch import read_config
from deepkd_plugin.losses import decoupled_kd, kd_divergence
from deepkd_plugin.optim import DecoupledMomentumSGD
from deepkd_plugin.run import resume
from deepkd_plugin.run.metrics import read_metrics

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n# (\w+)\.py\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "docs" / name for name in ("extending.md", "extending_data.md")]
FILES = dict(BLOCK.findall("".join(page.read_text(encoding="utf-8") for page in PAGES)))
LONGEST = 25

RUN = {
    "SOLVER": {
        "TRAINER": "DecoupledMomentumSGD",
        "EPOCHS": 2,
        "BATCH_SIZE": 35,
        "LR": 0.05,
        "LR_DECAY_STAGES": [],
    },
    "DATASET": {"TYPE": "bars", "NUM_WORKERS": 0, "TEST": {"BATCH_SIZE": 70}},
    "EXPERIMENT": {"PROJECT": "errands", "NAME": "run"},
}

WHOLE = ("DATASET.TRAIN_PER_CLASS", "0", "DATASET.HOLDOUT", "0.0")
"""Options that undo what the fixture `train` leaves out of a set."""


@pytest.fixture
def folder(tmp_path):
    """A folder on Python's path with the files of these pages."""
    for name, code in FILES.items():
        (tmp_path / f"{name}.py").write_text(code)
    return tmp_path


@pytest.fixture
def extend(folder, monkeypatch):
    """Import some of the files as extensions; what they register is gone when the test is done."""
    registries = (
        *(DISTILLERS, sources.DATASETS, networks.NETWORKS, builtin.distiller_dict, builtin.trainer_dict),
        *(builtin.cifar_model_dict, builtin.tiny_imagenet_model_dict, builtin.imagenet_model_dict),
    )
    before, tree = [dict(one) for one in registries], builtin.CFG.clone()
    monkeypatch.setattr(extensions, "_contents", {})
    monkeypatch.syspath_prepend(folder)

    def load(*names):
        monkeypatch.setenv(extensions.VARIABLE, ",".join(names))
        registry.register(registry.find_host())

    yield load
    for one, content in zip((*registries, builtin.CFG), (*before, tree)):
        one.clear()
        one.update(content)
    for name in FILES:
        sys.modules.pop(name, None)


@pytest.fixture
def config(folder):
    """Write a config beside the files: config(name, **sections) -> its path."""

    def write(name, **sections):
        merged = {key: RUN.get(key, {}) | sections.get(key, {}) for key in RUN.keys() | sections.keys()}
        path = folder / "mine" / "tiny_tiny" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(merged))
        return path

    return write


def deepkd(folder, *words, extensions):
    """Run `python -m deepkd_plugin` in a process of its own, with the files as extensions."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"DEEPKD_EXTENSIONS": extensions}
    command = [sys.executable, "-m", "deepkd_plugin", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_page_has_the_four_errands_and_each_is_short():
    assert set(FILES) == {"mtkd", "relational", "bars", "tiny"}
    assert {name: code.count("\n") for name, code in FILES.items() if code.count("\n") > LONGEST} == {}


def test_a_base_method_takes_its_golden_step(extend, config):
    """DISTILLER.TYPE, DeepKD.BASE and keys come with the class; the step is the formula's, written out."""
    extend("mtkd", "bars", "tiny")
    assert list(bases())[-1] == "MTKD"
    file = config(
        "deepkd_mtkd",
        DISTILLER={"TYPE": "DeepKD", "TEACHER": "tiny", "STUDENT": "tiny"},
        DeepKD={"BASE": "MTKD"},
    )
    cfg, _ = read_config(registry.BUILTIN, str(file), ["MTKD.WEIGHT", "0.25", "DeepKD.MASK.TYPE", "none"])
    assert cfg.MTKD == {"WEIGHT": 0.25, "TEMPERATURES": [2.0, 4.0]}
    torch.manual_seed(0)
    student, teacher = (networks.network(registry.BUILTIN, "bars", "tiny", 7).double() for _ in range(2))
    image, target = torch.randn(5, 3, 48, 48, dtype=torch.float64), torch.tensor([0, 3, 6, 2, 2])
    logits, taught = student(image)[0], teacher(image)[0].detach()
    cross_entropy = torch.nn.functional.cross_entropy(logits, target)

    whole = DISTILLERS["MTKD"](student, teacher, cfg).train()(image=image, target=target, epoch=1)[1]
    kl = sum(0.25 * kd_divergence(logits, taught, t).mean() for t in (2.0, 4.0))
    torch.testing.assert_close(whole, {"loss_ce": cross_entropy, "loss_kd": kl})

    weight = student.classifier.weight
    parts = [decoupled_kd(logits, taught, target, t) for t in (2.0, 4.0)]
    loss = cross_entropy + sum(0.25 * (part.tckd.mean() + part.nckd.mean()) for part in parts)
    expected = weight.detach() - 0.1 * torch.autograd.grad(loss, weight)[0]
    optimizer = DecoupledMomentumSGD(student.parameters(), 0.1, {"tog": 0.9, "tcg": 0.5, "ncg": 0.7})
    optimizer.backward(DeepKD(student, teacher, cfg).train()(image=image, target=target, epoch=1)[1])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


def test_a_fourth_stream_trains_with_its_own_delta(extend, config, train):
    extend("relational", "bars", "tiny")
    file = config("vanilla", DISTILLER={"TYPE": "NONE", "STUDENT": "tiny"})
    code, _, err = train(str(file), *WHOLE, "SOLVER.EPOCHS", "12")
    assert code == 0, err
    taught = {"TYPE": "Relational", "TEACHER": "tiny", "STUDENT": "tiny"}
    taught["TEACHER_WEIGHTS"] = str(train.folder.parent.parent / "errands/run/student_best")
    delta = {"DECOUPLED": {"DELTA": {"REL": 0.05, "TCG": -0.2}}}
    file = config("relational", DISTILLER=taught, SOLVER=RUN["SOLVER"] | delta)
    code, _, err = train(str(file), *WHOLE, "EXPERIMENT.NAME", "second")
    assert code == 0, err
    last = read_metrics(train.folder.parent.parent / "errands/second")[-1]
    assert last["momentum"] == pytest.approx({"tog": 0.9, "tcg": 0.7, "ncg": 0.9, "rel": 0.95})
    assert set(last["loss"]) == {"tog", "tcg", "ncg", "rel"}


def test_a_data_set_and_a_network_train(extend, config, train):
    """48 × 48 pixels and 7 classes, by a network that nobody knew: it learns the bars."""
    extend("bars", "tiny")
    file = config("vanilla", DISTILLER={"TYPE": "NONE", "STUDENT": "tiny"})
    code, out, err = train(str(file), *WHOLE, "SOLVER.EPOCHS", "12")
    assert code == 0, err
    assert "errands/run: NONE on bars, 140 images" in out
    lines = read_metrics(train.folder.parent.parent / "errands/run")
    assert len(lines) == 12
    assert lines[-1]["test_acc"] > 90


@pytest.mark.slow
def test_a_table_of_them_is_planned_estimated_trained_and_compared(config, folder):
    """In processes of their own, which are told of the extensions by the environment alone."""
    config("vanilla", DISTILLER={"TYPE": "NONE", "STUDENT": "tiny"})
    names = "mtkd,relational,bars,tiny"
    first = deepkd(folder, "reproduce", "./mine", "--seeds", "1", "--out", "out", extensions=names)
    assert first.returncode == 0, first.stdout + first.stderr
    (best,) = (folder / "out").glob("runs/tiny_tiny/vanilla/*/student_best")
    taught = {"TEACHER": "tiny", "STUDENT": "tiny", "TEACHER_WEIGHTS": str(best)}
    config("kd", DISTILLER=taught | {"TYPE": "KD"})
    config("mtkd", DISTILLER=taught | {"TYPE": "MTKD"})
    config("deepkd_mtkd", DISTILLER=taught | {"TYPE": "DeepKD"}, DeepKD={"BASE": "MTKD"})
    config("relational", DISTILLER=taught | {"TYPE": "Relational"})
    planned = deepkd(folder, "reproduce", "./mine", "--seeds", "1", "--out", "out", "--dry-run", extensions=names)
    assert planned.returncode == 0, planned.stderr
    assert "1 finished, 4 new" in planned.stdout
    assert re.search(r"time +about", planned.stdout)
    whole = deepkd(folder, "reproduce", "./mine", "--seeds", "1", "--out", "out", extensions=names)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    table = json.loads((folder / "out" / "table.json").read_text())
    assert {row["name"]: row["base"] for row in table["methods"]} == {
        "vanilla": None,
        "kd": None,
        "mtkd": None,
        "deepkd_mtkd": "mtkd",
        "relational": "kd",
    }
    assert {row["label"] for row in table["methods"]} >= {"MTKD + DeepKD + DTM", "KD + Relational + DTM"}
    assert "over MTKD" in (folder / "out" / "report.md").read_text()


def test_a_file_s_content_is_part_of_the_code_s_hash(config, folder):
    """A table does not mix runs of two versions of an extension, nor of what that imports from its folder."""
    config("vanilla", DISTILLER={"TYPE": "NONE", "STUDENT": "tiny"})
    words = ("reproduce", "./mine", "--seeds", "1", "--out", "out", "SOLVER.EPOCHS", "1")
    (folder / "widths.py").write_text("WIDTH = 8\n")
    (folder / "tiny.py").write_text(
        "from widths import WIDTH\n" + FILES["tiny"].replace("nn.Conv2d(3, 8", "nn.Conv2d(3, WIDTH")
    )
    assert deepkd(folder, *words, extensions="bars,tiny").returncode == 0
    (folder / "widths.py").write_text("WIDTH = 8  # changed\n")
    again = deepkd(folder, *words, extensions="bars,tiny")
    assert again.returncode == 2
    assert "was made by other code" in again.stderr


def test_the_registering_module_is_hashed_whatever_it_registers(extend, folder):
    """Also where the reader and the network are nobody's file: this package's own, and arguments put before another."""
    (folder / "borrowed.py").write_text(
        "from dataclasses import replace\nfrom functools import partial\n"
        "from deepkd_plugin.data import register_dataset\nfrom deepkd_plugin.data.sources import DATASETS\n"
        "from deepkd_plugin.hosts.networks import register_network\nfrom tiny import Tiny\n"
        "register_dataset('glyphs_brighter', replace(DATASETS['glyphs100'], mean=(0.4, 0.4, 0.4)))\n"
        "register_network('tiny_too', partial(Tiny))\n"
    )
    extend("tiny", "borrowed")
    assert extensions.contents() == {
        name: hashlib.sha256((folder / f"{name}.py").read_bytes()).hexdigest() for name in ("borrowed", "tiny")
    }
    del sys.modules["borrowed"]


@pytest.mark.parametrize("zoo", ["cifar_models", "imagenet_models"])
def test_a_network_of_the_host_is_not_replaced(extend, zoo):
    getattr(registry.BUILTIN, zoo)["theirs"] = (None, None)
    networks.register_network("theirs", lambda num_classes: None)
    with pytest.raises(UserError, match="already has the network 'theirs'; register yours under another name"):
        extend("bars")


def test_a_run_goes_on_without_an_extension_it_had_no_use_of(extend, config, tmp_path):
    """Its checkpoint has that extension's keys; keys that are newer than a checkpoint have their defaults."""
    extend("relational", "mtkd", "bars", "tiny")
    file = str(config("vanilla", DISTILLER={"TYPE": "NONE", "STUDENT": "tiny"}))
    later = read_config(registry.BUILTIN, file, [])[0].clone()
    later.defrost()
    state = {"config": flatten(later), "teacher": None, "epoch": 1, "best_epoch": 1, "best_acc": 1.0}
    state |= {"model": {"student.bias": torch.zeros(1)}, "optimizer": {}}
    del state["config"]["SOLVER.AMP"]
    for gone in ("MTKD.WEIGHT", "SOLVER.DECOUPLED.DELTA.REL"):
        assert gone in state["config"]
    torch.save(state, tmp_path / "latest")
    del later["MTKD"], later.SOLVER.DECOUPLED.DELTA["REL"]
    assert resume.read_state(tmp_path, later, None)[1:] == (state, {})
    later.SOLVER.AMP = True
    with pytest.raises(UserError, match="needs the run's own config: SOLVER.AMP was False, is True"):
        resume.read_state(tmp_path, later, None)


WRONG_NETWORKS = {
    "plain": lambda num_classes: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes)),
    "large": lambda num_classes: networks.NETWORKS["tiny"](num_classes=num_classes + 2),
    "odd": lambda classes: None,
}


def test_what_cannot_be_registered_is_said(extend, folder, config, train):
    (folder / "broken.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(UserError, match=r"DEEPKD_EXTENSIONS names 'broken', which cannot be imported"):
        extend("broken")
    extend("bars", "tiny")
    with pytest.raises(ValueError, match="'tiny' is registered already"):
        networks.register_network("tiny", lambda num_classes: None)
    for name in ("KD", "kd"):
        with pytest.raises(ValueError, match="needs another `name`"):
            register_distiller(type(name, (DISTILLERS["KD"],), {"__module__": __name__}))
    for streams in ("rel", ("tog", "Rel"), ("a.b",)):
        with pytest.raises(ValueError, match="must be a tuple of names in small letters"):
            register_distiller(type("Odd", (DeepKD,), {"streams": streams}))
    for name, make in WRONG_NETWORKS.items():
        networks.register_network(name, make)
    registry.register(registry.find_host())
    said = {"tinny": "DISTILLER.STUDENT is 'tinny'", "plain": "returns Tensor for one image; it must return"}
    said |= {"large": "logits of the shape (1, 9)", "odd": "cannot take an image of 48 x 48 pixels (TypeError"}
    for name, words in said.items():
        code, _, err = train(str(config("vanilla", DISTILLER={"TYPE": "NONE", "STUDENT": name})), *WHOLE)
        assert code == 2
        assert words in err


@pytest.mark.parametrize(
    ("streams", "loss", "said"),
    [
        (("tog", "tcg", "ncg", "rel"), "rell", "loss 'rell' belongs to no stream"),
        (("tog", "tcg", "ncg", "rel", "idle"), "rel", "it declares the streams idle and gives them no loss"),
    ],
)
def test_losses_and_declared_streams_must_fit(extend, config, train, streams, loss, said):
    """Whatever the momenta are: here all are equal, and no loss slips into another stream."""

    class Odd(DeepKD):
        def forward_train(self, image, target, epoch, **batch):
            logits, losses = super().forward_train(image, target, epoch, **batch)
            return logits, losses | {loss: logits.square().mean()}

    Odd.streams = streams
    extend("bars", "tiny")
    register_distiller(Odd)
    code, _, err = train(str(config("vanilla", DISTILLER={"TYPE": "NONE", "STUDENT": "tiny"})), *WHOLE)
    assert code == 0, err
    best = str(train.folder.parent.parent / "errands/run/student_best")
    taught = {"TYPE": "Odd", "TEACHER": "tiny", "STUDENT": "tiny", "TEACHER_WEIGHTS": best}
    code, _, err = train(str(config("odd", DISTILLER=taught)), *WHOLE, "EXPERIMENT.NAME", "odd")
    assert code == 2
    assert said in err


def test_a_delta_of_a_stream_that_the_run_does_not_have_is_refused(extend, config, train):
    extend("relational", "bars", "tiny")
    file = config("vanilla", DISTILLER={"TYPE": "NONE", "STUDENT": "tiny"})
    code, _, err = train(str(file), "SOLVER.DECOUPLED.DELTA.REL", "0.05")
    assert code == 2
    assert "SOLVER.DECOUPLED.DELTA.REL is 0.05; it must be 0.0: the run's streams are tog, tcg, ncg" in err


def test_the_weights_are_decayed_in_a_stream_that_the_run_has(extend, config):
    class Two(DeepKD):
        streams = ("tog", "ncg")

    extend("bars", "tiny")
    register_distiller(Two)
    file = str(config("two", DISTILLER={"TYPE": "Two", "TEACHER": "tiny", "STUDENT": "tiny"}))
    key = "SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM"
    with pytest.raises(UserError, match=f"{key} is 'tcg'; it must be one of the run's streams, tog, ncg"):
        read_config(registry.BUILTIN, file, [])
    read_config(registry.BUILTIN, file, [key, "ncg"])
