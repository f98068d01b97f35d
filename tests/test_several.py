"""One run in several processes, and in micro-batches: what it writes is what one process writes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from processes import as_process, in_two_processes
from torch import nn
from torch.utils.data import DataLoader, Dataset

from deepkd_plugin import choice, config, launch, trainer
from deepkd_plugin.data.arrays import Passes, Shares
from deepkd_plugin.data.augment import Mixing
from deepkd_plugin.device import seed_everything
from deepkd_plugin.distillers import KD, MLKD, DeepKD, Distiller
from deepkd_plugin.distributed import collectives, process_group
from deepkd_plugin.divided import DividedStep
from deepkd_plugin.errors import UserError
from deepkd_plugin.teacher_logits import tables
from deepkd_plugin.teacher_logits.table import Table
from deepkd_plugin.trainer import DecoupledAdamWTrainer, DecoupledMomentumTrainer

ROOT = Path(__file__).parents[1]


class Images(Dataset):
    """53 images; a training sample is asked for by (epoch, place), and depends on both."""

    def __init__(self, training):
        self.training = training
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(53, 3, 2, 2, generator=generator)
        self.labels = (self.images.flatten(1) @ torch.randn(12, 5, generator=generator)).argmax(1)

    def __len__(self):
        return 53

    def __getitem__(self, key):
        epoch, place = key if isinstance(key, tuple) else (0, key)
        image = self.images[place] + 0.1 * epoch
        return (image, self.labels[place], place) if self.training else (self.images[place], self.labels[place])


def network(width, norm=None):
    torch.manual_seed(width)
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, width), norm(width) if norm else nn.Tanh(), nn.Tanh())
    net = small.Net(width)
    net.body = body
    return net


def make(prefix, norm=None, mixed=False, **keys):
    """mixed: whole batches alone, mixed in pairs, and AdamW."""
    cfg = small.config(prefix, **keys)
    seed_everything(0)
    distiller = DeepKD(network(8, norm), network(16).requires_grad_(False), cfg)
    order = Passes(np.arange(48 if mixed else 53), cfg.SOLVER.SEED)
    loading = {"batch_size": 16, "sampler": order}
    if process_group.size() > 1:
        loading = {"batch_sampler": Shares(order, 16, config.chunk(cfg))}
    tested = range(process_group.rank(), 53, process_group.size())
    loaders = DataLoader(Images(True), **loading), DataLoader(Images(False), 16, sampler=tested)
    cfg.SOLVER.ADAMW.EPS = 1e-3  # so that a step does not depend on the rounding of gradients next to 0
    made = (DecoupledAdamWTrainer if mixed else DecoupledMomentumTrainer)("run", distiller, *loaders, cfg)
    made.teacher_acc = 50.0
    if mixed:
        cfg.AUGMENT.MIXUP, cfg.AUGMENT.CUTMIX = 0.8, 1.0
        made.mixing = Mixing(cfg.AUGMENT, 0.1, 5, cfg.SOLVER.SEED)
    return made


RUNS = {
    "plain": {},
    "accumulated": {"ACCUMULATE": 3},
    "gsnr": {},
    "mixed": {"mixed": True, "ACCUMULATE": 2},
    "float16": {"AMP": "float16"},
}


def adapt(name, made):
    """Let a run of RUNS sample its gradients."""
    if name == "gsnr":
        made.cfg.GSNR.EVERY, made.cfg.GSNR.WINDOW, made.cfg.GSNR.MEASURE = 2, 3, True
        made.monitor = made.step.monitor = trainer.solver.make_monitor(made.module, made.optimizer, made.cfg, 4)
    return made


def stop_after(made, epoch):
    """Let a run end as a killed one does, after so many epochs."""
    train_epoch = made.train_epoch

    def stopping(number):
        if number > epoch:
            raise InterruptedError
        return train_epoch(number)

    made.train_epoch = stopping


class Sum(torch.autograd.Function):
    """The sum over all processes, and of its gradient."""

    @staticmethod
    def forward(ctx, values):
        return collectives._reduced(values.clone())

    @staticmethod
    def backward(ctx, gradient):
        return collectives._reduced(gradient.clone())


class Synchronised(nn.BatchNorm1d):
    """What SyncBatchNorm does, which needs a GPU."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        ones = torch.ones(1, x.shape[1])
        total, squares, count = Sum.apply(torch.cat([x.sum(0), x.square().sum(0), len(x) * ones[0]])).chunk(3)
        mean = total / count
        variance = squares / count - mean.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


