"""Optimizers that torch does not have: their papers, retold in tests/papers.py, and what only they can do."""

import copy
import itertools
from typing import Any

import papers
import pytest
import torch
from helpers import CONFIGURATIONS, assert_same_bits, generator, normal, ulp
from torch import Tensor
from torch.nn import Parameter

from fasttrain.optim import Adan, AdEMAMix, Optimizer, ScheduleFreeAdamW, ScheduleFreeSGD

STEPS = 12
BEYOND = [c for c in CONFIGURATIONS if c.optimizer in (Adan, AdEMAMix, ScheduleFreeSGD, ScheduleFreeAdamW)]


def problem(seed: int) -> tuple[Tensor, papers.Gradient]:
    """A start, and gradients that depend on the point and on the step."""
    numbers = generator(seed)
    start = normal((3, 7), torch.float64, numbers)
    noise = [normal((3, 7), torch.float64, numbers) for _ in range(STEPS + 1)]
    return start, lambda theta, step: 0.7 * theta + torch.sin(3 * theta) + noise[step]


def trajectory(optimizer: type[Optimizer], start: Tensor, gradient: papers.Gradient, sign: int = 1,
               **options: Any) -> tuple[Any, list[Tensor]]:
    p = Parameter(start.clone())
    opt = optimizer([p], **options)
    points = []
    for step in range(1, STEPS + 1):
        p.grad = sign * gradient(p.detach(), step)
        opt.step()
        points.append(p.detach().clone())
    return opt, points


def close(got: Tensor, wanted: Tensor) -> None:
    """Relative to the element, or to 1, the size of the numbers that were added up, where the sum is near zero."""
    assert ((got - wanted).abs() / wanted.abs().clamp_min(1)).max() <= 1e-12


def assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        close(a, b)


# --- The papers -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("no_prox", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adan(decay: float, no_prox: bool, maximize: bool, backend: str) -> None:
    start, gradient = problem(1)
    wanted = papers.adan(start, gradient, STEPS, 0.05, (0.03, 0.2, 0.01), 1e-6, decay, proximal=not no_prox)
    _, points = trajectory(Adan, start, gradient, -1 if maximize else 1, lr=0.05, betas=(0.97, 0.8, 0.99), eps=1e-6,
                           weight_decay=decay, no_prox=no_prox, maximize=maximize, backend=backend)
    assert_close(points, wanted)


@pytest.mark.parametrize("b1", [0.0, 0.9])
@pytest.mark.parametrize("alpha_warmup", [None, 6, 100])
@pytest.mark.parametrize("beta3_warmup", [None, 6, 100])
def test_ademamix(beta3_warmup: int | None, alpha_warmup: int | None, b1: float, backend: str) -> None:
    start, gradient = problem(2)
    wanted = papers.ademamix(start, gradient, STEPS, 0.05, (b1, 0.98, 0.9999), 5.0, alpha_warmup, beta3_warmup, 1e-6,
                             0.1)
    opt, points = trajectory(AdEMAMix, start, gradient, lr=0.05, betas=(b1, 0.98, 0.9999), alpha=5.0, eps=1e-6,
                             alpha_warmup=alpha_warmup, beta3_warmup=beta3_warmup, weight_decay=0.1, backend=backend)
    assert_close(points, wanted)
    (state,) = opt.state.values()
    assert ("exp_avg_fast" in state) == (b1 != 0)


@pytest.mark.parametrize(("warmup", "r", "power"), [(0, 0.0, 2.0), (5, 0.0, 2.0), (5, 1.5, 0.0), (100, 0.5, 1.0)])
@pytest.mark.parametrize("optimizer", [ScheduleFreeSGD, ScheduleFreeAdamW])
def test_schedule_free(optimizer: type[Optimizer], warmup: int, r: float, power: float, backend: str) -> None:
    start, gradient = problem(3)
    adam = optimizer is ScheduleFreeAdamW
    own = dict(betas=(0.8, 0.95), eps=1e-6) if adam else dict(momentum=0.8)
    wanted = papers.schedule_free(start, gradient, STEPS, 0.05, 0.8, 0.1, warmup, r, power,
                                  *((0.95, 1e-6) if adam else ()))
    opt, points = trajectory(optimizer, start, gradient, lr=0.05, weight_decay=0.1, warmup_steps=warmup, r=r,
                             weight_lr_power=power, backend=backend, **own)
    assert_close(points, [y for _, y, _ in wanted])
    ((p, state),) = opt.state.items()
    x, y, z = wanted[-1]
    close(state["z"], z)
    opt.eval()
    close(p.detach(), x)
    opt.train()
    close(p.detach(), y)


