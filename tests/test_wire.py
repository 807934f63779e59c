"""The wire: the same bits on every rank, and an error rather than silence when a peer is gone."""

import os
import time

import pytest
import ranks
import torch

from fasttrain.dist.wire import WireError


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


def raises_after_its_peer_lost_it(wire):
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
