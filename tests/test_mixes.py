"""Optimizers, options, layouts, groups and freezing, mixed at random: the CPU backend against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import LAYOUTS, generator, make, usable
from torch import Tensor
from torch.nn import Parameter

import fasttrain.optim as optim

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis (pip install fasttrain[test])")
st = hypothesis.strategies

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": dict(lr=0.01), "Adam": dict(lr=0.01, weight_decay=0.1, amsgrad=True), "Lion": dict(lr=0.01),
    "SGD": dict(lr=0.1, momentum=0.9, nesterov=True), "RMSprop": dict(lr=0.01, centered=True, momentum=0.5),
    "Adagrad": dict(lr=0.1), "Adan": dict(lr=0.01), "NAdam": dict(lr=0.01), "ScheduleFreeAdamW": dict(lr=0.01),
}
MASTERS = {torch.float32: ["none"], torch.float16: ["none", "fp32", "kahan", "stochastic"],
           torch.bfloat16: ["none", "fp32", "split", "split8", "kahan", "stochastic"]}
LARGE = ((70, 31), (2100,), (3, 4, 5, 12))  # more than one block


@st.composite
def groups(draw: Any) -> dict[str, Any]:
    """The options of a group, and the dtype and layouts of its parameters."""
    dtype = draw(st.sampled_from(list(MASTERS)))
    options = {
        "master": draw(st.sampled_from(MASTERS[dtype])),
        "state_dtype": draw(st.sampled_from([None, "fp32", "bf16", "fp16", "int8", "e4m3", "e5m2", "int4"])),
        "state_rounding": draw(st.sampled_from([None, "nearest", "stochastic"])),
        "ema_decay": draw(st.sampled_from([None, 0.9])), "ema_dtype": draw(st.sampled_from(["fp32", "bf16"])),
        "min_size": draw(st.sampled_from([0, 100])), "zero_gradients": draw(st.booleans()),
        "clip_value": draw(st.sampled_from([None, 0.5])), "clip_each": draw(st.sampled_from([None, 3.0])),
        "seed": draw(st.integers(0, 3)),
    }
    places = draw(st.lists(st.sampled_from([*LAYOUTS, *LARGE]), min_size=1, max_size=3))
    return {"dtype": dtype, "options": options, "places": places}


def parameter(place: Any, dtype: torch.dtype, numbers: torch.Generator) -> Parameter:
    def values(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=numbers).to(dtype)
    return Parameter(values(place) if isinstance(place, tuple) else make(place, values).view)


def run(backend: str, name: str, drawn: list[dict[str, Any]], frozen: list[list[bool]]) -> list[Tensor]:
    """Every parameter and state after the steps; `frozen` says which parameters have no gradient in which step."""
    numbers = generator(5)
    made = [{"params": [parameter(place, group["dtype"], numbers) for place in group["places"]], **group["options"]}
            for group in drawn]
    optimizer = getattr(optim, name)(made, **OPTIMIZERS[name], backend=backend)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in frozen:
        for index, p in enumerate(params):
            gradient = torch.randn(p.shape, generator=numbers).to(p.dtype)
            p.grad = None if step[index % len(step)] else gradient
        optimizer.clip_grad_norm_(5.0)
        optimizer.step()
    found = []
    for p in params:
        state = optimizer.state.get(p, {})
        found += [p.detach(), *(state[key] for key in sorted(state) if isinstance(state[key], Tensor))]
        found += [] if p.grad is None else [p.grad]
    return found


@hypothesis.given(name=st.sampled_from(list(OPTIMIZERS)), drawn=st.lists(groups(), min_size=1, max_size=3),
                  frozen=st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=4))
@hypothesis.settings(max_examples=120, derandomize=True)
def test_the_cpu_does_what_the_reference_does(name: str, drawn: list[dict[str, Any]], frozen: list[list[bool]]) -> None:
    if reason := usable("cpu"):
        pytest.skip(reason)
    ours, wanted = run("cpu", name, drawn, frozen), run("reference", name, drawn, frozen)
    assert len(ours) == len(wanted)
    for index, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        x, y = (torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1)) for t in (a, b))
        same = x.view(torch.uint8) == y.view(torch.uint8)
        both_nan = (x.float().isnan() & y.float().isnan()).repeat_interleave(x.element_size())
        assert bool((same | both_nan).all()), f"tensor {index} ({a.dtype}, {tuple(a.shape)}) of {name} differs"
