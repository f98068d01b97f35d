"""DecoupledMomentumSGD inside other people's loops, beyond the examples: clipping, accumulation, logging, scaling."""

import ast
import csv
import math

import pytest
import torch
from test_examples import EXAMPLES, assert_same, bare, importable, load  # noqa: F401
from torch import nn

from deepkd_plugin import DecoupledMomentumSGD
from deepkd_plugin import backward as backward_of_wrapper

pytestmark = pytest.mark.slow

MOMENTA = {"tog": 0.9, "tcg": 0.5, "ncg": 0.7}
MAX_NORM = 0.05  # below the norm of every step of the examples


# ---------------------------------------------------------------- Lightning


def lightning_training(**methods):
    """The example with some of its module's methods replaced, and networks in float64."""
    example, shared = load("lightning_module"), load("shared")
    student, teacher = shared.networks(torch.float64)
    example.Distillation = type("Changed", (example.Distillation,), methods)
    return example, shared, student, teacher


def clipped_step(self, batch, index):
    inputs, labels = batch
    opt = self.optimizers()
    opt.zero_grad()
    opt.backward(load("shared").losses(self.student(inputs), self.teacher(inputs), labels, self.current_epoch))
    self.clip_gradients(opt, gradient_clip_val=MAX_NORM, gradient_clip_algorithm="norm")
    opt.step()


def test_lightning_clips_the_streams():
    example, shared, student, teacher = lightning_training(training_step=clipped_step)
    example.train(student, teacher, shared.batches(shared.data(torch.float64)))
    assert_same(student.state_dict(), bare(max_norm=MAX_NORM))


class Seen:
    """What Lightning's metrics held at the end."""

    def on_train_end(self, trainer, module):
        self.metrics = dict(trainer.callback_metrics)


def logging_run(folder, logger):
    """A run with LearningRateMonitor; returns the momenta and what callbacks saw."""
    example, shared, student, teacher = lightning_training(configure_optimizers=with_scheduler)
    callbacks = example.lightning.pytorch.callbacks
    seen = type("See", (Seen, callbacks.Callback), {})()
    monitor = callbacks.LearningRateMonitor("step", log_momentum=True)
    made = getattr(example.lightning.pytorch.loggers, logger)(folder)
    options = {"logger": made, "callbacks": [monitor, seen], "log_every_n_steps": 1, "default_root_dir": folder}
    example.train(student, teacher, shared.batches(shared.data(torch.float64)), **options)
    return shared.MOMENTA, seen.metrics


def with_scheduler(self):
    opt = load("shared").optimizer(self.student)
    return [opt], [torch.optim.lr_scheduler.ConstantLR(opt, 1.0)]


NAME = "lr-DecoupledMomentumSGD"


def test_lightning_monitor_with_a_csv_file(tmp_path):
    """Callbacks see the largest momentum; the file has all of them by stream, as text."""
    momenta, metrics = logging_run(tmp_path, "CSVLogger")
    assert metrics[f"{NAME}-momentum"].item() == pytest.approx(max(momenta.values()))
    (file,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    assert len(rows) > 10
    for row in rows:
        assert float(row[NAME]) == 0.05
        assert ast.literal_eval(row[f"{NAME}-momentum"]) == momenta


def test_lightning_monitor_with_tensorboard(tmp_path):
    """Each stream has a curve of its own."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    momenta, _ = logging_run(tmp_path, "TensorBoardLogger")
    for stream, m in momenta.items():
        (folder,) = tmp_path.rglob(f"{NAME}-momentum_{stream}")
        events = EventAccumulator(str(folder))
        events.Reload()
        values = [event.value for event in events.Scalars(f"{NAME}-momentum")]
        assert values == pytest.approx([m] * len(values))
        assert len(values) > 10


def autocast_training(backward_and_step, dtype, opt, model, teacher):
    """An epoch with the student's forward pass under autocast; in Fabric the wrapper does that."""
    shared = load("shared")
    for inputs, labels in shared.batches(shared.data()):
        opt.zero_grad()
        with torch.autocast("cpu", dtype):
            logits = model(inputs)
        backward_and_step(shared.losses(logits.float(), teacher(inputs), labels, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16 with a scaler"])
def test_fabric_with_mixed_precision(dtype):
    """By `fabric.backward` and `collect`; `backward` is refused by Fabric itself."""
    fabric_module = load("fabric_loop")
    from lightning.fabric.plugins import MixedPrecision

    shared = load("shared")
    expected, teacher = shared.networks()
    own = shared.optimizer(expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)

    def bare_step(by_stream):
        for stream, loss in by_stream.items():
            scaler.scale(loss).backward(retain_graph=True)
            own.collect(stream)
        scaler.step(own)
        scaler.update()

    autocast_training(bare_step, dtype, own, expected, teacher)

    precision = {
        torch.bfloat16: lambda: MixedPrecision("bf16-mixed", "cpu"),
        torch.float16: lambda: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0)),
    }[dtype]()
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, plugins=[precision])
    student, _ = shared.networks()
    model, opt = fabric.setup(student, shared.optimizer(student))

    def fabric_step(by_stream):
        for stream, loss in by_stream.items():
            fabric.backward(loss, retain_graph=True)
            opt.collect(stream)
        opt.step()

    autocast_training(fabric_step, dtype, opt, model, teacher)
    assert_same(student.state_dict(), expected.state_dict(), 1e-6)
    with pytest.raises(RuntimeError, match="fabric.backward"):
        autocast_training(opt.backward, dtype, opt, model, teacher)


