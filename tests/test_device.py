"""What the device module asks of PyTorch, with stand-ins for CUDA; and what it says if that cannot be."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepkd_plugin import device
from deepkd_plugin.errors import UserError
from deepkd_plugin.run import checkpoint

CUDA = torch.device("cuda")


@pytest.fixture
def repeatable(monkeypatch):
    """Settings that SOLVER.DETERMINISTIC changes in the whole process; back to what they were after the test."""
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    monkeypatch.delenv(device.WORKSPACE, raising=False)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)


def test_by_default_cudnn_looks_for_the_fastest(repeatable):
    device.tune()
    assert torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    assert device.WORKSPACE not in device.os.environ


def test_deterministic_algorithms(repeatable):
    device.tune(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == (False, True)
    assert device.os.environ[device.WORKSPACE] == ":4096:8"
    repeatable.setattr(torch.cuda, "is_initialized", lambda: True)
    device.tune(deterministic=True)  # a second time, when CUDA has started under it


@pytest.mark.parametrize(
    ("value", "started", "found"),
    [
        (":0:0", False, "':0:0'"),
        (":0:0", True, "':0:0'"),
        (None, True, "not set, and CUDA has started already"),
    ],
)
def test_what_cublas_cannot_repeat_is_refused(repeatable, value, started, found):
    if value:
        repeatable.setenv(device.WORKSPACE, value)
    repeatable.setattr(torch.cuda, "is_initialized", lambda: started)
    with pytest.raises(UserError) as error:
        device.tune(deterministic=True)
    assert str(error.value) == (
        f"environment: CUBLAS_WORKSPACE_CONFIG is {found}; it must be :4096:8 or :16:8 with SOLVER.DETERMINISTIC"
    )
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_other_size_of_workspace_is_kept(repeatable):
    repeatable.setenv(device.WORKSPACE, ":16:8")
    device.tune(deterministic=True)
    assert device.os.environ[device.WORKSPACE] == ":16:8"


def test_runs_that_repeat_bit_for_bit(train, repeatable):
    ends, asked, pick = [], [], device.pick
    repeatable.setattr(device, "pick", lambda: asked.append(torch.are_deterministic_algorithms_enabled()) or pick())
    for name in ("one", "other"):
        code, _, err = train("deepkd", "SOLVER.DETERMINISTIC", "True", "EXPERIMENT.NAME", name)
        assert code == 0, err
        assert torch.are_deterministic_algorithms_enabled()
        ends.append(checkpoint.load(train.folder.parent / name / "student_latest", "test")["model"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert all(asked)  # before a device is looked for, so before CUDA starts


def test_an_operation_without_a_deterministic_algorithm_is_named():
    with pytest.raises(UserError) as error, device.refusals():
        raise RuntimeError(
            "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
        )
    assert str(error.value) == (
        "SOLVER.DETERMINISTIC is True, and adaptive_avg_pool2d_backward_cuda does not have a deterministic "
        "implementation on this device; set it to False, or take networks without this operation"
    )
    with pytest.raises(RuntimeError, match="something else"), device.refusals():
        raise RuntimeError("something else")


def test_pytorch_still_says_it_in_these_words(repeatable):
    """By an operation that has no deterministic form on a CPU either."""
    device.tune(deterministic=True)
    with pytest.raises(UserError, match="put_ does not have a deterministic implementation on this"), device.refusals():
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


@pytest.mark.parametrize(
    ("count", "asked", "always", "wrapped", "said"),
    [
        (0, False, False, False, ""),
        (1, True, False, False, ""),
        (4, True, False, True, ""),
        (4, False, False, False, "uses 1 of 4 GPUs; SOLVER.DATA_PARALLEL True splits each batch over all\n"),
        (0, False, True, True, ""),
        (4, False, True, True, ""),
    ],
)
def test_data_parallel_only_if_asked_for(monkeypatch, capsys, count, asked, always, wrapped, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(nn, "DataParallel", lambda module: ("all cards", module))
    module = nn.Linear(1, 1)
    assert device.parallel(module, asked, always) == (("all cards", module) if wrapped else module)
    assert capsys.readouterr().out == said


def test_what_numbers_on_a_gpu_depend_on(monkeypatch):
    assert device.settings(torch.device("cpu")) == {}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91301)
    assert device.settings(CUDA) == {
        "cuda": "13.0",
        "cudnn": "91301",
        "matmul precision": "none",
        "convolution precision": "tf32",
    }


def test_networks_are_compiled_for_one_size_of_batch():
    assert device.compile_options(torch.device("cpu")) == {"dynamic": False}
    assert device.compile_options(CUDA) == {"dynamic": False, "mode": "reduce-overhead"}
    assert device.reuses_memory(CUDA)
    assert not device.reuses_memory(torch.device("cpu"))


def test_a_step_begins_for_compiled_networks(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    device.begin_step()
    assert begun == [True]


class Cuda:
    """Stands in for the parts of torch.cuda that captures use; `done` has what was asked of it."""

    def __init__(self, monkeypatch):
        self.done, self.streams, self.pools, self.ended = [], 0, 0, False
        self.now = SimpleNamespace(name="main", wait_stream=lambda other: self.done.append(("main waits", other.name)))
        self.generator = SimpleNamespace(
            clone_state=lambda: "before", graphsafe_set_state=lambda state: self.done.append(("generator", state))
        )
        monkeypatch.setattr(torch.cuda, "Stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self.pool)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "now", stream))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "default_generators", (self.generator,))

    def stream(self):
        self.streams += 1
        name = f"side {self.streams}"
        return SimpleNamespace(name=name, wait_stream=lambda other: self.done.append((f"{name} waits", other.name)))

    def pool(self):
        self.pools += 1
        return f"pool {self.pools}"

    @contextlib.contextmanager
    def on(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def end(self, index, pool):
        self.done.append(("no more of", pool))
        if self.ended:
            raise RuntimeError("not currently recording to this pool")

    @contextlib.contextmanager
    def graph(self, graph, **options):
        """As torch.cuda.graph: if the capture cannot be ended, its stream stays the current one."""
        self.done.append(("capture", options["stream"].name, options["pool"], options["capture_error_mode"]))
        before, self.now = self.now, options["stream"]
        yield
        self.now = before


def test_captures_share_one_stream_and_one_pool(monkeypatch):
    cuda = Cuda(monkeypatch)
    captures = device.Captures()
    for _ in range(2):
        with captures.warm_up():
            assert torch.cuda.current_stream().name == "side 1"
        assert cuda.now.name == "main"
        _, result = captures.capture(lambda: "filled")
        assert result == "filled"
    turn = [("side 1 waits", "main"), ("main waits", "side 1"), ("capture", "side 1", "pool 1", "thread_local")]
    assert cuda.done == turn + turn
    assert (cuda.streams, cuda.pools) == (1, 1)


@pytest.mark.parametrize("ended", [True, False], ids=["today", "older"])
def test_a_failed_capture_gives_back_what_it_took(monkeypatch, ended):
    cuda = Cuda(monkeypatch)
    cuda.ended = ended

    def failing():
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        device.Captures().capture(failing)
    assert cuda.done[-2:] == [("no more of", "pool 1"), ("generator", "before")]
    assert cuda.now.name == "main"


def test_autocast_within_may_be_asked_for_twice():
    network = nn.Linear(3, 4)
    for _ in range(2):
        device.autocast_within(network, torch.device("cpu"))
    assert network(torch.randn(2, 3)).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError):
        network(torch.randn(2, 5))
    assert not torch.is_autocast_enabled("cpu")


class Wide(nn.Linear):
    """A kind of linear layer of somebody's own."""

    def forward(self, features):
        return 2 * super().forward(features)


def test_the_last_linear_layer_of_any_kind_computes_in_float32():
    network = nn.Sequential(nn.Linear(3, 4), Wide(4, 5))
    features = torch.randn(2, 3)
    expected = network(features)
    device.classify_in_float32(network)
    assert [layer.__class__.__name__ for layer in network] == ["Linear", "Wide"]
    assert isinstance(network[1], Wide)
    assert torch.equal(network(features), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert network[0](features).dtype == torch.bfloat16
        logits = network(features)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)
    replica = network[1]._replicate_for_data_parallel()
    assert type(replica) is type(network[1])
    device.classify_in_float32(nn.Conv2d(1, 1, 1))  # without such a layer nothing changes
