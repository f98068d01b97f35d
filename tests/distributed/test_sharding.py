"""Which images of a batch each process passes."""

import pytest
from processes import as_process

from deepkd_plugin.distributed import sharding


@pytest.mark.parametrize(("count", "chunk", "size"), [(12, 12, 1), (12, 12, 5), (12, 5, 2), (7, 3, 4), (3, 12, 4)])
def test_processes_share_each_micro_batch_in_order(monkeypatch, count, chunk, size):
    as_process(monkeypatch, 0, size)
    shares = sharding.shares(count, chunk)
    assert sum(map(sum, shares)) == count
    assert all(max(each) - min(each) <= 1 and sum(each) <= chunk for each in shares)
    places, first = [], 0
    for number, each in enumerate(shares):
        for rank, mine in enumerate(each):
            as_process(monkeypatch, rank, size)
            own = sharding.own(count, chunk)
            sizes = [max(of[rank], 1) for of in shares]
            part = own[sum(sizes[:number]) : sum(sizes[: number + 1])]
            # one that has no image there passes the first one
            assert part == (list(range(len(places), len(places) + mine)) if mine else [first])
            places += part[:mine]
        first += sum(each)
    assert places == list(range(count))
