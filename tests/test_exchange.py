"""Reductions made of messages between pairs, against sums that one process makes, and what they put on the wire."""

import pytest
import ranks
import torch
from helpers import assert_same_bits, generator, normal

from benchmarks import bench_exchange, harness, processes
from fasttrain.dist import exchange
from fasttrain.dist.control import Control
from fasttrain.dist.wire import Wire
from fasttrain.kernels import norm
from fasttrain.kernels.chunks import encode_int8
from fasttrain.precision import codecs

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LENGTH = 3 * 4 * 256 * 5  # cuts into whole blocks for 1, 2, 3 and 4 ranks


def bucket_of(rank, dtype=F32, length=LENGTH):
    return normal((length,), dtype, generator(100 + rank))


# --- The naive versions: everything of everybody in one process -------------------------------------------------------

def naive_sum(buckets, scale, out):
    """Rank after rank, in float32 (float64 for float64), rounded once."""
    wide = F64 if F64 in (buckets[0].dtype, out) else F32
    total = buckets[0].to(wide)
    for bucket in buckets[1:]:
        total = total + bucket.to(wide)
    return (total * torch.tensor(scale, dtype=wide)).to(out)


def naive_all_reduce(buckets, scale, wire, back):
    return naive_sum([b.to(wire) for b in buckets], scale, back).to(buckets[0].dtype)


