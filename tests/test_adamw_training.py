"""Runs of the trainer DecoupledAdamW: what its optimizer is made of, resuming, momenta by GSNR, float16."""

import json

import pytest
import small
import torch
from torch import nn

from deepkd_plugin import solver
from deepkd_plugin.data.augment import Mixing
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import registry
from deepkd_plugin.hosts.networks import student_network
from deepkd_plugin.launch import read_config, run
from deepkd_plugin.run.resume import check_optimizer
from deepkd_plugin.trainer import DecoupledAdamWTrainer


def make(folder, monkeypatch, stop=None, **keys):
    """A small run of four epochs on mixed images; it ends as a killed one does after epoch `stop`."""
    monkeypatch.setattr(small, "DecoupledMomentumTrainer", DecoupledAdamWTrainer)
    cfg = small.config(folder, LR=0.01, **keys)
    cfg.GSNR.EVERY, cfg.GSNR.WINDOW = 1, 3
    cfg.AUGMENT.MIXUP = 0.8
    made = small.make(cfg)
    made.mixing = Mixing(cfg.AUGMENT, 0.1, 5, 0)
    train_epoch = made.train_epoch

    def stopping(epoch):
        if stop is not None and epoch > stop:
            raise InterruptedError
        return train_epoch(epoch)

    made.train_epoch = stopping
    return made


@pytest.mark.parametrize("keys", [{}, {"AMP": "float16"}, {"ACCUMULATE": 2}])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch, keys):
    run(make(tmp_path / "whole", monkeypatch, **keys), False, False, small.COMMAND)
    with pytest.raises(InterruptedError):
        run(make(tmp_path / "parts", monkeypatch, stop=2, **keys), False, False, small.COMMAND)
    run(make(tmp_path / "parts", monkeypatch, **keys), True, False, small.COMMAND)
    assert small.same(*(small.weights(tmp_path / name / "run") for name in ("whole", "parts")))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("step", lambda value: value - 100, "a number of steps that is none"),
        ("step", lambda value: value.expand(2), "a number of steps that is none"),
        ("step", lambda value: value * float("nan"), "a number of steps that is none"),
        ("exp_avg_sq", lambda value: value - 1, "means of squares below 0"),
        ("exp_avg_sq", lambda value: value * float("inf"), "one that is not finite"),
    ],
)
def test_a_state_that_the_next_step_would_stumble_over_is_refused(tmp_path, monkeypatch, name, change, message):
    made = make(tmp_path, monkeypatch)
    made.step(made.samples(8), 1)
    check_optimizer(tmp_path, made.optimizer, made.optimizer.param_groups)
    state = made.optimizer.state[made.module.student.head.weight]
    state[name] = change(state[name])
    with pytest.raises(UserError, match=message):
        check_optimizer(tmp_path, made.optimizer, made.optimizer.param_groups)


def test_momenta_follow_the_gsnr(tmp_path, monkeypatch):
    made = make(tmp_path, monkeypatch)
    made.cfg.SOLVER.DECOUPLED.ALLOCATION = "gsnr"
    again = DecoupledAdamWTrainer("run", made.distiller, made.train_loader, made.val_loader, made.cfg)
    again.teacher_acc, again.mixing = 50.0, made.mixing
    run(again, False, False, small.COMMAND)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len({json.dumps(line["momentum"]) for line in lines}) > 1


@pytest.mark.parametrize(("decay", "spared"), [("weights", {"0.bias", "1.weight", "1.bias", "token"}), ("all", set())])
def test_what_decays(tmp_path, decay, spared):
    class Student(nn.Sequential):
        def no_weight_decay(self):
            return {"token"}

    student = Student(nn.Linear(2, 2), nn.LayerNorm(2))
    student.token = nn.Parameter(torch.zeros(1, 1, 2))
    cfg = small.config(tmp_path, WEIGHT_DECAY=0.05)
    cfg.SOLVER.ADAMW.DECAY, cfg.SOLVER.ADAMW.BETA2, cfg.SOLVER.ADAMW.EPS = decay, 0.95, 1e-6
    opt = solver.decoupled_adamw(student, student.parameters(), cfg)
    names = {p: name for name, p in student.named_parameters()}
    still = {names[p] for group in opt.param_groups if not group["weight_decay"] for p in group["params"]}
    assert still == spared
    assert sum(len(group["params"]) for group in opt.param_groups) == 5
    for group in opt.param_groups:
        assert (group["beta2"], group["eps"], group["weight_decay"] in (0.0, 0.05)) == (0.95, 1e-6, True)
        assert group["momentum"] == pytest.approx({"tog": 0.95, "tcg": 0.85, "ncg": 0.9})


def student(tmp_path, name, drop):
    file = tmp_path / "some.yaml"
    file.write_text(
        f"DATASET: {{TYPE: cifar100}}\nDISTILLER: {{TYPE: NONE, STUDENT: '{name}', STUDENT_DROP_PATH: {drop}}}\n"
    )
    return student_network(registry.BUILTIN, read_config(registry.BUILTIN, file, [])[0], 100)


def test_stochastic_depth_of_a_student(tmp_path):
    pytest.importorskip("timm")
    made = student(tmp_path, "timm:resnet10t", 0.2)
    assert max(getattr(module, "drop_prob", None) or 0.0 for module in made.modules()) == pytest.approx(0.2)
    with pytest.raises(UserError, match="DROP_PATH is 0.2; it must be 0.0 with resnet20, which is not of timm"):
        student(tmp_path, "resnet20", 0.2)
    with pytest.raises(UserError, match="the network timm:vgg11 cannot be made"):
        student(tmp_path, "timm:vgg11", 0.2)
