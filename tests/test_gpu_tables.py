"""Tables and the ring on a real GPU: gradients that move at every step, a host far ahead, several GPUs."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits, generator, needs_native, normal

from fasttrain.kernels import cuda, dispatch, native, ring
from fasttrain.optim import AdamW

pytestmark = [pytest.mark.gpu, needs_native]
GPU = torch.device("cuda", 0)
SHAPES = ((5,), (300, 70), (9001,), ())


@pytest.fixture(params=("cuda", "triton"))
def backend(request):
    if request.param == "cuda" and not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    assert dispatch.load(request.param).why_not(GPU) is None
    return request.param


def pairs(devices, backend, lr=0.1):
    """Parameters here and on GPUs, and an optimizer of each."""
    here = [torch.nn.Parameter(normal(shape, torch.float32, generator(1))) for shape in SHAPES for _ in devices]
    there = [torch.nn.Parameter(p.detach().to(devices[i % len(devices)])) for i, p in enumerate(here)]
    return here, there, AdamW(here, lr=lr), AdamW(there, lr=lr, backend=backend)


def same(here, there):
    for index, (p, q) in enumerate(zip(here, there, strict=True)):
        assert_same_bits(q.detach().cpu(), p.detach(), f"parameter {index}")


def test_many_steps_ahead(backend):
    """More steps are queued behind other work than the ring has slots; each reads its own addresses and rows."""
    here, there, wanted, ours = pairs([GPU], backend)
    steps = 2 * ring.MOST
    grads = [[normal(p.shape, torch.float32, generator(step)) for p in here] for step in range(steps)]
    moved = [[grad.to(GPU) for grad in given] for given in grads]
    for p, grad in zip(there, moved[0], strict=True):
        p.grad = grad
    ours.step()  # compiles
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    for given in moved[1:]:
        for p, grad in zip(there, given, strict=True):
            p.grad = grad
        ours.step()
    for given in grads:
        for p, grad in zip(here, given, strict=True):
            p.grad = grad
        wanted.step()
    same(here, there)


def test_what_a_step_sends():
    """Rows, and 8 bytes for each chunk whose gradient moved; rows alone where none did. No wait."""
    if not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    _, there, _, ours = pairs([GPU], "cuda")
    reports = []
    for step in range(4):
        if step != 3:
            fresh = [torch.ones_like(p) for p in there]
        for p, grad in zip(there, fresh, strict=True):
            p.grad = grad
        ours.step()
        reports.append(ours.last_step)
    assert all(report.copies == 1 and report.host_syncs == 0 for report in reports)
    assert reports[0].bytes_sent > 2 * reports[1].bytes_sent
    assert reports[3].bytes_sent <= 64


def test_two_gpus(backend):
    """Parameters of one optimizer on two GPUs, one launch each; the current device is neither's concern."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    here, there, wanted, ours = pairs([GPU, torch.device("cuda", 1)], backend)
    for step in range(3):
        for p, q in zip(here, there, strict=True):
            p.grad = normal(p.shape, torch.float32, generator(step))
            q.grad = p.grad.to(q.device)
        wanted.step()
        with torch.cuda.device(step % 2):
            ours.step()
            assert torch.cuda.current_device() == step % 2
    same(here, there)
