"""Schedules have the values of torch's, transformers' and optax's of the same kind."""

import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as theirs

from fasttrain import schedules as s

LR, STEPS = 0.3, 60
# torch's go on from the value before, so that roundings add up over the steps; all are in double precision.
CLOSE = dict(rel=1e-12, abs=1e-15)

TORCH: dict[str, tuple[Any, dict[str, Any]]] = {
    "ConstantLR": (lambda o: theirs.ConstantLR(o, 0.5, 7), dict(lr=s.constant(0.5, 7) + s.constant(1.0))),
    "LinearLR": (lambda o: theirs.LinearLR(o, 0.1, 0.8, 9), dict(lr=s.linear(9, 0.1, 0.8))),
    "LinearLR warmup": (lambda o: theirs.LinearLR(o, 0.1, 1.0, 9), dict(lr=s.warmup(9, start=0.1))),
    "ExponentialLR": (lambda o: theirs.ExponentialLR(o, 0.93), dict(lr=s.exponential(0.93))),
    "StepLR": (lambda o: theirs.StepLR(o, 7, 0.3), dict(lr=s.step_decay(7, 0.3))),
    "MultiStepLR": (lambda o: theirs.MultiStepLR(o, [5, 9, 31], 0.3), dict(lr=s.multi_step((5, 9, 31), 0.3))),
    "PolynomialLR": (lambda o: theirs.PolynomialLR(o, 40, 1.7), dict(lr=s.polynomial(40, 1.7))),
    "CosineAnnealingLR": (lambda o: theirs.CosineAnnealingLR(o, STEPS, 0.03), dict(lr=s.cosine(STEPS, 0.1))),
    "CosineAnnealingWarmRestarts": (lambda o: theirs.CosineAnnealingWarmRestarts(o, 7, 1, 0.03),
                                    dict(lr=s.restarts(7, floor=0.1))),
    "CosineAnnealingWarmRestarts grown": (lambda o: theirs.CosineAnnealingWarmRestarts(o, 3, 2, 0.03),
                                          dict(lr=s.restarts(3, 2, floor=0.1))),
    "SequentialLR": (lambda o: theirs.SequentialLR(o, [theirs.LinearLR(o, 0.1, 1.0, 9),
                                                       theirs.CosineAnnealingLR(o, 51)], [9]),
                     dict(lr=s.warmup(9, start=0.1) + s.cosine(51))),
    "ChainedScheduler": (lambda o: theirs.ChainedScheduler([theirs.LinearLR(o, 0.1, 1.0, 9),
                                                            theirs.ExponentialLR(o, 0.95)]),
                         dict(lr=s.warmup(9, start=0.1) * s.exponential(0.95))),
    "CyclicLR": (lambda o: theirs.CyclicLR(o, 0.03, LR, 7, 5),
                 dict(lr=s.cyclic(7, 5), momentum=s.cyclic(7, 5, low=0.9, high=0.8))),
    "CyclicLR triangular2": (lambda o: theirs.CyclicLR(o, 0.03, LR, 7, mode="triangular2"),
                             dict(lr=s.cyclic(7, shape="triangular2"),
                                  momentum=s.cyclic(7, low=0.9, high=0.8, shape="triangular2"))),
    "CyclicLR exp_range": (lambda o: theirs.CyclicLR(o, 0.03, LR, 7, mode="exp_range", gamma=0.97),
                           dict(lr=s.cyclic(7, shape="exp_range", gamma=0.97),
                                momentum=s.cyclic(7, low=0.9, high=0.8, shape="exp_range", gamma=0.97))),
    "OneCycleLR": (lambda o: theirs.OneCycleLR(o, LR, STEPS + 1),
                   dict(lr=s.one_cycle(STEPS + 1), momentum=s.one_cycle(STEPS + 1, start=0.95, peak=0.85, end=0.95))),
    "OneCycleLR linear": (lambda o: theirs.OneCycleLR(o, LR, STEPS + 1, pct_start=0.37, anneal_strategy="linear",
                                                      three_phase=True, div_factor=10.0, final_div_factor=100.0),
                          dict(lr=s.one_cycle(STEPS + 1, 0.37, 0.1, 0.001, shape="linear", three_phases=True),
                               momentum=s.one_cycle(STEPS + 1, 0.37, 0.95, 0.95, 0.85, "linear", True))),
}


def optimizer_of(kind: Any = torch.optim.SGD, **options: Any) -> torch.optim.Optimizer:
    return kind([torch.nn.Parameter(torch.ones(1))], lr=LR, **options)


