"""Data parallelism in all its ways equals one process on the full batch: in bits where promised, else within bounds."""

from __future__ import annotations

import itertools
from typing import Any

import matrix
import pytest
import ranks
import torch
from helpers import assert_same_bits
from matrix import F32, Case, Net, allowed
from torch import Tensor, nn

from fasttrain.optim import AdamW
from fasttrain.parallel import DataParallel, Zero, shard

OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
MAX_NORM = 0.5
# Rounding of one batch of everything beside many small ones: the order of sums, and activations of 16 bits.
FULL = {"float32": 1e-5, "mixed": 0.02, "mixed in float32 buckets": 0.02}


def parallel(wire: Any, case: Case) -> tuple[Any, Any, nn.Module]:
    """What accumulates and steps, its optimizer, and the bare module."""
    net = Net(case)
    small = case.buckets == "small buckets"
    if case.stage == "stage 3":
        reduce_dtype = F32 if case.dtypes == "mixed in float32 buckets" else None
        sharded = shard(net, blocks="layers" if small or case.dtypes != "float32" else [], wire=case.wire,
                        reduce_dtype=reduce_dtype, watch=False)
        return sharded, AdamW(net.parameters(), **OPTIONS), net
    model = DataParallel(net, mesh=wire, wire=case.wire, bucket_cap_mb=0.003 if small else None,
                         grad_dtype=F32 if case.dtypes == "mixed in float32 buckets" else None)
    assert (len(model.reducer.layout.buckets) > 3) == small
    if case.stage == "stage 0":
        return model, AdamW(net.parameters(), **OPTIONS), net
    return model, Zero(model, AdamW, stage=int(case.stage[-1]), rotating=2, **OPTIONS), net


def whole(p: Tensor) -> Tensor:
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def trained(wire: Any, cases: list[Case]) -> int:
    for case in cases:
        try:
            one(wire, case)
        except Exception as error:
            error.add_note(f"in the case: {case}")
            raise
    return len(cases)


def one(wire: Any, case: Case) -> None:
    """Steps of a case; beside it a whole model is stepped with the mean that one process computes."""
    model, optimizer, net = parallel(wire, case)
    beside = Net(case)
    twin = AdamW(beside.parameters(), **OPTIONS)
    for p in beside.parameters():
        if case.dtypes == "mixed in float32 buckets":
            p.grad_dtype = None
    kept = [[0.0] * case.size for _ in beside.parameters()]  # of each parameter and rank, what codes lacked at most
    for step, micros in enumerate(case.groups()):
        grads = matrix.of_ranks(beside, case, step)
        means = means_of(case, grads, beside)
        rows = on_the_full_batch(beside, case, step, means_of(case._replace(wire="same"), grads, beside))
        accumulate = model.accumulate(int(case.accumulate.split()[1]))
        for micro in range(micros):
            with accumulate(final=step + 1 == len(case.groups()) and micro + 1 == micros):
                x = matrix.batch_of(step, wire.rank, micro)
                model.count(len(x))
                matrix.loss_of(model if case.stage != "stage 3" else net, case, x, wire.rank).backward()
        assert accumulate.ends
        if case.stage == "stage 0" and not case.exact:
            for index, p in enumerate(net.parameters()):
                means[index] = bounded(case, p.grad, means[index], [one[index] for one in grads], kept[index])
        norm = model.step(optimizer, MAX_NORM)
        scale = torch.tensor(rows / case.size)
        of_means = sum(mean.double().square().sum() for mean in means if mean is not None)
        torch.testing.assert_close(norm, (of_means.sqrt() / scale).float(), rtol=1e-6, atol=0)
        for p, mean in zip(beside.parameters(), means, strict=True):
            p.grad = None if mean is None else mean.clone()
        twin.step_scaled(scale, torch.tensor(False), norm, MAX_NORM)
        optimizer.zero_grad()
        for (name, p), q in zip(net.named_parameters(), beside.parameters(), strict=True):
            assert_same_bits(whole(p), q.detach(), f"{name} after step {step}")
    if case.stage != "stage 3":
        model.reducer.remove()


def means_of(case: Case, grads: list[list[Tensor | None]], model: nn.Module) -> list[Tensor | None]:
    of_each = zip(*grads, strict=True)
    return [matrix.mean_of(case, several, p) for several, p in zip(of_each, model.parameters(), strict=True)]


def on_the_full_batch(model: nn.Module, case: Case, step: int, means: list[Tensor | None]) -> int:
    """The mean over ranks is that of one batch of everything, of so many rows, within the rounding of its dtypes."""
    everything, rows = matrix.full_batch(model, case, step)
    bound = FULL["mixed" if case.stage == "stage 3" and case.wire == "bf16" else case.dtypes]  # accumulated in bfloat16
    for mean, full in zip(means, everything, strict=True):
        assert (mean is None) == (full is None)
        if mean is not None and full is not None:
            assert (mean.float() / (rows / case.size) - full).norm() <= bound * full.norm() + 1e-7
    return rows


def bounded(case: Case, got: Tensor | None, wanted: Tensor | None, grads: list[Tensor | None],
            kept: list[float]) -> Tensor | None:
    """The gradient of a parameter at stage 0, where the sum has no promised bits, within its bound.

    same: a sum of W addends in any order is rounded W - 1 times, by half an ulp of at most the sum of magnitudes; so
    is the one that it is compared with. int8: codes stand for M c |c| / 127^2, where M is the largest magnitude of
    what is sent, the gradient and what the last codes lacked; half the widest gap is 253/2 of that. The mean travels
    back in bfloat16.
    """
    assert (got is None) == (wanted is None)
    if got is None or wanted is None:
        return None
    there = [torch.zeros_like(wanted) if grad is None else grad for grad in grads]
    half_ulp = torch.finfo(got.dtype).eps / 2
    sizes = sum(grad.float().abs() for grad in there) / case.size  # type: ignore[union-attr]
    bound = 2 * (case.size - 1) * half_ulp * sizes
    if case.wire == "int8":
        bound = 2 * half_ulp * sizes + 2.0**-8 * wanted.float().abs()
        for rank, grad in enumerate(there):
            before = kept[rank]
            kept[rank] = (grad.float().abs().max().item() + before) * 126.5 / 127**2 * (1 + 1e-6)
            bound = bound + (before + kept[rank]) / case.size * (1 + 2.0**-8)
    beyond = (got.float() - wanted.float()).abs() - bound
    assert (beyond <= 0).all(), f"{beyond.max()} beyond the bound of {bound.flatten()[beyond.argmax()]}"
    return got.clone()


def test_every_pair_occurs_in_the_list() -> None:
    factors = matrix.FACTORS
    assert matrix.listed() == matrix.covering(), "write matrix.covering() to matrix.txt, a case a line"
    for first, second in itertools.combinations(factors, 2):
        found = {(getattr(case, first), getattr(case, second)) for case in matrix.listed()}
        assert found == {(a, b) for a in factors[first] for b in factors[second] if allowed({first: a, second: b})}


@pytest.mark.parametrize("size", matrix.SIZES)
def test_equals_one_process_on_the_full_batch(size: int) -> None:
    cases = [case for case in matrix.listed() if case.size == size]
    assert ranks.run(trained, size, cases) == [len(cases)] * size


@pytest.mark.slow
@pytest.mark.parametrize("cases", matrix.products(), ids=lambda cases: f"{cases[0]}, and others")
def test_every_combination(cases: list[Case]) -> None:
    assert ranks.run(trained, cases[0].size, cases) == [len(cases)] * cases[0].size
