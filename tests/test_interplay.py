"""The face of torch.optim: what torch does with an optimizer works with ours, and means the same."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CONFIGURATIONS, Configuration, assert_same_bits, generator, needs_native, normal, usable
from torch import Tensor
from torch.nn import Parameter

from fasttrain.optim import (
    ASGD,
    OPTIMIZERS,
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
    ScheduleFreeAdamW,
)

TORCH: dict[type[Optimizer], Any] = {ours: getattr(torch.optim, ours.__name__) for ours in (Adam, *OPTIMIZERS)
                                     if hasattr(torch.optim, ours.__name__)}
TORCHS = [configuration for configuration in CONFIGURATIONS if configuration.optimizer in TORCH]


def by_name(configuration: Configuration) -> str:
    return configuration.name


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := usable(request.param):
        pytest.skip(reason)
    return request.param


def parameters(dtype: torch.dtype = torch.float32, seed: int = 3) -> list[Parameter]:
    numbers = generator(seed)
    return [Parameter(normal(size, dtype, numbers)) for size in ((5, 3), (8,), ())]


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    numbers = generator(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p).copy_(normal(p.shape, p.dtype, numbers))  # of the parameter's layout
    optimizer.step()


def ends(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [*params, *(v for p in params for _, v in sorted(optimizer.state.get(p, {}).items()))]


def assert_same_ends(got: torch.optim.Optimizer, wanted: torch.optim.Optimizer) -> None:
    for a, b in zip(ends(got), ends(wanted), strict=True):
        assert_same_bits(a, b)


# --- Calls and hooks --------------------------------------------------------------------------------------------------

def test_closures(backend: str) -> None:
    p = Parameter(torch.tensor([2.0]))
    optimizer = SGD([p], lr=0.25, backend=backend)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss.item() == 4.0
    assert p.item() == 1.0
    assert seen == [True]
    assert optimizer.step() is None


def test_hooks() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    p = Parameter(torch.tensor([2.0]))
    p.grad = torch.tensor([1.0])
    optimizer = SGD([p], lr=0.5)
    seen: list[tuple[str, float]] = []
    hooks = [register_optimizer_step_pre_hook(lambda *_: seen.append(("all before", p.item()))),
             optimizer.register_step_pre_hook(lambda *_: seen.append(("before", p.item()))),
             optimizer.register_step_post_hook(lambda *_: seen.append(("after", p.item()))),
             register_optimizer_step_post_hook(lambda *_: seen.append(("all after", p.item())))]
    optimizer.step()
    for hook in hooks:
        hook.remove()
    optimizer.step()
    assert seen == [("all before", 2.0), ("before", 2.0), ("after", 1.5), ("all after", 1.5)]


def test_hooks_run_once_in_every_class() -> None:
    """torch wraps `step` in the class of the first instance; our classes share one."""
    for optimizer in (Adam, *OPTIMIZERS):
        p = Parameter(torch.ones(1))
        p.grad = torch.ones(1)
        opt = optimizer([p])
        seen: list[int] = []
        opt.register_step_post_hook(lambda *_, seen=seen: seen.append(1))
        opt.step()
        assert seen == [1], optimizer


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


@pytest.mark.parametrize("schedule", [
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    lambda o: torch.optim.lr_scheduler.SequentialLR(o, [torch.optim.lr_scheduler.LinearLR(o),
                                                        torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [3]),
], ids=["cosine", "one cycle", "sequential"])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"])
def test_schedules(schedule: Callable[..., Any], lr: Any, backend: str) -> None:
    """One cycle also moves beta1."""
    runs = []
    for optimizer, extra in ((Adam, dict(backend=backend)), (torch.optim.Adam, dict(foreach=False))):
        opt = optimizer(parameters(torch.float64), lr=copy.deepcopy(lr), **extra)
        scheduler = schedule(opt)
        for i in range(6):
            step(opt, i)
            scheduler.step()
        runs.append(opt)
    for a, b in zip(*map(ends, runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_schedule_warns_of_no_step_only_where_there_was_none(recwarn: pytest.WarningsRecorder) -> None:
    opt = SGD(parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    step(opt, 0)
    scheduler.step()
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]


def test_named_parameters(backend: str) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model.named_parameters(), backend=backend)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(1))]})
    assert repr(optimizer).startswith("AdamW (\nParameter Group 0\n")


@pytest.mark.filterwarnings("error:Dynamo")
def test_torch_compile_steps_as_it_is() -> None:
    """It does not look into the step: it would warn of caches and of compiled functions, and compile for nothing."""
    runs = []
    for compiled in (True, False):
        opt = AdamW(parameters(), lr=0.1)

        def train(opt: Optimizer = opt) -> Tensor:
            loss = sum((p * p).sum() for p in opt.param_groups[0]["params"])
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        train = torch.compile(train, backend="eager") if compiled else train
        for _ in range(3):
            train()
        runs.append(opt)
    assert_same_ends(*runs)


def test_a_step_in_a_gradient_hook(backend: str) -> None:
    """An optimizer for each parameter, stepped as its gradient arrives."""
    runs = []
    for in_hook in (True, False):
        params = parameters()
        opts = {p: AdamW([p], lr=0.1, backend=backend) for p in params}
        if in_hook:
            for p in params:
                p.register_post_accumulate_grad_hook(lambda p, opts=opts: opts[p].step() or opts[p].zero_grad())
        for _ in range(2):
            sum((p * p).sum() for p in params).backward()
            if not in_hook:
                for opt in opts.values():
                    opt.step()
                    opt.zero_grad()
        runs.append(params)
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)


# --- Going out and coming back ----------------------------------------------------------------------------------------

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


# --- Loss scaling -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("optimizer", "fused"), [(AdamW, True), (AdamW, None), (SGD, True), (SGD, None), (Lion, None),
                                                  (NAdam, None), (ScheduleFreeAdamW, None)])
@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scaler(optimizer: type[Optimizer], fused: bool | None, unscaled: bool, backend: str) -> None:
    """A power of two as scale is exact: the bits of an unscaled run. A step with an infinity changes nothing at all."""
    flag = {"fused": fused} if optimizer in (AdamW, SGD) else {}
    runs = []
    for scaled in (True, False):
        params = parameters()
        opt = optimizer(params, lr=0.1, **flag, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=scaled)
        for i in range(4):
            opt.zero_grad()
            numbers = generator(i)
            loss = sum((p * normal(p.shape, p.dtype, numbers)).sum() for p in params)
            if i == 2:
                if not scaled:
                    continue
                loss = loss + params[1].sum() * float("inf")
            before = [t.detach().clone() for t in ends(opt)]
            scaler.scale(loss).backward()
            grads = [p.grad.clone() for p in params]
            if unscaled:
                scaler.unscale_(opt)
            scaler.step(opt)
            if fused and not unscaled:  # the gradients are not rewritten
                for p, grad in zip(params, grads, strict=True):
                    assert_same_bits(p.grad, grad)
            scaler.update()
            if i == 2:
                for a, b in zip(ends(opt), before, strict=True):
                    assert_same_bits(a, b)
                assert scaler.get_scale() == 512.0
        runs.append(opt)
    assert_same_ends(*runs)


def test_found_inf_is_a_count_and_the_first_skipped_step_makes_no_state(backend: str) -> None:
    params = parameters()
    opt = AdamW(params, fused=True, backend=backend)
    for p in params:
        p.grad = torch.full_like(p, float("inf"))
    opt.found_inf, opt.grad_scale = torch.tensor(3.0), torch.tensor(4.0)  # type: ignore[attr-defined]
    opt.step()
    assert not opt.state
    assert all(bool(p.isfinite().all()) for p in params)
    opt.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    opt.step()
    assert opt.state[params[0]]["step"] == 1


def test_a_scale_that_is_no_power_of_two_rounds_once_more(backend: str) -> None:
    p, q = Parameter(torch.zeros(100, dtype=torch.float64)), Parameter(torch.zeros(100, dtype=torch.float64))
    p.grad = normal((100,), torch.float64, generator(1))
    q.grad = p.grad / 3
    opt = SGD([p], lr=1.0, fused=True, backend=backend)
    opt.grad_scale, opt.found_inf = torch.tensor(3.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    opt.step()
    SGD([q], lr=1.0, backend=backend).step()
    torch.testing.assert_close(p, q, rtol=3e-16, atol=0)


def test_without_scaling_what_is_not_finite_propagates(backend: str) -> None:
    runs = []
    for optimizer in (AdamW, torch.optim.AdamW):
        p = Parameter(torch.ones(4))
        opt = optimizer([p])
        p.grad = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
        opt.step()
        runs.append([p.detach().isfinite(), *(v.isnan() for v in opt.state[p].values())])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("flags", [dict(foreach=True), dict(foreach=False), dict(fused=True), dict(fused=False)],
                         ids=str)
@pytest.mark.parametrize("optimizer", [Adam, AdamW, SGD])
def test_flags_of_torch_change_nothing(optimizer: type[Optimizer], flags: dict[str, Any]) -> None:
    runs = []
    for extra in (flags, {}):
        opt = optimizer(parameters(), lr=0.1, **extra)
        for i in range(2):
            step(opt, i)
        opt.zero_grad(set_to_none=False)
        step(opt, 3)
        runs.append(opt)
    assert_same_ends(*runs)


def test_capturable_is_accepted() -> None:
    opt = AdamW(parameters(), capturable=True)
    step(opt, 1)
    assert opt.state[opt.param_groups[0]["params"][0]]["step"] == 1


# --- Autograd ---------------------------------------------------------------------------------------------------------

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


# --- Denormals --------------------------------------------------------------------------------------------------------

@needs_native
@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormals")
def test_the_callers_floating_point_mode_changes_no_bit_and_is_restored() -> None:
    runs = []
    for flush in (True, False):
        numbers = generator(1)
        p = Parameter(normal((40_000,), torch.float32, numbers) * 2.0**-125)  # results on both sides of the normal
        opt = SGD([p], lr=1.0, momentum=0.5, backend="cpu")
        grad = normal((40_000,), torch.float32, numbers) * 2.0**-125
        q = Parameter(torch.full((100,), 2.0**-24, dtype=torch.float16))  # a half denormal passes through the float's
        torch.set_flush_denormal(flush)
        try:
            for _ in range(2):
                p.grad, q.grad = grad.clone(), torch.zeros(100, dtype=torch.float16)
                opt.step()
                SGD([q], lr=1.0, backend="cpu").step()
            smallest = torch.tensor([2.0**-126])
            assert bool((smallest * 0.5 == 0).all()) is flush
        finally:
            torch.set_flush_denormal(False)
        assert bool((p.detach().abs()[p.detach() != 0] < 2.0**-126).any())
        assert bool((q == 2.0**-24).all())
        runs.append([p.detach(), opt.state[p]["momentum_buffer"]])
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)


def test_untouched_rows_do_not_decay_into_denormals(backend: str) -> None:
    """Contract 11, over the steps of a run: torch's own moments stay denormal for ever."""
    runs = []
    for optimizer, extra in ((Adam, dict(backend=backend)), (torch.optim.Adam, {})):
        p = Parameter(torch.ones(10))
        opt = optimizer([p], betas=(0.5, 0.5), **extra)
        p.grad = torch.full((10,), 1e-18)
        opt.step()
        p.grad = torch.zeros(10)
        for _ in range(75):
            opt.step()
        runs.append(torch.cat([opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]]))
    assert bool((runs[0] == 0).all())
    assert bool(((runs[1] > 0) & (runs[1] < 2.0**-126)).any())
