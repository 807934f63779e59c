"""Numbers that an optimizer keeps for each parameter and replaces on every step: NAdam's product, ASGD's eta and mu.

Also what else of torch's optimizers has no place in the tables of tests/test_witness.py: sparse gradients of Adagrad.
"""

import copy
from typing import Any

import pytest
import torch
from few import reschedule
from helpers import assert_same_bits, generator, normal
from torch.nn import Parameter

from fasttrain.kernels import dispatch
from fasttrain.optim import ASGD, Adagrad, NAdam, Optimizer, convert

RUNNING = pytest.mark.parametrize("optimizer", [NAdam, ASGD])


def parameters(seed: int = 3) -> list[Parameter]:
    numbers = generator(seed)
    return [Parameter(normal(size, torch.float64, numbers)) for size in ((5, 3), (8,), ())]


@RUNNING
def test_histories_that_differ_under_schedules_are_torchs(optimizer: type[Optimizer], backend: str) -> None:
    """Equal step counts, different numbers: parameters that were stepped at different times of a schedule."""
    mine, torchs = parameters(), parameters()
    ours: Any = optimizer(mine, backend=backend)
    theirs = getattr(torch.optim, optimizer.__name__)(torchs, foreach=False)
    numbers = generator(4)
    for step in range(8):
        for opt in (ours, theirs):
            reschedule(opt.param_groups[0], step)
        for i, (p, q) in enumerate(zip(mine, torchs, strict=True)):
            p.grad = q.grad = None if (step + i) % 3 == 0 else normal(p.shape, p.dtype, numbers)
        ours.step()
        theirs.step()
        for p, q in zip(mine, torchs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
            for key in ours.running if p in ours.state else ():
                assert_same_bits(ours.state[p][key], theirs.state[q][key], f"step {step}, {key}")
    assert len({ours.state[p][ours.running[0]].item() for p in mine}) == 3


@RUNNING
def test_a_step_that_fails_or_is_skipped_leaves_the_numbers(optimizer: type[Optimizer], backend: str,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    opt: Any = optimizer(params, backend=backend)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    before = copy.deepcopy([opt.state[p] for p in params])

    def unchanged() -> None:
        for p, old in zip(params, before, strict=True):
            for key, value in old.items():
                assert_same_bits(opt.state[p][key], value, key)

    opt.found_inf = torch.tensor(1.0)
    opt.step()
    del opt.found_inf
    unchanged()
    params[2].grad = torch.ones((), dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    unchanged()
    params[2].grad = torch.ones((), dtype=torch.float64)
    kept = opt.state[params[1]][opt.running[0]]
    for wrong in (0.5, torch.ones(2), torch.tensor(1)):
        opt.state[params[1]][opt.running[0]] = wrong
        with pytest.raises(TypeError, match=rf"parameter 1 .* state '{opt.running[0]}' is .*one floating-point number"):
            opt.step()
    opt.state[params[1]][opt.running[0]] = kept
    unchanged()

    def broken(*_: Any) -> None:
        raise RuntimeError("the backend broke")

    if backend == "cpu":  # what the plan calls before it writes anything
        monkeypatch.setattr(torch.autograd.graph, "increment_version", broken)
    else:
        monkeypatch.setattr(dispatch.load(backend), "step", broken)
    with pytest.raises(RuntimeError, match="the backend broke"):
        opt.step()
    unchanged()


@RUNNING
def test_the_numbers_stay_the_same_tensors(optimizer: type[Optimizer]) -> None:
    (p, *_) = parameters()
    opt: Any = optimizer([p])
    p.grad = torch.ones_like(p)
    opt.step()
    tensors = [opt.state[p][key] for key in opt.running]
    versions = [tensor._version for tensor in tensors]
    opt.step()
    assert all(opt.state[p][key] is tensor for key, tensor in zip(opt.running, tensors, strict=True))
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))


# --- Adagrad's sparse gradients ---------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own function makes a sparse tensor
@pytest.mark.parametrize("kwargs", [dict(), dict(lr_decay=0.1, maximize=True, initial_accumulator_value=0.5)], ids=str)
def test_sparse_gradients_of_adagrad_are_torchs(kwargs: dict[str, Any], backend: str) -> None:
    runs = []
    for optimizer, extra in ((Adagrad, {"backend": backend}), (torch.optim.Adagrad, {})):
        params = [Parameter(torch.linspace(-1, 1, 6)), Parameter(torch.ones(6, dtype=torch.float64))]
        opt: Any = optimizer(params[:1], lr=0.1, **kwargs, **extra)
        opt.add_param_group({"params": params[1:]})
        for step in range(4):
            for p in params:
                grad = torch.tensor([0, 1.0, 0, 0, step, 2], dtype=p.dtype)
                p.grad = grad.to_sparse() if step != 2 else grad
            opt.step()
        runs.append((params, opt))
    (mine, ours), (torchs, theirs) = runs
    for p, q in zip(mine, torchs, strict=True):
        torch.testing.assert_close(p, q)
        assert ours.state[p]["step"].item() == 4
        torch.testing.assert_close(ours.state[p]["sum"], theirs.state[q]["sum"])


def test_sparse_gradients_and_decay_are_refused_before_the_step_is_counted() -> None:
    p = Parameter(torch.ones(3))
    opt = Adagrad([p], weight_decay=0.1)
    p.grad = torch.tensor([0, 1.0, 0]).to_sparse()
    with pytest.raises(RuntimeError, match="weight_decay option is not compatible with sparse gradients"):
        opt.step()
    assert opt.state[p]["step"].item() == 0


@RUNNING
def test_running_numbers_survive_a_conversion(optimizer: type[Optimizer]) -> None:
    numbers = generator(9)
    p = Parameter(normal((5000,), torch.float32, numbers))
    old, new = optimizer([p]), optimizer([p], state_dtype="bf16", ema_decay=0.9)
    for _ in range(3):
        p.grad = normal(p.shape, p.dtype, numbers)
        old.step()
    new.load_state_dict(convert(old.state_dict(), new))
    for key in ("step", *optimizer.running):
        assert_same_bits(new.state[p][key], old.state[p][key], key)
    new.step()
    assert new.state[p]["step"].item() == 4
