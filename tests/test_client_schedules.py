"""Every learning-rate schedule of torch, and its weight averages: the same rates, momenta and weights as with torch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clients import F64, OURS, PAIRS, assert_close_run, batches, model_of, named, squared_error
from helpers import assert_same_run
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 12

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9 if step % 2 else 1.05),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)], [4]),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.05, step_size_up=3),  # moves momentum or beta1
    "CyclicLR exp_range": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.05, 4, mode="exp_range", gamma=0.9,
                                                          base_momentum=0.5, max_momentum=0.8),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.05, 0.02], total_steps=STEPS + 1),  # these too
    "OneCycleLR linear": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=STEPS + 1, anneal_strategy="linear",
                                                           three_phase=True),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.2),
    "SWALR": lambda o: SWALR(o, 0.003, anneal_epochs=4),
}


def test_every_schedule_of_torch_is_here() -> None:
    made = {name.split()[0] for name in SCHEDULES}
    assert made == {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}  # the base of all


class Run:
    """A network in two groups of different rates, and a schedule."""

    def __init__(self, make: Callable[..., Any], schedule: Callable[[Any], Any], **options: Any) -> None:
        self.model = model_of()
        groups = [{"params": list(self.model[0].parameters())},
                  {"params": list(self.model[1:].parameters()), "lr": options.get("lr", 0.02) / 2}]
        self.optimizer = make(groups, **options)
        self.schedule = schedule(self.optimizer)

    def train(self, first: int = 0, last: int = STEPS) -> list[list[float]]:
        """Steps from the first to the last, exclusive; returns the rates and momenta of each."""
        used = []
        for batch in batches(STEPS)[first:last]:
            used.append([float(x) for group in self.optimizer.param_groups
                         for x in (group["lr"], *group.get("betas", ()), group.get("momentum", 0.0))])
            self.optimizer.zero_grad()
            loss = squared_error(self.model, batch)
            loss.backward()
            self.optimizer.step()
            self.schedule.step(*([loss.item()] if isinstance(self.schedule, lr_scheduler.ReduceLROnPlateau) else []))
        return used

    def ends(self) -> dict[str, torch.Tensor]:
        return named(self.model, self.optimizer)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_rates_and_the_same_weights(name: str, schedule: str) -> None:
    ours, theirs = (Run(make, SCHEDULES[schedule]) for make in PAIRS[name])
    rates = [run.train() for run in (ours, theirs)]
    assert rates[0] == rates[1]
    assert any(row != rates[0][0] for row in rates[0])
    assert_close_run(ours.ends(), theirs.ends())


@pytest.mark.parametrize("schedule", ["CosineAnnealingLR", "SequentialLR", "ReduceLROnPlateau", "StepLR"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_rate_that_is_a_tensor(name: str, schedule: str) -> None:
    """Schedules write into it. Of float64: torch computes in a tensor's own precision."""
    ours, theirs = (Run(make, SCHEDULES[schedule], lr=torch.tensor(0.02, dtype=F64)) for make in PAIRS[name])
    rates = [run.train() for run in (ours, theirs)]
    assert rates[0] == rates[1]
    assert_close_run(ours.ends(), theirs.ends())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_schedule_comes_back_from_its_state(name: str, schedule: str) -> None:
    """As torch's documents say: schedule and optimizer are made first, then both states are loaded."""
    straight = Run(OURS[name], SCHEDULES[schedule])
    wanted = straight.train()
    stopped = Run(OURS[name], SCHEDULES[schedule])
    stopped.train(0, 5)
    saved = copy.deepcopy([stopped.model.state_dict(), stopped.optimizer.state_dict(), stopped.schedule.state_dict()])
    resumed = Run(OURS[name], SCHEDULES[schedule])
    for part, state in zip((resumed.model, resumed.optimizer, resumed.schedule), saved, strict=True):
        part.load_state_dict(state)
    assert resumed.train(5) == wanted[5:]
    assert_same_run(resumed.ends(), straight.ends(), schedule)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("average", ["mean", "ema"])
def test_averaged_weights_with_their_schedule(name: str, average: str) -> None:
    """Stochastic weight averaging: `AveragedModel`, `SWALR`, `update_bn` over a network with batch normalisation."""
    ends = []
    for make in PAIRS[name]:
        # Not directly behind a bias, whose gradient would be rounding errors alone: Adam makes whole steps of those.
        model = nn.Sequential(model_of(), nn.Tanh(), nn.BatchNorm1d(3, dtype=F64))
        optimizer = make(model.parameters())
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8) if average == "ema" else None)
        schedule = SWALR(optimizer, 0.003, anneal_epochs=4)
        for batch in batches(6):
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()
            averaged.update_parameters(model)
            schedule.step()
        update_bn([x for x, _ in batches(6)], averaged)
        ends.append({key: value.double() for key, value in averaged.state_dict().items()} | named(model, optimizer))
    assert_close_run(*ends)
    assert any(key.endswith("running_mean") for key in ends[0])
