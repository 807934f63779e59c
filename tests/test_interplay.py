"""The face of torch.optim: what torch calls of an optimizer, and hangs on it, works with ours and means the same."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from few import assert_same_ends, ends, parameters, step
from helpers import assert_same_bits
from torch import Tensor
from torch.nn import Parameter

from fasttrain.optim import OPTIMIZERS, SGD, Adam, AdamW, Optimizer


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
