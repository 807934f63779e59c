"""What cannot be stepped: an error that names it, and everything left as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import OPTIMIZERS, assert_same, give, parameters, snapshot
from helpers import assert_same_bits
from torch import Tensor
from torch.nn import Parameter

from fasttrain.optim import SGD, AdamW, Lion


class Wrapper(Tensor):
    """Holds its elements elsewhere, as DTensor does."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor):
        self.inner = inner

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "detach" in str(func):
            return cls(args[0].inner)
        raise NotImplementedError(func)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "Wrapper()"


def freed() -> Parameter:
    p = Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    p.untyped_storage().resize_(0)
    return p


def with_grad(p: Parameter, grad: Tensor) -> Parameter:
    p.grad_dtype = None
    p.grad = grad
    return p


def meta() -> Parameter:
    return with_grad(Parameter(torch.ones(4, device="meta")), torch.ones(4, device="meta"))


def shared() -> Parameter:
    return with_grad(Parameter(torch.ones(1).expand(4)), torch.ones(4))


WRONG: dict[str, tuple[Callable[[], Parameter], str]] = {
    "integer": (lambda: with_grad(Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False),
                                  torch.ones(4, dtype=torch.int32)), r"torch\.int32.*takes float32"),
    "float8": (lambda: with_grad(Parameter(torch.ones(4).to(torch.float8_e4m3fn)),
                                 torch.ones(4).to(torch.float8_e4m3fn)), r"torch\.float8_e4m3fn; a step takes float32"),
    "integer gradient": (lambda: with_grad(Parameter(torch.ones(4)), torch.ones(4, dtype=torch.int64)),
                         r"its gradient is torch\.int64"),
    "complex gradient": (lambda: with_grad(Parameter(torch.ones(4)), torch.ones(4, dtype=torch.complex64)),
                         r"torch\.float32 and its gradient torch\.complex64"),
    "real gradient": (lambda: with_grad(Parameter(torch.ones(4, dtype=torch.complex64)), torch.ones(4)),
                      r"torch\.complex64 and its gradient torch\.float32"),
    "meta": (meta, r"on meta.*no elements in memory"),
    "expanded": (shared, r"the parameter share memory.*clone"),
    "conjugate": (lambda: with_grad(Parameter((torch.ones(4) * 1j).conj()), torch.ones(4, dtype=torch.complex64)),
                  r"conjugated or negated view.*clone"),
    "negated": (lambda: with_grad(Parameter(torch._neg_view(torch.ones(4))), torch.ones(4)),
                r"conjugated or negated view.*clone"),
    "freed": (freed, r"4 elements and no memory"),
    "no gradient memory": (lambda: with_grad(Parameter(torch.ones(4)), torch._efficientzerotensor((4,))),
                           r"its gradient has 4 elements and no memory"),
    "wrapper": (lambda: with_grad(Parameter(Wrapper(torch.ones(4))), Wrapper(torch.ones(4))),
                r"Wrapper|no elements in memory"),
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_stepped_is_named_and_nothing_is_written(what: str, optimizer: str, named: bool,
                                                                backend: str) -> None:
    make, message = WRONG[what]
    wrong = make()
    params = [*parameters(sizes=((3, 4), (5,))), wrong]
    opt = OPTIMIZERS[optimizer](list(zip("abc", params, strict=True)) if named else params, backend=backend)
    give(params[:2])
    before = [p.detach().clone() for p in params[:2]]
    name = "parameter 'c'" if named else r"parameter 2 of group 0 \(shape \(4,\)\)"
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"{name}: .*{message}"):
        opt.step()
    for p, old in zip(params, before, strict=False):
        assert_same_bits(p, old)
    assert not opt.state
    # After a good step, and with what was right before:
    params[2].grad = None
    opt.step()
    expected = parameters(sizes=((3, 4), (5,)))
    give(expected)
    OPTIMIZERS[optimizer](expected, backend=backend).step()
    for p, q in zip(params, expected, strict=False):
        assert_same_bits(p, q)
    del opt.param_groups[0]["params"][2:]
    states = snapshot(params[:2], opt)
    opt.param_groups[0]["params"].append(make())
    if named:
        opt.param_groups[0]["param_names"] = list("abc")
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        opt.step()
    assert_same(snapshot(params[:2], opt), states)


@pytest.mark.parametrize(("value", "message"), [
    (torch.ones(7), r"its state 'exp_avg' is torch\.float32 of shape \(7,\)"),
    (torch.ones(6, dtype=torch.int64), r"exp_avg is torch\.int64"),
    (torch.ones(6, device="meta"), r"exp_avg.* on meta"),
    (torch.ones(1).expand(6), r"elements of exp_avg share memory"),
    (None, r"no tensor 'exp_avg'"),
])
def test_states_that_cannot_be_stepped(value: Any, message: str, backend: str) -> None:
    params = parameters(sizes=((6,), (6,)))
    give(params)
    opt = AdamW(params, backend=backend)
    opt.step()
    opt.state[params[1]]["exp_avg"] = value
    before = snapshot(params, opt)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=rf"parameter 1 of group 0 .*{message}"):
        opt.step()
    assert_same({k: v for k, v in snapshot(params, opt).items() if "meta" not in str(v.device)},
                {k: v for k, v in before.items() if "meta" not in str(v.device)})


def test_a_failed_first_step_does_not_count(backend: str) -> None:
    """SGD's first buffer is the gradient, not dampened: also after a step that raised when the buffer had been made."""
    ends = []
    for fails in (True, False):
        params = [*parameters(sizes=((3, 4), (5,))), Parameter(torch.ones(4))]
        opt = SGD(params, lr=0.1, momentum=0.9, dampening=0.5, backend=backend)
        give(params[:2])
        params[0].grad = params[0].grad.t().contiguous().t()  # not in the plan: stepped one by one
        if fails:
            params[2].grad_dtype = None
            params[2].grad = torch.ones(4, dtype=torch.int64)
            with pytest.raises(TypeError):
                opt.step()
            params[2].grad = None
        opt.step()
        ends.append(snapshot(params, opt))
    assert_same(*ends)


def test_a_bad_rule_writes_nothing(backend: str) -> None:
    class Bad(Lion):
        rules = (Lion.rules[0].__class__("Bad", ("exp_avg",), lambda step, lr: {"lr": lr}, Lion.element),)

    params = parameters()
    opt = Bad(params, backend=backend)
    give(params)
    before = snapshot(params, opt)
    with pytest.raises(TypeError, match=r"rule Bad: element\(\) uses k\.b1"):
        opt.step()
    assert_same(snapshot(params, opt), before)
    assert not opt.state