def synchronised(network):
    network.body[2].__class__ = Synchronised
    return network


def train(made, resume=False):
    try:
        return made.train(resume, command=small.COMMAND)
    except InterruptedError:
        return None


def in_several(rank, folder):
    results = {}
    for name, keys in RUNS.items():
        results[name] = train(adapt(name, make(f"{folder}/{name}", **keys)))
    # half of a run here, the other half in one process; and the other way round
    made = make(f"{folder}/first")
    stop_after(made, 2)
    train(made)
    train(make(f"{folder}/second"), resume=True)
    # inside an epoch: after its second step of four
    trainer.READ_EVERY = 1
    made = make(f"{folder}/within", CHECKPOINT_MINUTES=1e-9)
    stop_within(made, 3, 2)
    train(made)
    trainer.READ_EVERY = 20
    made = make(f"{folder}/batchnorm", norm=nn.BatchNorm1d)
    train(made)
    made.test()
    results["buffers"] = made.module.student.body[2].running_mean
    collectives.synchronised = synchronised
    train(make(f"{folder}/synchronised", norm=nn.BatchNorm1d, SYNC_BATCHNORM=True))
    results["overflow"] = overflow(rank, make(f"{folder}/overflow", AMP="float16"))
    results["auto"] = [choice._agreed(choice.Choice(rank == one, "measured")).value for one in range(2)]
    failures = []
    for keys in ({"LR": 1e30}, {"BATCH_SIZE": 16}):
        try:
            made = make(f"{folder}/failing {len(failures)}", **keys)
            if "BATCH_SIZE" in keys:
                made.teacher = f"{rank:016x}0"
            train(made)
        except UserError as error:
            failures.append(str(error))
    return results | {"failures": failures}


def overflow(rank, made):
    """Take a step in which a gradient of one stream overflows in one process; returns what moved, and the scales."""
    parts = made.prepare(next(made.batches(1, 1, None)), 1, 1)
    made.count(parts, 1)
    made.step.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    before = [p.clone() for p in made.module.student.parameters()]
    seen = []
    parameter = made.module.student.head.bias
    hook = parameter.register_hook(lambda g: seen.append(1) or (g / 0 if rank and len(seen) == 1 else g))
    made.step(parts, 1)
    hook.remove()
    moved = sum(not torch.equal(p, was) for p, was in zip(made.module.student.parameters(), before))
    return {"moved": moved, "states": len(made.optimizer.state), "scale": made.step.scaler.get_scale()}


def stop_within(made, epoch, step):
    """Let a run end as a killed one does, when it has saved itself after a step inside an epoch."""
    save_within = made.save_within

    def stopping(saved, within):
        save_within(saved, within)
        if (made.epoch + 1, saved) == (epoch, step):
            raise InterruptedError

    made.save_within = stopping