def naive_int8(buckets, residuals, scale, back):
    decoded = []
    for bucket, residual in zip(buckets, residuals, strict=True):
        codes, units = torch.empty(len(bucket), dtype=torch.int8), torch.empty(len(bucket) // 256)
        encode_int8(bucket, codes, units, residual=residual)
        decoded.append(codecs.decode(codecs.NUMBER["int8"], codes, units, len(bucket)))
    return naive_sum(decoded, scale, back).to(buckets[0].dtype)


# --- Ranks ------------------------------------------------------------------------------------------------------------

def everything(wire: Wire):
    found = {}
    for source, out in ((F32, F32), (BF16, F32), (F16, F16), (F64, F64), (BF16, BF16)):
        mine = torch.empty(LENGTH // wire.size, dtype=out)
        found[source, out] = mine, wire.reduce_scatter(mine, bucket_of(wire.rank, source), "avg", squares=True).wait()
    inside = bucket_of(wire.rank)
    part = exchange.chunks_of(inside, wire.size)[wire.rank]
    wire.reduce_scatter(part, inside).wait()
    found["in place"] = part
    gathered = torch.full((LENGTH,), 77.0)
    exchange.chunks_of(gathered, wire.size)[wire.rank].copy_(part)
    wire.all_gather_into(gathered, exchange.chunks_of(gathered, wire.size)[wire.rank]).wait()
    found["gathered"] = gathered
    for source, on_wire, back in ((F32, None, None), (F32, BF16, None), (F32, BF16, F32), (BF16, None, None)):
        bucket = bucket_of(wire.rank, source)
        measured = exchange.ordered_all_reduce(wire, bucket, 0.3, True, on_wire, back).wait()
        found[source, on_wire, back] = bucket, measured
    residual = torch.zeros(LENGTH)
    for turn in range(2):
        bucket = bucket_of(wire.rank)
        exchange.int8_all_reduce(wire, bucket, 1 / wire.size, residual=residual).wait()
        found["int8", turn] = bucket, residual.clone()
    into = [torch.full((r + 1,), -1) for r in range(wire.size)]
    wire.all_to_all(into, [torch.full((wire.rank + 1,), 10 * wire.rank + r) for r in range(wire.size)]).wait()
    found["all to all"] = [t.tolist() for t in into]
    return found


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_every_exchange_is_the_sum_of_one_process(size):
    answers = ranks.run(everything, size)
    for rank, found in enumerate(answers):
        def mine(flat, rank=rank):
            return exchange.chunks_of(flat, size)[rank]

        for source, out in ((F32, F32), (BF16, F32), (F16, F16), (F64, F64), (BF16, BF16)):
            scattered, (squares, nonfinite) = found[source, out]
            wanted = naive_sum([bucket_of(r, source) for r in range(size)], 1 / size, out)
            assert_same_bits(scattered, mine(wanted), f"{source} -> {out}")
            assert_same_bits(squares, norm.squares([mine(wanted)])[0][0])
            assert not nonfinite
        total = naive_sum([bucket_of(r) for r in range(size)], 1.0, F32)
        assert_same_bits(found["in place"], mine(total))
        assert_same_bits(found["gathered"], total)
        for source, on_wire, back in ((F32, None, None), (F32, BF16, None), (F32, BF16, F32), (BF16, None, None)):
            bucket, (squares, _) = found[source, on_wire, back]
            wanted = naive_all_reduce([bucket_of(r, source) for r in range(size)], 0.3, on_wire or source,
                                      back or on_wire or source)
            assert_same_bits(bucket, wanted, f"{source} by {on_wire} back by {back}")
            assert_same_bits(squares, norm.squares([mine(wanted).to(back or on_wire or source)])[0][0])
        residuals = [torch.zeros(LENGTH) for _ in range(size)]
        for turn in range(2):
            wanted = naive_int8([bucket_of(r) for r in range(size)], residuals, 1 / size, BF16)
            bucket, residual = found["int8", turn]
            assert_same_bits(bucket, wanted, f"int8, turn {turn}")
            assert_same_bits(residual, residuals[rank])
        assert found["all to all"] == [[10 * r + rank] * (r + 1) for r in range(size)]


def in_pieces(wire, cuts):
    """The same gradients in buckets of other lengths, all under way at once, waited for in the other order."""
    whole = bucket_of(wire.rank, BF16, 6000)
    buckets = [piece.clone() for piece in whole.split(cuts)]
    works = [exchange.ordered_all_reduce(wire, bucket, 0.5) for bucket in buckets]
    for work in reversed(works):
        work.wait()
    assert all(work.done() for work in works)
    return torch.cat(buckets)


def test_the_sum_does_not_depend_on_the_cut_into_buckets():
    one, many = (ranks.run(in_pieces, 2, cuts) for cuts in ([6000], [2, 998, 1500, 1500, 2000]))
    assert_same_bits(one[0], one[1])
    assert_same_bits(one[0], many[0])
    assert_same_bits(one[0], naive_all_reduce([bucket_of(r, BF16, 6000) for r in range(2)], 0.5, BF16, BF16))


def counted(wire):
    bucket, size = torch.ones(1024 * wire.size), wire.size
    wire.reduce_scatter(torch.empty(1024), bucket).wait()
    wire.all_gather_into(bucket, bucket[:1024].clone()).wait()
    wire.all_reduce(bucket).wait()
    before = wire.sent
    exchange.ordered_all_reduce(wire, bucket, wire=BF16).wait()
    half = wire.sent - before
    exchange.int8_all_reduce(wire, bucket).wait()
    return dict(wire.calls), dict(wire.bytes), half, wire.sent - before - half, size


def test_bytes_on_the_wire_are_those_of_the_formula():
    for calls, sent, half, coded, size in ranks.run(counted, 2):
        whole = 4096 * size
        assert calls == {"reduce_scatter": 1, "all_gather": 1, "all_reduce": 3}
        assert sent["reduce_scatter"] == sent["all_gather"] == whole * (size - 1) // size
        assert half == whole * (size - 1) // size  # half of the 2 (n - 1) / n of float32
        assert sent["all_reduce"] == 2 * whole * (size - 1) // size + half + coded
        assert coded == (1024 + 4 * 4 + 2 * 1024) * (size - 1)  # codes and units one way, bfloat16 back


@pytest.mark.parametrize("shape", [(10,), (4, 4)])
def test_a_bucket_that_cannot_be_cut_is_refused(shape):
    with pytest.raises(ValueError, match=r"cannot be cut into 4 equal chunks.*multiple of 4"):
        exchange.check_cut(torch.empty(shape), 4)
    with pytest.raises(ValueError, match=r"whole blocks of 256.*multiple of 512"):
        exchange.check_cut(torch.empty(256), 2, 256)


def test_the_benchmark_measures_every_rival():
    rows = []
    for work, (seconds, sent) in ranks.run(bench_exchange.measure, 2, 1024, 2)[0].items():
        assert all(len(times) == 2 for times in seconds.values())
        medians = harness.medians(processes.slowest([seconds, seconds]))
        rows.append({"work": work, "elements": 1024, "seconds": medians, "bytes_sent": sent,
                     "ratio": {name: harness.ratio(seconds, "gloo", name) for name in seconds if name != "gloo"}})
    assert [row["bytes_sent"]["fasttrain"] for row in rows] == [2048, 2048, 4096]
    assert "all-reduce" in bench_exchange.report(rows)


@pytest.mark.gpu
def test_one_process_on_a_gpu():
    """Everything that an exchange does on a GPU but for the messages."""
    device = torch.device("cuda", 0)
    wire = Wire(device, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        bucket = bucket_of(0).to(device)
        out = torch.empty_like(bucket)
        squares, nonfinite = wire.reduce_scatter(out, bucket, "avg", squares=True).wait()
        assert_same_bits(out, bucket)
        assert_same_bits(squares, norm.squares([bucket])[0][0])
        assert not nonfinite
        wire.all_gather_into(out, bucket).wait()
        measured = exchange.ordered_all_reduce(wire, out, 0.5, squares=True, wire=BF16).wait()
        assert_same_bits(out.cpu(), naive_all_reduce([bucket_of(0)], 0.5, BF16, BF16))
        assert measured[0] > 0
        residual, wanted = torch.zeros_like(bucket), torch.zeros(LENGTH)
        exchange.int8_all_reduce(wire, bucket, residual=residual).wait()
        assert_same_bits(bucket.cpu(), naive_int8([bucket_of(0)], [wanted], 1.0, BF16))
        assert_same_bits(residual.cpu(), wanted)
        outcome = Control(wire, 3).send([1, 2], squares, nonfinite, tokens=5, used=[True, False, True]).read()
        assert outcome == (squares.item(), 0, None, 5, 0, [1, 0, 1])
    finally:
        wire.close()