def followed(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[list[float]]:
    """Learning rate and momentum (or first beta) of each step."""
    used = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        used.append([group["lr"], group.get("momentum", group.get("betas", (0.0,))[0])])
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", TORCH)
def test_torch(name: str, kind: str) -> None:
    options = {"momentum": 0.9} if kind == "SGD" else {}
    make, ours = TORCH[name]
    ends = []
    for scheduled in (make, lambda o: s.Scheduler(o, **ours)):
        optimizer = optimizer_of(getattr(torch.optim, kind), **options)
        ends.append(followed(optimizer, scheduled(optimizer), STEPS + 1))
    for wanted, got in zip(*ends, strict=True):
        assert got == pytest.approx(wanted, **CLOSE)


@pytest.mark.parametrize("options", [
    dict(), dict(mode="max", threshold_mode="abs", threshold=0.3), dict(cooldown=2, patience=0),
    dict(min_lr=0.1 * LR, factor=0.5, patience=1), dict(mode="max", patience=2)])
def test_torch_plateau(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(4)
    metrics = torch.rand(200, generator=generator).tolist()
    metrics[17] = metrics[50] = math.nan
    optimizers = optimizer_of(), optimizer_of()
    reference = theirs.ReduceLROnPlateau(optimizers[0], eps=0.0, **{"patience": 4, **options})
    floor = options.get("min_lr", 0.0) / LR
    mine = {name: value for name, value in options.items() if name != "min_lr"}
    plateau = s.Plateau(**{"patience": 4, **mine}, floor=floor)
    scheduler = s.Scheduler(optimizers[1], plateau=plateau)
    falls = 0
    for metric in metrics:
        reference.step(metric)
        falls += plateau.update(metric).reduced
        scheduler.step()
        assert optimizers[1].param_groups[0]["lr"] == pytest.approx(optimizers[0].param_groups[0]["lr"], **CLOSE)
        assert plateau.bad == reference.num_bad_epochs
    assert falls > 1


WARM, LONG = 6, 50


def test_transformers() -> None:
    t = pytest.importorskip("transformers", reason="transformers is not installed (pip install fasttrain[clients])")
    rest, zero = LONG - WARM, s.warmup(WARM, start=0.0)
    cases = [
        (t.get_constant_schedule(optimizer_of()), s.constant()),
        (t.get_constant_schedule_with_warmup(optimizer_of(), WARM), zero + s.constant()),
        (t.get_linear_schedule_with_warmup(optimizer_of(), WARM, LONG), zero + s.linear(rest)),
        (t.get_cosine_schedule_with_warmup(optimizer_of(), WARM, LONG), s.warmup_cosine(LONG, WARM, start=0.0)),
        (t.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer_of(), WARM, LONG, 3),
         zero + s.cosine(rest, cycles=3)),
        (t.get_polynomial_decay_schedule_with_warmup(optimizer_of(), WARM, LONG, lr_end=0.03, power=1.5),
         zero + s.polynomial(rest, 1.5, end=0.1)),
        (t.get_inverse_sqrt_schedule(optimizer_of(), WARM), zero + s.inverse_sqrt(WARM)),
        (t.get_inverse_sqrt_schedule(optimizer_of(), WARM, timescale=20), zero + s.inverse_sqrt(20)),
    ]
    for tail, shape in (("linear", "linear"), ("cosine", "cosine"), ("1-sqrt", "sqrt")):
        cases.append((t.get_wsd_schedule(optimizer_of(), WARM, 15, LONG, warmup_type=tail, decay_type=tail,
                                         min_lr_ratio=0.1),
                      s.warmup(WARM, start=0.1, shape=shape) + s.constant(steps=LONG - WARM - 15)
                      + s.decay(15, 0.1, shape)))
    for reference, ours in cases:
        wanted = [rate for rate, _ in followed(reference.optimizer, reference, LONG + 1)]
        assert [LR * ours(step) for step in range(LONG + 1)] == pytest.approx(wanted, **CLOSE), repr(ours)


def test_optax() -> None:
    optax = pytest.importorskip("optax", reason="optax is not installed (pip install fasttrain[peers])")
    import jax

    rest, zero = LONG - WARM, s.warmup(WARM, start=0.0)
    cases = [
        (optax.constant_schedule(0.7), s.constant(0.7)),
        (optax.linear_schedule(0.2, 0.9, 30), s.linear(30, 0.2, 0.9)),
        (optax.polynomial_schedule(1.0, 0.1, 2.5, 30), s.polynomial(30, 2.5, end=0.1)),
        (optax.cosine_decay_schedule(1.0, 30, 0.1), s.cosine(30, 0.1)),
        (optax.warmup_constant_schedule(0.2, 1.0, WARM), s.warmup(WARM, start=0.2)),
        (optax.warmup_cosine_decay_schedule(0.0, 1.0, WARM, LONG, 0.05), zero + s.cosine(rest, 0.05)),
        (optax.exponential_decay(1.0, 7, 0.6), s.exponential(0.6, 7)),
        (optax.exponential_decay(1.0, 7, 0.6, staircase=True, end_value=0.3), s.exponential(0.6, 7, True, 0.3)),
        (optax.warmup_exponential_decay_schedule(0.1, 1.0, WARM, 9, 0.6), s.warmup(WARM, start=0.1)
         + s.exponential(0.6, 9)),
        (optax.piecewise_constant_schedule(1.0, {9: 0.5, 20: 0.3}), s.multi_step((9, 20), (0.5, 0.3))),
        (optax.piecewise_interpolate_schedule("linear", 1.0, {9: 0.5, 20: 3.0}),
         s.points((0, 9, 20), (1.0, 0.5, 1.5))),
        (optax.cosine_onecycle_schedule(40, 1.0), s.points((0, 12, 40), (1 / 25, 1.0, 1 / 25 / 1e4), "cosine")),
        (optax.linear_onecycle_schedule(40, 1.0), s.points((0, 12, 34, 40), (1 / 25, 1.0, 1 / 25, 1 / 25 / 1e4))),
        (optax.sgdr_schedule([dict(init_value=0.0, peak_value=1.0, warmup_steps=4, decay_steps=14),
                              dict(init_value=0.1, peak_value=0.5, warmup_steps=5, decay_steps=20, end_value=0.1)]),
         s.warmup(4, start=0.0) + s.cosine(10) + 0.5 * (s.warmup(5, start=0.2) + s.cosine(15, 0.2))),
        (optax.join_schedules([optax.linear_schedule(0.0, 1.0, 5), optax.constant_schedule(1.0),
                               optax.cosine_decay_schedule(1.0, 20)], [5, 25]),
         s.warmup(5, start=0.0) + s.constant(steps=20) + s.cosine(20)),
    ]
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():  # else float32
        for reference, ours in cases:
            wanted = jax.vmap(reference)(jax.numpy.arange(LONG + 10)).tolist()
            assert [ours(step) for step in range(LONG + 10)] == pytest.approx(wanted, **CLOSE), repr(ours)
