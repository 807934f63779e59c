"""Offloaded optimizers on a real GPU: their numbers, their order on streams, and what memory they take where."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from helpers import assert_same_bits, generator, needs_native
from stored import same
from test_offload import BF16, CASES, assert_same, both, compare, give, params_of, run
from torch.nn import Parameter

from fasttrain.kernels.link import link_of
from fasttrain.optim import SGD, AdamW

pytestmark = [pytest.mark.gpu, needs_native]
GPU = torch.device("cuda", 0)
LARGE = 1 << 22  # elements


@pytest.mark.parametrize("case", CASES)
def test_bits(case: str) -> None:
    compare(case, GPU)


def test_arriving_gradients_have_the_numbers_of_a_step() -> None:
    """Gradients that are given, so that backward computes nothing."""
    made = []
    for device, options in ((GPU, dict(offload=True, offload_bucket=1 << 20)), (torch.device("cpu"), {})):
        numbers = generator(3)
        params = [Parameter(torch.randn(size, generator=numbers).to(device)) for size in (LARGE, 5, LARGE, 1 << 16)]
        optimizer = AdamW(params, lr=0.1, ema_decay=0.9, **options)
        if options:
            optimizer.step_on_arrival()
        for _ in range(3):
            torch.autograd.backward(params, [torch.randn(p.shape, generator=numbers).to(device) for p in params])
            optimizer.step()
            optimizer.zero_grad()
        made.append(optimizer)
    assert_same(*made)


@pytest.mark.parametrize("own", [False, True], ids=["default stream", "a stream of one's own"])
def test_order_on_streams(own: bool) -> None:
    """Gradients that a slow GPU has yet to write are waited for; what is queued behind a step sees its parameters."""
    p, lr = Parameter(torch.zeros(LARGE, device=GPU)), 0.5
    optimizer = SGD([p], lr=lr, offload=True, offload_bucket=1 << 20)
    p.grad = torch.empty_like(p)
    seen = []
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(GPU) if own else torch.cuda.current_stream(GPU)):
        for step in range(10):
            torch.cuda._sleep(20_000_000)
            p.grad.fill_(float(step))
            optimizer.step()
            seen.append(p.detach().clone())
            p.grad.fill_(-1e9)
        torch.cuda.current_stream(GPU).synchronize()
    for step, value in enumerate(seen):
        assert bool((value == -lr * sum(range(step + 1))).all()), step


def test_memory() -> None:
    """States take none on the GPU; on the host it is pinned, as much as was said, and given back."""
    for _ in range(3):  # memory that was still registered could not be registered again
        p = Parameter(torch.zeros(LARGE, device=GPU, dtype=BF16))
        optimizer = AdamW([p], storage="8-byte", ema_decay=0.9, offload=True)
        p.grad = torch.ones_like(p)
        before = torch.cuda.memory_allocated(GPU)
        optimizer.step()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated(GPU) == before
        kept = [value for key, value in optimizer.state[p].items() if key != "step"]
        assert all(value.is_pinned() for value in kept)
        assert sum(value.nbytes for value in kept) <= optimizer.pinned_bytes().states
        assert optimizer._host.twins[0].is_pinned()
        del optimizer, kept, p
        gc.collect()


def test_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        link_of(GPU).pinned(1 << 50)  # more than there are addresses to allocate
    registered = link_of(GPU).pinned(1 << 16)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: registered)  # to be registered once more
    with pytest.raises(RuntimeError, match="cudaHostRegister of 65536 bytes"):
        link_of(GPU).pinned(1 << 16)
    monkeypatch.undo()
    assert torch.ones(2, device=GPU).sum().item() == 2.0  # the next kernel does not find the error


def test_checkpoints() -> None:
    """From the GPU's own optimizer to the offloaded one, and on the CPU; no state touches the GPU."""
    ours, plain = both("AdamW", BF16, GPU, storage="8-byte", ema_decay=0.9)
    run(plain, 0, 3)
    with torch.no_grad():
        for p, q in zip(params_of(ours), params_of(plain), strict=True):
            p.copy_(q)
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    run(ours, 3, 6)
    run(plain, 3, 6)
    assert_same(ours, plain)
    assert all(value.device.type == "cpu" for p in params_of(ours) for value in ours.state[p].values())
    with ours.ema_weights(), plain.ema_weights():
        same([p.detach().cpu() for p in params_of(ours)], [p.detach() for p in params_of(plain)], "averages")
    for a, b in zip(ours.full_precision(), plain.full_precision(), strict=True):
        assert_same_bits(a, b)


def test_written_outside() -> None:
    ours, plain = both("AdamW", BF16, GPU, master="split")
    for optimizer in (ours, plain):
        for step in range(4):
            give(optimizer, step)
            optimizer.step()
            with torch.no_grad():
                params_of(optimizer)[step].mul_(0.5)
    assert_same(ours, plain)
