"""DISTILLER.TEACHER_POOL streams: TOG, and a pair of streams with momenta of its own for each of several teachers."""

import json
from functools import partial

import pytest
import small
import test_several
import torch
from processes import in_two_processes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepkd_plugin import config, launch, mixture, speed
from deepkd_plugin.device import seed_everything
from deepkd_plugin.distillers import DISTILLERS, DeepKD
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts.registry import find_host
from deepkd_plugin.mixture import Teachers, mixed_logits
from deepkd_plugin.step import Step
from deepkd_plugin.streams import assign_losses
from deepkd_plugin.trainer import DecoupledAdamWTrainer, DecoupledMomentumTrainer

PAIRS = ("tog", "tcg", "ncg", "tcg_2", "ncg_2")
OTHER = {"TEACHER": "other", "DELTA": {"TCG": -0.3, "NCG": 0.02}}


def asking(prefix, *more, base="KD", mix="fixed", **keys):
    """The config of a run with teachers beside the first, each with streams of its own if there are any."""
    cfg = small.config(prefix, **keys)
    cfg.DISTILLER.TYPE = "DeepKD"
    cfg.DeepKD.BASE, cfg.DISTILLER.MORE_TEACHERS, cfg.DISTILLER.TEACHER_MIX = base, list(more), mix
    if more:
        cfg.DISTILLER.TEACHER_POOL = "streams"
    return cfg


def teacher(*seeds, shares=None, mix="fixed"):
    """Several networks, or the one of a single seed."""
    nets = [test_several.network(16 + seed).requires_grad_(False) for seed in seeds]
    return Teachers(nets, shares or [1.0] * len(nets), mix, 4.0) if shares or len(nets) > 1 else nets[0]


def stepped(cfg, taught, kind=Step, steps=3, views=1, **options):
    """The student's weights after some steps, and the optimizer."""
    seed_everything(0)
    student = test_several.network(8)
    distiller = DISTILLERS["DeepKD"](student, taught, cfg).train()
    optimizer = small.DecoupledMomentumTrainer.make_optimizer(student.parameters(), cfg)
    by_stream = partial(assign_losses, streams=optimizer.streams, assignment={})
    step = kind(distiller, optimizer, by_stream, cfg.SOLVER.AMP, torch.device("cpu"))
    for number, option in options.items():
        setattr(step, number, option)
    for number in range(steps):
        noise = torch.Generator().manual_seed(number)
        images = [torch.randn(10, 3, 2, 2, generator=noise) for _ in range(views)]
        target = torch.randint(5, (10,), generator=noise)
        outcome = step({"image": images if views > 1 else images[0], "target": target}, 1.0)
    return {name: part.detach().clone() for name, part in student.named_parameters()}, optimizer, outcome


def close(ours, theirs, tolerance=1e-6):
    return all(torch.allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance) for name in theirs)


@pytest.mark.parametrize(("base", "views"), [("KD", 1), ("DKD", 1), ("CRLD", 2), ("NKD", 1), ("RLD", 1), ("WTTM", 1)])
def test_one_teacher_is_plain_deepkd_and_two_equal_ones_are_it_to_rounding(base, views):
    plain, _, _ = stepped(asking("", base=base), teacher(1), views=views)
    cfg = asking("", base=base)
    cfg.DISTILLER.TEACHER_POOL = "streams"
    for mix in ("fixed", "target", "entropy"):
        one, optimizer, _ = stepped(cfg, teacher(1, shares=[3.0], mix=mix), views=views)
        assert optimizer.streams == PAIRS[:3]
        assert small.same(one, plain)
        two, optimizer, outcome = stepped(
            asking("", {"TEACHER": "same"}, base=base), teacher(1, 1, mix=mix), views=views
        )
        assert optimizer.streams == PAIRS
        assert outcome.losses.keys() == set(PAIRS)
        assert close(two, plain)
    # streams of equal momenta share a buffer and a backward pass
    assert {name for state in optimizer.state.values() for name in state} == {
        "momentum_buffer_tog",
        "momentum_buffer_tcg+tcg_2",
        "momentum_buffer_ncg+ncg_2",
    }


