"""Every way to run a step takes the same step: against the eager one."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from captures import Captures
from torch import nn
from torch.nn import functional as F

from deepkd_plugin import config, data, device, solver, speed
from deepkd_plugin.data.glyphs import load_glyphs100
from deepkd_plugin.data.resident import ResidentLoader
from deepkd_plugin.distillers import DISTILLERS, DKD, KD, DeepKD
from deepkd_plugin.distillers.base import Distiller
from deepkd_plugin.gsnr import GradientMonitor
from deepkd_plugin.hosts import builtin, registry
from deepkd_plugin.hosts.networks import trained_network
from deepkd_plugin.launch import read_config
from deepkd_plugin.optim import DecoupledMomentumSGD
from deepkd_plugin.run import checkpoint
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.run.schedule import make_scheduler
from deepkd_plugin.trainer import Trainer

CONFIGS = Path(__file__).parents[1] / "configs"

MOMENTUM = {"tog": 0.975, "tcg": 0.825, "ncg": 0.95}


class Toy(nn.Module):
    """A distiller with BatchNorm whose losses change with the epoch, as warm-up and mask do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)]
        self.student = nn.Sequential(*layers).double()

    def forward(self, image, target, epoch):
        logits = self.student(image)
        kd = epoch * logits.square().mean()
        return logits, {"tog": F.cross_entropy(logits, target), "tcg": kd, "ncg": logits.sin().mean()}


def make(kind=speed.Step):
    module = Toy()
    optimizer = DecoupledMomentumSGD(module.parameters(), 0.1, MOMENTUM, 1e-2, "tcg")
    return kind(module, optimizer, lambda losses: losses, False, torch.device("cpu"))


SIZES = (6, 6, 6, 6, 6, 4)
"""Images in the batches of an epoch."""


def run(step, epochs=3, sizes=SIZES):
    """Every step's losses and logits, and the final weights and statistics."""
    generator = torch.Generator().manual_seed(1)
    seen = []
    for epoch in range(1, epochs + 1):
        step.optimizer.param_groups[0]["lr"] = 0.1 / epoch
        for size in sizes:
            image = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
            batch = {"image": image, "target": torch.arange(size) % 5}
            outcome = step(batch, epoch)
            seen += [outcome.logits.clone(), *(loss.clone() for loss in outcome.losses.values())]
    return seen + [value.clone() for value in step.distiller.state_dict().values()]


def assert_same(one, other, tolerance=1e-12):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def captures(monkeypatch):
    """What is captured: the list of the test's Captures."""
    monkeypatch.setattr(device, "Captures", Captures)
    monkeypatch.setattr(Captures, "made", [])
    return Captures.made


def test_replayed_steps_are_the_eager_ones(captures):
    """Three epochs of another learning rate and loss, with a smaller last batch, through replays."""
    graphed = make(speed.GraphedStep)
    assert_same(run(make()), run(graphed))
    # one an epoch: this distiller says nothing of its constants
    assert [made.count for made in captures] == [3]
    assert graphed.optimizer.param_groups[0]["capturable"]
    assert graphed.name == "graphs"


class Constant(Distiller):
    """Toy as a Distiller whose losses change in the third epoch only, and which says so."""

    def __init__(self):
        nn.Module.__init__(self)
        self.toy = Toy()
        self.asked = set()

    def constants(self, epoch, num_classes):
        self.asked.add(num_classes)
        return max(epoch, 2)

    def forward(self, image, target, epoch):
        return self.toy(image, target, max(epoch, 2))


def test_a_capture_lasts_until_one_of_its_constants_changes(captures):
    def start(kind):
        module = Constant()
        optimizer = DecoupledMomentumSGD(module.parameters(), 0.1, MOMENTUM, 1e-2, "tcg")
        return kind(module, optimizer, lambda losses: losses, False, torch.device("cpu"))

    def go(step):
        seen = []
        for epoch, rate in ((1, 0.1), (2, 0.1), (3, 0.1), (4, 0.1), (4, 0.05)):
            step.optimizer.param_groups[0]["lr"] = rate
            generator = torch.Generator().manual_seed(epoch)
            for size in SIZES:
                image = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
                outcome = step({"image": image, "target": torch.arange(size) % 5}, epoch)
                seen += [outcome.logits.clone(), *(loss.clone() for loss in outcome.losses.values())]
            counts.append([made.count for made in captures])
        return seen + [value.clone() for value in step.distiller.state_dict().values()]

    counts = []
    eager, counts[:] = go(start(speed.Step)), []
    graphed = start(speed.GraphedStep)
    assert_same(eager, go(graphed))
    assert counts == [[1], [1], [2], [3], [4]]
    assert graphed.module.asked == {5}