def records(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    timed = ("images_per_second", "seconds", "data_seconds", "execution")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def check_same(ours, theirs, tolerance=1e-6):
    mine, other = small.weights(ours), small.weights(theirs)
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=tolerance, atol=tolerance)
    for line, expected in zip(records(ours), records(theirs), strict=True):
        assert line.keys() == expected.keys()
        assert line["test_acc"] == expected["test_acc"]
        assert line["train_acc"] == pytest.approx(expected["train_acc"])
        assert line["loss"] == pytest.approx(expected["loss"], rel=max(1e-4, tolerance))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The runs of two processes, and the same in one."""
    folder = tmp_path_factory.mktemp("several")
    torch.set_num_threads(1)
    one = folder / "one"
    for name in RUNS:
        keys = {key: value for key, value in RUNS[name].items() if key in ("AMP", "mixed")}
        train(adapt(name, make(one / name, **keys)))
    train(make(one / "synchronised", norm=nn.BatchNorm1d, SYNC_BATCHNORM=True))
    made = make(folder / "second")
    stop_after(made, 2)
    train(made)
    results = in_two_processes(in_several, folder, str(folder), one_run=True)
    return folder, results


@pytest.mark.parametrize("name", ["plain", "accumulated", "gsnr", "mixed"])
def test_a_run_in_two_processes_is_that_of_one(several, name):
    folder, results = several
    check_same(folder / name / "run", folder / "one" / name / "run")
    assert results[0][name] == results[1][name] == json.loads((folder / name / "run/run.json").read_text())["result"]


def test_gradient_samples_are_of_the_whole_batch(several):
    folder, _ = several
    windows = [
        [json.loads(line) for line in (path / "gsnr/run/gsnr.jsonl").read_text().splitlines()]
        for path in (folder, folder / "one")
    ]
    assert len(windows[0]) == len(windows[1]) == 2
    for ours, expected in zip(*windows):
        for stream, summary in expected["gsnr"].items():
            assert ours["gsnr"][stream] == pytest.approx(summary, rel=1e-3)


def test_float16_takes_one_decision_in_all_processes(several):
    folder, results = several
    assert results[0]["float16"] == results[1]["float16"]
    check_same(folder / "float16/run", folder / "one/float16/run", tolerance=2e-2)
    # what overflows in one stream of one process moves nothing anywhere
    for result in results:
        assert result["overflow"] == {"moved": 0, "states": 0, "scale": 8.0}


def test_synchronised_batchnorm_is_that_of_the_whole_batch(several):
    folder, _ = several
    check_same(folder / "synchronised/run", folder / "one/synchronised/run")


def test_a_run_goes_on_in_another_number_of_processes(several, capsys):
    folder, _ = several
    train(make(folder / "first"), resume=True)
    # other tests of this process may have registered code of their own, which is named before the processes
    assert re.search(r"goes on with another (code, )?processes:", capsys.readouterr().out)
    for name in ("first", "second"):
        check_same(folder / name / "run", folder / "one/plain/run")
    run = json.loads((folder / "first/run/run.json").read_text())
    assert run["processes"] == 2
    assert "processes" not in run["resumed"][0]


def test_a_run_saved_inside_an_epoch_goes_on_in_another_number_of_processes(several):
    folder, _ = several
    train(make(folder / "within"), resume=True)
    check_same(folder / "within/run", folder / "one/plain/run")


def test_the_first_process_has_the_buffers_of_all(several):
    folder, results = several
    saved = small.weights(folder / "batchnorm/run")["body.2.running_mean"]
    for result in results:
        torch.testing.assert_close(result["buffers"], saved, rtol=0, atol=0)


def test_processes_agree_on_what_the_first_measured(several):
    _, results = several
    assert [result["auto"] for result in results] == [[True, False]] * 2


def test_all_processes_stop_at_a_mistake(several):
    _, results = several
    for result in results:
        assert len(result["failures"]) == 2
        assert "became" in result["failures"][0]
        assert "the 2 processes differ in teacher" in result["failures"][1]


def test_a_run_in_float16_skips_what_overflows_and_goes_on_bitwise(tmp_path):
    """The scale of the first steps is too large on purpose; it is part of a checkpoint."""

    def made(folder):
        one = adapt("gsnr", make(tmp_path / folder, AMP="float16"))
        one.step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        return one

    whole = made("whole")
    first = [p.clone() for p in whole.module.student.parameters()]
    parts = whole.prepare(next(whole.batches(1, 1, None)), 1, 1)
    outcome = whole.step(parts, 1)
    assert all(loss.isfinite() for loss in outcome.losses.values())
    assert all(torch.equal(p, was) for p, was in zip(whole.module.student.parameters(), first))
    assert not whole.optimizer.state
    assert whole.step.scaler.get_scale() == 2.0**39
    train(made("whole"))
    cut = made("cut")
    stop_after(cut, 2)
    train(cut)
    train(made("cut"), resume=True)
    assert small.same(small.weights(tmp_path / "cut/run"), small.weights(tmp_path / "whole/run"))
    scale = small.checkpoint.load(tmp_path / "cut/run/latest", "test")["scaler"]["scale"]
    assert 1 < scale < 2.0**39


class TestWithinAnEpoch:
    @pytest.fixture(autouse=True)
    def often(self, monkeypatch):
        monkeypatch.setattr(trainer, "READ_EVERY", 1)

    @pytest.mark.parametrize(("epoch", "step"), [(1, 1), (1, 3), (3, 2)])
    def test_a_run_that_goes_on_is_bitwise_the_uninterrupted_one(self, tmp_path, epoch, step):
        train(adapt("gsnr", make(tmp_path / "whole", norm=nn.BatchNorm1d)))
        made = adapt("gsnr", make(tmp_path / "cut", norm=nn.BatchNorm1d, CHECKPOINT_MINUTES=1e-9))
        stop_within(made, epoch, step)
        train(made)
        assert made.resume_point().endswith(f"(epoch {epoch - 1} and {step} steps).")
        train(adapt("gsnr", make(tmp_path / "cut", norm=nn.BatchNorm1d)), resume=True)
        assert small.same(small.weights(tmp_path / "cut/run"), small.weights(tmp_path / "whole/run"))
        assert records(tmp_path / "cut/run") == records(tmp_path / "whole/run")
        gsnr = [(tmp_path / part / "run/gsnr.jsonl").read_text() for part in ("cut", "whole")]
        assert gsnr[0] == gsnr[1]

    def test_a_loader_of_somebody_else_goes_on_too(self, tmp_path):
        small.train(small.config(tmp_path / "whole"))
        made = small.make(small.config(tmp_path / "cut", CHECKPOINT_MINUTES=1e-9))
        stop_within(made, 2, 3)
        train(made)
        small.train(small.config(tmp_path / "cut"), resume=True)
        assert small.same(small.weights(tmp_path / "cut/run"), small.weights(tmp_path / "whole/run"))

    def test_a_state_that_is_not_whole_is_refused(self, tmp_path):
        made = small.make(small.config(tmp_path, CHECKPOINT_MINUTES=1e-9))
        stop_within(made, 1, 3)
        train(made)
        latest = tmp_path / "run/latest"
        state = small.checkpoint.load(latest, "test")
        del state["outline"]
        state["within"]["step"] = 4
        small.checkpoint.save(state, latest)
        with pytest.raises(UserError, match="its entry 'within' is not of an epoch of this run"):
            small.make(small.config(tmp_path)).train(resume=True)

    def test_without_the_key_there_is_none(self, tmp_path, monkeypatch):
        monkeypatch.setattr(DecoupledMomentumTrainer, "save_within", None)
        small.train(small.config(tmp_path))


def with_a_table(rank, file, options):
    folder = launch.train(file, options, False, False, small.COMMAND)
    return {"share": [line["teacher_computed"] for line in records(folder)]} if rank == 0 else {}


@pytest.mark.slow
def test_processes_share_a_table_of_teacher_logits(tmp_path, data_root):
    file = ROOT / "configs/glyphs100/res20_res8/deepkd.yaml"
    options = ["DATASET.ROOT", str(data_root), "DATASET.TRAIN_PER_CLASS", "2", "DATASET.HOLDOUT", "0.02"]
    options += ["SOLVER.EPOCHS", "2", "LOG.PREFIX", str(tmp_path), "DATASET.NUM_WORKERS", "0", "EXPERIMENT.NAME", "run"]
    options += ["DISTILLER.TEACHER_LOGITS", "table", "DISTILLER.LOGITS_DIR", str(tmp_path / "logits")]
    first, _ = in_two_processes(with_a_table, tmp_path, str(file), options, one_run=True)
    assert first["share"][0] == 1.0
    (path,) = tables.files(tmp_path / "logits")
    table = Table.open(path)
    *_, count = table.counts()
    assert count.damaged == 0
    # 200 images in two epochs, whose views may be the same by chance
    assert 300 < count.there <= 400


@pytest.mark.parametrize(
    ("keys", "size", "message"),
    [
        ({"BATCH_SIZE": 3}, 4, "SOLVER.BATCH_SIZE is 3; it must be at least 4, an image for each process"),
        ({"BATCH_SIZE": 8, "ACCUMULATE": 3}, 4, "SOLVER.ACCUMULATE is 3; it must be at most 2, so that a micro-batch"),
        ({"BATCH_SIZE": 8, "ACCUMULATE": 9}, 1, "SOLVER.ACCUMULATE is 9; it must be at most 8"),
        ({"DATA_PARALLEL": True}, 2, "SOLVER.DATA_PARALLEL is True; it must be False with 2 processes"),
        ({"DATA_PARALLEL": True, "ACCUMULATE": 2}, 1, "it must be False with SOLVER.ACCUMULATE 2"),
        ({"SYNC_BATCHNORM": True}, 2, "SOLVER.SYNC_BATCHNORM is True; it must be False on a CPU"),
        ({"AMP": "float8"}, 1, "SOLVER.AMP is 'float8'; it must be True, False or float16"),
    ],
)
def test_what_cannot_be_divided_is_refused(monkeypatch, tmp_path, keys, size, message):
    as_process(monkeypatch, 0, size)
    with pytest.raises(UserError, match=re.escape(message)):
        config.check(small.config(tmp_path, **keys), {})


def test_a_method_that_reads_more_than_logits_and_a_foreign_loader_are_refused(monkeypatch, tmp_path):
    class Features(DeepKD):
        """A method of somebody's, with a step of its own."""

        def forward_train(self, image, target, epoch, **batch):
            return super().forward_train(image, target, epoch, **batch)

    assert (DeepKD.losses_of, Features.losses_of) == ("samples", "")
    cfg = small.config(tmp_path, ACCUMULATE=2)
    made = make(tmp_path, ACCUMULATE=2)
    method = Features(network(8), network(16), cfg)
    with pytest.raises(UserError, match=r"with SOLVER.ACCUMULATE 2 it must be one that declares `losses_of`"):
        DecoupledMomentumTrainer("run", method, made.train_loader, made.val_loader, cfg)
    as_process(monkeypatch, 0, 2)
    with pytest.raises(UserError, match="in 2 processes it must be one that declares"):
        DecoupledMomentumTrainer("run", method, made.train_loader, made.val_loader, cfg)
    with pytest.raises(UserError, match="is not one that get_dataset made; in 2 processes it must be"):
        small.make(small.config(tmp_path))


