"""Adafactor in Triton's interpreter: what tests/test_adafactor.py says of every backend, and what is Triton's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import REALS, assert_same_bits, generator, normal, usable
from torch.nn import Parameter

from fasttrain.optim import Adafactor

# Not-a-number is one of the things that are tested; NumPy, under the interpreter, warns of it.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
              pytest.mark.skipif(bool(usable("triton")), reason=str(usable("triton")))]
adafactor = pytest.importorskip("test_adafactor")


def test_float64_is_torchs() -> None:
    adafactor.test_float64_is_torchs(adafactor.OPTIONS[-1], "triton")


@pytest.mark.slow
@pytest.mark.parametrize("options", adafactor.OPTIONS[:-1], ids=str)
def test_float64_is_torchs_with_every_option(options: dict[str, Any]) -> None:
    adafactor.test_float64_is_torchs(options, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float16],
                         ids=str)
def test_one_step_is_within_units_in_the_last_place(dtype: torch.dtype) -> None:
    adafactor.test_one_step_is_within_units_in_the_last_place(adafactor.OPTIONS[-1], dtype, "triton")


def test_parameters_that_share_memory() -> None:
    adafactor.test_parameters_that_share_memory_are_stepped_in_turn("triton")


@pytest.mark.parametrize("kind", [float("nan"), float("inf")])
def test_what_is_not_finite(kind: float) -> None:
    adafactor.test_what_is_not_finite_propagates_as_in_torch(kind, "triton")


def test_denormal_tails() -> None:
    adafactor.test_denormal_tails_become_zero("triton")


def made(dtype: torch.dtype) -> list[Parameter]:
    """A strided leaf, a transposed one, whole tiles, tiles cut on either side, a misaligned one, vectors, nothing."""
    numbers = generator(1)
    whole, odd, flat = normal((64, 256), dtype, numbers), normal((70, 300), dtype, numbers), normal(
        (1100,), dtype, numbers)
    return [Parameter(p) for p in (whole, odd, odd[::2, ::3], whole.T, flat[1:1081].view(4, 270), flat[3:], flat[::5],
                                   flat[:0], normal((3, 2, 5, 9), dtype, numbers), normal((), dtype, numbers))]


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_layouts_and_the_reference(dtype: torch.dtype) -> None:
    """To what two orders of sums in float64 leave, and factors that are rounded before they are multiplied: a few
    units in the last place of p or of its update, which is below 1 here.
    """
    ends = []
    for backend in ("triton", "reference"):
        params = made(dtype)
        optimizer = Adafactor(params, lr=0.1, weight_decay=0.1, backend=backend)
        numbers = generator(2)
        for _ in range(2):
            for p in params:
                p.grad = normal(p.shape, dtype, numbers)
            optimizer.step()
        ends.append([*params, *(state for p in params for _, state in sorted(optimizer.state[p].items()))])
    eps = torch.finfo(dtype).eps
    for index, (a, b) in enumerate(zip(*ends, strict=True)):
        off = ((a.detach().double() - b.detach().double()).abs() / b.detach().double().abs().clamp_min(
            1.0 if index < len(params) else 1e-30)).max().item() if a.numel() else 0.0
        assert off <= 8 * eps, f"tensor {index}: {off / eps:.1f} eps"


def test_neighbours_do_not_matter() -> None:
    """The same bits among others as alone; and one set of launches for all."""
    ends, launches = [], []
    for alone in (False, True):
        params = made(torch.float32)[:7]
        optimizers = [Adafactor([p], backend="triton") for p in params] if alone else [
            Adafactor(params, backend="triton")]
        numbers = generator(3)
        for p in params:
            p.grad = normal(p.shape, torch.float32, numbers)
        for optimizer in optimizers:
            optimizer.step()
            launches.append(optimizer.last_step.launches)
            assert optimizer.last_step.host_syncs == 0
        ends.append([*params, *(state for o in optimizers for p in o.param_groups[0]["params"]
                                for _, state in sorted(o.state[p].items()))])
    for index, (a, b) in enumerate(zip(*ends, strict=True)):
        assert_same_bits(a, b, f"tensor {index}")
    assert launches == [8, 6, 6, 6, 6, 6, 3, 3]  # all; those with factors alone; those without


def test_the_launches_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from fasttrain.kernels import triton_factored, triton_sums

    started: list[str] = []

    class Counted(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            started.append(name)
            return super().__getitem__(name)

    for module in (triton_factored, triton_sums):
        counted = Counted(module.kernels(True))
        monkeypatch.setattr(module, "kernels", lambda interpreted, counted=counted: counted)
    params = [Parameter(torch.ones(shape, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
              for shape in ((3, 4), (5,), (2, 3))]
    optimizer = Adafactor(params, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.last_step.launches == len(started) == 14
    assert started.count("add_up") == 2


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables once; then coefficients, and addresses of gradients that moved."""
    from fasttrain.kernels import resident, triton_factored

    monkeypatch.setattr(triton_factored, "kept", resident.Tables())  # other tests may have tables that fit
    params = [Parameter(torch.randn(64, 256)), Parameter(torch.randn(70))]
    optimizer = Adafactor(params, lr=0.1, backend="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    reports = []
    for step in range(4):
        if step == 3:
            old, params[0].grad = params[0].grad, torch.ones_like(params[0])
        optimizer.step()
        reports.append((optimizer.last_step.copies, optimizer.last_step.bytes_sent))
    del old
    assert reports[0][0] >= 6
    assert reports[1][0] == reports[2][0] == 1, "coefficients"
    assert reports[2][1] < 200
    assert 1 < reports[3][0] <= 3, "and the tables that have a gradient's address"
    assert reports[3][1] < reports[0][1]