def test_who_defines_a_step_inherits_no_word_on_its_constants():
    class Louder(KD):
        def forward_train(self, image, target, epoch, **batch):
            return super().forward_train(image, target, epoch, **batch)

    class Other(DeepKD):
        def decoupled(self, terms, target, epoch):
            return super().decoupled(terms, target, epoch)

    class Named(KD):
        published = "KD again"

    class Sure(DKD):
        def constants(self, epoch, num_classes):
            return "none"

        def forward_train(self, image, target, epoch, **batch):
            return super().forward_train(image, target, 1, **batch)

    kinds = {Louder: 7, Other: 7, Named: 1.0, Sure: "none"}
    assert {kind: kind.constants(object.__new__(kind), 7, 100) for kind in kinds} == kinds


@pytest.mark.parametrize(("method", "expected"), [("kd", 4), ("dkd", 23), ("deepkd", 97)])
def test_how_often_a_run_on_cifar_is_captured(captures, method, expected):
    """240 epochs of the published schedule; the mask grows in two of its three phases."""
    file = CONFIGS / "cifar100" / "res32x4_res8x4" / f"{method}.yaml"
    cfg = read_config(registry.BUILTIN, file, [])[0]
    module = DISTILLERS[cfg.DISTILLER.TYPE](nn.Linear(1, 1), nn.Linear(1, 1), cfg)
    optimizer = solver.decoupled_momentum(module.get_learnable_parameters(), cfg)
    scheduler = make_scheduler(optimizer, cfg.SOLVER)
    step = speed.GraphedStep(module, optimizer, lambda losses: losses, False, torch.device("cpu"))
    step.classes = 100
    changes, before = 0, None
    for epoch in range(1, cfg.SOLVER.EPOCHS + 1):
        constants = copy.deepcopy(step.constants_of(epoch))
        changes, before = changes + (constants != before), constants
        optimizer.step()
        scheduler.step()
    assert changes == expected


def test_a_capture_that_fails_leaves_no_trace_and_the_run_goes_on(captures, monkeypatch, capsys):
    def failing(self, function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Captures, "capture", failing)
    graphed = make(speed.GraphedStep)
    assert_same(run(make()), run(graphed))
    assert graphed.name == "eager"
    assert capsys.readouterr().out == (
        "SOLVER.EXECUTION graphs: falls back to eager (RuntimeError: operation not permitted when stream is capturing "
        "and more)\n"
    )
    assert captures[0].warm == graphed.EAGER


@pytest.mark.parametrize("pipeline", ["device", "workers"])
def test_images_and_meters_are_in_the_capture(train, captures, monkeypatch, pipeline):
    """A whole run by the trainer, with what an epoch logs: as the eager one."""
    options = ("SOLVER.BATCH_SIZE", "40", "DATASET.PIPELINE", pipeline, "DeepKD.MASK.TYPE", "static")
    options += ("SOLVER.LR_SCHEDULE", "step", "SOLVER.WARMUP_EPOCHS", "0")

    class Kept(speed.Step):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            speed._keep_buffers(self.optimizer)

    monkeypatch.setitem(speed.STEPS, "eager", Kept)
    assert train("deepkd", *options, "EXPERIMENT.NAME", "eager")[0] == 0
    made, complete, measure = [], ResidentLoader.make, Trainer.measure
    capture = Captures.capture

    def recorded(self, function):
        def counted():
            made.clear()
            outcome = function()
            inside.append(tuple(made))
            return outcome

        return capture(self, counted)

    inside = []
    monkeypatch.setattr(Captures, "capture", recorded)
    monkeypatch.setattr(ResidentLoader, "make", lambda *args: made.append("images") or complete(*args))
    monkeypatch.setattr(Trainer, "measure", lambda *args: made.append("meters") or measure(*args))
    # on a CPU make_step takes the eager one
    monkeypatch.setitem(speed.STEPS, "eager", speed.GraphedStep)
    assert train("deepkd", *options)[0] == 0
    # 5 batches an epoch: the fifth is the first that is replayed, as only after the first are the classes known
    parts = ("images", "meters") if pipeline == "device" else ("meters",)
    assert inside == [parts] * 6
    assert [made.count for made in captures] == [1]
    eager, graphed = (read_metrics(train.folder.parent / name) for name in ("eager", "run"))
    for one, other in zip(eager, graphed, strict=True):
        assert (one.pop("execution"), other.pop("execution")) == ("eager", "graphs")
        for timed in ("seconds", "images_per_second", "data_seconds"):
            del one[timed], other[timed]
        assert other == one


