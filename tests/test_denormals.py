"""Denormal numbers, and the caller's floating-point mode."""

import pytest
import torch
from helpers import assert_same_bits, generator, needs_native, normal
from torch.nn import Parameter

from fasttrain.optim import SGD, Adam


@needs_native
@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormals")
def test_the_callers_floating_point_mode_changes_no_bit_and_is_restored() -> None:
    runs = []
    for flush in (True, False):
        numbers = generator(1)
        p = Parameter(normal((40_000,), torch.float32, numbers) * 2.0**-125)  # results on both sides of the normal
        opt = SGD([p], lr=1.0, momentum=0.5, backend="cpu")
        grad = normal((40_000,), torch.float32, numbers) * 2.0**-125
        q = Parameter(torch.full((100,), 2.0**-24, dtype=torch.float16))  # a half denormal passes through the float's
        torch.set_flush_denormal(flush)
        try:
            for _ in range(2):
                p.grad, q.grad = grad.clone(), torch.zeros(100, dtype=torch.float16)
                opt.step()
                SGD([q], lr=1.0, backend="cpu").step()
            smallest = torch.tensor([2.0**-126])
            assert bool((smallest * 0.5 == 0).all()) is flush
        finally:
            torch.set_flush_denormal(False)
        assert bool((p.detach().abs()[p.detach() != 0] < 2.0**-126).any())
        assert bool((q == 2.0**-24).all())
        runs.append([p.detach(), opt.state[p]["momentum_buffer"]])
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)


def test_untouched_rows_do_not_decay_into_denormals(backend: str) -> None:
    """Contract 11, over the steps of a run: torch's own moments stay denormal for ever."""
    runs = []
    for optimizer, extra in ((Adam, dict(backend=backend)), (torch.optim.Adam, {})):
        p = Parameter(torch.ones(10))
        opt = optimizer([p], betas=(0.5, 0.5), **extra)
        p.grad = torch.full((10,), 1e-18)
        opt.step()
        p.grad = torch.zeros(10)
        for _ in range(75):
            opt.step()
        runs.append(torch.cat([opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]]))
    assert bool((runs[0] == 0).all())
    assert bool(((runs[1] > 0) & (runs[1] < 2.0**-126)).any())
