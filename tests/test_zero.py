"""ZeRO: the bits of the optimizer that is not divided, on every rank, and its states divided."""

import copy
import itertools

import pytest
import ranks
import torch
from sharded import assert_same_model, assert_same_state, backward, model_of, pair, state_bytes
from torch import nn

from fasttrain.optim import (
    LAMB,
    LARS,
    SGD,
    SOAP,
    Adafactor,
    Adam,
    AdamW,
    Lion,
    Muon,
    NAdam,
    ScheduleFreeAdamW,
    StableAdamW,
)
from fasttrain.parallel import DataParallel, Zero

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SMALL = {"min_size": 64}  # block codes for nearly all parameters

# optimizer, options, dtype
CASES = {
    "AdamW": (AdamW, {"lr": 0.1, "amsgrad": True}, F32),
    "Adam fp64": (Adam, {"lr": 0.1}, torch.float64),
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9}, BF16),
    "NAdam": (NAdam, {"lr": 0.01}, F16),
    "10-byte": (AdamW, {"lr": 0.1, "storage": "10-byte", "ema_decay": 0.9}, BF16),
    "8-byte": (AdamW, {"lr": 0.1, "storage": "8-byte", **SMALL}, BF16),
    "6-byte": (Lion, {"lr": 0.1, "storage": "6-byte", "ema_decay": 0.9, "ema_dtype": "bf16", **SMALL}, BF16),
    "5-byte": (AdamW, {"lr": 0.1, "storage": "5-byte", **SMALL}, BF16),
    "kahan": (AdamW, {"lr": 0.1, "master": "kahan", "state_dtype": "fp8"}, F16),
    "ScheduleFree": (ScheduleFreeAdamW, {"lr": 0.1, "master": "fp32"}, BF16),
    "clip_each": (AdamW, {"lr": 0.1, "clip_each": 0.1}, F32),
    "Muon": (Muon, {"lr": 0.01}, F32),
    "SOAP": (SOAP, {"lr": 0.01}, F32),
    "Adafactor": (Adafactor, {"lr": 0.01}, F32),
    "LAMB": (LAMB, {"lr": 0.01}, BF16),
    "LARS": (LARS, {"lr": 0.01}, F32),
    "StableAdamW": (StableAdamW, {"lr": 0.01}, F32),
}
STAGES, SIZES, MICROS = (1, 2), (1, 2, 4), (1, 2)
# Every case with either stage over the list, sizes and micro-batches in turns; all of them are slow.
FEW = [(case, 1 + index % 2, (2, 4, 2, 1)[index % 4], 1 + index // 2 % 2) for index, case in enumerate(CASES)]


def trained(wire, chosen):
    """Steps of several cases in one start of the ranks."""
    for case, stage, micros in chosen:
        cls, options, dtype = CASES[case]
        model, zero, twin, whole = pair(wire, cls, dtype, stage, options)
        for step in range(4):
            for wrapped, optimizer in ((model, zero), (twin, whole)):
                backward(wrapped, step, wire.rank, micros)
                optimizer._clip = 0.5
                optimizer.step()
                optimizer.zero_grad()
            assert_same_model(model, twin, f"{case}, stage {stage}, step {step}")
        full = zero.consolidate(None)
        assert_same_state(full, whole.state_dict())
        whole.load_state_dict(full)
    return True


@pytest.mark.parametrize("size", SIZES)
def test_the_bits_of_the_undivided_optimizer(size):
    assert all(ranks.run(trained, size, [(case, stage, micros) for case, stage, n, micros in FEW if n == size]))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_the_bits_of_every_combination(case, size):
    assert all(ranks.run(trained, size, [(case, *rest) for rest in itertools.product(STAGES, MICROS)]))


def loaded(wire, state, before, dtype):
    """A state from another number of ranks, and a stage more."""
    cls, options, _ = CASES["6-byte"]
    model, zero, twin, whole = pair(wire, cls, dtype, 2, options)
    state = copy.deepcopy(state)  # what a pipe brings is memory that the ranks share
    for wrapped, optimizer in ((model, zero), (twin, whole)):
        wrapped.load_state_dict(before)
        optimizer.load_state_dict(state)
        for step in range(2):
            backward(wrapped, step, wire.rank)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_model(model, twin, "loaded")
    full = zero.consolidate(None)
    assert_same_state(full, whole.state_dict())
    zero.consolidate_state_dict(to=wire.size - 1)
    if wire.rank == wire.size - 1:
        assert_same_state(zero.state_dict(), full)
    else:
        with pytest.raises(RuntimeError, match="no rank has the whole state"):
            zero.state_dict()
    return True


def saved(wire):
    cls, options, dtype = CASES["6-byte"]
    model = model_of(wire, dtype)
    zero = Zero(model, cls, **options)
    for step in range(2):
        backward(model, step, wire.rank)
        zero.step()
    found = zero.consolidate(to=0)
    assert bool(found) == (wire.rank == 0)
    with pytest.raises(ValueError, match="is it of another model"):
        zero.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
    return found, model.state_dict()


def test_a_state_goes_to_another_number_of_ranks_and_another_stage():
    (state, before), _ = ranks.run(saved, 2)
    assert all(ranks.run(loaded, 3, state, before, BF16))


def divided(wire, stage):
    model = DataParallel(nn.Sequential(*(nn.Linear(200, 200) for _ in range(8))), mesh=wire, bucket_cap_mb=0.3)
    zero = Zero(model, AdamW, stage=stage, lr=0.1, rotating=2)
    model(torch.ones(2, 200)).sum().backward()
    buckets = {bucket.data.untyped_storage().data_ptr(): bucket.data.untyped_storage().nbytes()
               for bucket in model.reducer.buckets}
    assert not any(p.grad.data_ptr() for p in model.module.parameters())
    zero.step()
    return state_bytes(zero.inner), sum(buckets.values()), len(zero.inner.state)


def test_states_are_divided_by_the_ranks():
    elements = 8 * (200 * 200 + 200)
    for size, stage in ((2, 1), (4, 2)):
        found = ranks.run(divided, size, stage)
        assert sum(held - 4 * pieces for held, _, pieces in found) == 2 * 4 * elements  # a step count for each piece
        assert max(held for held, _, _ in found) <= 1.03 * 2 * 4 * elements / size  # shards are padded
        for _, buckets, _ in found:
            assert buckets >= 4 * elements if stage == 1 else buckets <= 0.3 * 4 * elements  # two buckets of eight
