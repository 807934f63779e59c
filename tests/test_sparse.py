"""Gradients and parameters that are no plain tensors: sparse, negated, of a subclass, of inference mode."""

from typing import Any

import pytest
import torch
from few import OPTIMIZERS, assert_same, give, parameters, snapshot
from helpers import assert_same_bits, generator, normal
from torch import Tensor
from torch.nn import Parameter

from fasttrain.optim import SGD, Adam, AdamW, Lion, Optimizer


@pytest.mark.parametrize("optimizer", [Adam, AdamW, Lion])
def test_sparse_gradients_are_refused_before_anything_is_written(optimizer: type[Optimizer], backend: str) -> None:
    params = parameters(sizes=((3,), (4,)))
    give(params)
    dense, params[1].grad = params[1].grad, torch.ones(4).to_sparse()
    opt = optimizer(params, backend=backend)
    before = snapshot(params, opt)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        opt.step()
    assert_same(snapshot(params, opt), before)
    assert not opt.state
    params[1].grad = dense
    opt.step()
    before = snapshot(params, opt)
    params[1].grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        opt.step()
    assert_same(snapshot(params, opt), before)
    if optimizer is not Lion:
        theirs = torch.optim.Adam([params[1]])
        with pytest.raises(RuntimeError) as error:
            theirs.step()
        with pytest.raises(RuntimeError, match=f"^{error.value}$"):
            opt.step()


@pytest.mark.parametrize("kwargs", [dict(), dict(momentum=0.9), dict(momentum=0.9, nesterov=True), dict(maximize=True)],
                         ids=str)
def test_sparse_gradients_of_sgd_are_torchs(kwargs: dict[str, Any], backend: str) -> None:
    ends = []
    for optimizer, extra in ((SGD, dict(backend=backend)), (torch.optim.SGD, dict(foreach=False))):
        params = parameters(sizes=((6,), (4,)))
        opt = optimizer(params, lr=0.1, **kwargs, **extra)
        for step in range(3):
            params[0].grad = torch.tensor([0, 1.0, 0, 0, step, 2]).to_sparse()
            params[1].grad = torch.full((4,), 0.5 + step)
            opt.step()
        params[0].grad = None
        opt.step()
        ends.append(params)
    for got, wanted in zip(*ends, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("then", ["sparse", "dense"])
def test_gradients_turn_sparse_and_dense(then: str, backend: str) -> None:
    params = parameters(sizes=((6,),))
    opt = SGD(params, lr=0.1, backend=backend)
    dense = torch.tensor([0, 1.0, 0, 0, 3, 2])
    kinds = [dense, dense.to_sparse()]
    before = params[0].detach().clone()
    for grad in kinds if then == "sparse" else kinds[::-1]:
        params[0].grad = grad
        opt.step()
    torch.testing.assert_close(params[0].detach(), before - 0.2 * dense)


def test_an_imaginary_part_leaves_a_gradient_to_be_negated(backend: str) -> None:
    """Autograd hands a scalar parameter such a view; its bytes in memory have the other sign."""
    a, b = Parameter(torch.tensor(1.0)), Parameter(torch.tensor(1.0))
    opt = SGD([a, b], lr=1.0, backend=backend)
    for step in range(3):
        opt.zero_grad()
        (torch.complex(a, b).conj() * torch.tensor(2 + 3j)).real.backward()
        assert b.grad.is_neg()
        opt.step()
        assert (a.item(), b.item()) == (1 - 2.0 * (step + 1), 1 - 3.0 * (step + 1))


class Tagged(Tensor):
    """A subclass without storage of its own making."""


class TaggedParameter(Parameter):
    pass


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_subclasses_of_tensor(optimizer: str, backend: str) -> None:
    ends = []
    for make in (lambda t: Parameter(t.as_subclass(Tagged)), TaggedParameter, Parameter):
        params = [make(p.detach().clone()) for p in parameters()]
        assert type(params[0]) in (Tagged, TaggedParameter, Parameter)
        opt = OPTIMIZERS[optimizer](params, backend=backend)
        for seed in range(2):
            numbers = generator(seed)
            for p in params:
                p.grad = normal(p.shape, p.dtype, numbers)
            opt.step()
        ends.append([p.detach().as_subclass(Tensor) for p in params])
        before = [p._version for p in params]
        opt.step()
        assert all(p._version > old for p, old in zip(params, before, strict=True))
    for got in ends[:2]:
        for a, b in zip(got, ends[2], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_inference_mode(optimizer: str, backend: str) -> None:
    ends = []
    for inference in (True, False):
        params = parameters()
        opt = OPTIMIZERS[optimizer](params, backend=backend)
        for seed in range(2):
            give(params, seed)
            with torch.inference_mode(inference):
                opt.step()
        ends.append(snapshot(params, opt))
    assert_same(*ends)
