"""Several processes against one: torch.distributed's gloo, on this machine."""

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import in_two_processes
from torch import nn

from deepkd_plugin import device, distributed
from deepkd_plugin.errors import UserError
from deepkd_plugin.optim import DecoupledAdamW, DecoupledMomentumSGD

MOMENTA = {
    "apart": {"tog": 0.9, "tcg": 0.5, "ncg": 0.7},
    "equal": dict.fromkeys(("tog", "tcg", "ncg"), 0.9),
}


def network():
    torch.manual_seed(0)
    # a branch for one sign of the first number, so that a process may have no gradient for it; one is never used
    return nn.ModuleDict({name: nn.Linear(3, 2).double() for name in ("all", "some", "none")})


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs()
    x[:4, 0] *= -1  # the first process's half
    return x


def losses(net, x, scale):
    out = net["all"](x)
    by_stream = {
        "tog": out.square().sum() / scale,
        "tcg": out.sin().sum() / scale,
        "ncg": out[:, 0].sum() / scale,
    }
    chosen = x[x[:, 0] > 0]
    if len(chosen):
        by_stream["ncg"] = by_stream["ncg"] + net["some"](chosen).square().sum() / scale
    return by_stream


def make_sgd(params, momenta):
    return DecoupledMomentumSGD(params, 0.05, momenta, 0.01, "tcg")


def make_adamw(params, momenta):
    return DecoupledAdamW(params, 0.05, momenta, eps=1e-3)


RUNS = [(make, momenta) for make in (make_sgd, make_adamw) for momenta in MOMENTA]


def train(run, mine=slice(None), scale=8, processes=1, sum_over=None):
    net = network()
    make, momenta = run
    opt = make(net.parameters(), MOMENTA[momenta])
    for step in range(5):
        opt.zero_grad()
        by_stream = losses(net, batch(step)[mine], scale)
        # in two calls, of which the first is of this process alone
        opt.backward({"tog": 0.25 * by_stream["tog"], "ncg": 0.5 * by_stream["ncg"]}, retain_graph=True)
        rest = by_stream | {"tog": 0.75 * by_stream["tog"], "ncg": 0.5 * by_stream["ncg"]}
        opt.backward(rest, sum_over=sum_over)
        if processes > 1 and sum_over is None:
            opt.average_gradients()
        opt.step()
    return net.state_dict(), [p.grad is None for p in net.parameters()]


def share(rank):
    distributed.BUCKET = 40  # so that there are several
    mine = slice(4 * rank, 4 * rank + 4)
    return {
        how: [train(run, mine, *scaled) for run in RUNS]
        for how, scaled in {"averaged": (4, 2), "summed": (8, 2, dist.group.WORLD)}.items()
    }


def test_two_processes_train_as_one(tmp_path):
    """They average their gradients between backward and step, or sum them while the passes go on."""
    expected = [train(run) for run in RUNS]
    for of_process in in_two_processes(share, tmp_path):
        for how, results in of_process.items():
            for (state, missing), (whole, without) in zip(results, expected):
                assert missing == without, how
                assert sum(missing) == 2
                for name, value in whole.items():
                    torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


def as_process(monkeypatch, rank, size=2):
    """Let this process be one of several, as far as it is asked for its number."""
    monkeypatch.setattr(distributed, "_here", distributed._ALONE._replace(rank=rank, size=size))


@pytest.mark.parametrize(("count", "chunk", "size"), [(12, 12, 1), (12, 12, 5), (12, 5, 2), (7, 3, 4), (3, 12, 4)])
def test_processes_share_each_micro_batch_in_order(monkeypatch, count, chunk, size):
    as_process(monkeypatch, 0, size)
    shares = distributed.shares(count, chunk)
    assert sum(map(sum, shares)) == count
    assert all(max(each) - min(each) <= 1 and sum(each) <= chunk for each in shares)
    places, first = [], 0
    for number, each in enumerate(shares):
        for rank, mine in enumerate(each):
            as_process(monkeypatch, rank, size)
            own = distributed.own(count, chunk)
            sizes = [max(of[rank], 1) for of in shares]
            part = own[sum(sizes[:number]) : sum(sizes[: number + 1])]
            # one that has no image there passes the first one
            assert part == (list(range(len(places), len(places) + mine)) if mine else [first])
            places += part[:mine]
        first += sum(each)
    assert places == list(range(count))


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_that_is_no_launchers_is_refused(monkeypatch, missing):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", *distributed.MEETING):
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"WORLD_SIZE is 2 and {missing} is missing"), distributed.joined():
        pass


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("RANK", "-1"), ("RANK", "2"), ("LOCAL_RANK", "x")])
def test_a_number_of_a_launcher_that_is_none_is_refused(monkeypatch, name, value):
    """WORLD_SIZE too, which would else be one process, and so one of several that train the same."""
    for one in ("WORLD_SIZE", *distributed.MEETING):
        monkeypatch.setenv(one, "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"environment: {name} is '?{value}'?; it must be"), distributed.joined():
        pass


def test_a_process_has_the_card_of_its_number(monkeypatch):
    taken = []
    monkeypatch.setattr(device, "take", taken.append)
    distributed.take_card()  # on a CPU there is none
    here = distributed._ALONE._replace(local=1, size=2, device=torch.device("cuda", 1))
    monkeypatch.setattr(distributed, "_here", here)
    distributed.take_card()
    assert taken == [1]


@pytest.mark.parametrize(
    ("size", "local", "words"),
    [(1, "1", "python"), (4, "4", "torchrun --nproc_per_node 4"), (8, "4", "torchrun --nproc_per_node 4 --nnodes 2")],
)
def test_a_command_says_how_the_run_was_started(monkeypatch, size, local, words):
    as_process(monkeypatch, 0, size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert " ".join(distributed.command("tool.py")) == f"{words} tool.py"


def test_what_an_earlier_attempt_left_in_the_store_is_not_taken():
    """A launcher may give all attempts one store; a process that is early must not read its predecessor's peer."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    for attempt in range(2):
        parts = {}

        def meet(number, parts=parts):
            parts[number] = distributed._of_this_attempt(store, number, 3)

        # the first process comes last, as one does whose predecessor takes its time to end
        threads = [threading.Thread(target=meet, args=(number,)) for number in (2, 1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(parts) == 3
        assert not parts[1].check(["address 0"])
        parts[0].set("address 0", str(attempt))
        assert parts[1].get("address 0") == parts[2].get("address 0") == str(attempt).encode()
