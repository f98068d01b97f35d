"""mdistiller's own scripts after `deepkd apply`, as processes, in a copy of the real checkout."""

import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from deepkd_plugin.commands.apply import apply
from deepkd_plugin.hosts.builtin.models import cifar_model_dict
from deepkd_plugin.run import checkpoint
from deepkd_plugin.run.metrics import read_metrics

ROOT = Path(__file__).parents[1]
FEATURES = [16, 32, 64, 64]
SMALL = {
    "EXPERIMENT.NAME": "",
    "EXPERIMENT.PROJECT": "tests",
    "DISTILLER.TEACHER": "resnet20",
    "DISTILLER.STUDENT": "resnet8",
    "DISTILLER.TEACHER_WEIGHTS": "builtin:glyphs100_resnet20",
    "SOLVER.EPOCHS": 1,
    "DATASET.NUM_WORKERS": 0,
    "REVIEWKD.SHAPES": [1, 8, 16, 32],
    "REVIEWKD.OUT_SHAPES": [1, 8, 16, 32],
    "REVIEWKD.IN_CHANNELS": FEATURES,
    "REVIEWKD.OUT_CHANNELS": FEATURES,
}
"""resnet20 on the embedded teacher to resnet8, one epoch: what every run below changes in a config file."""


def environment(**change):
    kept = {name: value for name, value in os.environ.items() if name != "MDISTILLER_ROOT"}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "WANDB_MODE": "disabled"} | change


def python(*arguments, cwd, **change):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(**change), capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(mdistiller_root, cifar_root, tmp_path_factory):
    """A copy of mdistiller with the plugin applied and a small CIFAR-100 in the folder that mdistiller reads."""
    if not (mdistiller_root / "tools" / "train.py").is_file():
        pytest.skip(f"{mdistiller_root} has no tools/: an installed package, not a checkout")
    root = tmp_path_factory.mktemp("checkout") / "mdistiller"
    keep_out = shutil.ignore_patterns(".git", "output", "data", "download_ckpts", "detection")
    shutil.copytree(mdistiller_root, root, ignore=keep_out)
    shutil.copytree(cifar_root, root / "data")
    apply(root)
    return root


def small(checkout, config, **options):
    """A config file of the checkout with SMALL and options set: (file, experiment's folder)."""
    tree = yaml.safe_load((checkout / config).read_text())
    options = {name.replace("__", "."): value for name, value in options.items()}
    name = ",".join([Path(config).stem, *(str(Path(str(value)).name) for value in options.values())])
    for path, value in (SMALL | {"EXPERIMENT.TAG": name} | options).items():
        node = tree
        *parents, leaf = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    file = checkout / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file.name, checkout / "output" / "tests" / name


def train(checkout, config, flags=(), **options):
    """Run the patched tools/train.py on `small`: (process, experiment's folder)."""
    file, folder = small(checkout, config, **options)
    return python("tools/train.py", "--cfg", file, *flags, cwd=checkout), folder


