"""Cross-entropy of logits whose classes are divided over ranks, on real processes, against torch in float64 on one."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from entropy import Numbers, check_grads, check_losses, draw, exact
from helpers import assert_same_bits
from ranks import run
from torch import Tensor

from fasttrain.losses import cross_entropy, vocab_parallel_cross_entropy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = (Numbers(), Numbers(0.1, 1e-3))
# How classes are cut, by how many ranks: evenly, in uneven shards, with one that has none.
CUTS = {2: ([0, 500, 1000], [0, 3, 1000], [0, 1000, 1000]), 4: ([0, 250, 500, 750, 1000], [0, 1, 1, 30, 1000])}
SPECIAL = [[0.0, 1, 2, math.inf], [math.nan, 1, 2, 3], [-math.inf, -math.inf, 5, -math.inf], [-math.inf] * 4,
           [1, 2, -math.inf, 3]]


def apart(loss: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def parallel(wire: Any, cuts: Sequence[Sequence[int]]) -> dict[Any, Any]:
    """Every case's loss and derivative of this rank's columns; and what was sent."""
    found: dict[Any, Any] = {}
    for cut in cuts:
        first, last = cut[wire.rank], cut[wire.rank + 1]
        for dtype in (*DTYPES, torch.float64):
            for numbers in NUMBERS:
                logits, targets = draw((3, 7, 1000), dtype, 1)
                x = logits[..., first:last].clone().requires_grad_()
                before = wire.calls.copy(), wire.bytes.copy()
                loss = vocab_parallel_cross_entropy(
                    x, targets, first, 1000, wire, label_smoothing=numbers.label_smoothing, z_loss=numbers.z_loss,
                    reduction="none")
                found[tuple(cut), dtype, numbers] = (*apart(loss, x), wire.calls - before[0], wire.bytes - before[1])
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_against_one_process(ranks: int) -> None:
    answers = run(parallel, ranks, CUTS[ranks])
    for (cut, dtype, numbers), (loss, _, calls, sent) in answers[0].items():
        logits, targets = draw((3, 7, 1000), dtype, 1)
        wanted = exact(logits, targets, numbers, torch.ones(1))
        grads = torch.cat([answer[cut, dtype, numbers][1] for answer in answers], -1)
        if dtype == torch.float64:
            torch.testing.assert_close(loss, wanted.losses, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(grads, wanted.grads, rtol=1e-10, atol=1e-12)
        else:
            check_losses(loss, wanted.losses, (cut, dtype, numbers))
            check_grads(grads, wanted, (cut, dtype, numbers))
        for answer in answers[1:]:
            assert_same_bits(answer[cut, dtype, numbers][0], loss)
        assert dict(calls) == {"all_gather": 1}
        assert sent["all_gather"] == 21 * (40 if dtype == torch.float64 else 20) * (ranks - 1)


def others(wire: Any) -> dict[str, Any]:
    """Reductions, writing in place, padding, all ignored, extreme logits, special values."""
    found = {}
    logits, targets = draw((10, 1000), torch.float32, 2)
    first, last = 500 * wire.rank, 500 * (wire.rank + 1)
    for reduction in ("mean", "sum"):
        x = logits[:, first:last].clone().requires_grad_()
        found[reduction] = apart(vocab_parallel_cross_entropy(x, targets, first, 1000, wire, reduction=reduction), x)
    x = logits[:, first:last].clone().requires_grad_()
    found["in place"] = apart(vocab_parallel_cross_entropy(x * 1, targets, first, 1000, wire, inplace_backward=True), x)
    x = F.pad(logits[:, first:last], (0, 24), value=math.nan).requires_grad_()
    found["padded"] = apart(vocab_parallel_cross_entropy(x[:, :500], targets, first, 1000, wire), x)
    x = logits[:, first:last].clone().requires_grad_()
    found["ignored"] = apart(vocab_parallel_cross_entropy(x, torch.full_like(targets, -100), first, 1000, wire), x)
    x = (logits[:, first:last] * 30 + 1e4).requires_grad_()
    found["extreme"] = apart(vocab_parallel_cross_entropy(x, targets, first, 1000, wire, label_smoothing=0.1,
                                                          reduction="none"), x)
    x = torch.tensor(SPECIAL)[:, 2 * wire.rank : 2 * wire.rank + 2].requires_grad_()
    found["special"] = apart(vocab_parallel_cross_entropy(x, torch.full((5,), 2), 2 * wire.rank, 4, wire,
                                                          reduction="none"), x)
    calls = wire.calls.copy()
    try:
        vocab_parallel_cross_entropy(x, torch.full((5,), 4), 2 * wire.rank, 4, wire)
    except IndexError as error:
        found["error"] = str(error), dict(wire.calls - calls)
    return found


def test_options_and_values() -> None:
    one, other = run(others, 2)
    logits, targets = draw((10, 1000), torch.float32, 2)

    def whole(name: str) -> tuple[Tensor, Tensor]:
        assert_same_bits(one[name][0], other[name][0], name)
        return one[name][0], torch.cat([one[name][1], other[name][1]], -1)

    for reduction in ("mean", "sum"):
        x = logits.clone().requires_grad_()
        loss, grads = apart(cross_entropy(x, targets, reduction=reduction), x)
        torch.testing.assert_close(whole(reduction)[0], loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(whole(reduction)[1], grads, rtol=1e-5, atol=1e-7)
    assert_same_bits(whole("in place")[1], whole("mean")[1])
    assert_same_bits(one["padded"][1][:, :500], one["mean"][1])
    assert bool((one["padded"][1][:, 500:] == 0).all())
    assert whole("ignored")[0].isnan()
    assert_same_bits(whole("ignored")[1], torch.zeros(10, 1000))
    extreme = exact(logits * 30 + 1e4, targets, Numbers(0.1), torch.ones(1))
    check_losses(whole("extreme")[0], extreme.losses)
    check_grads(whole("extreme")[1], extreme)
    x = torch.tensor(SPECIAL).requires_grad_()
    loss, grads = apart(F.cross_entropy(x, torch.full((5,), 2), reduction="none"), x)
    torch.testing.assert_close(whole("special")[0], loss, equal_nan=True)
    torch.testing.assert_close(whole("special")[1], grads, equal_nan=True)
    said = "the target of row 0 is 4, and there are 4 classes: targets are from 0 to 3, or ignore_index (-100)"
    assert one["error"] == other["error"] == (said, {})  # on every rank, before anything is sent


# --- In one process, with the ranks' parts handed over ----------------------------------------------------------------

def test_any_gathering_function() -> None:
    """What the other ranks would send is computed first."""
    from fasttrain.kernels.cross_entropy import Terms, measure_part

    logits, targets = draw((6, 90), torch.float32, 3)
    cut = [0, 20, 50, 90]
    parts = torch.stack([measure_part(logits[:, a:b], targets, Terms(a, 90, -100, 0.0, 0.0)) for a, b in pairwise(cut)])
    loss = vocab_parallel_cross_entropy(logits[:, 20:50], targets, 20, 90, lambda own: parts)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first, vocabulary", [(-1, 10), (6, 10), (0, 4)])
def test_columns_outside_of_the_vocabulary(first: int, vocabulary: int) -> None:
    words = f"columns of classes {first} to {first + 4} do not lie in a vocabulary of {vocabulary}: give the class"
    logits, targets = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=words):
        vocab_parallel_cross_entropy(logits, targets, first, vocabulary, lambda parts: parts[None])