def test_a_step_leaves_no_graph():
    outcome = make()({"image": torch.randn(4, 3, 8, 8, dtype=torch.float64), "target": torch.arange(4)}, 1)
    assert not any(t.requires_grad for t in (outcome.logits, *outcome.losses.values()))
    assert outcome.sums == {}


def test_no_step_of_a_warm_up_by_iteration_is_captured(captures):
    """Its factor is another in every step; the first steps after it are eager too, and then a capture is made."""
    graphed, eager = make(speed.GraphedStep), make()
    points = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, *[3] * 5]
    image, target = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 5
    for step, epoch in enumerate(points):
        batch = {"image": image.roll(step, 0), "target": target}
        one, other = graphed(batch, epoch), eager(batch, epoch)
        assert_same(list(one.losses.values()), list(other.losses.values()))
        assert captures[0].count == (step >= 11)


def test_capturable_buffers_stay_where_they_are():
    eager, capturable = make(), make()
    speed._keep_buffers(capturable.optimizer)
    assert_same(run(eager, 1), run(capturable, 1))
    before = [t.data_ptr() for t in buffers(capturable.optimizer)]
    assert before
    run(capturable, 1)
    assert [t.data_ptr() for t in buffers(capturable.optimizer)] == before


def buffers(optimizer):
    """The tensors of the optimizer's state."""
    return [buffer for state in optimizer.state.values() for buffer in state.values()]


class Memory:
    """What compiled networks write to: whatever a step left there is overwritten when the next begins."""

    def __init__(self):
        self.teachers, self.others, self.steps = [], [], 0

    def begin(self):
        self.steps += 1
        self.overwrite(self.teachers + self.others)
        self.teachers, self.others = [], []

    @staticmethod
    def overwrite(tensors):
        for t in tensors:
            t.data.fill_(math.nan)


class Replayed(nn.Module):
    """A network as compiled ones are on a GPU: a call overwrites what the teacher returned before it.

    The gradients of its weights are in such memory too.
    """

    def __init__(self, network, memory):
        super().__init__()
        self.network, self.memory = network, memory
        for p in network.parameters():
            p.register_hook(self.keep)

    def compile(self, **options):
        self.options = options

    def keep(self, gradient):
        gradient = gradient.clone()
        self.memory.others.append(gradient)
        return gradient

    def forward(self, image):
        logits = self.network(image)
        self.memory.overwrite(self.memory.teachers)
        (self.memory.others if self.training else self.memory.teachers).append(logits)
        return logits, {}


