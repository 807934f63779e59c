"""Adafactor is torch.optim.Adafactor; the compiled passes and the eager ones agree, whatever shares the work."""

import copy
from typing import Any

import pytest
import torch
from helpers import generator, needs_native, normal, ulp
from invariance import check_instruction_sets, check_threads_and_neighbours
from torch import Tensor
from torch.nn import Parameter

from fasttrain.optim import Adafactor

pytest.importorskip("expecttest", reason="torch's optim_db needs expecttest")
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.Adafactor)
OPTIONS: list[dict[str, Any]] = [
    *(i.kwargs for i in INFO.optim_inputs_func(device="cpu")), dict(eps=(1e-2, 1e-3)), dict(eps=(0.0, 0.0)),
    dict(lr=0.5, eps=(1e-30, 1e-2), d=1.25, weight_decay=0.1, beta2_decay=-0.5, maximize=True)]
# Vectors and scalars, one tile and many, tiles cut on either side, batches of matrices, single rows and columns.
SHAPES = ((7,), (), (5, 3), (65, 40), (3, 2100), (66, 2049), (3, 5, 7, 4), (1, 9), (9, 1), (4100,), (2, 1, 1))


def give(step: int, dtype: torch.dtype, numbers: torch.Generator, *lists: list[Parameter]) -> None:
    """The same gradients to all, of very different sizes; some are missing, one is frozen at first."""
    for i, same in enumerate(zip(*lists, strict=True)):
        grad = normal(same[0].shape, dtype, numbers) * 10.0 ** (i % 5 - 3)
        missing = (i + step) % 6 == 5 or (i == 3 and step < 2)
        for p in same:
            p.grad = None if missing else grad.clone()


