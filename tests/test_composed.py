"""The optimizers of several rules: each rule gives the same bits on every backend; and what all of them can do."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, assert_same_bits, generator, make, normal, usable
from torch import Tensor
from torch.nn import Parameter

from fasttrain.kernels import dispatch
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import COMPOSED, LAMB, LARS, OPTIMIZERS, SOAP, Adafactor, Muon, Optimizer, StableAdamW
from fasttrain.rule import Rule

ELEMENTWISE = {rule for optimizer in OPTIMIZERS for rule in optimizer.rules}
RULES = {rule.name: rule for optimizer in COMPOSED for rule in optimizer.rules
         if rule not in ELEMENTWISE and rule.sums is None}  # stages: test_two_stage.py
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KINDS = [(F32, F32, F32), (F64, F64, F64), (BF16, F32, F32), (F16, BF16, F16), (F32, BF16, F64)]


def items(rule: Rule, kinds: tuple[torch.dtype, ...]) -> list[Item]:
    numbers = generator(1)
    made = []
    for layout in ("empty", "one", "odd", "misaligned", "transposed", "strided", "chunks"):
        dtypes = (kinds[0], kinds[1], *(kinds[2] for _ in rule.state))
        tensors = [make(layout, lambda size, d=d: normal(size, d, numbers)).view for d in dtypes]
        for tensor, name in zip(tensors[2:], rule.state, strict=True):
            if name in rule.positive:
                tensor.copy_(tensor.abs())
        row = [1.0, *(0.5 + torch.rand((), dtype=F64, generator=numbers).item() for _ in trace(rule).coefficients)]
        made.append(Item(layout, rule, tuple(tensors), row, None))
    return made


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_rules(name: str, kinds: tuple[torch.dtype, ...], backend: str) -> None:
    if reason := usable(backend):
        pytest.skip(reason)
    got, wanted = items(RULES[name], kinds), items(RULES[name], kinds)
    if backend == "triton":  # the interpreter takes milliseconds for each tensor
        got, wanted = got[:3], wanted[:3]
    dispatch.load(backend).step(got)
    dispatch.load("reference").step(wanted)
    for mine, theirs in zip(got, wanted, strict=True):
        for index, (a, b) in enumerate(zip(mine.tensors, theirs.tensors, strict=True)):
            assert_same_bits(a, b, f"{name}, {mine.name}, tensor {index}")


# --- What every one of them can do ------------------------------------------------------------------------------------

MAKE: dict[str, Callable[..., Optimizer]] = {
    **{c.__name__: (lambda params, c=c, **options: c(params, **{"lr": 0.02, **options}))
       for c in (LAMB, LARS, StableAdamW, SOAP)},
    "Adafactor": lambda params, **options: Adafactor(params, **{"lr": 0.02, **options}),
    "Muon": lambda params, **options: Muon(params, lr=0.02, **options),
}
assert {optimizer.__name__ for optimizer in COMPOSED} <= {name.split()[0] for name in MAKE}


def parameters(dtype: torch.dtype = F32) -> list[Parameter]:
    numbers = generator(3)
    return [Parameter(normal(size, dtype, numbers)) for size in ((6, 4), (7,), (6, 4), (3, 4, 5), (), (0, 4), (4, 6))]


def step(optimizer: Any, params: list[Parameter], seed: int, skip: tuple[int, ...] = ()) -> None:
    numbers = generator(seed)
    for i, p in enumerate(params):
        grad = normal(p.shape, p.dtype, numbers)
        p.grad = None if i in skip else grad
    optimizer.step()


def numbers_of(optimizer: Any, params: list[Parameter]) -> list[Tensor]:
    return [*(p.detach() for p in params), *(v for p in params for _, v in sorted(optimizer.state.get(p, {}).items()))]


def assert_same_numbers(got: Any, mine: list[Parameter], wanted: Any, theirs: list[Parameter]) -> None:
    for a, b in zip(numbers_of(got, mine), numbers_of(wanted, theirs), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_state_goes_out_and_comes_back(name: str, dtype: torch.dtype, backend: str) -> None:
    """Through a file, pickle and deepcopy, in the middle of a run: the rest of it has the same bits."""
    params = parameters(dtype)
    optimizer = MAKE[name](params, backend=backend)
    for seed in range(3):
        step(optimizer, params, seed, skip=(2,) if seed == 1 else ())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = [Parameter(p.detach().clone()) for p in params]
    again = MAKE[name](loaded, backend=backend)
    again.load_state_dict(torch.load(file))
    copies = [(again, loaded)]
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        copies.append((copied, [p for group in copied.param_groups for p in group["params"]]))
    for seed in (5, 6):
        step(optimizer, params, seed)
        for other, theirs in copies:
            step(other, theirs, seed)
    for other, theirs in copies:
        assert_same_numbers(other, theirs, optimizer, params)


@pytest.mark.parametrize("name", MAKE)
def test_maximize_is_a_descent_of_the_negated_gradient(name: str, backend: str) -> None:
    one, two = parameters(), parameters()
    up, down = MAKE[name](one, maximize=True, backend=backend), MAKE[name](two, backend=backend)
    for seed in range(3):
        numbers = generator(seed)
        for p, q in zip(one, two, strict=True):
            p.grad = normal(p.shape, F32, numbers)
            q.grad = -p.grad
        up.step()
        down.step()
    assert_same_numbers(up, one, down, two)


@pytest.mark.parametrize("name", MAKE)
def test_groups_frozen_parameters_and_closures(name: str, backend: str) -> None:
    """A parameter that is frozen, thawed or added later steps as if it were alone; two groups have their own lr."""
    params, alone = parameters(), parameters()
    optimizer = MAKE[name](params[:1], backend=backend)
    optimizer.add_param_group({"params": params[1:], "lr": 0.5})
    others = [MAKE[name]([p], backend=backend) for p in alone]
    for other in others[1:]:
        other.param_groups[0]["lr"] = 0.5
    for seed in range(4):
        skip = (0, 3) if seed in (0, 2) else (1,) if seed == 1 else ()
        step(optimizer, params, seed, skip)
        for p, q, other in zip(params, alone, others, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
            other.step()
    for p, q, other in zip(params, alone, others, strict=True):
        assert_same_numbers(optimizer, [p], other, [q])
    assert optimizer.step(lambda: torch.tensor(3.0)).item() == 3.0


@pytest.mark.parametrize("name", MAKE)
def test_layouts(name: str, backend: str) -> None:
    """Every layout steps as its contiguous copy, and nothing around a view is written."""
    for layout in LAYOUTS:
        made = make(layout, lambda size: normal(size, F32, generator(4)))
        p, q = Parameter(made.view), Parameter(made.view.clone(memory_format=torch.contiguous_format))
        one, two = MAKE[name]([p], backend=backend), MAKE[name]([q], backend=backend)
        for seed in range(2):
            q.grad = normal(q.shape, F32, generator(seed))
            p.grad = torch.empty_like(p).copy_(q.grad)
            one.step()
            two.step()
        made.check(layout)
        assert_same_bits(p, q, layout)


@pytest.mark.parametrize("name", MAKE)
def test_a_bad_gradient_changes_nothing(name: str, backend: str) -> None:
    params = parameters()
    optimizer = MAKE[name](params, backend=backend)
    step(optimizer, params, 1)
    before = [tensor.clone() for tensor in numbers_of(optimizer, params)]
    for p in params:
        p.grad = torch.ones_like(p)
    params[3].grad = torch.ones(3, 4, 5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    for a, b in zip(numbers_of(optimizer, params), before, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("name", MAKE)
def test_versions_are_incremented(name: str, backend: str) -> None:
    params = parameters()
    optimizer = MAKE[name](params, backend=backend)
    before = [p._version for p in params]
    step(optimizer, params, 1)
    step(optimizer, params, 2)
    assert all(p._version > version for p, version in zip(params, before, strict=True) if p.numel())


@pytest.mark.parametrize("name", MAKE)
def test_a_step_of_torchs_gradient_scaler(name: str, backend: str) -> None:
    """A loss scale is divided out, and found_inf skips the step."""
    one, two = parameters(), parameters()
    scaled, plain = MAKE[name](one, backend=backend), MAKE[name](two, backend=backend)
    for seed in range(3):
        numbers = generator(seed)
        for p, q in zip(one, two, strict=True):
            q.grad = normal(q.shape, F32, numbers)
            p.grad = q.grad * 1024
        scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(float(seed == 1))
        scaled.step()
        if seed != 1:
            plain.step()
    assert_same_numbers(scaled, one, plain, two)
