"""Steps that a device drives, against the same steps on the host: every bit, over whole trainings.

In CPU memory ``capturable=True`` and a backend that is not the CPU's stand for a GPU.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from helpers import BY_NAME, assert_same_bits, generator
from stored import same, states
from torch import Tensor
from torch.nn import Parameter

from fasttrain import LossScaler
from fasttrain.optim import (
    ASGD,
    LAMB,
    LARS,
    SGD,
    Adam,
    AdamW,
    Lion,
    Muon,
    NAdam,
    Optimizer,
    Rprop,
    ScheduleFreeAdamW,
    StableAdamW,
    clip_grad_norm,
    drive,
)

STORAGES: dict[str, dict[str, Any]] = {
    "split": dict(master="split", clip_value=0.02),
    "split, int8": dict(storage="8-byte", min_size=1, zero_gradients=True),
    "8-bit remainder, fp8": dict(master="split8", state_dtype="fp8", min_size=1, clip_each=0.3),
    "stochastic, int4": dict(storage="5-byte", min_size=1, seed=5, ema_decay=0.9, ema_dtype="bf16"),
    "stochastic, bf16": dict(master="stochastic", state_dtype="bf16", ema_decay=0.9, clip_each=0.1),
    "copy": dict(master="fp32", ema_decay=0.99, zero_gradients=True),
    "compensation": dict(master="kahan", state_dtype="e5m2", min_size=1, state_rounding="stochastic", clip_value=0.1),
}
SIZES = (700, 5, 33)
SKIPPED = (0, 4)  # steps in which a gradient overflows
STEPS = 7


def reschedule(group: dict[str, Any], step: int) -> None:
    """Hyperparameters change on the way."""
    group["lr"] = 0.1 / (1 + step)
    if group.get("weight_decay"):
        group["weight_decay"] = 0.1 + 0.01 * step
    if "betas" in group:
        group["betas"] = (0.9 - 0.05 * step, *group["betas"][1:])


class Training:
    """A few steps of three parameters in two groups, one of them thawed, with a loss scale, clipping, a schedule."""

    def __init__(self, kind: type[Optimizer], driven: bool, dtype: torch.dtype = torch.float32,
                 backend: str = "reference", **options: Any):
        numbers = generator(7)
        self.params = [Parameter(torch.randn(size, generator=numbers).to(dtype)) for size in SIZES]
        groups = [dict(params=self.params[:2]), dict(params=self.params[2:], lr=0.02)]
        self.optimizer = kind(groups, backend=backend, capturable=driven, **options)
        self.scaler = LossScaler(64.0, growth_interval=3)

    def give(self, step: int) -> None:
        numbers = generator(50 + step)
        for index, p in enumerate(self.params):
            p.grad = None
            gradient = (torch.randn(p.shape, generator=numbers) * self.scaler.get_scale()).to(p.dtype)
            if index != 1 or step > 1:
                p.grad = gradient
        if step in SKIPPED and (step or not isinstance(self.optimizer, (Rprop, ASGD))):  # made with the first lr
            self.params[0].grad[3] = float("inf")

    def step(self, step: int) -> None:
        self.give(step)
        for group in self.optimizer.param_groups:
            reschedule(group, step)
        self.scaler.step(self.optimizer, max_norm=5.0 + step)

    def run(self, steps: range = range(STEPS)) -> Training:
        for step in steps:
            self.step(step)
        return self

    def ends(self) -> tuple[list[Tensor], list[dict[str, Tensor]], list[Tensor | None]]:
        return ([p.detach() for p in self.params], states(self.optimizer, self.params), [p.grad for p in self.params])


def assert_same(got: Training, wanted: Training, what: str = "") -> None:
    for a, b in zip(got.ends()[:2], wanted.ends()[:2], strict=True):
        same(a, b, what)
    for a, b in zip(got.ends()[2], wanted.ends()[2], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same_bits(a, b, what)
    assert got.scaler.get_scale() == wanted.scaler.get_scale()
    draws = [[group.get("draws") for group in one.optimizer.state_dict()["param_groups"]] for one in (got, wanted)]
    assert draws[0] == draws[1]


def pair(kind: type[Optimizer], **options: Any) -> tuple[Training, Training]:
    return Training(kind, True, **options), Training(kind, False, **options)


# --- Bits -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BY_NAME)
def test_every_equation(name: str):
    made = BY_NAME[name]
    options = made.draw(generator(11))
    got, wanted = (one.run() for one in pair(made.optimizer, **options))
    assert (got.optimizer.last_step.driven, wanted.optimizer.last_step.driven) == (True, False)
    assert_same(got, wanted, name)


@pytest.mark.parametrize("kind", [AdamW, Lion])
@pytest.mark.parametrize("name", STORAGES)
def test_every_storage(kind: type[Optimizer], name: str):
    got, wanted = (one.run() for one in pair(kind, dtype=torch.bfloat16, **STORAGES[name]))
    assert got.optimizer.last_step.driven
    assert_same(got, wanted, name)


def test_every_way_of_clipping_and_none():
    """What is told for one step holds for one step."""
    trainings = pair(AdamW)
    for training in trainings:
        optimizer = training.optimizer
        for step in range(6):
            training.give(step if step not in SKIPPED else 10 + step)
            if step in (1, 2, 5):
                optimizer.clip_grad_norm_(0.1 if step < 5 else 1e-3)
            optimizer.step()
    assert_same(*trainings)
    assert trainings[0].optimizer.last_step.host_syncs == 0


def test_several_optimizers_are_clipped_and_scaled_together():
    ends = []
    for driven in (True, False):
        a, b = Training(AdamW, driven), Training(SGD, driven, lr=0.1, momentum=0.9)
        for step in range(STEPS):
            a.give(step)
            b.give(step)
            if step % 2:
                clip_grad_norm([a.optimizer, b.optimizer], 0.3)
                a.optimizer.step()
                b.optimizer.step()
            else:
                a.scaler.step([a.optimizer, b.optimizer], max_norm=3.0)
        ends.append((a, b))
    for got, wanted in zip(*ends, strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, options", [(LAMB, {}), (LAMB, dict(bias_correction=False, weight_decay=0.1)),
                                           (LARS, dict(lr=0.1)), (LARS, dict(lr=0.1, momentum=0.0)), (StableAdamW, {})])
def test_optimizers_with_sums(kind: type[Optimizer], options: dict[str, Any], dtype: torch.dtype):
    got, wanted = (one.run() for one in pair(kind, dtype=dtype, **options))
    assert got.optimizer.last_step.driven
    assert_same(got, wanted, kind.__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_muon(dtype: torch.dtype):
    """Its matrices, in batches of equal shape, and what AdamW steps beside them."""
    trainings = []
    for driven in (True, False):
        training = Training(SGD, driven, dtype, lr=0.1)
        numbers = generator(4)
        training.params = [Parameter(torch.randn(shape, generator=numbers).to(dtype))
                           for shape in ((8, 6), (3, 4), (8, 6), (2, 3, 4), (5,))]
        training.optimizer = Muon([dict(params=training.params[:2]), dict(params=training.params[2:4], momentum=0.8),
                                   dict(params=training.params[4:], use_muon=False)],
                                  backend="reference", capturable=driven)
        trainings.append(training.run())
        assert training.optimizer.last_step.driven == driven
    assert_same(*trainings)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_averages_of_parameters_that_rest(dtype: str):
    """They go on, by the draws that a step would have taken, and stand still in steps that the device skips."""
    trainings = pair(AdamW, ema_decay=0.9, ema_dtype=dtype, dtype=torch.bfloat16)
    for training in trainings:
        for step in range(STEPS):
            training.give(step)
            if step > 2:
                training.params[1].grad = training.params[2].grad = None
            training.scaler.step(training.optimizer)
    assert trainings[0].optimizer.last_step.driven
    assert_same(*trainings)


@pytest.mark.parametrize("kind", [AdamW, ScheduleFreeAdamW])
def test_a_step_without_gradients_between(kind: type[Optimizer]):
    trainings = pair(kind, **(dict(dtype=torch.bfloat16, master="stochastic") if kind is AdamW else {}))
    for training in trainings:
        for step in range(1, 4):
            training.step(step)
            training.optimizer.zero_grad()
            training.optimizer.step()
        training.step(5)
    assert trainings[0].optimizer.last_step.driven
    assert_same(*trainings)


def test_what_did_not_change_is_not_looked_at_again(monkeypatch: pytest.MonkeyPatch):
    training = Training(SGD, True, lr=0.1).run(range(3))
    monkeypatch.setattr(type(training.optimizer), "_examine", lambda *_: pytest.fail("it was examined again"))
    training.run(range(3, STEPS))


# --- Counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [AdamW, NAdam, ScheduleFreeAdamW])
def test_states_go_from_the_device_to_the_host_and_back(kind: type[Optimizer]):
    """Through a state dict."""
    got, wanted = pair(kind)
    wanted.run()
    got.run(range(3))
    for driven, steps in ((False, range(3, 5)), (True, range(5, STEPS))):
        other = Training(kind, driven)
        for p, q in zip(other.params, got.params, strict=True):
            p.data.copy_(q.data)
        other.optimizer.load_state_dict(copy.deepcopy(got.optimizer.state_dict()))
        for group in other.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = driven
        other.scaler.load_state_dict(got.scaler.state_dict())
        got = other.run(steps)
        assert got.optimizer.last_step.driven == driven
    assert_same(got, wanted)


def test_a_copy_goes_on():
    got, wanted = pair(AdamW, storage="6-byte", min_size=1, dtype=torch.bfloat16)
    got, wanted = copy.deepcopy(got.run(range(3))), wanted.run(range(3))
    assert_same(got.run(range(3, STEPS)), wanted.run(range(3, STEPS)))


def test_a_first_step_that_was_skipped_is_still_to_come():
    """Where only states would tell the first step: of SGD, whose momentum begins as the gradient."""
    got, wanted = pair(SGD, lr=0.1, momentum=0.9, dampening=0.5)
    for one in (got, wanted):
        one.step(0)
    assert got.optimizer.state_dict()["state"] == wanted.optimizer.state_dict()["state"] == {}
    got.optimizer._capturable = False
    drive.leave(got.optimizer)
    assert_same(got.run(range(1, STEPS)), wanted.run(range(1, STEPS)))


def test_hyperparameters_on_the_device():
    """Changed by whoever has them: no call tells the optimizer."""
    got, wanted = pair(Adam, weight_decay=0.1)
    rates = [torch.tensor(0.1), torch.tensor(0.02, dtype=torch.float64)]
    decay = torch.tensor(0.25)
    for group, rate in zip(got.optimizer.param_groups, rates, strict=True):
        group["lr"], group["weight_decay"] = rate, decay
    for step in range(STEPS):
        rates[0].fill_(2.0**-step)
        rates[1].fill_(0.1 / (1 + step))
        decay.fill_(2.0 ** -(2 + step % 3))
        for group, rate in zip(wanted.optimizer.param_groups, rates, strict=True):
            group["lr"], group["weight_decay"] = rate.item(), decay.item()
        for one in (got, wanted):
            one.give(step)
            one.scaler.step(one.optimizer)
    assert got.optimizer.last_step.driven
    assert_same(got, wanted)


# --- Memory -----------------------------------------------------------------------------------------------------------

def test_no_gradient_is_kept_alive(monkeypatch: pytest.MonkeyPatch):
    """Between steps: they are the largest thing that a step reads and does not write."""
    pytest.importorskip("triton", reason="triton is not installed")
    training = Training(AdamW, True, backend="triton")
    for step in range(2):
        training.step(step)
        assert training.optimizer.last_step.driven
        alive = [weakref.ref(p.grad) for p in training.params if p.grad is not None]
        training.optimizer.zero_grad()
        assert [one() for one in alive] == [None] * len(alive)