# ---------------------------------------------------------------- Accelerate and Transformers


def test_accelerate_accumulates_and_clips():
    """Two halves of a batch, and a clipped sum of them, are the whole batch's."""
    example, shared = load("accelerate_loop"), load("shared")
    student, teacher = shared.networks(torch.float64)
    halves = shared.batches(shared.data(torch.float64), shared.BATCH // 2)
    example.train(student, teacher, halves, MAX_NORM, gradient_accumulation_steps=2)
    assert_same(student.state_dict(), bare(max_norm=MAX_NORM))


def test_transformers_trainer_accumulates():
    example = load("transformers_trainer")
    teacher, sentences = example.bert(32).double(), example.sentences()
    states = []
    for steps in (1, 2):
        student = example.bert(16).double()
        sizes = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": example.BATCH // steps}
        example.train(student, teacher, sentences, train_sampling_strategy="sequential", **sizes)
        states.append(student.state_dict())
    assert_same(states[1], states[0])


# ---------------------------------------------------------------- timm


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_timm_clips(mode):
    """A norm is a common factor and is followed; the other two are not, and are refused unless `clip` does them."""
    timm = pytest.importorskip("timm", reason='pip install -e ".[examples]" brings timm')
    net, opt = problem()
    opt.backward(losses(net))
    if mode == "norm":
        before = [p.grad.clone() for p in net.parameters()]
        timm.utils.dispatch_clip_grad(net.parameters(), 0.01, mode=mode)
        opt.step()
        for p, g in zip(net.parameters(), before):
            total = math.sqrt(sum(float(b.square().sum()) for b in before))
            moved = sum(opt.state[p].values())
            torch.testing.assert_close(moved, g * 0.01 / (total + 1e-6), rtol=1e-12, atol=1e-12)
        return
    timm.utils.dispatch_clip_grad(net.parameters(), 0.01, mode=mode)
    with pytest.raises(RuntimeError, match="clip by clip()"):
        opt.step()
    net, opt = problem()
    opt.backward(losses(net))
    opt.clip(lambda params: timm.utils.dispatch_clip_grad(params, 0.01, mode=mode))
    clipped = [p.grad.clone() for p in net.parameters()]
    opt.step()
    for p, g in zip(net.parameters(), clipped):
        torch.testing.assert_close(sum(opt.state[p].values()), g, rtol=1e-12, atol=1e-12)


def test_timm_schedules_the_rate():
    timm_scheduler = pytest.importorskip("timm.scheduler", reason='pip install -e ".[examples]" brings timm')
    net, opt = problem()
    sgd = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    rates = []
    for one in (opt, sgd):
        scheduler, _ = timm_scheduler.create_scheduler_v2(one, sched="cosine", num_epochs=10, warmup_epochs=2)
        of_one = []
        for epoch in range(10):
            scheduler.step(epoch)
            of_one.append(one.param_groups[0]["lr"])
        rates.append(of_one)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 5


def problem(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, DecoupledMomentumSGD(net.parameters(), 0.05, MOMENTA, **options)


def losses(net, step=0, dtype=torch.float64):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    out = net(x)
    return {"tog": out.square().mean(), "tcg": out.sin().mean(), "ncg": out[:, 0].mean()}


# ---------------------------------------------------------------- torch.amp.GradScaler


def scaled_training(recipe, overflow_at=(), steps=6, start=2.0**10):
    net, opt = problem()
    scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=2)
    for step in range(steps):
        opt.zero_grad()
        by_stream = losses(net, step)
        if step in overflow_at:
            by_stream = {name: loss * math.inf for name, loss in by_stream.items()}
        opt.backward({name: scaler.scale(loss) for name, loss in by_stream.items()})
        recipe(scaler, opt, net)
        scaler.step(opt)
        scaler.update()
    return net, opt


def plain_training(max_norm, left_out=(), steps=6):
    net, opt = problem()
    for step in range(steps):
        if step in left_out:
            continue
        opt.zero_grad()
        opt.backward(losses(net, step))
        if max_norm:
            opt.clip(lambda params: nn.utils.clip_grad_norm_(params, max_norm))
        opt.step()
    return net, opt


def no_clipping(scaler, opt, net):
    """Scale, backward, step."""


def unscale_and_clip(scaler, opt, net):
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)


