"""Running numbers in the native plan: advanced once for all parameters of a group whose numbers are equal."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from few import reschedule
from helpers import assert_same_bits, generator, needs_native, normal
from torch.nn import Parameter

from fasttrain.optim import ASGD, NAdam, Optimizer

RUNNING = pytest.mark.parametrize("optimizer", [NAdam, ASGD])


def many(count: int, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    numbers = generator(5)
    return [Parameter(normal((2 + i % 5, 3), dtype, numbers)) for i in range(count)]


def twins(optimizer: type[Optimizer], make: Callable[[], list[Parameter]], groups: int = 1,
          **options: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    """The same optimizer planned and on the reference backend, and what the planned one's `advance` is called with."""
    calls: list[dict[str, Any]] = []

    class Counted(optimizer):  # type: ignore[misc, valid-type]
        def advance(self, state: dict[str, Any], group: dict[str, Any], step: float) -> Any:
            calls.append(dict(state))
            return super().advance(state, group, step)

    made = []
    for of, backend in ((Counted, None), (optimizer, "reference")):
        params = make()
        made.append(of([{"params": params[i::groups]} for i in range(groups)], backend=backend, **options))
    return made[0], made[1], calls


def all_of(opt: Any) -> list[Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


def assert_same(ours: Any, theirs: Any, step: Any) -> None:
    for i, (p, q) in enumerate(zip(all_of(ours), all_of(theirs), strict=True)):
        assert_same_bits(p, q, f"step {step}, parameter {i}")
        assert ours.state.get(p, {}).keys() == theirs.state.get(q, {}).keys()
        for key in ours.state.get(p, ()):
            assert_same_bits(ours.state[p][key], theirs.state[q][key], f"step {step}, parameter {i}, {key}")


def give(ours: Any, theirs: Any, step: int, which: Callable[[int], bool] = lambda i: True) -> list[Parameter]:
    numbers = generator(100 + step)
    for i, (p, q) in enumerate(zip(all_of(ours), all_of(theirs), strict=True)):
        grad = normal(p.shape, p.dtype, numbers)
        p.grad, q.grad = (grad, grad.clone()) if which(i) else (None, None)
    return [p for p in all_of(ours) if p.grad is not None]


def history(opt: Any, p: Parameter) -> tuple[Any, ...]:
    group = next(i for i, group in enumerate(opt.param_groups) if any(p is other for other in group["params"]))
    state = opt.state[p]
    return group, state["step"].item(), *((state[key].dtype, state[key].item()) for key in opt.running)


@needs_native
@RUNNING
def test_equal_histories_are_advanced_once(optimizer: type[Optimizer]) -> None:
    ours, theirs, calls = twins(optimizer, lambda: many(60), groups=2)
    most = 0
    for step in range(8):
        for opt in (ours, theirs):
            reschedule(opt.param_groups[0], step)
        stepped = give(ours, theirs, step, lambda i, step=step: step == 0 or (step + i) % 7 < 4)  # type: ignore[misc]
        rows = {history(ours, p) for p in stepped} if step else {0, 1}
        most = max(most, len(rows))
        calls.clear()
        ours.step()
        theirs.step()
        assert len(calls) == len(rows), f"step {step}"
        assert all(call.keys() == set(ours.running) for call in calls)
        if step:  # in the first, parameters are described
            assert ours.last_step.launches == 1
            assert ours.last_step.parameters == len(stepped)
        assert_same(ours, theirs, step)
    assert 4 < most < 20


@needs_native
@RUNNING
@pytest.mark.parametrize("value", [0.75, 0.0])  # zeros of all types have the same bits
def test_equal_numbers_of_unequal_types_are_told_apart(optimizer: type[Optimizer], value: float) -> None:
    """torch's load_state_dict casts them to the parameter's dtype; and any of them may be replaced by hand."""
    ours, theirs, calls = twins(optimizer, lambda: many(10), lr=0.3)
    give(ours, theirs, 0)
    for opt in (ours, theirs):
        opt.step()
        for i, p in enumerate(all_of(opt)):
            for key in opt.running:
                dtype = (torch.bfloat16, torch.float16, torch.float32, torch.float64)[i % 4]
                opt.state[p][key] = torch.tensor(value).to(dtype).reshape(() if i < 8 else (1,))
    for step in range(1, 4):
        give(ours, theirs, step)
        calls.clear()
        ours.step()
        theirs.step()
        assert len(calls) == 4
        assert ours.last_step.launches == 1
        assert_same(ours, theirs, step)
    assert len({history(ours, p) for p in all_of(ours)}) == 4


@needs_native
@RUNNING
def test_not_a_number_and_signed_zeros_are_numbers_too(optimizer: type[Optimizer]) -> None:
    ours, theirs, calls = twins(optimizer, lambda: many(9))
    give(ours, theirs, 0)
    for opt in (ours, theirs):
        opt.step()
        for i, p in enumerate(all_of(opt)):
            opt.state[p][opt.running[0]].fill_((0.0, -0.0, float("nan"))[i % 3])
    give(ours, theirs, 1)
    calls.clear()
    ours.step()
    theirs.step()
    assert len(calls) == 3
    assert_same(ours, theirs, 1)


@needs_native
@RUNNING
@pytest.mark.parametrize("options", [dict(storage="10-byte"), dict(storage="8-byte", min_size=0),
                                     dict(ema_decay=0.9, zero_gradients=True), dict(clip_each=0.5)], ids=str)
def test_every_way_of_keeping(optimizer: type[Optimizer], options: dict[str, Any]) -> None:
    ours, theirs, calls = twins(optimizer, lambda: many(12, torch.bfloat16), **options)
    for step in range(4):
        stepped = give(ours, theirs, step, lambda i, step=step: i < 6 or step > 1)  # type: ignore[misc]
        rows = len(stepped) if "clip_each" in options else 2 if step > 1 else 1
        calls.clear()
        ours.step()
        theirs.step()
        assert len(calls) == rows
        assert_same(ours, theirs, step)


@needs_native
@RUNNING
def test_a_state_of_torch_goes_on_in_the_plan(optimizer: type[Optimizer]) -> None:
    mine, torchs = many(3, torch.float64), many(3, torch.float64)
    ours: Any = optimizer(mine)
    theirs = getattr(torch.optim, optimizer.__name__)(torchs, foreach=False)
    numbers = generator(6)
    for step in range(9):
        for p, q in zip(mine, torchs, strict=True):
            p.grad = q.grad = normal(p.shape, p.dtype, numbers)
        ours.step()
        theirs.step()
        if step in (2, 5):
            q = torchs[step == 2]
            q.data.mul_(0.5)
            theirs.state[q][ours.running[0]].mul_(0.5)
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
            for p, q in zip(mine, torchs, strict=True):
                p.data.copy_(q)
        for p, q in zip(mine, torchs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
            for key in ours.running:
                assert_same_bits(ours.state[p][key], theirs.state[q][key], f"step {step}, {key}")
    assert ours.last_step.launches == 1
    assert ours.state_dict()["state"][0].keys() == theirs.state_dict()["state"][0].keys()


@RUNNING
def test_on_arrival_and_at_once_go_on_from_each_other(optimizer: type[Optimizer]) -> None:
    both = [optimizer(many(5)) for _ in range(2)]
    for step in range(6):
        numbers = generator(step)
        weights = [normal(p.shape, p.dtype, numbers) for p in all_of(both[0])]
        arrival = both[0].step_on_arrival() if step in (1, 2, 4) else None
        for opt in both:
            opt.zero_grad()
            loss = sum((p * w).sum() for p, w in zip(all_of(opt), weights, strict=True))
            loss.backward()  # type: ignore[union-attr]
            opt.step()
        assert_same(*both, step)
        if arrival is not None:
            arrival.remove()


@needs_native
def test_more_numbers_than_the_plan_takes() -> None:
    class Five(NAdam):
        running = ("mu_product", "one", "two", "three", "four")

        def init_state(self, p: Any, group: Any, rule: Any) -> bool:
            made = super().init_state(p, group, rule)
            for name in self.running[1:]:
                self.state[p].setdefault(name, torch.ones(()))
            return made

        def advance(self, state: Any, group: Any, step: float) -> Any:
            now, later = super().advance(state, group, step)
            return now, {**later, **{name: state[name] + step for name in self.running[1:]}}

    five, plain = Five(many(3)), NAdam(many(3))
    for step in range(3):
        give(five, plain, step)
        five.step()
        plain.step()
    for p, q in zip(all_of(five), all_of(plain), strict=True):
        assert_same_bits(p, q, "parameter")
        assert [five.state[p][name].item() for name in five.running[1:]] == [7.0] * 4


@RUNNING
def test_a_page_that_replaces_a_number_by_several_changes_nothing(optimizer: type[Optimizer], backend: str) -> None:
    class Wrong(optimizer):  # type: ignore[misc, valid-type]
        def advance(self, state: Any, group: Any, step: float) -> Any:
            now, later = super().advance(state, group, step)
            return now, {**later, self.running[0]: torch.ones(2)} if step == 2 else later

    opt, other = Wrong(many(3), backend=backend), optimizer(many(3), backend=backend)
    give(opt, other, 0)
    opt.step()
    other.step()
    with pytest.raises(RuntimeError, match="size 2"):
        opt.step()
    assert_same(opt, other, 1)


@needs_native
def test_a_run_needs_the_numbers_after_it() -> None:
    opt, other = NAdam(many(3)), NAdam(many(3))
    give(opt, other, 0)
    opt.step()
    other.step()
    lists = [all_of(opt)]
    assert opt._plan.scan(opt.state, lists) == []
    (_, step, first), = opt._plan.rows()
    assert (step, first) == (2, 0)
    for numbers, message in (([], "for each of rows"), ([()], "another type"),
                             ([(torch.ones((), dtype=torch.float64),)], "another type"),
                             ([(torch.ones(2),)], "another type"), ([(0.5,)], "another type")):
        with pytest.raises(ValueError, match=message):
            opt._plan.run(np.zeros((1, 16)), None, 1, torch.autograd.graph.increment_version, numbers)
    opt._plan.release()
    assert_same(opt, other, 1)
