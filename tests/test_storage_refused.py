"""Storage options, state dicts and states that do not fit: errors that name them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stored import give_gradients, parameters, run, same, states
from torch.nn import Parameter

from fasttrain.optim import LAMB, LARS, SOAP, Adafactor, AdamW, StableAdamW, convert


@pytest.mark.parametrize("options, message", [
    (dict(master="fp64"), "master='fp64' is none of"),
    (dict(state_dtype="int3"), "state_dtype='int3' is none of"),
    (dict(state_dtype={"exp_avg": "fp7"}), r"state_dtype\['exp_avg'\]='fp7' is none of"),
    (dict(state_rounding="up"), "state_rounding='up' is none of"),
    (dict(ema_decay=1.0), r"ema_decay=1.0 must be in \[0, 1\)"),
    (dict(ema_dtype="int8"), "ema_dtype='int8' is none of"),
    (dict(min_size=-1), "min_size=-1 must be an integer"),
    (dict(clip_value=0.0), "clip_value=0.0 must be positive"),
    (dict(clip_each=-1.0), "clip_each=-1.0 must be positive"),
    (dict(storage="3-byte"), "storage '3-byte' is none of"),
])
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(), **options)
    optimizer = AdamW(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters(), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype, options, message", [
    (torch.float32, dict(master="fp32"), "is torch.float32; master='fp32' is for bfloat16 and float16 parameters"),
    (torch.float64, dict(master="stochastic"), "is torch.float64; master='stochastic'"),
    (torch.float16, dict(master="split"), "is torch.float16; master='split' is for bfloat16 parameters: use"),
    (torch.float64, dict(state_dtype="int8"), "is torch.float64, whose states are float64"),
    (torch.complex64, dict(ema_decay=0.9), "takes real floating-point parameters"),
    (torch.bfloat16, dict(state_dtype={"momentum": "int8"}), "the states are exp_avg, exp_avg_sq"),
])
def test_what_a_dtype_cannot_take(dtype: torch.dtype, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        AdamW([("blocks.0.weight", Parameter(torch.zeros(5000, dtype=dtype)))], **options)
    assert "blocks.0.weight" in str(error.value)


@pytest.mark.parametrize("kind", [LAMB, LARS, StableAdamW, Adafactor, SOAP])
@pytest.mark.parametrize("options", [dict(clip_each=1.0), dict(clip_value=1.0), dict(state_dtype="int8")], ids=str)
def test_options_of_elements_for_others(kind: Any, options: dict[str, Any]) -> None:
    params = [Parameter(torch.zeros(80, 64))]
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*{kind.__name__} does not step it element by"):
        kind(params, lr=1.0, **options)
    optimizer = kind(params, lr=1.0)
    with pytest.raises(ValueError, match="does not step it element by element"):
        optimizer.add_param_group({"params": parameters(), **options})
    assert len(optimizer.param_groups) == 1


def test_state_dicts_that_do_not_fit() -> None:
    params = parameters()
    optimizer = AdamW(params, storage="8-byte")
    run(params, optimizer, 2)
    before, kept = [p.detach().clone() for p in params], states(optimizer, params)
    fitting = optimizer.state_dict()

    def changed(change: Any) -> dict[str, Any]:
        state = copy.deepcopy(fitting)
        change(state)
        return state

    others = {
        "kept with the defaults": AdamW(params).state_dict() | {"state": {0: {"step": torch.tensor(1.0)}}},
        "has no 'exp_avg_scale'": changed(lambda s: s["state"][0].pop("exp_avg_scale")),
        "has 'momentum_buffer' for it": changed(lambda s: s["state"][0].update(momentum_buffer=torch.zeros(90, 64))),
        r"its state 'exp_avg' has shape \(3,\)": changed(lambda s: s["state"][0].update(exp_avg=torch.zeros(3))),
        "different number of parameter groups": changed(lambda s: s["param_groups"].append(s["param_groups"][0])),
    }
    for message, state in others.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        same([p.detach() for p in params], before, message)
        same(states(optimizer, params), kept, message)
    with pytest.raises(ValueError, match="groups of 2 parameters, the optimizer of 1"):
        convert(fitting, AdamW(params[:1]))
    optimizer.load_state_dict(fitting)


def test_states_put_in_by_hand_are_checked() -> None:
    params = parameters()
    optimizer = AdamW(params, storage="8-byte")
    run(params, optimizer, 1)
    kept = optimizer.state[params[0]]["exp_avg"]
    optimizer.state[params[0]]["exp_avg"] = kept.float()
    before = [p.detach().clone() for p in params]
    give_gradients(params, 1)
    with pytest.raises(RuntimeError, match=r"'exp_avg' is torch.float32 of shape .*fasttrain.optim.convert"):
        optimizer.step()
    same([p.detach() for p in params], before, "weights")
    optimizer.state[params[0]]["exp_avg"] = kept
    optimizer.step()