def test_each_teacher_has_losses_by_its_weight_and_momenta_of_its_own():
    cfg = asking("", OTHER)
    assert config.deltas(cfg) == {"tog": 0.05, "tcg": -0.05, "ncg": 0.0, "tcg_2": -0.3, "ncg_2": 0.02}
    assert config.momenta(cfg)[0] == pytest.approx({"tog": 0.95, "tcg": 0.85, "ncg": 0.9, "tcg_2": 0.6, "ncg_2": 0.92})
    _, optimizer, outcome = stepped(cfg, teacher(1, 2, shares=[3.0, 1.0]), steps=1)
    assert {name for state in optimizer.state.values() for name in state} == {f"momentum_buffer_{s}" for s in PAIRS}
    for number, share in enumerate((0.75, 0.25)):
        _, _, alone = stepped(asking(""), teacher(number + 1), steps=1)
        ending = f"_{number + 1}" if number else ""
        for stream in ("tcg", "ncg"):
            torch.testing.assert_close(outcome.losses[stream + ending], share * alone.losses[stream])
    torch.testing.assert_close(outcome.losses["tog"], alone.losses["tog"])


@pytest.mark.parametrize("mix", ["target", "entropy"])
def test_weights_are_each_samples(mix):
    taught, cfg = teacher(1, 2, mix=mix), asking("", OTHER, mix=mix)
    distiller = DeepKD(test_several.network(8), taught, cfg).train()
    image, target = torch.randn(6, 3, 2, 2), torch.arange(6) % 5
    _, losses = distiller(image=image, target=target, epoch=1)
    weights = taught.weights(taught(image)[0], target)
    assert weights.std(0).min() > 1e-3
    for number, network in enumerate(taught.networks):
        alone = DeepKD(distiller.student, network, asking("")).train()
        each = [alone(image=image[i : i + 1], target=target[i : i + 1], epoch=1)[1]["tcg"] for i in range(6)]
        expected = (weights[:, number].float() * torch.stack(each)).mean()
        torch.testing.assert_close(losses["tcg_2" if number else "tcg"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["probabilities", "streams"])
@pytest.mark.parametrize("amp", [False, "bfloat16"])
def test_a_compiled_step_is_the_eager_one(pool, amp, capsys):
    torch._dynamo.reset()
    cfg = asking("", OTHER if pool == "streams" else {"TEACHER": "other"}, AMP=amp)
    cfg.DISTILLER.TEACHER_POOL = pool
    eager, _, _ = stepped(cfg, teacher(1, 2))
    compiled, _, _ = stepped(cfg, teacher(1, 2), speed.CompiledStep)
    torch._dynamo.reset()
    assert "falls back" not in capsys.readouterr().out
    assert close(compiled, eager, 2e-3 if amp else 1e-5)


@pytest.mark.parametrize("pool", ["probabilities", "streams"])
def test_several_teachers_step_under_amp(pool):
    keys = {"AMP": "bfloat16"}
    more = {"TEACHER": "same"}
    plain, _, _ = stepped(asking("", **keys), teacher(1))
    whole, _, _ = stepped(asking(""), teacher(1))
    cfg = asking("", more, **keys)
    cfg.DISTILLER.TEACHER_POOL = pool
    two, _, _ = stepped(cfg, teacher(1, 1))
    assert close(two, plain, 1e-5)
    assert not close(plain, whole, 1e-5)  # it does round


class Asked(nn.Module):
    """Counts how often it is asked."""

    def __init__(self, network):
        super().__init__()
        self.network, self.count = network, 0

    def forward(self, image):
        self.count += 1
        return self.network(image)


@pytest.mark.parametrize("pool", ["probabilities", "logits", "streams"])
def test_a_step_asks_each_teacher_once_and_mixes_once(pool, monkeypatch):
    mixed = []
    monkeypatch.setattr(mixture, "mixed_logits", lambda *given: mixed.append(1) or mixed_logits(*given))
    nets = [Asked(test_several.network(16)) for _ in range(2)]
    cfg = asking("", {"TEACHER": "other"})
    cfg.DISTILLER.TEACHER_POOL = pool
    stepped(cfg, Teachers(nets, [1.0, 1.0], "fixed", 4.0), steps=1)
    assert [one.count for one in nets] == [1, 1]
    assert len(mixed) == (pool != "streams")


def make(prefix, mixed=False, pool="streams", **keys):
    """A trainer of test_several's images; mixed: AdamW."""
    made = test_several.make(prefix, **keys)
    cfg = made.cfg
    cfg.DISTILLER.TYPE = "DeepKD"
    cfg.DISTILLER.MORE_TEACHERS = [OTHER if pool == "streams" else {"TEACHER": "other"}]
    cfg.DISTILLER.TEACHER_POOL, cfg.DISTILLER.TEACHER_MIX = pool, "target"
    seed_everything(0)
    distiller = DeepKD(test_several.network(8), teacher(1, 2, mix="target"), cfg)
    kind = DecoupledAdamWTrainer if mixed else DecoupledMomentumTrainer
    again = kind("run", distiller, made.train_loader, made.val_loader, cfg)
    again.teacher_acc, again.module.teacher.tested = 50.0, [50.0, 50.0]
    return again


def test_a_run_names_the_streams_and_goes_on_with_their_buffers(tmp_path):
    whole = make(tmp_path / "whole")
    test_several.train(whole)
    cut = make(tmp_path / "cut")
    test_several.stop_after(cut, 2)
    test_several.train(cut)
    again = make(tmp_path / "cut")
    test_several.train(again, resume=True)
    assert small.same(small.weights(tmp_path / "cut/run"), small.weights(tmp_path / "whole/run"))
    for (_, ours), (_, theirs) in zip(again.optimizer.state.items(), whole.optimizer.state.items()):
        assert ours.keys() == {f"momentum_buffer_{stream}" for stream in PAIRS}
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    line = json.loads((tmp_path / "whole/run/metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"].keys() == line["momentum"].keys() == set(PAIRS)
    assert line["momentum"] == pytest.approx(config.momenta(whole.cfg)[0])
    changed = make(tmp_path / "cut")
    changed.cfg.DISTILLER.MORE_TEACHERS = [OTHER | {"DELTA": {"TCG": -0.2}}]
    with pytest.raises(UserError, match="DISTILLER.MORE_TEACHERS was .*-0.3"):
        changed.train(True, command=small.COMMAND)


@pytest.mark.parametrize("allocation", ["fixed", "gsnr"])
def test_gsnr_measures_and_allocates_every_stream(tmp_path, allocation):
    cfg = asking(tmp_path, OTHER)
    cfg.SOLVER.DECOUPLED.ALLOCATION, cfg.SOLVER.DECOUPLED.DELTA.NCG = allocation, 0.04
    cfg.GSNR.EVERY, cfg.GSNR.WINDOW, cfg.GSNR.MEASURE = 2, 3, True
    cfg.SOLVER.MOMENTUM = 0.6
    seed_everything(0)
    distiller = DeepKD(test_several.network(8), teacher(1, 2), cfg)
    images = TensorDataset(torch.randn(48, 3, 2, 2), torch.arange(48) % 5, torch.arange(48))
    tested = TensorDataset(*images.tensors[:2])
    made = DecoupledMomentumTrainer("run", distiller, DataLoader(images, 16), DataLoader(tested, 16), cfg)
    made.teacher_acc, distiller.teacher.tested = 50.0, [50.0, 50.0]
    made.train(False, command=small.COMMAND)
    windows = [json.loads(line) for line in (tmp_path / "run/gsnr.jsonl").read_text().splitlines()]
    assert len(windows) == 2
    for window in windows:
        assert window["gsnr"].keys() == window["momentum"].keys() == set(PAIRS)
        assert "tcg_2-ncg_2" in window["angle"] or len(window["angle"]) == 10
    if allocation == "gsnr":
        bounds = config.deltas(cfg)
        moved = {stream: value - 0.6 for stream, value in windows[-1]["momentum"].items()}
        assert any(abs(value) > 1e-6 for value in moved.values())
        assert all(abs(value) <= abs(bounds[stream]) + 1e-9 for stream, value in moved.items())


def in_several(rank, folder):
    for name, (keys, _) in RUNS.items():
        test_several.train(make(f"{folder}/{name}", **keys))
    return {}


RUNS = {
    "streams": ({}, {}),
    "accumulated": ({"ACCUMULATE": 3}, {}),
    "mixture": ({"pool": "probabilities"}, {"pool": "probabilities"}),
    "bfloat16": ({"AMP": "bfloat16"}, {"AMP": "bfloat16"}),
    "adamw": ({"mixed": True}, {"mixed": True}),
}
"""What runs in two processes, and what it is compared with in one."""


@pytest.mark.slow
def test_runs_in_two_processes_are_those_of_one(tmp_path):
    in_two_processes(in_several, tmp_path, str(tmp_path), one_run=True)
    for name, (_, keys) in RUNS.items():
        test_several.train(make(tmp_path / "one" / name, **keys))
        tolerance = {"bfloat16": 3e-3, "adamw": 1e-4}.get(name, 1e-6)
        test_several.check_same(tmp_path / name / "run", tmp_path / "one" / name / "run", tolerance)


def read(method, *options):
    file = method if "/" in method else f"configs/glyphs100/res20_res8/{method}.yaml"
    return launch.read_config(find_host(), file, options)[0]


KEY, POOL = "DISTILLER.MORE_TEACHERS", ("DISTILLER.TEACHER_POOL", "streams")


def again(**section):
    return str([{"TEACHER": "resnet20", "TEACHER_WEIGHTS": "builtin:glyphs100_resnet20"} | section])


@pytest.mark.parametrize(
    ("method", "options", "line"),
    [
        ("deepkd", POOL, "TEACHER_POOL is 'streams'; it must be 'probabilities' with one teacher"),
        ("kd", (KEY, again(), *POOL), "it must be 'probabilities' or 'logits' with DISTILLER.TYPE KD; DeepKD has"),
        ("deepkd", (KEY, again(), *POOL, "DeepKD.BASE", "MLKD"), "it must be 'logits' with DeepKD.BASE MLKD, which"),
        ("deepkd", (KEY, again(), *POOL, "DeepKD.FEATURE", "AT"), "MORE_TEACHERS is "),
        ("deepkd", (KEY, again(DELTA={"TCG": 0.01})), "it must be without DELTA unless DISTILLER.TEACHER_POOL"),
        ("deepkd", (KEY, again(DELTA={"TCG": 0.2}), *POOL), "MORE_TEACHERS, entry 1: command line: DELTA.TCG is 0.2; "
         "it must be in [-0.9, 0.1)"),
        ("deepkd", (KEY, again(DELTA={"TOG": 0.01}), *POOL), "DELTA numbers in (-1, 1) for TCG and NCG"),
        ("deepkd", (KEY, again(DELTA={"TCG": "x"}), *POOL), "DELTA numbers in (-1, 1) for TCG and NCG"),
        ("deepkd", (KEY, again(DELTA=0.1), *POOL), "DELTA numbers in (-1, 1) for TCG and NCG"),
    ],
)  # fmt: skip
def test_what_cannot_have_streams_of_each_teacher_is_refused_in_a_line(method, options, line):
    with pytest.raises(UserError) as caught:
        read(method, *options)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
