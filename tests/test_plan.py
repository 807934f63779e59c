"""The plan of a step is patched or thrown away wherever something changed, and an error leaves everything as it was."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, generator, needs_native, normal, usable
from torch import Tensor
from torch.nn import Parameter

from fasttrain.optim import ASGD, SGD, Adam, AdamW, Lion, NAdam, Optimizer, ScheduleFreeAdamW

BACKENDS = ["cpu", "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if reason := usable(request.param):
        pytest.skip(reason)
    return request.param


def parameters(sizes: Any = ((5, 3), (8,), ()), dtype: torch.dtype = torch.float32, seed: int = 3) -> list[Parameter]:
    numbers = generator(seed)
    return [Parameter(normal(size, dtype, numbers)) for size in sizes]


def give(params: list[Parameter], seed: int = 0) -> None:
    numbers = generator(seed)
    for p in params:
        p.grad = normal(p.shape, p.dtype if p.grad_dtype is None else p.grad_dtype, numbers)


def snapshot(params: list[Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    return {f"{i} {key}": value.detach().clone() for i, p in enumerate(params)
            for key, value in [("p", p), *sorted(optimizer.state.get(p, {}).items())] if isinstance(value, Tensor)}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert_same_bits(got[key], wanted[key], key)


# --- What changes between two steps -----------------------------------------------------------------------------------

Change = Callable[[Optimizer, list[Parameter]], None]


def none_and_back(optimizer: Optimizer, params: list[Parameter]) -> None:
    give(params, 10)
    params[0].grad = None
    optimizer.step()
    params[1].grad = None
    give(params[:1], 11)
    optimizer.step()
    give(params, 12)


def all_none(optimizer: Optimizer, params: list[Parameter]) -> None:
    optimizer.zero_grad()
    optimizer.step()
    give(params, 12)


def grad_dtype(optimizer: Optimizer, params: list[Parameter]) -> None:
    for p, dtype in zip(params, (torch.float64, torch.bfloat16, torch.float16), strict=True):
        p.grad = None
        p.grad_dtype = dtype
    give(params, 13)


def grad_strides(optimizer: Optimizer, params: list[Parameter]) -> None:
    give(params, 13)
    params[0].grad = params[0].grad.t().contiguous().t()


def new_data(optimizer: Optimizer, params: list[Parameter]) -> None:
    for p in params:
        p.data = normal(p.shape, p.dtype, generator(14))


def new_dtype(optimizer: Optimizer, params: list[Parameter]) -> None:
    """As `module.double()` does: data, gradient and, by hand, states."""
    for p in params:
        p.grad = None
        p.grad_dtype = None
        p.data = p.data.double()
        for key, value in optimizer.state[p].items():
            if key != "step":
                optimizer.state[p][key] = value.double()
    for p in params:
        p.grad = torch.full_like(p, 0.25)


def new_strides(optimizer: Optimizer, params: list[Parameter]) -> None:
    params[0].grad = None
    params[0].data = params[0].data.t().contiguous().t()
    give(params[:1], 15)


def new_shape(optimizer: Optimizer, params: list[Parameter]) -> None:
    params[1].grad = None
    params[1].data = torch.ones(11)
    optimizer.state.pop(params[1])
    give(params[1:2], 15)


def new_state(optimizer: Optimizer, params: list[Parameter]) -> None:
    optimizer.state[params[0]] = {key: value + 0.5 for key, value in optimizer.state[params[0]].items()}


def new_exp_avg(optimizer: Optimizer, params: list[Parameter]) -> None:
    key = next(key for key in optimizer.state[params[0]] if key not in ("step", *optimizer.running))
    optimizer.state[params[0]][key] = torch.full_like(params[0].detach(), 0.5)


def new_step(optimizer: Optimizer, params: list[Parameter]) -> None:
    if optimizer.counts_steps:
        optimizer.state[params[0]]["step"] = torch.tensor(100.0)
        optimizer.state[params[1]]["step"].fill_(7)
        optimizer.state[params[2]]["step"] = torch.tensor(3)


def new_numbers(optimizer: Optimizer, params: list[Parameter]) -> None:
    for key in optimizer.running:
        optimizer.state[params[0]][key] = torch.tensor(0.5, dtype=torch.float64)
        optimizer.state[params[1]][key].mul_(0.5)
        optimizer.state[params[2]][key].data = torch.tensor([0.25])


def cleared(optimizer: Optimizer, params: list[Parameter]) -> None:
    optimizer.state.clear()


def cleared_one(optimizer: Optimizer, params: list[Parameter]) -> None:
    optimizer.state[params[1]].clear()


def loaded(optimizer: Optimizer, params: list[Parameter]) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        for value in state.values():
            value.add_(1)
    saved["param_groups"][0]["lr"] = 0.07
    optimizer.load_state_dict(saved)


def new_group(optimizer: Optimizer, params: list[Parameter]) -> None:
    params.append(Parameter(torch.ones(6)))
    params[-1].grad = torch.ones(6)
    optimizer.add_param_group({"params": [params[-1]], "lr": 0.3})


def edited_list(optimizer: Optimizer, params: list[Parameter]) -> None:
    params.append(Parameter(torch.ones(6)))
    params[-1].grad = torch.ones(6)
    optimizer.param_groups[0]["params"].append(params[-1])
    del optimizer.param_groups[0]["params"][1]


def swapped(optimizer: Optimizer, params: list[Parameter]) -> None:
    group = optimizer.param_groups[0]
    group["params"] = tuple(reversed(group["params"]))


def other_lr(optimizer: Optimizer, params: list[Parameter]) -> None:
    optimizer.param_groups[0]["lr"] = 0.25


def decay(optimizer: Optimizer, params: list[Parameter]) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.1 - optimizer.param_groups[0]["weight_decay"]


def ascend(optimizer: Optimizer, params: list[Parameter]) -> None:
    optimizer.param_groups[0]["maximize"] = True


def in_place(optimizer: Optimizer, params: list[Parameter]) -> None:
    with torch.no_grad():
        for p in params:
            p.mul_(-1)
            p.grad.mul_(3)


CHANGES = [
    none_and_back, all_none, grad_dtype, grad_strides, new_data, new_dtype, new_strides, new_shape, new_state,
    new_exp_avg, new_step, new_numbers, cleared, cleared_one, loaded, new_group, edited_list, swapped, other_lr, decay,
    ascend, in_place,
]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda params, **kw: AdamW(params, lr=0.1, **kw),
    "SGD": lambda params, **kw: SGD(params, lr=0.1, momentum=0.9, dampening=0.5, **kw),
    "Lion": lambda params, **kw: Lion(params, lr=0.1, **kw),
    "NAdam": lambda params, **kw: NAdam(params, lr=0.1, **kw),
    "ASGD": lambda params, **kw: ASGD(params, lr=0.1, t0=2, **kw),
    "ScheduleFreeAdamW": lambda params, **kw: ScheduleFreeAdamW(params, lr=0.1, **kw),
}


@needs_native
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_plan_follows(change: Change, optimizer: str) -> None:
    """Against the reference, which has no plan."""
    ends = []
    for backend in BACKENDS:
        params = parameters()
        opt = OPTIMIZERS[optimizer](params, backend=backend)
        for step in range(2):
            give(params, step)
            opt.step()
        give(params, 2)
        before = snapshot(params, opt)
        change(opt, params)
        opt.step()
        assert set(snapshot(params, opt)) >= set(before)
        opt.step()  # the same pointers once more
        give(params, 20)
        opt.step()
        ends.append(snapshot(params, opt))
    assert_same(*ends)


@needs_native
def test_unchanged_and_fresh_gradients_need_no_description() -> None:
    """The normal path: every gradient has a new pointer on every step, and the plan takes it by itself."""
    params = parameters()
    opt = AdamW(params)
    give(params)
    opt.step()
    described = []
    opt._describe = lambda index, *_: described.append(index) or True  # type: ignore[method-assign]
    opt.step()
    for step in range(3):
        old = [p.grad for p in params]
        give(params, step)
        assert {g.data_ptr() for g in old}.isdisjoint({p.grad.data_ptr() for p in params})
        opt.step()
    assert described == []


@needs_native
def test_a_freed_gradient_is_never_read() -> None:
    params = parameters(((1000,),))
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


def test_a_tensor_lr_is_read_on_every_step(backend: str) -> None:
    ends = []
    for lr in (torch.tensor(0.5), 0.5):
        params = parameters()
        opt = SGD(params, lr=lr, backend=backend)
        give(params)
        opt.step()
        if isinstance(lr, Tensor):
            lr.fill_(0.125)
        else:
            opt.param_groups[0]["lr"] = 0.125
        opt.step()
        ends.append(snapshot(params, opt))
    assert_same(*ends)


def test_numpy_numbers_are_computed_in_double(backend: str) -> None:
    np = pytest.importorskip("numpy")
    ends = []
    for kind in (np.float32, float):
        params = parameters(dtype=torch.float64)
        opt = AdamW(params, lr=kind(np.float32(0.1)), weight_decay=kind(np.float32(0.3)), backend=backend)
        give(params)
        opt.step()
        ends.append(snapshot(params, opt))
    assert_same(*ends)


def test_groups_have_their_own_options(backend: str) -> None:
    options = [dict(lr=0.1), dict(lr=0.2, maximize=True), dict(weight_decay=0.5), dict(betas=(0.5, 0.6), eps=0.1)]
    together = parameters(((4,),) * 4)
    give(together)
    opt = Adam([{"params": [p], **extra} for p, extra in zip(together, options, strict=True)], backend=backend)
    opt.step()
    for i, extra in enumerate(options):
        alone = parameters(((4,),) * 4)
        give(alone)
        Adam([alone[i]], **extra, backend=backend).step()
        assert_same_bits(together[i], alone[i], str(extra))


def test_an_option_toggled_later_makes_its_states_or_says_which_is_missing(backend: str) -> None:
    params = parameters()
    opt = SGD(params, lr=0.1, backend=backend)
    give(params)
    opt.step()
    opt.param_groups[0]["momentum"] = 0.9
    opt.step()
    assert_same_bits(opt.state[params[0]]["momentum_buffer"], params[0].grad)
    adam = AdamW(params, backend=backend)
    adam.step()
    adam.param_groups[0]["amsgrad"] = True
    before = snapshot(params, adam)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*no tensor 'max_exp_avg_sq'.*delete optimizer\."):
        adam.step()
    assert_same(snapshot(params, adam), before)
    adam.state.clear()
    adam.step()
    assert "max_exp_avg_sq" in adam.state[params[0]]


@needs_native
def test_backend_may_change_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttrain.kernels import reference

    params = parameters()
    opt = AdamW(params)
    give(params)
    opt.step()
    called = []
    monkeypatch.setattr(reference, "step", lambda items: called.extend(items))
    opt.backend = "reference"
    opt.step()
    assert len(called) == len(params)
    opt.backend = None
    monkeypatch.setenv("FASTTRAIN_BACKEND", "reference")
    opt.step()
    assert len(called) == 2 * len(params)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    give(params)
    with pytest.raises(ValueError, match=r"backend 'gpu' is none of cuda, triton, cpu, reference"):
        AdamW(params, backend="gpu").step()
    monkeypatch.setenv("FASTTRAIN_BACKEND", "cuda")
    opt = AdamW(params)
    before = snapshot(params, opt)
    with pytest.raises((RuntimeError, ImportError), match="cuda"):
        opt.step()
    assert_same(snapshot(params, opt), before)
    assert not opt.state


# --- Step counts ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64), torch.tensor(3),
                                   torch.tensor(3, dtype=torch.int32), torch.tensor([3.0])], ids=str)
def test_step_counts_of_any_kind(count: Tensor, backend: str) -> None:
    ends = []
    for step in (count.clone(), torch.tensor(3.0)):
        params = parameters(((6,),))
        give(params)
        opt = AdamW(params, backend=backend)
        opt.state[params[0]] = {"step": step, "exp_avg": torch.ones(6), "exp_avg_sq": torch.ones(6)}
        opt.step()
        opt.step()
        assert step.item() == 5
        assert step.dtype in (count.dtype, torch.float32)
        ends.append(params[0])
    assert_same_bits(*ends)


def test_a_checkpoint_with_a_plain_number_as_step(backend: str) -> None:
    params = parameters(((6,),))
    opt = AdamW(params, backend=backend)
    give(params)
    opt.step()
    saved = opt.state_dict()
    saved["state"][0]["step"] = 41  # as torch wrote it before 1.12
    opt.load_state_dict(saved)
    opt.step()
    assert opt.state[params[0]]["step"].item() == 42


# --- What cannot be stepped: an error that names it, and nothing written ----------------------------------------------

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
    params = [*parameters(((3, 4), (5,))), wrong]
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
    expected = parameters(((3, 4), (5,)))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool], ids=str)
def test_step_counts_that_cannot_count(dtype: torch.dtype, backend: str) -> None:
    params = parameters(((6,), (3,)))
    give(params)
    opt = AdamW(params, backend=backend)
    opt.step()
    opt.state[params[1]]["step"] = torch.ones((), dtype=dtype)
    before = snapshot(params, opt)
    with pytest.raises(TypeError, match=r"parameter 1 of group 0.*its step count is torch\.\w+ of shape \(\)"):
        opt.step()
    assert_same(snapshot(params, opt), before)
    opt.state[params[1]]["step"] = 3
    with pytest.raises(TypeError, match=r"its step count is a int, not a tensor; load .* with load_state_dict"):
        opt.step()


@pytest.mark.parametrize(("value", "message"), [
    (torch.ones(7), r"its state 'exp_avg' is torch\.float32 of shape \(7,\)"),
    (torch.ones(6, dtype=torch.int64), r"exp_avg is torch\.int64"),
    (torch.ones(6, device="meta"), r"exp_avg.* on meta"),
    (torch.ones(1).expand(6), r"elements of exp_avg share memory"),
    (None, r"no tensor 'exp_avg'"),
])
def test_states_that_cannot_be_stepped(value: Any, message: str, backend: str) -> None:
    params = parameters(((6,), (6,)))
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
        params = [*parameters(((3, 4), (5,))), Parameter(torch.ones(4))]
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


# --- Sparse, complex, subclasses --------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", [Adam, AdamW, Lion])
def test_sparse_gradients_are_refused_before_anything_is_written(optimizer: type[Optimizer], backend: str) -> None:
    params = parameters(((3,), (4,)))
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
        params = parameters(((6,), (4,)))
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
    params = parameters(((6,),))
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


def test_duplicates_are_refused() -> None:
    p, q = parameters(((2,), (3,)))
    with (pytest.warns(UserWarning, match="duplicate parameters"),
          pytest.raises(ValueError, match=r"parameter 2 of group 0 .* occurs twice in its group: give it once")):
        AdamW([p, q, p])
    opt = AdamW([p])
    with (pytest.warns(UserWarning, match="duplicate parameters"),
          pytest.raises(ValueError, match=r"parameter 1 of group 1")):
        opt.add_param_group({"params": [q, q]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": [q]})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [p]})


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_parameters_that_share_memory_are_stepped_one_after_the_other(threads: int) -> None:
    """Two Parameters of one storage, as torch steps them: twice. Never at the same time by two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ends = []
        for backend in BACKENDS:
            numbers = generator(threads)
            whole = normal((16_384,), torch.float32, numbers)
            params = [Parameter(whole) if i % 5 else Parameter(whole[100:16_000]) for i in range(60)]
            opt = SGD(params, lr=0.5, momentum=0.9, backend=backend)
            for _ in range(2):
                for p in params:
                    p.grad = normal(p.shape, torch.float32, numbers)
                opt.step()
            ends.append(whole)
        assert_same_bits(*ends)
    finally:
        torch.set_num_threads(before)


def test_strided_parameters_that_share_memory(backend: str) -> None:
    """Copies that are written back must not lose one of two updates."""
    whole = torch.ones(8, 6)
    params = [Parameter(whole[:, ::2]), Parameter(whole[:, 1::2]), Parameter(whole[::2])]
    for p in params:
        p.grad = torch.ones_like(p)
    SGD(params, lr=0.25, backend=backend).step()
    assert_same_bits(whole, torch.ones(8, 6) - 0.25 - 0.25 * (torch.arange(8) % 2 == 0).float()[:, None])


@needs_native
def test_parameters_apart_are_stepped_by_all_threads() -> None:
    """Views of one flat storage, as sharding makes them, share no element."""
    from fasttrain.kernels.item import Item, apart

    flat = torch.ones(30)
    rule = SGD.rules[0]
    items = [Item("p", rule, (part, part.clone()), (), None) for part in flat.split(10)]
    assert apart(items)
    assert not apart([*items, Item("q", rule, (flat[9:10], flat[:1]), (), None)])
    assert apart([*items, Item("empty", rule, (flat[5:5], flat[:0]), (), None)])


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