def close(got: Tensor, wanted: Tensor, what: str) -> None:
    error = (got.detach() - wanted.detach()).abs() / wanted.detach().abs().clamp_min(1e-12)
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    # Sums of squares of up to 270,000 numbers in another order, and cancellation in p: relative to 1 there.
    assert bool(((got.detach() - wanted.detach()).abs() <= 1e-12 * wanted.detach().abs().clamp_min(
        1 if what.endswith("p") else 0)).all()), f"{what}: relative error {error.max().item():.1e}"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float64_is_torchs(options: dict[str, Any], backend: str) -> None:
    numbers = generator(1)
    mine = [Parameter(normal(shape, torch.float64, numbers)) for shape in SHAPES]
    theirs = copy.deepcopy(mine)
    both = []
    for optimizer, params, extra in ((Adafactor, mine, {"backend": backend}), (torch.optim.Adafactor, theirs, {})):
        both.append(optimizer([{"params": params[:5]}, {"params": params[5:], "lr": 0.03, "weight_decay": 0.01}],
                              **copy.deepcopy(options), **extra))
    for step in range(4):
        give(step, torch.float64, numbers, mine, theirs)
        for optimizer in both:
            optimizer.step()
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            close(p, q, f"step {step}, {i} p")
            assert both[0].state[p].keys() == both[1].state[q].keys()
            for key, value in both[1].state[q].items():
                close(both[0].state[p][key], value, f"step {step}, {i} {key}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_one_step_is_within_units_in_the_last_place(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Against one float64 step of torch from the same state.

    States are made in float64 and rounded once; the gradient's square of a vector takes three roundings in fp32 more.
    p: 2 for its product and the sum, and the update's own seven roundings of half a unit, of its own size.
    """
    numbers = generator(2)
    mine = [Parameter(normal(shape, dtype, numbers)) for shape in SHAPES]
    ours = Adafactor(mine, **options, backend=backend)
    eps = options.get("eps", (None, 1e-3))
    for step in range(3):
        give(step, dtype, numbers, mine)
        exact = [Parameter(p.detach().double()) for p in mine]
        machine = torch.finfo(dtype).eps if eps[0] is None else eps[0]
        torchs = torch.optim.Adafactor(exact, **{**options, "eps": (machine, eps[1])})
        for p, q in zip(mine, exact, strict=True):
            q.grad = None if p.grad is None else p.grad.double()
            if p in ours.state:
                torchs.state[q] = {key: value.double() if key != "step" else value.clone()
                                   for key, value in ours.state[p].items()}
        before = [q.detach().clone() for q in exact]
        ours.step()
        torchs.step()
        narrow = dtype != torch.float32
        for i, (p, q, old) in enumerate(zip(mine, exact, before, strict=True)):
            update = (q.detach() - old).abs()
            size = torch.maximum(torch.maximum(old.abs(), q.detach().abs()), update)
            off = ((p.detach().double() - q.detach()).abs() / ulp(size, dtype)).max().item()
            assert off <= (0.52 if narrow else 6.0), f"step {step}, {i}: p is off by {off:.2f} ulp"
            for key, value in torchs.state.get(q, {}).items():
                off = ((ours.state[p][key].double() - value).abs() / ulp(value, dtype)).max().item()
                bound = 0 if key == "step" else 0.51 if narrow else 3.5 if key == "variance" else 0.51
                assert off <= bound, f"step {step}, {i}: {key} is off by {off:.2f} ulp"


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_threads_and_neighbours_do_not_matter(dtype: torch.dtype) -> None:
    """The same bits on any number of threads, among other parameters or alone, tile by tile or in one stretch."""
    sizes = ((500, 600), (70, 30), (300_001,), (3,), (4, 256, 300), (40, 41))
    check_threads_and_neighbours(Adafactor, sizes, dtype, seed=3)


CODE = """
import torch
from fasttrain.kernels import native
from fasttrain.optim import Adafactor
numbers = torch.Generator().manual_seed(4)
params = [torch.nn.Parameter(torch.randn(size, generator=numbers).to(dtype)) for size in ((33, 2100), (700,))
          for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
optimizer = Adafactor(params)
for _ in range(2):
    for p in params:
        p.grad = torch.randn(p.shape, generator=numbers).to(p.dtype)
    optimizer.step()
print(native.module().isa(), [x.hex() for p in params for x in p.detach().double().flatten()[::37].tolist()])
"""


@needs_native
def test_instruction_sets_do_not_matter() -> None:
    check_instruction_sets(CODE)


def test_parameters_that_share_memory_are_stepped_in_turn(backend: str) -> None:
    flat = normal((60,), torch.float64, generator(5))
    ends = []
    for optimizer, extra in ((Adafactor, {"backend": backend}), (torch.optim.Adafactor, {})):
        storage = flat.clone()
        params = [Parameter(storage[:40].view(5, 8)), Parameter(storage[20:])]
        opt = optimizer(params, lr=0.5, **extra)
        for p in params:
            p.grad = normal(p.shape, torch.float64, generator(6))
        opt.step()
        ends.append(storage)
    assert torch.allclose(*ends, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [float("nan"), float("inf")])
def test_what_is_not_finite_propagates_as_in_torch(kind: float, backend: str) -> None:
    ends = []
    for optimizer, extra in ((Adafactor, {"backend": backend}), (torch.optim.Adafactor, {})):
        params = [Parameter(torch.ones(4, 5, dtype=torch.float64)), Parameter(torch.ones(6, dtype=torch.float64))]
        for p in params:
            p.grad = torch.ones_like(p)
            p.grad.view(-1)[3] = kind
        opt = optimizer(params, **extra)
        opt.step()
        ends.append([*params, *(opt.state[p][k] for p in params for k in sorted(opt.state[p]))])
    for a, b in zip(*ends, strict=True):
        if kind != kind:
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.allclose(a, b, rtol=1e-12, equal_nan=True)
        else:  # torch's lerp makes NaN of an infinity in its first step, and so of every element
            assert bool(b[~a.isfinite()].isnan().all())
            assert isinstance(a, Parameter) <= (not bool(a.isfinite().all()))


def test_denormal_tails_become_zero(backend: str) -> None:
    params = [Parameter(torch.ones(3, 4)), Parameter(torch.ones(5))]
    optimizer = Adafactor(params, backend=backend)
    for p in params:
        p.grad = torch.full_like(p, 2.0**-62)
    optimizer.step()
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(6):
        optimizer.step()
    for p in params:
        for key, value in optimizer.state[p].items():
            assert key == "step" or bool((value == 0).all() | (value.abs() >= 2.0**-126).all()), (key, value)


def test_checkpoints_go_both_ways(backend: str) -> None:
    numbers = generator(7)
    mine = [Parameter(normal(shape, torch.float64, numbers)) for shape in SHAPES]
    theirs = copy.deepcopy(mine)
    ours, torchs = Adafactor(mine, backend=backend), torch.optim.Adafactor(theirs, lr=0.3)
    give(0, torch.float64, numbers, theirs)
    torchs.step()
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(q)
    give(1, torch.float64, numbers, mine, theirs)
    ours.step()
    torchs.step()
    for p, q in zip(mine, theirs, strict=True):
        close(p, q, "p")
    back = torch.optim.Adafactor(theirs)
    back.load_state_dict(ours.state_dict())
    assert back.state_dict()["state"].keys() == ours.state_dict()["state"].keys()


ERRORS = list(INFO.optim_error_inputs_func("cpu", torch.float32))


@pytest.mark.parametrize("index", range(len(ERRORS)))
def test_the_errors_of_torch(index: int) -> None:
    import warnings

    wrong = ERRORS[index]
    raised = []
    for optimizer in (Adafactor, torch.optim.Adafactor):
        given = copy.deepcopy(wrong.optimizer_error_input)
        params = given.params if given.params is not None else [Parameter(torch.ones(2, 3))]
        with pytest.raises(Exception) as error, warnings.catch_warnings():  # noqa: PT011, PT012
            warnings.simplefilter("error")
            made = optimizer(params, **given.kwargs)
            assert wrong.error_on == OptimizerErrorEnum.STEP_ERROR
            made.step()
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]


def test_a_state_of_another_shape_is_refused(backend: str) -> None:
    p = Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    optimizer = Adafactor([p], backend=backend)
    optimizer.step()
    optimizer.state[p]["row_var"] = torch.zeros(4, 1)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .* 'row_var' is \(4, 1\) on cpu, and must be"):
        optimizer.step()
    del optimizer.state[p]["row_var"]
    with pytest.raises(RuntimeError, match="'row_var' is missing"):
        optimizer.step()


def test_the_signature_is_torchs() -> None:
    import inspect

    theirs = inspect.signature(torch.optim.Adafactor.__init__).parameters
    mine = inspect.signature(Adafactor.__init__).parameters
    assert [(k, v.default, v.kind) for k, v in theirs.items()] == [(k, v.default, v.kind) for k, v in mine.items()][:-1]
    assert list(mine)[-1] == "options"
