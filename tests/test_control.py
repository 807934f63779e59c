"""The control of a step: sums that are right, and the same error on every rank where they disagree."""

import math

import pytest
import ranks
import torch

from fasttrain.dist.control import Control, Disagreement, control, different


def adds(wire):
    total = wire.size * (wire.size - 1) // 2
    assert [t.tolist() for t in control(wire, torch.tensor([wire.rank, -wire.rank, 5]))] == [
        [0, -(wire.size - 1), 5], [wire.size - 1, 0, 5], [total, -total, 5 * wire.size]]
    step = Control(wire, parameters=100)
    used = [wire.rank == 0 or i % 3 == 0 for i in range(100)]
    plain = step.send([1, 4], squares=0.5, tokens=2**40 + wire.rank, used=used).read()
    pending = step.send([2, 4], torch.tensor(math.nan if wire.rank == 1 else 1.0, dtype=torch.float64),
                        torch.tensor(wire.rank == 1), stop=wire.rank == 0)
    both = step.send([3, 4], nonfinite=True).read()
    with pytest.raises(ValueError, match=r"compare \('step', 'buckets'\), each of 53 bits at most; got \[1\]"):
        step.send([1])
    with pytest.raises(ValueError, match="53 bits"):
        step.send([1, 2**60])
    return plain, pending.read(), pending.nonfinite.item(), both


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_added(size):
    for plain, spoilt, nonfinite, both in ranks.run(adds, size):
        assert plain.squares == size / 2
        assert plain.tokens == size * 2**40 + size * (size - 1) // 2
        assert plain.used == [size if i % 3 == 0 else 1 for i in range(100)]
        assert (plain.nonfinite, plain.culprit, plain.stop) == (0, None, 0)
        assert math.isnan(spoilt.squares)
        assert nonfinite
        assert (spoilt.nonfinite, spoilt.culprit, spoilt.stop) == (1, 1, 1)
        assert spoilt.used == [0] * 100
        assert (both.nonfinite, both.culprit) == (size, None)


def comes_apart(wire):
    """Rank 1 has skipped a backward; the wire still works afterwards."""
    step = Control(wire)
    pending = step.send([8 - (wire.rank == 1), 3])
    with pytest.raises(Disagreement) as caught:
        pending.read()
    return str(caught.value), wire.sum_(torch.ones(1)).item()


def test_a_disagreement_is_the_same_error_on_every_rank():
    words = "the ranks have come apart: step is 8 on ranks 0 and 2 and 7 on rank 1"
    assert ranks.run(comes_apart, 3) == [(words, 3)] * 3


def test_everything_that_differs_is_named():
    assert different(("a", "b", "c"), [[1, 2, 3], [1, 3, 4], [1, 3, 5], [1, 3, 4]]) == (
        "the ranks have come apart: b is 2 on rank 0 and 3 on ranks 1, 2 and 3; "
        "c is 3 on rank 0 and 4 on ranks 1 and 3 and 5 on rank 2")