@pytest.mark.slow
def test_deepkd_trains_resumes_and_is_read_by_eval(checkout):
    config = "configs/cifar100/res32x4_res8x4/deepkd.yaml"
    done, folder = train(checkout, config)
    assert done.returncode == 0, done.stderr
    assert "teacher   resnet20 95.00 % top-1 on the test images" in done.stdout
    (record,) = read_metrics(folder)
    assert set(record["loss"]) == {"tog", "tcg", "ncg"}
    assert record["top_k"] == 5
    assert record["momentum"]["tcg"] < record["momentum"]["tog"]
    assert (folder / "run.json").is_file()
    again, _ = train(checkout, config)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr

    file, folder = small(checkout, config, SOLVER__EPOCHS=2)
    stop = (
        "import runpy, sys, deepkd_plugin.mdistiller\n"
        "from deepkd_plugin.trainer import Trainer\n"
        "run = Trainer.train_epoch\n"
        "def stop(self, epoch):\n"
        "    if epoch == 2: raise KeyboardInterrupt\n"
        "    return run(self, epoch)\n"
        "Trainer.train_epoch = stop\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    here = {"MDISTILLER_ROOT": str(checkout)}
    stopped = python("-c", stop, "tools/train.py", "--cfg", file, cwd=checkout, **here)
    assert stopped.returncode != 0
    assert len(read_metrics(folder)) == 1
    resumed = python("tools/train.py", "--cfg", file, "--resume", cwd=checkout)
    assert resumed.returncode == 0, resumed.stderr
    assert [record["epoch"] for record in read_metrics(folder)] == [1, 2]

    read = python("tools/eval.py", "-m", "resnet8", "-c", folder / "student_best", cwd=checkout)
    assert read.returncode == 0, read.stderr
    assert "Top-1:" in read.stderr


GLYPHS = ROOT / "deepkd_plugin/hosts/builtin/weights/glyphs100_resnet20.pt"


@pytest.mark.slow
def test_what_apply_says_is_next_and_eval_of_what_it_trains(checkout, data_root, tmp_path):
    """`tools/eval.py -d glyphs100`, which mdistiller's own list of data sets does not have."""
    root = tmp_path / "the check out"
    shutil.copytree(checkout, root, ignore=shutil.ignore_patterns("output", "data"))
    shutil.copytree(data_root, root / "data")
    said = python("-m", "deepkd_plugin", "apply", root, cwd=tmp_path)
    (line,) = [line for line in said.stdout.splitlines() if line.startswith("next      ")]
    words = shlex.split(line)
    assert words[1:5] == ["cd", str(root), "&&", "python"]
    short = ("SOLVER.EPOCHS", "1", "DATASET.TRAIN_PER_CLASS", "4", "DATASET.HOLDOUT", "0.02", "EXPERIMENT.NAME", "run")
    done = python(*words[5:], *short, cwd=root)
    assert done.returncode == 0, done.stderr
    (student,) = root.glob("output/glyphs100/*/student_best")
    best = json.loads((student.parent / "run.json").read_text())["result"]["best"]
    words = ("tools/eval.py", "-m", "resnet8", "-c", student, "-d", "glyphs100")
    read = python(*words, "DATASET.HOLDOUT", "0.02", cwd=root)
    assert read.returncode == 0, read.stderr
    assert f"resnet8 on glyphs100: top-1 {best:.2f} %" in read.stdout


def test_eval_of_data_sets_that_mdistiller_lacks(checkout, data_root, tmp_path):
    words = (checkout / "tools/eval.py", "-m", "resnet20", "-c", GLYPHS, "--dataset=glyphs100", "--root", data_root)
    read = python(*words, cwd=tmp_path)
    assert read.returncode == 0, read.stderr
    assert "resnet20 on glyphs100: top-1 96.52 %" in read.stdout
    read = python(*words[:-3], "-d", "glyphs10", cwd=tmp_path)
    assert read.returncode == 2
    assert "invalid choice: 'glyphs10'" in read.stderr


@pytest.mark.parametrize("method", ["dkd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("crld", "mlkd"))])
def test_the_baselines_train(checkout, method):
    done, folder = train(checkout, f"configs/cifar100/res32x4_res8x4/{method}.yaml")
    assert done.returncode == 0, done.stderr
    assert read_metrics(folder)[0]["train_loss"] > 0


@pytest.mark.parametrize(("method", "trainer"), [("REVIEWKD", "base"), ("KD", "base"), ("DKD", "dot")])
@pytest.mark.slow
def test_mdistillers_own_methods_train_and_resume(checkout, method, trainer):
    options = {"DISTILLER__TYPE": method, "SOLVER__TRAINER": trainer}
    done, folder = train(checkout, "configs/cifar100/kd.yaml", **options)
    assert done.returncode == 0, done.stderr
    assert "teacher   resnet20 95.00 % top-1 on the test images" in done.stdout
    assert "wandb" not in done.stdout + done.stderr
    state = checkpoint.load(folder / "latest", "test")
    assert state["epoch"] == 1
    resumed, _ = train(checkout, "configs/cifar100/kd.yaml", ["--resume"], **options)
    assert resumed.returncode == 0, resumed.stderr
    assert "Best accuracy" in resumed.stdout
    read = python("tools/eval.py", "-m", "resnet8", "-c", folder / "student_latest", cwd=checkout)
    assert read.returncode == 0, read.stderr


def one_line(done):
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("deepkd: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    return lines[0].removeprefix("deepkd: error: ")


@pytest.mark.slow
def test_a_teacher_file_that_would_run_code_does_not_run(checkout, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for number, content in enumerate([{"model": Payload()}, Payload()]):
        path = tmp_path / f"teacher{number}.pth"
        torch.save(content, path)
        done, _ = train(checkout, "configs/cifar100/kd.yaml", DISTILLER__TEACHER_WEIGHTS=str(path))
        assert f"{path}: DISTILLER.TEACHER_WEIGHTS must name a checkpoint of tensors" in one_line(done)
        assert not (tmp_path / "ran").exists()
    raw = tmp_path / "raw.pth"
    raw.write_bytes(pickle.dumps(Payload()))
    read = python("tools/eval.py", "-m", "resnet20", "-c", raw, cwd=checkout)
    assert "this file is not one" in one_line(read)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_mistakes_in_mdistillers_launcher_are_one_line(checkout, tmp_path):
    config = "configs/cifar100/kd.yaml"
    fresh = tmp_path / "fresh.pth"
    torch.save({"model": cifar_model_dict["resnet20"][0](num_classes=100).state_dict()}, fresh)
    for options, expected in [
        ({"DATASET__TYPE": "imagenet"}, "DISTILLER.STUDENT is 'resnet8'; it must be one of ResNet18"),
        ({"DISTILLER__TEACHER_WEIGHTS": ""}, "the zoo has no weights of resnet20"),
        ({"DISTILLER__TEACHER": "resnet56", "DISTILLER__TEACHER_WEIGHTS": ""}, "240.pth: no such file"),
        ({"DISTILLER__TEACHER_WEIGHTS": str(fresh)}, "is at chance on cifar100"),
        ({"DISTILLER__TYPE": "MLKD"}, "it must be DecoupledMomentumSGD: MLKD needs two views"),
        ({"SOLVER__LR_SCHEDULE": "cosine"}, "it must be 'step' under mdistiller's trainer base"),
        ({"SOLVER__WARMUP_UNIT": "iteration"}, "it must be 'epoch' under mdistiller's trainer base"),
        (
            {"DeepKD__MASK__TYPE": "half"},
            "config: DeepKD.MASK.TYPE is 'half'; it must be one of none, static",
        ),
    ]:
        done, folder = train(checkout, config, **options)
        assert expected in one_line(done)
        assert not folder.exists()


@pytest.mark.slow
def test_teacher_files_of_every_layout(checkout, tmp_path):
    """Bare or under "model", with DataParallel's prefix, with RepDistiller's numpy accuracy."""
    import numpy as np

    weights = checkpoint.load(ROOT / "deepkd_plugin/hosts/builtin/weights/glyphs100_resnet20.pt", "test")
    weights = weights.get("model", weights)
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    for number, content in enumerate(
        [weights, wrapped, {"epoch": 240, "model": wrapped, "best_acc": np.float64(72.5)}]
    ):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        done = python("tools/eval.py", "-m", "resnet20", "-c", path, cwd=checkout)
        assert done.returncode == 0, done.stderr
        assert "Top-1:95.000" in done.stderr


def test_registering_after_the_imports_reaches_names_that_are_held_already(checkout, tmp_path):
    (tmp_path / "script.py").write_text(
        "from mdistiller.dataset import get_dataset\n"
        "from mdistiller.engine.utils import load_checkpoint\n"
        "from mdistiller.distillers import distiller_dict\n"
        "from mdistiller.engine.cfg import CFG\n"
        "import deepkd_plugin\n"
        "added = deepkd_plugin.register()\n"
        "assert {'DeepKD', 'CRLD', 'MLKD', 'DecoupledMomentumSGD'} <= set(added), added\n"
        "assert get_dataset.__module__ == load_checkpoint.__module__ == 'deepkd_plugin.hosts.mdistiller'\n"
        "assert 'DeepKD' in distiller_dict and CFG.LOG.WANDB is False\n"
        "CFG.LOG.WANDB = True\n"
        "assert deepkd_plugin.register() == [] and CFG.LOG.WANDB is True\n"
    )
    done = python(tmp_path / "script.py", cwd=tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{checkout}")
    assert done.returncode == 0, done.stderr


def test_the_doctor_on_mdistiller(checkout, tmp_path):
    done = python("-m", "deepkd_plugin.registry", cwd=tmp_path, MDISTILLER_ROOT=str(checkout))
    assert done.returncode == 0, done.stderr
    assert f"mdistiller in {checkout}" in done.stdout
    assert "REVIEWKD DKD +MLKD +CRLD +NKD +RLD +WTTM +DIST +DeepKD" in done.stdout
    assert "crd_dot +DecoupledMomentumSGD" in done.stdout
    assert "cifar100 images        in place, 100 test images" in done.stdout


OWN_BRANCH = """
import torch
from torch.utils.data import DataLoader

class Noise(torch.utils.data.Dataset):
    def __init__(self, count, training):
        self.count, self.training = count, training
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index)) + index % 5
        return (image, index % 5, index) if self.training else (image, index % 5)

_theirs = get_dataset
def get_dataset(cfg):
    if cfg.DATASET.TYPE == "noise":
        train = DataLoader(Noise(40, True), batch_size=cfg.SOLVER.BATCH_SIZE, shuffle=True)
        return train, DataLoader(Noise(20, False), batch_size=20), 40, 5
    return _theirs(cfg)
"""


@pytest.mark.slow
def test_a_checkouts_own_branch_of_get_dataset(checkout, tmp_path):
    """A data set that only the checkout's get_dataset has trains there, with a teacher that was trained on it."""
    root = tmp_path / "mdistiller"
    shutil.copytree(checkout, root, ignore=shutil.ignore_patterns("output", "data"))
    with (root / "mdistiller" / "dataset" / "__init__.py").open("a") as file:
        file.write(OWN_BRANCH)
    keys = {"DATASET__TYPE": "noise", "SOLVER__EPOCHS": 2, "DATASET__TRAIN_PER_CLASS": 0, "DATASET__HOLDOUT": 0.0}
    vanilla = keys | {"DISTILLER__STUDENT": "resnet8", "DISTILLER__TYPE": "NONE"}
    done, folder = train(root, "configs/cifar100/kd.yaml", **vanilla)
    assert done.returncode == 0, done.stderr
    taught = {"DISTILLER__TEACHER": "resnet8", "DISTILLER__TEACHER_WEIGHTS": str(folder / "student_latest")}
    taught |= {"DISTILLER__STUDENT": "resnet8", "DISTILLER__ANY_TEACHER": True}
    ours = {"SOLVER__TRAINER": "DecoupledMomentumSGD"}
    ours |= {"SOLVER__DECOUPLED": {"LOSS_STREAMS": ["loss_ce:tog", "loss_kd:tcg"]}}
    done, folder = train(root, "configs/cifar100/kd.yaml", **keys, **taught, **ours)
    assert done.returncode == 0, done.stderr
    assert (folder / "student_latest").exists()
    done, _ = train(root, "configs/cifar100/kd.yaml", **keys | {"DATASET__TYPE": "nothing"}, **taught)
    assert "DATASET.TYPE is 'nothing'; it must be one of cifar100" in one_line(done)
    done, _ = train(root, "configs/cifar100/kd.yaml", **keys | {"DATASET__HOLDOUT": 0.2}, **taught)
    assert "DATASET.HOLDOUT is 0.2; it must be 0.0 with DATASET.TYPE noise, which mdistiller's own" in one_line(done)


# From here on, without mdistiller: forks made of a few lines.


def fork(root, change):
    """A package of mdistiller's structure; `change` replaces the content of files."""
    files = {
        "__init__": "",
        "distillers/__init__": "class NONE: pass\ndistiller_dict = {'NONE': NONE}\n",
        "engine/__init__": "from .trainer import Base\ntrainer_dict = {'base': Base}\n",
        "engine/trainer": "class Base:\n    def __init__(self, name, distiller, a, b, cfg): pass\n",
        "engine/cfg": "from yacs.config import CfgNode\n"
        "CFG = CfgNode({'SOLVER': {}, 'LOG': {'WANDB': True}, 'DATASET': {}, 'DISTILLER': {}, 'EXPERIMENT': {}})\n",
        "engine/utils": "def load_checkpoint(path): pass\n",
        "dataset/__init__": "def get_dataset(cfg): pass\n",
        "models/__init__": "cifar_model_dict = {}\nimagenet_model_dict = {}\n",
    } | change
    for name, text in files.items():
        path = root / "mdistiller" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def register_in(root, cwd):
    code = "import deepkd_plugin.mdistiller"
    return python("-c", code, cwd=cwd, MDISTILLER_ROOT=str(root))


def test_a_fork_that_keeps_the_structure(tmp_path):
    done = register_in(fork(tmp_path / "fork", {}), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"distillers/__init__": "methods = {}\n"},
            "this mdistiller has no mdistiller.distillers.distiller_dict",
        ),
        (
            {"dataset/__init__": "import nowhere\n"},
            "mdistiller needs the package nowhere, which is not installed",
        ),
        ({"models/__init__": "1 / 0\n"}, "cannot be imported (mdistiller.models: ZeroDivisionError"),
        (
            {"distillers/__init__": "class MLKD: pass\ndistiller_dict = {'MLKD': MLKD}\n"},
            "mdistiller already has 'MLKD': mdistiller.distillers.MLKD; the plugin would register "
            "deepkd_plugin.distillers.mlkd.MLKD",
        ),
    ],
)
def test_forks_with_other_names(tmp_path, change, expected):
    done = register_in(fork(tmp_path / "fork", change), tmp_path)
    assert expected in one_line(done)


def test_no_mdistiller_where_one_is_needed(tmp_path):
    done = register_in(tmp_path, tmp_path)
    assert f"environment: MDISTILLER_ROOT is '{tmp_path}'; it must name a checkout" in one_line(done)
    done = python("-m", "deepkd_plugin", "doctor", cwd=tmp_path, MDISTILLER_ROOT=str(tmp_path))
    assert "it must name a checkout of mdistiller" in one_line(done)
    if python("-c", "import mdistiller", cwd=tmp_path).returncode:
        done = python("-c", "import deepkd_plugin.mdistiller", cwd=tmp_path)
        assert "mdistiller is not here; MDISTILLER_ROOT must name its checkout" in one_line(done)


def test_a_folder_called_mdistiller_is_no_package(tmp_path):
    """The checkout seen from the folder above it: Python takes it for a namespace package."""
    (tmp_path / "mdistiller" / "tools").mkdir(parents=True)
    done = python("-m", "deepkd_plugin", "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
