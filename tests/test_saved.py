"""States kept by storage options that go out and come back: resumed, converted, in full precision."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, generator
from stored import parameters, run, same, states

from fasttrain.optim import SGD, AdamW, convert
from fasttrain.precision.storage import PRESETS


@pytest.mark.parametrize("options", [*({"storage": name} for name in PRESETS), {"master": "kahan", "ema_decay": 0.9},
                                     {"master": "split", "state_dtype": "e5m2", "ema_decay": 0.5, "ema_dtype": "bf16"}],
                         ids=str)
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "torch.save"])  # torch cannot pickle 8-bit floats otherwise
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(options: dict[str, Any], how: str) -> None:
    params = parameters()
    optimizer = AdamW(params, lr=1e-2, **options)
    run(params, optimizer, 3)
    if how == "state_dict":
        twins = parameters()
        twin = AdamW(twins, lr=1.0, **options)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with torch.no_grad():  # in either order: here the weights come after the optimizer's state
            for p, q in zip(params, twins, strict=True):
                q.copy_(p)
    else:
        torch.save(optimizer, file := io.BytesIO())
        file.seek(0)
        twin = copy.deepcopy(optimizer) if how == "deepcopy" else torch.load(file, weights_only=False)
        twins = [p for group in twin.param_groups for p in group["params"]]
    same(run(params, optimizer, 3, first=3), run(twins, twin, 3, first=3), "weights")
    same(states(optimizer, params), states(twin, twins), "states")


@pytest.mark.parametrize("source", [{}, {"storage": "8-byte"}, {"storage": "5-byte"}, {"master": "kahan"}], ids=str)
@pytest.mark.parametrize("target", [None, {}, {"storage": "split"}, {"storage": "mixed", "ema_decay": 0.9}], ids=str)
def test_conversion(source: dict[str, Any], target: dict[str, Any] | None) -> None:
    params = parameters()
    old = AdamW(params, lr=1e-2, **source)
    run(params, old, 5)
    state = old.state_dict()
    before = copy.deepcopy(state)
    new = torch.optim.AdamW(params) if target is None else AdamW(params, **target)
    new.load_state_dict(convert(state, new))
    for index, p in enumerate(params):
        assert new.state[p]["step"].item() == 5
        decoded = convert(state, torch.optim.AdamW(params))["state"][index]
        for key in ("exp_avg", "exp_avg_sq"):
            kept = new.state[p][key]
            assert torch.equal(kept.float(), decoded[key].to(kept.dtype).float()), key
    run(params, new, 1, first=5)
    assert new.param_groups[0]["lr"] == 1e-2
    same([state["state"][0]], [before["state"][0]], "the source is as it was")


def test_a_master_survives_conversion() -> None:
    params = parameters()
    split = AdamW(params, lr=1e-3, storage="split")
    run(params, split, 5)
    mixed = AdamW(params, storage="mixed")
    mixed.load_state_dict(convert(split.state_dict(), mixed))
    back = AdamW(params, storage="split")
    back.load_state_dict(convert(mixed.state_dict(), back))
    same(states(back, params), states(split, params), "there and back")


@pytest.mark.parametrize("master", ["none", "fp32", "split", "kahan"])
@pytest.mark.parametrize("stepped", [False, True])
def test_weights_go_in_and_out_in_full_precision(master: str, stepped: bool) -> None:
    params = parameters()
    optimizer = SGD(params, lr=0.0, momentum=0.9, master=master)
    if stepped:
        run(params, optimizer, 1)
    weights = [torch.randn(p.shape, generator=generator(7)) for p in params]
    optimizer.load_full_precision(weights)
    run(params, optimizer, 2)
    for got, wanted, p in zip(optimizer.full_precision(), weights, params, strict=True):
        if master in ("fp32", "split"):
            assert_same_bits(got, wanted, master)
        else:
            assert torch.allclose(got, wanted, rtol=2.0**-8 if master == "none" else 2.0**-16)
        assert torch.allclose(p.detach().float(), wanted, rtol=2.0**-8)
    with pytest.raises(ValueError, match="1 weights are given for 2"):
        optimizer.load_full_precision(weights[:1])
    with pytest.raises(ValueError, match=r"the weight has shape \(3,\)"):
        optimizer.load_full_precision([weights[0], torch.zeros(3)])
