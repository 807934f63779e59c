"""The plan of a step is patched or thrown away wherever something changed between two steps."""

import copy
from collections.abc import Callable

import pytest
import torch
from few import BACKENDS, OPTIMIZERS, assert_same, give, parameters, snapshot
from helpers import assert_same_bits, generator, needs_native, normal
from torch import Tensor
from torch.nn import Parameter

from fasttrain.optim import SGD, Adam, AdamW, Optimizer

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
    together = parameters(sizes=((4,),) * 4)
    give(together)
    opt = Adam([{"params": [p], **extra} for p, extra in zip(together, options, strict=True)], backend=backend)
    opt.step()
    for i, extra in enumerate(options):
        alone = parameters(sizes=((4,),) * 4)
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