def test_compiled_networks_may_use_their_memory_again(monkeypatch):
    cfg = builtin.CFG.clone()
    config.add_deepkd_config(cfg)
    memory = Memory()
    monkeypatch.setattr(device, "begin_step", memory.begin)
    monkeypatch.setattr(device, "reuses_memory", lambda at: True)

    def start(kind, wrap):
        networks = [wrap(Toy().student), wrap(Toy().student)]
        for p in networks[1].parameters():
            p.requires_grad_(False)
            p.mul_(1.5)
        module = DeepKD(*networks, cfg).train()
        optimizer = DecoupledMomentumSGD(module.get_learnable_parameters(), 0.1, MOMENTUM, 1e-2, "tcg")
        return kind(module, optimizer, lambda losses: losses, False, torch.device("cpu"))

    class Plain(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, image):
            return self.network(image), {}

    compiled = start(speed.CompiledStep, lambda network: Replayed(network, memory))
    assert_same(run(start(speed.Step, Plain)), run(compiled))
    assert (compiled.name, memory.steps) == ("compile", 18)
    compiled.distiller.eval()(image=torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert memory.steps == 19  # a test's batch is a step too


class Elsewhere(nn.Module):
    """A wrapper as DataParallel is: it calls a replica of the module in a thread."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **batch):
        replica = self.module._replicate_for_data_parallel()
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(replica, **batch).result()


class Precise(nn.Module):
    """A distiller that notes the dtypes of its networks' logits; its teacher's features are kept in `features`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
        self.teacher = copy.deepcopy(self.student)
        self.seen = []

    def forward(self, image, target, epoch):
        logits = self.student(image)
        features = self.teacher[:2](image)
        self.seen.append((logits.dtype, features.dtype, self.teacher[2](features).dtype))
        if epoch > 1:
            raise ValueError("no more")
        return logits, {"tog": F.cross_entropy(logits, target)}


@pytest.mark.parametrize("wrap", [Elsewhere, nn.DataParallel, lambda module: module], ids=["thread", "data", "alone"])
@pytest.mark.parametrize("amp", [True, False])
def test_autocast_is_where_the_forward_pass_is(amp, wrap):
    module = Precise()
    names = list(module.state_dict())
    optimizer = DecoupledMomentumSGD(module.student.parameters(), 0.1, {"tog": 0.9})
    step = speed.Step(wrap(module), optimizer, lambda losses: losses, amp, torch.device("cpu"))
    batch = {"image": torch.randn(4, 3, 8, 8), "target": torch.arange(4)}
    step(batch, 1)
    low = torch.bfloat16 if amp else torch.float32
    assert module.seen == [(low, low, torch.float32)]
    assert list(module.state_dict()) == names
    with pytest.raises(ValueError, match="no more"):
        step(batch, 2)
    assert not torch.is_autocast_enabled("cpu")
    copied = copy.deepcopy(module)
    assert copied(**batch, epoch=1)[0].dtype == low
    assert isinstance(copied.teacher[2], nn.Linear)


@pytest.mark.usefixtures("one_thread")
def test_of_a_teacher_in_bfloat16_no_two_logits_are_equal_by_rounding(data_root):
    """Its top 50 come from float32 sums; what is upstream of its last layer is in bfloat16."""
    teacher = trained_network(registry.BUILTIN, "glyphs100", "resnet20", 100, "builtin:glyphs100_resnet20", "").eval()
    fingerprint = checkpoint.fingerprint(teacher)
    pixels = torch.from_numpy(load_glyphs100(data_root, "test")[0][:256]).permute(0, 3, 1, 2)
    of = data.source("glyphs100")
    image = (pixels / 255 - torch.tensor(of.mean)[:, None, None]) / torch.tensor(of.std)[:, None, None]

    def logits():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out, features = teacher(image)
        assert features["pooled_feat"].dtype == torch.bfloat16
        return out

    def ties(out):
        return sum(len(row.unique()) < 100 for row in out)

    with torch.no_grad():
        exact = teacher(image)[0]
    before = logits()
    device.classify_in_float32(teacher)
    device.classify_in_float32(teacher)
    after = logits()
    assert (before.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    assert ties(before) > 200
    assert ties(after) == 0
    assert (after - exact).abs().mean() < 0.9 * (before - exact).abs().mean()
    top = [out.float().topk(50).indices.sort().values for out in (exact, before, after)]
    changed = [(top[0] != other).any(1).sum() for other in top[1:]]
    assert changed[1] <= changed[0]
    with torch.no_grad():
        assert torch.equal(teacher(image)[0], exact)
    assert checkpoint.fingerprint(teacher) == fingerprint
    compiled = torch.compile(teacher, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert compiled(image[:4])[0].dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", "broken"])
def test_compiled_steps_and_the_fallback(monkeypatch, capsys, backend):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(device, "compile_options", lambda at: {"backend": broken if backend == "broken" else backend})
    compiled = make(speed.CompiledStep)
    assert_same(run(make(), 1), run(compiled, 1), 1e-10)
    out = capsys.readouterr().out
    if backend == "broken":
        assert compiled.name == "eager"
        assert "SOLVER.EXECUTION compile: falls back to eager (" in out
        assert "no compiler here" in out
    else:
        assert (compiled.name, out) == ("compile", "")
    assert not any("_orig_mod" in name for name in compiled.distiller.state_dict())


@pytest.mark.parametrize(
    ("options", "execution", "said"),
    [
        ((), "eager", ""),
        (("SOLVER.EXECUTION", "graphs"), "eager", "graphs: falls back to eager (it needs CUDA"),
    ],
)
def test_runs_name_the_way_they_went(train, options, execution, said):
    code, out, err = train("deepkd", *options)
    assert code == 0, err
    assert [record["execution"] for record in read_metrics(train.folder)] == [execution] * 2
    assert said in out


class Measured:
    """A step as the trainer takes it where gradients are sampled: an iteration is counted first."""

    def __init__(self, step, every):
        self.step, self.optimizer, self.distiller = step, step.optimizer, step.distiller
        self.monitor = step.monitor = GradientMonitor(
            step.distiller.named_parameters(), tuple(MOMENTUM), every, window=100
        )

    def __call__(self, batch, epoch):
        self.monitor.tick()
        assert self.step.samples == (self.monitor.iteration % self.monitor.every == 0)
        return self.step(batch, epoch)


def with_momentum(step, momentum):
    for group in step.optimizer.param_groups:
        group["momentum"] = dict(momentum)
    return step


@pytest.fixture
def replays(captures, monkeypatch):
    """The iterations in which a capture was replayed: a list, and what makes a measured step."""
    capture, iterations, measured = Captures.capture, [], []

    def counted(self, function):
        graph, outcome = capture(self, function)
        replay = graph.replay

        def counting():
            iterations.append(measured[0].monitor.iteration)
            replay()

        graph.replay = counting
        return graph, outcome

    monkeypatch.setattr(Captures, "capture", counted)

    def start(step, every):
        measured.append(Measured(step, every))
        return measured[0]

    return iterations, start


def test_a_step_without_a_monitor_takes_no_sample():
    assert make().monitor is None
    assert not make().samples


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("momentum", [MOMENTUM, dict.fromkeys(MOMENTUM, 0.9)])
def test_sampled_steps_are_the_same_bit_for_bit(momentum):
    plain, sampled = (with_momentum(make(), momentum) for _ in range(2))
    sampled = Measured(sampled, 4)
    for a, b in zip(run(plain), run(sampled)):
        assert torch.equal(a, b)
    assert (sampled.monitor.iteration, sampled.monitor.moments.samples) == (18, 4)
    # apart, although equal momenta share a backward pass
    norms = {found["norm"] for found in sampled.monitor.finish()["gsnr"].values()}
    assert len(norms) == 3


@pytest.mark.usefixtures("one_thread")
def test_compiled_steps_are_sampled_like_eager_ones(monkeypatch):
    monkeypatch.setattr(device, "compile_options", lambda at: {"backend": "aot_eager"})
    eager, compiled = Measured(make(), 3), Measured(make(speed.CompiledStep), 3)
    assert_same(run(eager, 1), run(compiled, 1), 1e-10)
    assert compiled.step.name == "compile"
    for name in ("mean", "squares", "norms", "degrees"):
        mine, theirs = (getattr(m.monitor.moments, name) for m in (compiled, eager))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("one_thread")
def test_a_sampled_step_is_eager_and_replays_go_on_after_it(replays, captures):
    iterations, start = replays
    graphed = start(make(speed.GraphedStep), 5)
    sizes = (6,) * 8 + (4,)
    eager = Measured(make(), 5)
    assert_same(run(eager, sizes=sizes), run(graphed, sizes=sizes))
    # three eager steps an epoch that are neither sampled (5, 10, …) nor of another size (9, 18, 27)
    assert iterations == [4, 6, 7, 8, 14, 16, 17, 23, 24, 26]
    assert captures[0].count == 3  # a sample ends no capture
    assert graphed.monitor.moments.samples == 5
    for name in ("mean", "squares"):
        mine, theirs = (getattr(m.monitor.moments, name) for m in (graphed, eager))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("one_thread")
def test_momenta_that_change_end_a_capture(replays, captures):
    """As an allocation sets them after a window: first all equal and merged, then apart, then others."""
    iterations, start = replays
    equal = dict.fromkeys(MOMENTUM, 0.9)
    graphed = start(with_momentum(make(speed.GraphedStep), equal), 1000)
    eager = Measured(with_momentum(make(), equal), 1000)

    def go(step):
        seen = []
        for part, momentum in enumerate((equal, MOMENTUM, MOMENTUM, MOMENTUM | {"ncg": 0.9})):
            with_momentum(step, momentum)
            generator = torch.Generator().manual_seed(part)
            for size in (6, 6, 6, 6, 4, 6):
                image = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
                outcome = step({"image": image, "target": torch.arange(size) % 5}, 1)
                seen += [outcome.logits.clone(), *(loss.clone() for loss in outcome.losses.values())]
        return seen + [value.clone() for value in step.distiller.state_dict().values()]

    assert_same(go(eager), go(graphed))
    # 6 steps each: three eager ones after a change, the fifth is of another size, none where nothing changed
    assert iterations == [4, 6, 10, 12, 13, 14, 15, 16, 18, 22, 24]
    assert captures[0].count == 3