def unscale_and_clip_by_ours(scaler, opt, net):
    scaler.unscale_(opt)
    opt.clip(lambda params: nn.utils.clip_grad_norm_(params, 0.1))


@pytest.mark.parametrize("overflow_at", [(), (0,), (2, 3)], ids=["never", "first", "later"])
@pytest.mark.parametrize(
    ("recipe", "max_norm"), [(no_clipping, None), (unscale_and_clip, 0.1), (unscale_and_clip_by_ours, 0.1)]
)
def test_scaler_changes_nothing_and_skips_an_overflow(recipe, max_norm, overflow_at):
    net, opt = scaled_training(recipe, overflow_at)
    expected, plain = plain_training(max_norm, overflow_at)
    assert_same(net.state_dict(), expected.state_dict())
    for p, q in zip(net.parameters(), expected.parameters()):
        for name, buffer in plain.state[q].items():
            torch.testing.assert_close(opt.state[p][name], buffer, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- torch.distributed.checkpoint


@pytest.mark.parametrize(
    ("full", "flatten"), [(False, False), (False, True), (True, False)], ids=["sharded", "flat", "full"]
)  # full and flat at once is more than torch takes, of its own SGD too
@pytest.mark.parametrize("momenta", [MOMENTA, dict.fromkeys(MOMENTA, 0.9)], ids=["distinct", "equal"])
def test_distributed_checkpoint_goes_on_alike(momenta, full, flatten, tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=full, flatten_optimizer_state_dict=flatten)

    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        return net, DecoupledMomentumSGD(net.parameters(), 0.05, momenta, 0.01, "tcg")

    def train(net, opt, steps):
        for step in steps:
            opt.zero_grad()
            opt.backward(losses(net, step))
            opt.step()

    net, opt = make()
    train(net, opt, range(3))
    saved = {"net": net.state_dict(), "opt": get_optimizer_state_dict(net, opt, options=options)}
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    train(net, opt, range(3, 6))

    other, fresh = make()
    found = {"net": other.state_dict(), "opt": get_optimizer_state_dict(other, fresh, options=options)}
    for p in other.parameters():
        assert not any(bool(buffer.any()) for buffer in fresh.state[p].values())
    dcp.load(found, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    other.load_state_dict(found["net"])
    set_optimizer_state_dict(other, fresh, found["opt"], options=options)
    assert fresh.param_groups[0]["momentum"] == momenta
    train(other, fresh, range(3, 6))
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


# ---------------------------------------------------------------- what is refused


def test_wrapper_without_our_optimizer_is_refused():
    net, _ = problem()
    with pytest.raises(TypeError, match="takes a DecoupledMomentumSGD, a DecoupledAdamW or a wrapper of one"):
        backward_of_wrapper(torch.optim.SGD(net.parameters(), 0.1), losses(net))


def test_a_loss_backward_of_a_client_is_refused_in_one_line():
    """What a client that calls loss.backward() by itself gets, say Lightning's automatic optimization."""
    net, opt = problem()
    sum(losses(net).values()).backward()
    with pytest.raises(RuntimeError, match="call the optimizer's backward") as caught:
        opt.step()
    assert "\n" not in str(caught.value)


def test_hooks_of_accumulation_run_with_collect_only():
    net, opt = problem()
    called = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(called.append)
    opt.backward(losses(net))
    assert called == []
    opt.zero_grad()
    for stream, loss in losses(net).items():
        loss.backward(retain_graph=True)
        opt.collect(stream)
    assert len(called) == 3 * len(list(net.parameters()))
