import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from yacs.config import CfgNode

import deepkd_plugin
from deepkd_plugin.distillers import DeepKD
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import registry
from deepkd_plugin.trainer import DecoupledMomentumTrainer


def fresh(**change):
    """A host with registries of its own, so that a test leaves the built-in one as it is."""
    empty = {"distillers": {}, "trainers": {}, "cfg": CfgNode({"SOLVER": {"LR": 0.1}})}
    return replace(registry.BUILTIN, name="fork", **(empty | change))


def test_register_adds_in_place_and_reports():
    host = fresh()
    added = registry.register(host)
    assert host.distillers["DeepKD"] is DeepKD
    assert host.trainers["DecoupledMomentumSGD"] is DecoupledMomentumTrainer
    assert "TEMPERATURE" in host.cfg.DeepKD
    assert {"DeepKD", "DecoupledMomentumSGD", "SOLVER.DECOUPLED.DELTA.TOG"} <= set(added)
    assert registry.register(host) == []


def test_a_foreign_entry_is_kept_and_named():
    class Other:
        pass

    host = fresh(trainers={"DecoupledMomentumSGD": Other})
    with pytest.raises(UserError, match=r"fork already has 'DecoupledMomentumSGD': .*Other; the plugin"):
        registry.register(host)
    assert host.distillers == {}
    assert host.trainers == {"DecoupledMomentumSGD": Other}
    assert "DeepKD" not in host.cfg


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"MLKD": 3}, "fork: its config has the value 3 where the plugin has the section MLKD"),
        ({"CRLD": {"TEMPERATURE": "four"}}, "fork: its config key CRLD.TEMPERATURE is 'four'; the plugin's"),
    ],
)
def test_a_foreign_config_key_is_kept_and_named(tree, expected):
    host = fresh(cfg=CfgNode(tree))
    with pytest.raises(UserError, match=expected):
        registry.register(host)
    assert host.distillers == {}
    assert host.cfg == CfgNode(tree)


def test_the_builtin_host_is_complete():
    host = registry.BUILTIN
    registry.register(host)
    methods = {"KD", "DKD", "CRLD", "MLKD", "NKD", "RLD", "WTTM", "DIST"}
    assert {"NONE", "DeepKD", *methods} == set(host.distillers)
    assert {"base", "DecoupledMomentumSGD", "DecoupledAdamW"} == set(host.trainers)
    assert "ResNet18" in host.models("imagenet")
    assert "resnet20" in host.models("cifar100")
    assert "resnet20" in host.models("glyphs100")


def test_the_names_others_rely_on():
    for name in ("register", "DecoupledMomentumSGD", "DecoupledAdamW", "TopKSchedule", "decoupled_kd"):
        assert hasattr(deepkd_plugin, name)


def test_the_parts_import_nothing_above_them():
    """The losses, the mask, the optimizer and the GSNR come without the rest: using them costs torch alone."""
    code = (
        "import sys, deepkd_plugin\n"
        "print(sorted(m for m in sys.modules if m.startswith('deepkd_plugin.')))\n"
        "print([m for m in ('torchvision', 'tensorboardX', 'yacs', 'matplotlib') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ground = ("device", "distributed", "errors", "terminal")  # what several processes need
    parts = ("gsnr", "ledger", "losses", "optim", "streams", "tokens", "topk", "updates")
    parts += tuple(f"distributed.{part}" for part in ("buckets", "collectives", "environment", "process_group"))
    parts += tuple(f"optim.{part}" for part in ("adamw", "base", "sgd", "state"))
    parts = [f"deepkd_plugin.{part}" for part in sorted((*ground, *parts))]
    assert done.stdout.splitlines() == [str(parts), "[]"]


def test_only_one_module_knows_about_devices():
    package = Path(registry.__file__).parent
    for file in package.rglob("*.py"):
        if file.name != "device.py":
            assert not re.search(r"torch\.(cuda|device\(|backends)|\.cuda\(", file.read_text()), file