def test_these_tests_can_fail() -> None:
    start, gradient = problem(4)
    wanted = papers.adan(start, gradient, STEPS, 0.05, (0.03, 0.2, 0.01), 1e-6, 0.3, proximal=True)
    _, points = trajectory(Adan, start, gradient, lr=0.05, betas=(0.97, 0.8, 0.99), eps=1e-6, weight_decay=0.3,
                           no_prox=True)
    with pytest.raises(AssertionError):
        assert_close(points, wanted)


# --- fp32 and 16 bits: against one float64 step from the same state ---------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("configuration", BEYOND, ids=lambda configuration: configuration.name)
def test_one_step_is_within_units_in_the_last_place(configuration: Any, dtype: torch.dtype) -> None:
    """Counted in the largest term: a moment of two terms is off by 3.5 at most (see test_witness.py), Adan's second
    one, of the square of a sum of three, by 8; a parameter of three terms, whose factors are coefficients, by 5. In 16
    bits: one rounding, and at Adan's kept gradient none.
    """
    bound = 0.51 if dtype != torch.float32 else 8.0 if configuration.optimizer is Adan else 5.0
    numbers = generator(5)
    options = configuration.draw(numbers)
    p = Parameter(normal((40, 5), dtype, numbers))
    opt = configuration.optimizer([p], **options)
    for _ in range(8):
        p.grad = normal(p.shape, dtype, numbers)
        q = Parameter(p.detach().double())
        q.grad = p.grad.double()
        exact: Any = configuration.optimizer([q], **options)
        exact.param_groups[0].update({k: v for k, v in opt.param_groups[0].items() if k != "params"})
        exact.state[q] = {k: v.double() if k != "step" else v.clone() for k, v in opt.state.get(p, {}).items()}
        before = {"p": q.detach().clone(), **{k: v.clone() for k, v in exact.state[q].items()}}
        opt.step()
        exact.step()
        g = q.grad.abs()
        sizes = {"p": options.get("lr", 1e-3) * (1 + g + q.detach().abs()), "z": g * options.get("lr", 1.0),
                 "exp_avg_sq": (g + before.get("neg_pre_grad", g * 0).abs()) ** 2 * 0.5, "step": g * 0}
        for key, (got, wanted) in {"p": (p, q), **{k: (opt.state[p][k], v) for k, v in exact.state[q].items()}}.items():
            got, wanted = got.detach().double(), wanted.detach().double()
            scale = torch.maximum(torch.maximum(before.get(key, wanted).abs(), wanted.abs()), sizes.get(key, g))
            off = ((got - wanted).abs() / ulp(scale, dtype)).max().item()
            assert off <= bound, f"{key} is off by {off:.2f} ulp"


# --- Modes of the schedule-free ones ----------------------------------------------------------------------------------

FREE = pytest.mark.parametrize("optimizer", [ScheduleFreeSGD, ScheduleFreeAdamW])


def stepped(optimizer: type[Optimizer], dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Parameter]:
    numbers = generator(6)
    p = Parameter(normal((5, 3), dtype, numbers))
    opt = optimizer([p], lr=0.1, **options)
    for _ in range(3):
        p.grad = normal(p.shape, dtype, numbers)
        opt.step()
    return opt, p


@FREE
def test_a_step_in_evaluation_mode_is_an_error_and_changes_nothing(optimizer: type[Optimizer], backend: str) -> None:
    opt, p = stepped(optimizer, backend=backend)
    opt.eval()
    before = p.detach().clone(), copy.deepcopy(opt.state_dict())
    with pytest.raises(RuntimeError, match=r"group 0 is in evaluation mode.*Call optimizer\.train\(\)"):
        opt.step()
    assert_same_bits(p, before[0])
    after = opt.state_dict()
    assert after["param_groups"] == before[1]["param_groups"]
    for key, value in before[1]["state"][0].items():
        assert_same_bits(after["state"][0][key], value)
    opt.train()
    opt.step()


