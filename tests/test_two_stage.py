"""LAMB, LARS and StableAdamW are their papers', and a stage's sums have the same bits from every backend."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import papers_layerwise as papers
import pytest
import torch
from helpers import LAYOUTS, ROOT, assert_same_bits, generator, make, needs_native, normal, ulp, usable
from invariance import check_instruction_sets, check_threads_and_neighbours
from torch import Tensor
from torch.nn import Parameter

from fasttrain.kernels import emit_cpp, native, norm, stages
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import LAMB, LARS, STAGES, StableAdamW
from fasttrain.rule import Rule

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ADAM = dict(lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
SGD = dict(lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.2, eps=1e-4)
CASES: list[tuple[Any, Callable[..., Tensor], dict[str, Any]]] = [
    (LAMB, papers.lamb, ADAM),
    (LAMB, papers.lamb, dict(ADAM, bias_correction=False, clamp=(0.5, 3.0))),
    (LAMB, papers.lamb, dict(ADAM, weight_decay=0.0, always_adapt=False)),
    (LAMB, papers.lamb, dict(ADAM, weight_decay=0.0, betas=(0.0, 0.0))),
    (LARS, papers.lars, SGD),
    (LARS, papers.lars, dict(SGD, nesterov=True, eps=0.0)),
    (LARS, papers.lars, dict(SGD, momentum=0.0, weight_decay=0.0)),
    (LARS, papers.lars, dict(SGD, adapt=False)),
    (StableAdamW, papers.stable_adamw, ADAM),
    (StableAdamW, papers.stable_adamw, dict(ADAM, weight_decay=0.0, betas=(0.0, 0.9), eps=1e-8)),
]
KEYS = {LAMB: {"exp_avg": "m", "exp_avg_sq": "v"}, StableAdamW: {"exp_avg": "v", "exp_avg_sq": "u"},
        LARS: {"momentum_buffer": "v"}}
SHAPES = ((5, 3), (4100,), (), (33, 70), (0, 4))


def gradients(step: int, dtype: torch.dtype, params: list[Parameter], numbers: torch.Generator) -> None:
    """Of very different sizes, some missing; all zeros for one parameter at first."""
    for i, p in enumerate(params):
        grad = normal(p.shape, dtype, numbers) * 10.0 ** ((i + 2 * step) % 5 - 2)
        p.grad = None if (i + step) % 5 == 4 else torch.zeros_like(p) if (i, step) == (1, 0) else grad


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[2]}")
def test_float64_is_the_papers(case: Any, maximize: bool, backend: str) -> None:
    optimizer, paper, options = case
    numbers = generator(1)
    params = [Parameter(normal(shape, F64, numbers)) for shape in SHAPES]
    with torch.no_grad():
        params[0].zero_()  # the norm of a parameter is zero at first
    ours = optimizer(params, **options, maximize=maximize, backend=backend)
    kept: list[dict[str, Any]] = [{} for _ in params]
    for step in range(6):
        gradients(step, F64, params, numbers)
        wanted = [p.detach().clone() if p.grad is None else
                  paper(p.detach().clone(), -p.grad if maximize else p.grad.clone(), state, **options)
                  for p, state in zip(params, kept, strict=True)]
        ours.step()
        for p, q, state in zip(params, wanted, kept, strict=True):
            assert torch.allclose(p, q, rtol=1e-12, atol=1e-12), step
            for key, name in KEYS[optimizer].items():
                if key in ours.state.get(p, {}):
                    assert torch.allclose(ours.state[p][key], state[name], rtol=1e-12, atol=1e-12), (step, key)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{case[2]}")
def test_one_step_is_within_units_in_the_last_place(case: Any, dtype: torch.dtype, backend: str) -> None:
    """Against one float64 step from the same state: p and its update count as terms, the update's roundings (at most
    nine halves of a unit, in its own size, and the sums' relative 2^-23) too. 16 bits are rounded once.
    """
    optimizer, paper, options = case
    numbers = generator(2)
    params = [Parameter(normal(shape, dtype, numbers)) for shape in SHAPES]
    ours = optimizer(params, **options, backend=backend)
    for step in range(3):
        gradients(step, dtype, params, numbers)
        wanted = []
        for p in params:
            state = {name: ours.state[p][key].double() for key, name in KEYS[optimizer].items()
                     if key in ours.state.get(p, {})}
            state["t"] = int(ours.state[p]["step"].item()) if "step" in ours.state.get(p, {}) else 0
            old = p.detach().double()
            new = old if p.grad is None else paper(old, p.grad.double(), state, **options)
            wanted.append((old, new))
        ours.step()
        for p, (old, new) in zip(params, wanted, strict=True):
            # The momentum's terms may cancel: what rounding leaves then is of the size of other elements' updates.
            size = old.abs() + ((new - old).abs().max() if p.numel() else 0.0)
            off = ((p.detach().double() - new).abs() / ulp(size, dtype)).max().item() if p.numel() else 0.0
            assert off <= (8.0 if dtype == F32 else 0.52), f"step {step}: off by {off:.2f} ulp"


# --- The stages -------------------------------------------------------------------------------------------------------

KINDS = [(F32, F32, F32), (F64, F64, F64), (BF16, F32, F32), (F16, BF16, F16), (F32, BF16, F64)]


def items(rule: Rule, kinds: tuple[torch.dtype, ...]) -> list[Item]:
    numbers = generator(3)
    made = []
    for layout in LAYOUTS:
        dtypes = (kinds[0], kinds[1], *(kinds[2] for _ in rule.state))
        tensors = [make(layout, lambda size, d=d: normal(size, d, numbers)).view for d in dtypes]
        for tensor, name in zip(tensors[2:], rule.state, strict=True):
            if name in rule.positive:
                tensor.copy_(tensor.abs())
        row = [-2.0, *(0.5 + torch.rand((), dtype=F64, generator=numbers).item() for _ in trace(rule).coefficients)]
        made.append(Item(layout, rule, tuple(tensors), row, torch.tensor(3.0)))
    return made


@needs_native
@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("rule", STAGES, ids=lambda rule: rule.name)
def test_stages(rule: Rule, kinds: tuple[torch.dtype, ...]) -> None:
    got, wanted, before = (items(rule, kinds) for _ in range(3))
    sums, right = stages.run(got, "cpu"), stages.run(wanted, "reference")
    assert sums.shape == right.shape == (len(got), len(rule.sums or ()))
    assert_same_bits(torch.from_numpy(sums.copy()), torch.from_numpy(right.copy()))
    changed = [False, *trace(rule).changed]
    changed[0], changed[1] = changed[1], False  # p, g, then the states
    for mine, theirs, old in zip(got, wanted, before, strict=True):
        assert mine.counter is not None
        assert mine.counter.item() == 4
        for index, (a, b, c) in enumerate(zip(mine.tensors, theirs.tensors, old.tensors, strict=True)):
            assert_same_bits(a, b, f"{mine.name}, tensor {index}")
            if not changed[index]:
                assert_same_bits(a, c, f"{mine.name}, tensor {index} was written")


def test_the_sums_are_those_of_a_norm() -> None:
    """LARS measures squares: of numbers that fp32 squares without rounding, the bits of pass A."""
    rule = next(rule for rule in STAGES if rule.name == "LARSMeasurePlain")
    p, g = ((normal((n,), BF16, generator(4))).float() for n in (70_001, 70_001))
    sums = stages.run([Item("p", rule, (p, g), [1.0], None)], "cpu" if usable("cpu") is None else "reference")
    assert_same_bits(torch.from_numpy(sums[0].copy()), norm.squares([p, g])[0])


@needs_native
def test_the_compiled_module_holds_these_stages() -> None:
    assert native.module().stages() == [(rule.name, emit_cpp.digest(rule)) for rule in STAGES]
    written = (ROOT / "csrc" / "stage_rules.h").read_text()
    assert written == emit_cpp.stages_header(STAGES), "csrc/stage_rules.h is stale: `make rules`"
    other = replace(STAGES[0], element=lambda *a: (a[0], a[2], a[3], a[0] * a[0], a[1] * a[1]))
    assert stages.number_of(other) is None


@needs_native
@pytest.mark.parametrize("optimizer", [LAMB, LARS, StableAdamW])
def test_threads_and_neighbours_do_not_matter(optimizer: Any) -> None:
    check_threads_and_neighbours(optimizer, ((200_001,), (3,), (65_536,), (0,), (70_000,)), F32, seed=5)


CODE = """
import torch
from fasttrain.kernels import native
from fasttrain.optim import LAMB, LARS, StableAdamW
ends = []
for optimizer in (LAMB, LARS, StableAdamW):
    numbers = torch.Generator().manual_seed(6)
    params = [torch.nn.Parameter(torch.randn(5003, generator=numbers).to(dtype))
              for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    for _ in range(2):
        opt = optimizer(params, lr=0.1)
        for p in params:
            p.grad = torch.randn(p.shape, generator=numbers).to(p.dtype)
        opt.step()
    ends += [x.hex() for p in params for x in p.detach().double()[::37].tolist()]
print(native.module().isa(), ends)
"""


@needs_native
def test_instruction_sets_do_not_matter() -> None:
    check_instruction_sets(CODE)


def test_complex_numbers_are_pairs(backend: str) -> None:
    for optimizer, _, options in CASES[:1] + CASES[4:5] + CASES[-2:-1]:
        numbers = generator(7)
        p = Parameter(torch.complex(*(normal((6, 3), F64, numbers) for _ in "ab")))
        q = Parameter(torch.view_as_real(p.detach()).clone())
        one, two = optimizer([p], **options, backend=backend), optimizer([q], **options, backend=backend)
        for _ in range(3):
            p.grad = torch.complex(*(normal((6, 3), F64, numbers) for _ in "ab"))
            q.grad = torch.view_as_real(p.grad).clone()
            one.step()
            two.step()
        assert_same_bits(torch.view_as_real(p.detach()), q.detach())


def test_what_is_not_finite_is_seen(backend: str) -> None:
    for optimizer in (LAMB, LARS, StableAdamW):
        p = Parameter(torch.ones(5))
        p.grad = torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0])
        optimizer([p], backend=backend).step()
        assert p.detach().isnan()[1]


@pytest.mark.parametrize(("optimizer", "options", "message"), [
    (LAMB, dict(lr=-1.0), "Invalid learning rate: -1.0"), (LAMB, dict(eps=-1.0), "Invalid epsilon value: -1.0"),
    (LAMB, dict(betas=(0.9, 1.0)), "Invalid beta parameter at index 1"),
    (LAMB, dict(clamp=(2.0, 1.0)), "Invalid clamp"), (LARS, dict(momentum=-0.1), "Invalid momentum value"),
    (LARS, dict(weight_decay=-1.0), "Invalid weight_decay value"),
    (LARS, dict(nesterov=True, momentum=0.0), "Nesterov momentum requires a momentum"),
    (LARS, dict(trust_coefficient=-1.0), "Invalid trust_coefficient"), (LARS, dict(eps=-1.0), "Invalid epsilon value"),
    (StableAdamW, dict(eps=-1.0), "Invalid epsilon value"), (StableAdamW, dict(lr=torch.ones(2)), "must be 1-element")])
def test_errors(optimizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer([Parameter(torch.ones(2))], **options)


def test_a_step_is_two_walks_and_reports_them(backend: str) -> None:
    params = [Parameter(torch.ones(4, 3)), Parameter(torch.ones(7))]
    optimizer = LAMB(params, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    assert optimizer.last_step.launches == 2
    assert optimizer.last_step.parameters == 2
    assert optimizer.last_step.allocations == 0
