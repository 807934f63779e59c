"""One step over micro-batches: the same numbers and weights however the model is divided."""

import math

import pytest
import ranks
import torch
from torch import nn

from fasttrain import LossScaler, optim
from fasttrain.parallel import DataParallel, Zero, shard
from fasttrain.train.stepper import Stepper

STEPS, BATCH, MICRO = 3, 8, 2


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))


def batch(step):
    return torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(step))


def mean(model, x):
    return (model(x) - 1).square().mean()


def by_items(model, x):
    rows = x[:, 0] > -0.5  # other numbers of items in every micro-batch
    return (model(x[rows]) - 1).square().sum(), int(rows.sum()) * 2


def run(wire, how, loss, poisoned=None, micro=MICRO, scaled=False):
    """The numbers of each step, and the weights."""
    model, zero = made(), how.startswith("zero")
    kind = torch.optim.AdamW if how.endswith("torch") else optim.AdamW
    divided = model
    if how.startswith("data") or zero:
        divided = DataParallel(model, mesh=wire, wire="ordered")
    elif how.startswith("shard"):
        divided = shard(model, blocks=[model[0]])
    params = list(model.parameters())
    optimizer = Zero(params, kind, stage=int(how[4]), lr=0.1) if zero else kind(params, lr=0.1)
    scaler = LossScaler(2.0**8) if scaled else None
    stepper = Stepper(divided, optimizer, loss, clip=0.05, scaler=scaler)
    rank, size = (0, 1) if wire is None else (wire.rank, wire.size)
    for step in range(STEPS):
        mine = batch(step).chunk(size)[rank]
        if step == poisoned and rank == size - 1:
            mine[0] = math.inf
        stepper.stop = step == 1 and rank == 0
        stepper.run(mine.chunk(micro))
    numbers = stepper.arrived()
    assert stepper.arrived() == []
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return numbers, [w.detach().clone() for w in weights], scaler.get_scale() if scaled else None


def check(found, expected):
    for (numbers, weights, _), (others, expected_weights, _) in zip(found, expected * len(found), strict=True):
        assert numbers == found[0][0], "the same on every rank"
        assert [n.step for n in numbers] == [1, 2, 3]
        assert [(n.skipped, n.stop) for n in numbers] == [(n.skipped, n.stop) for n in others]
        for a, b in zip(numbers, others, strict=True):
            assert (a.loss, a.norm) == pytest.approx((b.loss, b.norm), rel=1e-5, nan_ok=True)
        for a, b in zip(weights, expected_weights, strict=True):
            torch.testing.assert_close(a, b)


DIVIDED = ["data", "data torch", "zero1", "zero2", "zero1 torch", "shard", "shard torch"]


@pytest.mark.parametrize("how", DIVIDED)
def test_ranks_do_what_one_process_does(how):
    expected = [run(None, "alone" + how[-6:] * how.endswith("torch"), mean, micro=4)]
    check(ranks.run(run, 2, how, mean), expected)


@pytest.mark.parametrize("how", ["data", "zero2", "shard"])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_mean_over_items_of_all_ranks(how, scaled):
    expected = [run(None, "alone", by_items, micro=1)]
    check([run(None, "alone", by_items, micro=4, scaled=scaled)], expected)
    check(ranks.run(run, 2, how, by_items, None, MICRO, scaled), expected)


@pytest.mark.parametrize("how", DIVIDED)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(how):
    found = ranks.run(run, 2, how, mean, 1, MICRO, not how.endswith("torch"))
    for numbers, weights, scale in found:
        assert [n.skipped for n in numbers] == [False, True, False]
        assert not math.isfinite(numbers[1].norm)
        assert scale in (None, 2.0**7)
        assert all(torch.isfinite(w).all() for w in weights)
    expected = run(None, "alone" + how[-6:] * how.endswith("torch"), mean, 1, 4)
    for a, b in zip(found[0][1], expected[1], strict=True):
        torch.testing.assert_close(a, b)


def some_items(model, x):
    """One rank may have none at all."""
    rows = x[:, 0] > 0.7
    return (model(x[rows]) - 1).square().sum(), int(rows.sum()) * 2


@pytest.mark.parametrize("how", ["data", "zero2", "shard"])
def test_a_rank_may_have_no_items(how):
    expected = [run(None, "alone", some_items, micro=1)]
    counts = [[some_items(made(), part)[1] for part in batch(step).chunk(2)] for step in range(STEPS)]
    assert any(0 in one and any(one) for one in counts)
    check(ranks.run(run, 2, how, some_items, None, 1), expected)


def nan_loss(model, x):
    """Not finite at one step, on one rank, with gradients that are."""
    wrong = math.nan if torch.isinf(x).any() else 0.0
    return (model(x.nan_to_num(posinf=0.0)) - 1).square().mean() + wrong


def nan_loss_by_items(model, x):
    return nan_loss(model, x) * x.numel(), x.numel()


@pytest.mark.parametrize("how", [*DIVIDED, "data items", "zero2 items", "shard items"])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(how):
    loss = nan_loss_by_items if how.endswith("items") else nan_loss
    found = ranks.run(run, 2, how.removesuffix(" items"), loss, 1)
    for numbers, weights, _ in found:
        assert [n.skipped for n in numbers] == [False, True, False]
        assert math.isfinite(numbers[1].norm)
        assert all(torch.equal(a, b) for a, b in zip(weights, found[0][1], strict=True))
    expected = run(None, "alone" + how[-6:] * how.endswith("torch"), loss, 1, 4)
    assert [n.skipped for n in expected[0]] == [False, True, False]
    for a, b in zip(found[0][1], expected[1], strict=True):
        torch.testing.assert_close(a, b)


def residuals(wire, growth_interval):
    model = made()
    parallel = DataParallel(model, mesh=wire, wire="int8")
    stepper = Stepper(parallel, optim.SGD(model.parameters(), lr=0.0), mean,
                      scaler=LossScaler(8.0, growth_interval=growth_interval))
    stepper.run([batch(0)])
    return stepper.scaler.get_scale(), parallel.reducer.method.residuals[0].clone()


def test_what_codes_lack_is_scaled_as_the_losses_are():
    for (scale, lacked), (grown, scaled) in zip(ranks.run(residuals, 2, 100), ranks.run(residuals, 2, 1), strict=True):
        assert (scale, grown) == (8.0, 16.0)
        assert lacked.any()
        assert torch.equal(scaled, 2 * lacked)


def test_what_torchs_optimizers_cannot_do():
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"a loss scale needs an optimizer of fasttrain\.optim: SGD is not"):
        Stepper(model, optimizer, mean, scaler=LossScaler())
    with pytest.raises(TypeError, match="a SGD cannot divide late"):
        Stepper(model, optimizer, by_items).run([batch(0)])