def test_what_a_class_says_of_its_losses_is_not_said_of_another_s():
    class Terms(KD):
        """Terms of somebody's, which may compare samples."""

        @classmethod
        def terms(cls, views, cfg, temperature=None):
            return super().terms(views, cfg, temperature)

    class Own(Terms):
        """A class that says it."""

        losses_of = "samples"

        @classmethod
        def task(cls, views, cfg):
            return {}

    assert [cls.losses_of for cls in (KD, Terms, Own, MLKD, Distiller)] == ["samples", "batch", "samples", "batch", ""]
    cfg = small.config("")
    for base, losses_of in (("KD", "samples"), ("CRLD", "samples"), ("MLKD", "batch")):
        cfg.DeepKD.BASE = base
        assert DeepKD(network(2), network(2), cfg).losses_of == losses_of


@pytest.mark.parametrize(("execution", "name"), [("graphs", "eager"), ("compile", "compile")])
def test_ways_to_run_a_divided_step(tmp_path, capsys, execution, name):
    made = make(tmp_path, ACCUMULATE=2, EXECUTION=execution)
    assert made.step.name == name
    assert isinstance(made.step, DividedStep)
    assert ("falls back to eager" in capsys.readouterr().out) == (execution == "graphs")


def test_a_part_of_one_image_is_told_of_if_there_is_batchnorm(tmp_path):
    with pytest.raises(UserError, match="SOLVER.BATCH_SIZE: of a batch .* one image, which BatchNorm"):
        train(make(tmp_path, norm=nn.BatchNorm1d, ACCUMULATE=16))
