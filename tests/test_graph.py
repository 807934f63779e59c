"""`fasttrain.StepGraph` and captured steps without a GPU: what a capture would record is recorded, and called again."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, generator
from stored import same, states
from torch import Tensor
from torch.nn import Parameter

import fasttrain
from fasttrain.optim import ASGD, SGD, SOAP, Adafactor, Adam, AdamW, Lion, NAdam, Optimizer, ScheduleFreeSGD, drive
from fasttrain.optim.graph import StepGraph
from fasttrain.optim.prepared import Prepared

SIZES = (600, 7)


class Tape:
    """In the place of a CUDA graph: in a capture, what the optimizer queues is noted and not done."""

    def __init__(self, pool: Any = None):
        self.calls: list[tuple[Any, ...]] = []
        self.warmed = 0

    def warm(self, function):
        self.warmed += 1
        return function()

    def capture(self, function):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drive, "capturing", lambda: True)
            tell, queue = Prepared.tell, Prepared.queue
            patch.setattr(Prepared, "tell", lambda one, *told: self.calls.append((tell, one, *told)))
            patch.setattr(Prepared, "queue", lambda one: self.calls.append((queue, one)))
            return function()

    def replay(self):
        with torch.no_grad():
            for queued, *arguments in self.calls:
                queued(*arguments)

    def reset(self):
        self.calls.clear()


@pytest.fixture(autouse=True)
def _taped(monkeypatch):
    monkeypatch.setattr(StepGraph, "recorder", Tape)


class Training:
    """Steps whose gradients and scaling lie in memory that stays where it is."""

    def __init__(self, kind: type[Optimizer], graphed: bool, dtype: torch.dtype = torch.float32,
                 backend: str = "reference", warmup: int = 2, **options: Any):
        numbers = generator(3)
        self.params = [Parameter(torch.randn(size, generator=numbers).to(dtype)) for size in SIZES]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.optimizer = kind([dict(params=[p]) for p in self.params], backend=backend, capturable=True, **options)
        self.scale, self.found, self.norm = torch.tensor(8.0), torch.tensor(False), torch.tensor(1.0)
        self.made: Any = StepGraph(self.function, self.optimizer, warmup=warmup) if graphed else self.function

    def function(self) -> Tensor:
        self.optimizer.step_scaled(self.scale, self.found, self.norm, 2.0)
        return self.norm

    def step(self, step: int) -> None:
        numbers = generator(40 + step)
        for p in self.params:
            p.grad.copy_(torch.randn(p.shape, generator=numbers))
        self.found.fill_(step in (0, 3, 5))
        self.norm.fill_(1.0 + step)
        self.scale.fill_(2.0 ** (3 - step))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
            if group.get("weight_decay"):
                group["weight_decay"] = 0.1 + 0.01 * step
            if "betas" in group:
                group["betas"] = (0.9 - 0.02 * step, 0.99)
            if group.get("clip_value") is not None:
                group["clip_value"] = 1.0 / (1 + step)
        self.made()
        for one in self.optimizer._drive.captured:
            one.remember(self.optimizer)  # kernels in a graph count no versions, but the reference does

    def run(self, steps: int) -> Training:
        for step in range(steps):
            self.step(step)
        return self

    def ends(self) -> tuple[list[Any], ...]:
        return [p.detach() for p in self.params], states(self.optimizer, self.params), [p.grad for p in self.params]


CASES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (AdamW, {}), (Adam, dict(weight_decay=0.1)), (SGD, dict(momentum=0.9, dampening=0.5, lr=0.1)), (Lion, {}),
    (NAdam, {}), (ASGD, dict(t0=2)), (ScheduleFreeSGD, {}),
    (AdamW, dict(master="split", clip_value=0.5, clip_each=3.0, ema_decay=0.9)),
    (AdamW, dict(storage="5-byte", min_size=1)), (Lion, dict(storage="7-byte", min_size=1, zero_gradients=True))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__} {'+'.join(case[1])}")
def test_replays_are_the_steps(case):
    """Schedules, scales, skips and counts: every bit is that of the steps without a graph."""
    kind, options = case
    dtype = torch.bfloat16 if {"master", "storage"} & options.keys() else torch.float32
    got, wanted = (Training(kind, graphed, dtype, **options).run(8) for graphed in (True, False))
    assert got.made.captured
    assert len(got.made._recorder.calls) == 2
    for a, b in zip(got.ends(), wanted.ends(), strict=True):
        same(a, b, kind.__name__)


def test_an_eager_step_between_replays():
    """The graph owns what it was captured with; steps without it use tables of their own, on the same states."""
    got, wanted = Training(AdamW, True), Training(AdamW, False)
    for step in range(9):
        if step == 6:
            wanted.made, got.made, made = wanted.function, got.function, got.made
        if step == 7:
            got.made = made
        for one in (got, wanted):
            one.step(step)
    for a, b in zip(got.ends(), wanted.ends(), strict=True):
        same(a, b, "AdamW")


def test_a_parameter_that_was_written_between_replays():
    """Its remainder follows, as in a step without a graph."""
    got, wanted = (Training(AdamW, graphed, torch.bfloat16, master="split").run(4) for graphed in (True, False))
    for one in (got, wanted):
        with torch.no_grad():
            one.params[0].mul_(1.25)
        one.step(6)
    for a, b in zip(got.ends(), wanted.ends(), strict=True):
        same(a, b, "written")


def test_inputs_are_copied_and_the_result_is_that_of_the_function():
    seen = []

    def function(x, name):
        seen.append((x.clone(), name))
        training.function()
        return x

    training = Training(SGD, False, lr=0.1)
    graph = StepGraph(function, training.optimizer, warmup=1)
    for value in (1.0, 2.0, 3.0):
        out = graph(torch.full((2,), value), "a")
        assert_same_bits(out, torch.full((2,), value))
    assert len(seen) == 2
    assert graph.replay() is out
    for wrong in (torch.ones(3), torch.ones(2, dtype=torch.float64), 1.0):
        with pytest.raises(ValueError, match=r"input 0 is .*captured with torch.float32 of shape"):
            graph.replay(wrong, "a")
    with pytest.raises(ValueError, match="1 inputs are given; the step was captured with 2"):
        graph.replay(torch.ones(2))
    with pytest.raises(RuntimeError, match="captured already"):
        graph.capture()


def test_what_belongs_to_a_graph_is_freed_with_it():
    training = Training(AdamW, True).run(4)
    step, = training.optimizer._drive.captured
    kept = weakref.ref(step)
    del step
    training.made.close()
    gc.collect()
    assert kept() is None
    with pytest.raises(RuntimeError, match="no step was captured"):
        training.made.replay()


# --- What is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [SOAP, Adafactor])
def test_optimizers_that_cannot_be_captured(kind: type[Optimizer]):
    p = Parameter(torch.ones(4, 4))
    optimizer = kind([p], backend="reference", capturable=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=f"cannot be captured in a CUDA graph: {kind.__name__} "):
        Tape().capture(optimizer.step)
    assert torch.equal(p, torch.ones(4, 4))
    assert not optimizer.state


def test_what_was_not_stepped_before_is_refused():
    training = Training(AdamW, False)
    before = [p.detach().clone() for p in training.params]
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .*no step before|no step before.*parameter 0"):
        Tape().capture(training.function)
    assert not training.optimizer.state
    training.run(1)
    training.params[1].grad = None
    with pytest.raises(RuntimeError, match="other parameters have gradients than in the step before"):
        Tape().capture(training.function)
    training.params[0].grad = training.params[1].grad = None
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        Tape().capture(training.function)
    same([p.detach() for p in training.params], before, "parameters")  # the one step was skipped


@pytest.mark.parametrize("change, text", [
    (lambda one: one.params[0].__setattr__("grad", one.params[0].grad.to_sparse()), "has a sparse gradient"),
    (lambda one: one.optimizer.step_on_arrival(), "as their gradients arrive"),
    (lambda one: setattr(one.optimizer, "_clip", 0.5), "the host scales the gradients"),
    (lambda one: one.optimizer.__setattr__("backend", "cpu"), "is on the CPU")])
def test_steps_that_cannot_be_captured(change, text):
    training = Training(AdamW, False).run(2)
    before = [p.detach().clone() for p in training.params]
    change(training)
    with pytest.raises(RuntimeError, match=f"cannot be captured in a CUDA graph: .*{text}.*nothing was changed"):
        Tape().capture(training.optimizer.step)
    same([p.detach() for p in training.params], before, "parameters")


def test_frozen_numbers_are_told_once():
    training = Training(AdamW, False).run(2)
    text = r"betas, eps, lr, weight_decay of AdamW are Python numbers.*fasttrain.StepGraph"
    with pytest.warns(UserWarning, match=text) as told:
        Tape().capture(training.function)
    training.step(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tape().capture(training.function)
        Training(AdamW, True).run(4)  # a StepGraph refreshes them
    assert len(told) == 1


def test_a_graph_of_states_that_were_replaced_is_refused():
    training = Training(AdamW, True).run(4)
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"states were replaced \(load_state_dict.*capture it again"):
        training.made.replay()


def test_another_equation_than_the_captured_one_is_refused():
    training = Training(Adam, True).run(4)
    training.optimizer.param_groups[1]["weight_decay"] = 0.1
    with pytest.raises(RuntimeError, match=r"options of group 1 select rule .*capture the step again"):
        training.made.replay()


def test_a_capture_that_fails_leaves_no_step_behind():
    training = Training(AdamW, True).run(2)
    training.made.function = lambda: (training.function(), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.made.capture()
    assert training.optimizer._drive.captured == []
    training.made.function = training.function
    training.step(3)


def test_what_is_no_step_graph(monkeypatch):
    assert fasttrain.StepGraph is StepGraph
    with pytest.raises(TypeError, match="Adam is no optimizer of fasttrain"):
        StepGraph(print, torch.optim.Adam([Parameter(torch.ones(1))]))
    with pytest.raises(ValueError, match="warmup is 0"):
        StepGraph(print, Training(SGD, False, lr=0.1).optimizer, warmup=0)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="a CUDA graph needs an NVIDIA GPU"):
        StepGraph(print, Training(SGD, False, lr=0.1).optimizer)
