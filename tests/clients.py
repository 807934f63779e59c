"""What the tests of real clients share: two runs that differ in the optimizer alone, and how they are compared.

The weights and states of a whole run are compared in float64, within the 1e-12 that docs/numerics.md promises. In
float32 two right runs drift apart, for a model turns one differing bit into many: there every single step is compared
with torch's from the same state (`follow`), within the units in the last place that are promised for one step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from helpers import generator, normal, ulp
from torch import Tensor, nn

from fasttrain.optim import SGD, AdamW

F64, F32 = torch.float64, torch.float32
Make = Callable[..., torch.optim.Optimizer]  # of parameters, and of further options

ADAMW: dict[str, Any] = dict(lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
DESCENT: dict[str, Any] = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
PAIRS: dict[str, tuple[Make, Make]] = {
    "AdamW": (partial(AdamW, **ADAMW), partial(torch.optim.AdamW, **ADAMW)),
    "SGD": (partial(SGD, **DESCENT), partial(torch.optim.SGD, **DESCENT)),
}
OURS = {name: ours for name, (ours, _) in PAIRS.items()}


def model_of(dtype: torch.dtype = F64) -> nn.Module:
    """A small network; the same one at every call."""
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    numbers = generator(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(normal(p.shape, F64, numbers) * 0.5)
    return model


def batches(count: int, dtype: torch.dtype = F64, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets; the same ones at every call."""
    numbers = generator(2)
    return [(normal((size, 6), dtype, numbers), normal((size, 3), dtype, numbers)) for _ in range(count)]


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def named(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and states by name."""
    states = {f"{name}: {key}": torch.as_tensor(value) for name, p in model.named_parameters()
              for key, value in optimizer.state.get(p, {}).items()}
    return {name: p.detach().clone() for name, p in model.named_parameters()} | states


def assert_close_run(got: dict[str, Tensor], wanted: dict[str, Tensor], relative: float = 1e-12) -> None:
    """Relative to each number, or to 1, the size of what was added up, where it is near zero."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype
        error = ((got[name] - tensor).abs() / tensor.abs().clamp_min(1)).max().item()
        assert error <= relative, f"{name}: relative error {error:.1e}"


def follow(optimizer: torch.optim.Optimizer, make: Make, bound: float = 4.0) -> list[int]:
    """Compare every step with one that torch takes in float64 from the same weights, gradients and states.

    The bound is that of tests/test_witness.py, in units in the last place of the largest term that was added up.
    Returns a list to which every step adds its number of parameters.
    """
    steps: list[int] = []
    before: list[tuple[nn.Parameter, nn.Parameter, dict[str, Any]]] = []

    def keep(*_: Any) -> None:
        before.clear()
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            states = {key: value.clone() if key == "step" else value.to(F64, copy=True)
                      for key, value in optimizer.state.get(p, {}).items()}
            before.append((p, nn.Parameter(p.detach().to(F64, copy=True)), states))

    def check(*_: Any) -> None:
        stepped = [row for row in before if row[0].grad is not None]  # a closure computes gradients within the step
        twin = make([exact for _, exact, _ in stepped])
        for group in twin.param_groups:  # what schedules have changed
            group.update({key: value for key, value in optimizer.param_groups[0].items() if "param" not in key})
        for p, exact, states in stepped:
            exact.grad = p.grad.double()  # type: ignore[union-attr]
            if states:
                twin.state[exact] = states
        old = [exact.detach().clone() for _, exact, _ in stepped]
        twin.step()
        for (p, exact, states), was in zip(stepped, old, strict=True):
            group = twin.param_groups[0]
            buffer = states.get("momentum_buffer", torch.zeros(())).abs()
            moved = group["lr"] * (1 + buffer + exact.grad.abs() + group["weight_decay"] * was.abs())
            largest = torch.maximum(torch.maximum(was.abs(), exact.detach().abs()), moved)
            off = ((p.detach() - exact.detach()).abs() / ulp(largest, p.dtype)).max().item()
            assert off <= bound, f"step {len(steps)}: off by {off:.2f} ulp"
        steps.append(len(stepped))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(check)
    return steps
