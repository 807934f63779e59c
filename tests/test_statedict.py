"""Optimizers that are copied or saved, torch's checkpoints here and ours there."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from few import TORCH, assert_same_ends, ends, parameters, step
from helpers import CONFIGURATIONS, Configuration, assert_same_bits, generator
from torch.nn import Parameter

from fasttrain.optim import AdamW, Optimizer

TORCHS = [configuration for configuration in CONFIGURATIONS if configuration.optimizer in TORCH]


def by_name(configuration: Configuration) -> str:
    return configuration.name


def test_hooks_of_state_dicts() -> None:
    first, second = AdamW(parameters()), AdamW(parameters())
    step(first, 1)
    order = []
    second.register_load_state_dict_pre_hook(lambda _, saved: order.append("before"))

    def replace(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        order.append("replaced")
        changed = copy.deepcopy(saved)
        changed["param_groups"][0]["lr"] = 0.75
        changed["state"][0]["exp_avg"] = changed["state"][0]["exp_avg"].double()
        return changed

    second.register_load_state_dict_pre_hook(replace)
    second.register_load_state_dict_post_hook(lambda _: order.append("after"))
    first.register_state_dict_pre_hook(lambda _: order.append("saving"))
    second.load_state_dict(first.state_dict())
    assert order == ["saving", "before", "replaced", "after"]
    assert second.param_groups[0]["lr"] == 0.75
    assert second.state[second.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.float64
    second.load_state_dict(first.state_dict())  # the hooks are still there
    assert len(order) == 8


def torch_saved(optimizer: Optimizer) -> Optimizer:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(optimizer: Optimizer) -> Optimizer:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [Parameter(p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    fresh = type(optimizer)(params, lr=123.0, backend=optimizer.backend)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o)), "torch.save": torch_saved,
          "state_dict": through_state_dict}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=by_name)
def test_a_copy_goes_on_as_if_nothing_had_happened(configuration: Configuration, dtype: torch.dtype, way: str,
                                                   backend: str) -> None:
    optimizer = configuration.optimizer(parameters(dtype), **configuration.draw(generator(1)), backend=backend)
    for i in range(3):
        step(optimizer, i)
    other = COPIES[way](optimizer)
    assert type(other) is type(optimizer)
    assert other.backend == backend
    assert ends(other)[0] is not ends(optimizer)[0]
    for i in range(3, 6):
        step(optimizer, i)
    for i in range(3, 6):
        step(other, i)
    assert_same_ends(other, optimizer)


@pytest.mark.parametrize("configuration", TORCHS, ids=by_name)
def test_a_torch_checkpoint_loads_here_and_ours_there(configuration: Configuration) -> None:
    """Bits cannot agree with torch's: 1e-12 of float64 is what contract 2 promises, over ten steps."""
    options = configuration.draw(generator(1))
    torchs = TORCH[configuration.optimizer]
    theirs, straight = (torchs(parameters(torch.float64), **options, foreach=False) for _ in "ab")
    for i in range(2):
        step(theirs, i)
    for i in range(10):
        step(straight, i)
    ours = configuration.optimizer([Parameter(p.detach().clone()) for p in theirs.param_groups[0]["params"]])
    ours.load_state_dict(theirs.state_dict())
    assert {k: v for k, v in ours.param_groups[0].items() if k != "params"} == \
           {k: v for k, v in theirs.param_groups[0].items() if k != "params"}
    for i in range(2, 6):
        step(ours, i)
    back = torchs([Parameter(p.detach().clone()) for p in ours.param_groups[0]["params"]])
    back.load_state_dict(ours.state_dict())
    for state in back.state.values():  # torch casts what is one fp32 number for each parameter, which changes the run
        state.update({key: state[key].float() for key in ours.running})
    for i in range(6, 10):
        step(back, i)
    for a, b in zip(ends(back), ends(straight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("configuration", TORCHS, ids=by_name)
def test_states_are_those_of_torch(configuration: Configuration) -> None:
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            options = configuration.draw(generator(1))
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                pairs = []
                for optimizer in (configuration.optimizer, TORCH[configuration.optimizer]):
                    opt = optimizer(parameters(dtype), **options)
                    opt.param_groups[0]["params"][0].data = torch.ones(3, 5, dtype=dtype).t()
                    step(opt, 1)
                    pairs.append([{k: (v.dtype, v.shape, v.stride(), v.device) for k, v in opt.state[p].items()}
                                  for p in opt.param_groups[0]["params"] if p in opt.state])
                assert pairs[0] == pairs[1]
        finally:
            torch.set_default_dtype(torch.float32)


def test_loading_keeps_each_states_own_dtype(backend: str) -> None:
    params = parameters(torch.bfloat16)
    opt = AdamW(params, backend=backend)
    step(opt, 1)
    saved = copy.deepcopy(opt.state_dict())
    third = 1 + 2.0**-20  # bf16 cannot hold it
    for i, dtype in enumerate((torch.float32, torch.float64, torch.float16)):
        saved["state"][i]["exp_avg"] = torch.full(params[i].shape, third, dtype=dtype)
    opt.load_state_dict(saved)
    for p, i in zip(params, range(3), strict=True):
        assert_same_bits(opt.state[p]["exp_avg"], saved["state"][i]["exp_avg"])
        assert opt.state[p]["exp_avg_sq"].dtype == torch.bfloat16
    step(opt, 2)
    assert [opt.state[p]["exp_avg"].dtype for p in params] == [torch.float32, torch.float64, torch.float16]


def test_a_checkpoint_of_another_shape_of_groups_is_refused() -> None:
    first, second = AdamW(parameters()), AdamW(parameters()[:2])
    step(first, 1)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        second.load_state_dict(first.state_dict())
    step(second, 1)


def test_a_loaded_optimizer_shares_no_dict_with_the_checkpoint() -> None:
    first, second = AdamW(parameters()), AdamW(parameters())
    step(first, 1)
    saved = first.state_dict()
    second.load_state_dict(saved)
    second.param_groups[0]["lr"] = 7.0
    second.state[second.param_groups[0]["params"][0]]["new"] = 1
    assert first.param_groups[0]["lr"] == 1e-3
    assert "new" not in saved["state"][0]
