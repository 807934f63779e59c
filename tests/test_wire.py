"""The wire: the same bits on every rank, and an error rather than silence when a peer is gone."""

import os
import threading
import time

import pytest
import ranks
import torch
import torch.distributed as dist

from fasttrain.dist.exchange import ordered_all_reduce
from fasttrain.dist.wire import Wire, WireError


def everything(wire):
    noise = torch.Generator().manual_seed(wire.rank)
    x = torch.randn(1001, generator=noise)
    half = torch.full((3,), 60000.0, dtype=torch.float16)
    return (wire.rank, wire.size, x.clone(), wire.mean_(x), wire.sum_(torch.arange(3) + wire.rank),
            wire.broadcast_(torch.tensor([float(wire.rank)] * 2)), wire.mean_(half))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_collectives(size):
    answers = ranks.run(everything, size)
    assert [a[:2] for a in answers] == [(r, size) for r in range(size)]
    expected = torch.stack([a[2] for a in answers]).mean(0)
    for _, _, _, mean, total, broadcast, half in answers:
        torch.testing.assert_close(mean, expected)
        assert torch.equal(mean, answers[0][3])
        assert total.tolist() == [size * i + size * (size - 1) // 2 for i in range(3)]
        assert broadcast.tolist() == [0.0, 0.0]
        assert half.isfinite().all(), "fp16 must be divided before the sum, which would overflow"


def operations(wire):
    x = torch.tensor([wire.rank + 1.0, -wire.rank])
    reduced = {op: wire.all_reduce(x.clone(), op) for op in ("sum", "avg", "min", "max")}
    bits = torch.tensor([1 << wire.rank, 8])
    wire.all_reduce(bits, "bor").wait()
    texts = wire.gather_objects_json("ä" * wire.rank)
    gathered = wire.all_gather(torch.tensor([wire.rank]))
    empty = wire.sum_(torch.empty(0))
    assert not any(wire.gather_objects_json(""))
    assert wire.broadcast_(torch.tensor([wire.rank]), source=1).item() == 1
    wire.barrier()
    return {op: work.wait() is None for op, work in reduced.items()}, bits.tolist(), texts, gathered, empty.numel()


def test_operations_and_small_gathers():
    for waited, bits, texts, gathered, empty in ranks.run(operations, 3):
        assert waited == dict.fromkeys(("sum", "avg", "min", "max"), True)
        assert bits == [7, 8]
        assert texts == ["", "ä", "ää"]
        assert [t.item() for t in gathered] == [0, 1, 2]
        assert empty == 0


def beside_the_programs_own(wire):
    """Another wire over all, one over a part, one along a dimension of a mesh; torch's own collectives in between."""
    device = torch.device("cpu")
    pair = [0, 1] if wire.rank < 2 else [2, 3]
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    with pytest.raises(ValueError, match=r"has 2 dimensions.*give mesh\[name\]"):
        Wire.over(mesh)
    with pytest.raises(ValueError, match=r"this process is rank \d, and the group consists of ranks \[(2, 3|0, 1)\]"):
        Wire.over([r for r in range(4) if r not in pair])
    with pytest.raises(ValueError, match=r"rank, world_size came too late"):
        Wire(device, rank=0, world_size=4)
    wires = [Wire(device), Wire.over(pair), Wire.over(mesh["node"]), Wire.over(mesh.get_group("local"), timeout_s=9)]
    theirs = torch.ones(1)
    under_way = wire.rank % 2 and dist.all_reduce(theirs, async_op=True)  # before ours here, after them there
    mine = [w.sum_(torch.tensor([float(wire.rank)])).item() for w in wires]
    (under_way or dist.all_reduce(theirs, async_op=True)).wait()
    ranks_of = [w.ranks for w in wires]
    places = [(w.rank, w.size) for w in wires]
    wires[0].close()
    assert wire.sum_(torch.ones(1)).item() == 4, "the group of one wire closed that of another"
    return mine, ranks_of, places, theirs.item()


def test_every_wire_has_a_group_of_its_own():
    answers = ranks.run(beside_the_programs_own, 4)
    for rank, (sums, members, places, theirs) in enumerate(answers):
        pair, column = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
        assert sums == [6, sum(pair), sum(column), sum(pair)]
        assert members == [[0, 1, 2, 3], pair, column, pair]
        assert places == [(rank, 4), (rank % 2, 2), (rank // 2, 2), (rank % 2, 2)]
        assert theirs == 4


def different_sizes(wire):
    """Rank 1 exchanges another number of bytes: both get an error that says what they waited for."""
    begun = time.monotonic()
    small = Wire(torch.device("cpu"), timeout_s=0.5)
    with pytest.raises(WireError, match=r"reduce_scatter failed on rank \d of 2, (32|64) bytes: no answer in 0.5"):
        small.reduce_scatter(torch.empty(4 + 4 * wire.rank), torch.ones(8 + 8 * wire.rank)).wait()
    return time.monotonic() - begun


def test_messages_of_other_sizes_are_never_taken_for_ours():
    assert max(ranks.run(different_sizes, 2)) < 5


def peer_leaves(wire):
    if wire.rank == 1:
        os._exit(0)
    begun = time.monotonic()
    with pytest.raises(WireError, match="all_reduce failed"):
        wire.sum_(torch.ones(2))
    return time.monotonic() - begun


def test_a_lost_peer_is_an_error():
    with pytest.raises(ranks.RankFailed, match="rank 1 ended without an answer"):
        ranks.run(peer_leaves, 2)


def closes(wire):
    """A wire whose exchange has used its threads; none of them is left after it is closed."""
    other = Wire(wire.device)
    out = torch.empty(64)
    other.all_gather_into(out, torch.full((64 // wire.size,), float(wire.rank))).wait()
    ordered_all_reduce(other, torch.ones(64)).wait()
    before = [thread.name for thread in threading.enumerate() if thread.name.startswith("fasttrain wire")]
    other.close()
    return before, [thread.name for thread in threading.enumerate() if thread.name.startswith("fasttrain wire")]


def test_a_closed_wire_leaves_no_thread():
    for before, after in ranks.run(closes, 2):
        assert before
        assert after == []


def raises_after_its_peer_lost_it(wire):
    wire.barrier()  # a rank that ends while the other is still connecting would be a cause of its own
    if wire.rank == 0:
        raise WireError("the consequence")
    time.sleep(0.2)
    raise ValueError("a reason")


def lonely_answer(wire):
    if wire.rank == 1:
        raise ValueError("a reason")
    return wire.rank


def test_the_pool_reports_a_rank_that_raises():
    with pytest.raises(ranks.RankFailed, match=r"rank 1 failed(.|\n)*ValueError: a reason"):
        ranks.run(lonely_answer, 2)


def test_the_pool_reports_the_cause_before_its_consequence():
    with pytest.raises(ranks.RankFailed, match=r"rank 1 failed(.|\n)*ValueError: a reason"):
        ranks.run(raises_after_its_peer_lost_it, 2)