@FREE
def test_modes_may_be_asked_for_twice_and_before_the_first_step(optimizer: Any) -> None:
    p = Parameter(torch.tensor([1.0, -2.0]))
    opt = optimizer([p])
    for mode in (opt.train, opt.eval, opt.eval, opt.train):
        mode()
        assert p.tolist() == [1.0, -2.0]
    opt, p = stepped(optimizer)
    opt.eval()
    x = p.detach().clone()
    opt.eval()
    assert_same_bits(p, x)


@FREE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.float32], ids=str)
def test_a_swap_and_back_costs_one_rounding_each(optimizer: type[Optimizer], dtype: torch.dtype) -> None:
    real = torch.float32 if dtype == torch.complex64 else dtype
    numbers = generator(7)
    p = Parameter(normal((30,), torch.float64, numbers).to(dtype))
    opt: Any = optimizer([p], lr=0.1)
    for _ in range(3):
        p.grad = normal(p.shape, torch.float64, numbers).to(dtype)
        opt.step()
    y, version = p.detach().clone(), p._version
    opt.eval()
    assert p._version > version
    opt.train()
    moved = (torch.view_as_real(p.detach() - y) if p.is_complex() else p.detach() - y).abs().double()
    size = max(y.abs().max().item(), opt.state[p]["z"].abs().max().item())
    assert (moved / ulp(torch.tensor(size), real)).max() <= 4


@FREE
def test_the_mode_and_the_running_numbers_travel_with_the_state(optimizer: Any) -> None:
    opt, p = stepped(optimizer, warmup_steps=5)
    opt.eval()
    q = Parameter(p.detach().clone())
    other = optimizer([q])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert not other.param_groups[0]["train_mode"]
    for one, point in ((opt, p), (other, q)):
        one.train()
        point.grad = torch.ones_like(point)
        one.step()
    assert_same_bits(q, p)
    assert {k: v for k, v in opt.param_groups[0].items() if k != "params"} == \
           {k: v for k, v in other.param_groups[0].items() if k != "params"}
    assert opt.param_groups[0]["k"] == 4


@FREE
def test_a_skipped_or_failed_step_counts_for_nothing(optimizer: Any) -> None:
    opt, p = stepped(optimizer)
    running = {key: opt.param_groups[0][key] for key in ("k", "weight_sum", "lr_max")}
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    del opt.found_inf
    p.grad = torch.ones(7)[:1].expand(5, 3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        opt.step()
    assert running == {key: opt.param_groups[0][key] for key in running}


@pytest.mark.parametrize(("optimizer", "kwargs", "message"), [
    *itertools.product([Adan, AdEMAMix, ScheduleFreeAdamW, ScheduleFreeSGD], [dict(lr=-1.0)], ["learning rate: -1.0"]),
    *itertools.product([Adan, AdEMAMix, ScheduleFreeAdamW], [dict(eps=-1.0)], ["epsilon value: -1.0"]),
    *itertools.product([Adan, AdEMAMix, ScheduleFreeAdamW, ScheduleFreeSGD], [dict(weight_decay=-1)],
                       ["weight_decay value: -1"]),
    *itertools.product([Adan, AdEMAMix], [dict(betas=(0.9, 0.9, 1.0))], ["beta parameter at index 2: 1.0"]),
    *itertools.product([Adan, AdEMAMix], [dict(betas=(0.9, 0.9))], ["betas has 2 numbers, not 3"]),
    (ScheduleFreeAdamW, dict(betas=(0.9, 1.0)), "beta parameter at index 1: 1.0"),
    (ScheduleFreeAdamW, dict(betas=(0.0, 0.9)), "Invalid momentum: 0.0; it must be above 0"),
    (ScheduleFreeSGD, dict(momentum=1.0), "Invalid momentum: 1.0"), (AdEMAMix, dict(alpha=-1), "alpha value: -1"),
    (ScheduleFreeSGD, dict(warmup_steps=-1), "warmup_steps value: -1"),
])
def test_hyperparameters_out_of_range(optimizer: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer([Parameter(torch.ones(2))], **kwargs)
