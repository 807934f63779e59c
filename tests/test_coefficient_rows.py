"""Rows of coefficients that a device makes: what stands in them beside the coefficients, and where it reads numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import CPU, assert_same_bits, generator, needs_native, uniform
from scalar_rows import ADAMW, GROUP, compiled, interpreted, on_host
from torch import Tensor

from fasttrain import optim
from fasttrain.kernels import prologue
from fasttrain.kernels.item import Tail
from fasttrain.kernels.prologue import Row
from fasttrain.kernels.trace import trace
from fasttrain.kernels.trace_scalars import hyperparameters, trace_scalars
from fasttrain.optim.clip import coefficient

RUNNERS = [pytest.param(compiled, id="C++", marks=needs_native), pytest.param(interpreted, id="triton")]
Run = Callable[..., tuple[Tensor, Tensor]]


@pytest.mark.parametrize("run", RUNNERS)
def test_what_multiplies_the_gradient(run: Run):
    """Loss scale, clipping by the norm of all and of one, and the sign, as a step on the host multiplies them."""
    numbers = generator(1)
    rows, wanted = [], []
    for i in range(200):
        grad_scale, norm, square = (10 ** uniform(-6, 6, numbers) for _ in range(3))
        norm, square = {7: (math.inf, square), 8: (math.nan, square), 9: (norm, math.nan)}.get(i, (norm, square))
        limit, each = (None if (i >> bit) % 2 else 10 ** uniform(-3, 3, numbers) for bit in (0, 1))
        sign = -1.0 if i % 3 else 1.0
        own = coefficient(norm, limit) / grad_scale
        own = own * (1.0 if each is None else coefficient(abs(own) * math.sqrt(square), each))
        wanted.append(sign * own)
        tensors = [torch.tensor(value, dtype=torch.float64) for value in (grad_scale, norm, square)]
        on_device = i % 5 < 3
        rows.append(Row(GROUP, scale=sign, grad_scale=tensors[0] if on_device else grad_scale,
                        norm=tensors[1] if on_device else norm, max_norm=limit,
                        square=tensors[2] if on_device else square, max_each=each))
    graph = trace_scalars(ADAMW, GROUP)
    words = prologue.words(graph, rows, CPU)
    assert_same_bits(run(graph, words, True)[0][:, 0], torch.tensor(wanted, dtype=torch.float64))
    assert_same_bits(run(graph, words, False)[0][:, 0], torch.tensor(wanted, dtype=torch.float64).float())


@pytest.mark.parametrize("run", RUNNERS)
def test_tails(run: Run):
    rows = [Row(GROUP, clip_value=clip, ema_decay=decay) for clip in (None, 0.1) for decay in (None, 0.9999)]
    graph = trace_scalars(ADAMW, GROUP)
    out = run(graph, prologue.words(graph, rows, CPU), True, kept=True)[0]
    wanted = [Tail(), Tail(keep=0.9999, add=1 - 0.9999), Tail(0.1), Tail(0.1, 0.9999, 1 - 0.9999)]
    assert_same_bits(out[:, -3:], torch.tensor(wanted, dtype=torch.float64))
    assert out.shape[1] == 1 + len(trace(ADAMW).coefficients) + 3


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64], ids=str)
def test_a_step_count_on_the_device(run: Run, dtype: torch.dtype):
    """It is the number of steps made: the row is that of the one to come. A block of words serves many steps."""
    counter = torch.zeros((), dtype=dtype)
    graph = trace_scalars(ADAMW, GROUP)
    words = prologue.words(graph, [Row(GROUP, counter=counter)], CPU)
    for made in (0, 1, 2, 999, 99_999):
        counter.fill_(made)
        assert run(graph, words, True)[0][0].tolist() == [1.0, *on_host(ADAMW, GROUP, made + 1)]


@pytest.mark.parametrize("run", RUNNERS)
def test_hyperparameters_on_the_device(run: Run):
    lr, beta = torch.tensor(0.25), torch.tensor(0.75, dtype=torch.float64)
    graph = trace_scalars(ADAMW, dict(GROUP, lr=lr))
    words = prologue.words(graph, [Row(dict(GROUP, lr=lr, betas=(beta, 0.999)), step=3)], CPU)
    for rate in (0.25, 0.125, 0.0):
        lr.fill_(rate)
        assert run(graph, words, True)[0][0].tolist() == [1.0, *on_host(ADAMW, dict(GROUP, lr=rate,
                                                                                  betas=(0.75, 0.999)), 3)]


@pytest.mark.parametrize("run", RUNNERS)
def test_a_step_that_is_skipped_says_so(run: Run):
    found = [torch.tensor(True), torch.tensor(False), torch.tensor(2.0), torch.tensor(0.0), 1.0, 0.0,
             torch.tensor(math.nan), torch.tensor([3], dtype=torch.int64)]
    graph = trace_scalars(ADAMW, GROUP)
    skip = run(graph, prologue.words(graph, [Row(GROUP, found=one) for one in found], CPU), False)[1]
    assert skip.tolist() == [1, 0, 1, 0, 1, 0, 1, 1]


@needs_native
@pytest.mark.parametrize("optimizer", [*optim.OPTIMIZERS, optim.Adam], ids=lambda one: one.__name__)
@pytest.mark.parametrize("kept", [False, True], ids=["plain", "kept"])
def test_rows_of_the_optimizers(optimizer, kept):
    """What a step on the host makes of a parameter group."""
    options = {}
    if kept:
        if optimizer.running or issubclass(optimizer, optim.schedule_free.ScheduleFree):
            pytest.skip("its states are not kept in other ways")
        options = dict(clip_value=0.5, ema_decay=0.99)
    made = optimizer([torch.nn.Parameter(torch.ones(2))], maximize=True, **options)
    group = dict(made.param_groups[0], **dict.fromkeys(made.running, 0.5))
    rule = made.rule_of(group)
    values = hyperparameters(rule, group)
    graph = trace_scalars(rule, values)
    for step in (1, 2, 10):
        row = Row(values, step=step, scale=-1.0, grad_scale=8.0, clip_value=group.get("clip_value"),
                  ema_decay=group.get("ema_decay"))
        wanted = torch.tensor([made._row(rule, group, step, 1 / 8)], dtype=torch.float64)
        assert_same_bits(compiled(graph, prologue.words(graph, [row], CPU), True, kept)[0], wanted, optimizer.__name__)


def test_numbers_that_cannot_be_read_are_refused():
    graph = trace_scalars(ADAMW, GROUP)
    for wrong, error, text in ((torch.tensor(1.0, dtype=torch.bfloat16), TypeError, "lr is a tensor of torch.bfloat16"),
                               (torch.ones(2), ValueError, r"lr is a tensor of shape \(2,\) on cpu"),
                               (torch.ones((), device="meta"), ValueError, "lr is a tensor of shape .* on meta")):
        with pytest.raises(error, match=text):
            prologue.words(graph, [Row(dict(GROUP, lr=wrong))], CPU)
    with pytest.raises(ValueError, match="row 0 has 7: trace it again"):
        prologue.words(graph, [Row(dict(GROUP, betas=(0.9, 0.99, 0.999)))], CPU)
