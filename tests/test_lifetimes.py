"""A step keeps nothing alive that nobody else needs, and reads nothing that was freed."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from few import give, parameters
from helpers import assert_same_bits, needs_native

from fasttrain.optim import SGD, AdamW, Optimizer


@needs_native
def test_a_freed_gradient_is_never_read() -> None:
    params = parameters(sizes=((1000,),))
    opt = SGD(params, lr=1.0)
    give(params)
    opt.step()
    before = params[0].detach().clone()
    params[0].grad.fill_(1e9)
    params[0].grad = None
    opt.step()
    assert_same_bits(params[0], before)


def test_plan_keeps_no_gradient_alive(backend: str) -> None:
    params = parameters()
    opt = AdamW(params, backend=backend)
    for seed in range(2):
        give(params, seed)
        opt.step()
    grads = [weakref.ref(p.grad) for p in params]
    for p in params:
        p.grad = None
    assert [grad() for grad in grads] == [None] * 3


@pytest.mark.parametrize("made", [lambda p: AdamW(p), lambda p: SGD(p, momentum=0.9)])
def test_everything_is_freed_with_the_optimizer(made: Callable[..., Optimizer]) -> None:
    params = parameters()
    opt = made(params)
    for seed in range(2):
        give(params, seed)
        opt.step()
    watched = [*map(weakref.ref, params), *(weakref.ref(v) for s in opt.state.values() for v in s.values()),
               weakref.ref(opt)]
    del opt, params
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


def test_replaced_states_are_freed_by_the_next_step(backend: str) -> None:
    params = parameters()
    opt = AdamW(params, backend=backend)
    give(params)
    opt.step()
    old = [weakref.ref(v) for s in opt.state.values() for v in s.values()]
    opt.state.clear()
    opt.step()
    assert [ref() for ref in old] == [None] * len(old)


@needs_native
def test_gradients_live_from_the_scan_to_the_end_of_the_walk() -> None:
    """Another thread may drop them while the walk reads them without the interpreter lock."""
    p = torch.nn.Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    optimizer = AdamW([p])
    optimizer.step()
    gradient = weakref.ref(p.grad)
    assert optimizer._plan.scan(optimizer.state, [optimizer.param_groups[0]["params"]]) == []
    p.grad = None
    assert gradient() is not None
    optimizer._plan.release()
    assert gradient() is None
