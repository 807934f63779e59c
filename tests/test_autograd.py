"""What autograd sees of a step, and steps that it goes through."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import TORCH, ends, parameters, step
from helpers import generator, normal
from torch import Tensor
from torch.nn import Parameter

from fasttrain.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Adan,
    Lion,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)


@pytest.mark.parametrize("optimizer", [AdamW, SGD, Lion, NAdam, Adan])
def test_a_backward_through_stale_weights_raises(optimizer: type[Optimizer], backend: str) -> None:
    for layout in ("dense", "strided"):
        weight = Parameter(torch.ones(4, 4) if layout == "dense" else torch.ones(4, 8)[:, ::2])
        opt = optimizer([weight], backend=backend)
        weight.grad = torch.ones(4, 4)
        loss = (weight * weight).sum()
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_versions_of_everything_written_are_counted(backend: str) -> None:
    params = parameters()
    opt = AdamW(params, amsgrad=True, backend=backend)
    step(opt, 1)
    for seed in (2, 3):
        before = [t._version for t in ends(opt)]
        numbers = generator(seed)
        for p in params:
            p.grad = normal(p.shape, p.dtype, numbers)
        grads = [p.grad._version for p in params]
        opt.step()
        assert all(t._version > old for t, old in zip(ends(opt), before, strict=True))
        assert [p.grad._version for p in params] == grads
    frozen = params[0]
    frozen.grad = None
    before = [frozen._version, *(v._version for v in opt.state[frozen].values())]
    opt.step()
    assert [frozen._version, *(v._version for v in opt.state[frozen].values())] == before


def differentiable(optimizer: Any, kwargs: dict[str, Any], states: list[str]) -> Callable[..., Any]:
    """One step as a function of parameter, gradient and states, as torch's own tests write it."""
    def function(p: Tensor, grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        p = p.clone()
        p.grad = grad
        opt = optimizer([p], differentiable=True, **kwargs)
        opt.state[p] = {name: value.clone() for name, value in zip(states, values, strict=True)}
        if optimizer.__name__ != "SGD":
            opt.state[p]["step"] = torch.tensor(10.0, dtype=torch.float64)
        for name in {"NAdam": ["mu_product"], "ASGD": ["eta", "mu"]}.get(optimizer.__name__, []):
            opt.state[p][name] = torch.tensor(0.5, dtype=torch.float64)
        opt.step()
        return (p, *(opt.state[p][name] for name in states))

    return function


DIFFERENTIABLE = [
    (SGD, dict(lr=0.9), []), (SGD, dict(lr=0.9, momentum=0.9, weight_decay=0.1), ["momentum_buffer"]),
    (SGD, dict(lr=0.9, momentum=0.9, nesterov=True), ["momentum_buffer"]),
    (Adam, dict(lr=0.9, weight_decay=0.1), ["exp_avg", "exp_avg_sq"]),
    (Adam, dict(lr=0.9, amsgrad=True), ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
    (AdamW, dict(lr=0.9, weight_decay=0.1), ["exp_avg", "exp_avg_sq"]),
    (AdamW, dict(lr=0.9, weight_decay=0.1, maximize=True), ["exp_avg", "exp_avg_sq"]),
    (Adadelta, dict(lr=0.9, weight_decay=0.1), ["square_avg", "acc_delta"]),
    (Adagrad, dict(lr=0.9, weight_decay=0.1, lr_decay=0.1), ["sum"]),
    (Adamax, dict(lr=0.9, weight_decay=0.1), ["exp_avg", "exp_inf"]),
    (ASGD, dict(lr=0.9, weight_decay=0.1), ["ax"]),
    (NAdam, dict(lr=0.9, weight_decay=0.1), ["exp_avg", "exp_avg_sq"]),
    (RAdam, dict(lr=0.9, weight_decay=0.1), ["exp_avg", "exp_avg_sq"]),
    (RMSprop, dict(lr=0.9, weight_decay=0.1, momentum=0.5), ["square_avg", "momentum_buffer"]),
    (Rprop, dict(lr=0.9), ["prev", "step_size"]),
]


@pytest.mark.parametrize(("optimizer", "kwargs", "states"), DIFFERENTIABLE)
def test_differentiable(optimizer: type[Optimizer], kwargs: dict[str, Any], states: list[str]) -> None:
    numbers = torch.Generator().manual_seed(1)
    values = [torch.rand(6, dtype=torch.float64, generator=numbers, requires_grad=True) for _ in range(2 + len(states))]
    ours = differentiable(optimizer, kwargs, states)
    theirs = differentiable(TORCH[optimizer], kwargs, states)
    assert torch.autograd.gradcheck(ours, values)
    for a, b in zip(ours(*values), theirs(*values), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def unrolled(optimizer: Any, keys: list[str], kwargs: dict[str, Any]) -> Callable[..., Tensor]:
    """The loss after three steps, as a function of hyperparameters."""
    def function(*hyperparameters: Tensor) -> Tensor:
        p = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64, requires_grad=True).clone()
        given = dict(zip(keys, hyperparameters, strict=True))
        if "beta1" in given:
            given["betas"] = (given.pop("beta1"), given.pop("beta2"))  # type: ignore[assignment]
        opt = optimizer([p], differentiable=True, **kwargs, **given)
        for i in range(3):
            p.grad = torch.tensor([1.0, 0.25, -2.0], dtype=torch.float64) * (i + 1)
            opt.step()
        return (p * p).sum()

    return function


@pytest.mark.parametrize(("optimizer", "keys", "kwargs"), [
    (SGD, ["lr"], dict()), (SGD, ["lr", "weight_decay"], dict()),
    (AdamW, ["lr"], dict(weight_decay=0.1)), (AdamW, ["lr", "beta1", "beta2"], dict(weight_decay=0.1)),
    (Adam, ["lr"], dict(weight_decay=0.1)),
])
def test_hyperparameters_are_differentiable(optimizer: Any, keys: list[str], kwargs: dict[str, Any]) -> None:
    values = [torch.tensor({"lr": 0.1, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9}[key], dtype=torch.float64,
                           requires_grad=True) for key in keys]
    ours, theirs = unrolled(optimizer, keys, kwargs), unrolled(TORCH[optimizer], keys, kwargs)
    torch.set_default_dtype(torch.float64)  # torch's step count, and with it its bias corrections, would be fp32
    try:
        torch.testing.assert_close(ours(*values), theirs(*values), rtol=1e-12, atol=1e-12)
        grads = (torch.autograd.grad(run(*values), values) for run in (ours, theirs))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_momentum_run_is_differentiable() -> None:
    """Where torch's own raises: it changes the buffer that its backward pass needs."""
    values = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.3)]
    assert torch.autograd.gradcheck(unrolled(SGD, ["lr", "weight_decay"], dict(momentum=0.9)), values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        unrolled(torch.optim.SGD, ["lr", "weight_decay"], dict(momentum=0.9))(*values).backward()
