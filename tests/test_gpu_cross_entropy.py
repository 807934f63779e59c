"""Cross-entropy on a real GPU, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from entropy import Numbers, check_grads, check_losses, draw, exact
from helpers import assert_same_bits

from fasttrain.losses import cross_entropy, linear_cross_entropy, vocab_parallel_cross_entropy

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(shape, dtype, seed=1):
    logits, targets = draw(shape, dtype, seed)
    return logits, targets, logits.cuda().requires_grad_(), targets.cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 255, 2048, 50257, 151936])
def test_numbers(classes, dtype):
    """Within the bounds of the CPU; the same bits again, and in place."""
    for numbers in (Numbers(), Numbers(0.1, 1e-3)):
        logits, targets, x, t = on_gpu((40, classes), dtype)
        options = dict(label_smoothing=numbers.label_smoothing, z_loss=numbers.z_loss, reduction="none")
        wanted = exact(logits, targets, numbers, torch.ones(1))
        loss = cross_entropy(x, t, **options)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        check_losses(loss.detach().cpu(), wanted.losses, (classes, dtype, numbers))
        check_grads(grad.cpu(), wanted, (classes, dtype, numbers))
        for inplace in (False, True):
            again = cross_entropy(x * 1, t, inplace_backward=inplace, **options)
            assert_same_bits(again.detach(), loss.detach())
            assert_same_bits(torch.autograd.grad(again.sum(), x)[0], grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype):
    """Of rows that begin anywhere."""
    whole, _targets, x, t = on_gpu((3, 7, 3001), dtype)
    for cut in ((slice(None), slice(None, -1)), (slice(1, None), slice(1, None), slice(3, 2990))):
        view, some = x[cut], t[cut[:2]].clamp_max(2900)
        wanted = exact(whole[cut], some.cpu(), Numbers(0.1), torch.ones(1))
        loss = cross_entropy(view, some, label_smoothing=0.1, reduction="none")
        check_losses(loss.detach().cpu(), wanted.losses)
        check_grads(torch.autograd.grad(loss.sum(), view)[0].cpu(), wanted)


def test_nothing_waits_for_the_device():
    _logits, _targets, x, t = on_gpu((64, 5000), torch.bfloat16)
    hidden, weight = torch.randn(64, 32, device="cuda"), torch.randn(5000, 32, device="cuda", requires_grad=True)

    def step():
        cross_entropy(x, t, z_loss=1e-4).backward()
        linear_cross_entropy(hidden, weight, t, chunk=16).backward()
        vocab_parallel_cross_entropy(x, t, 0, 5000, lambda parts: parts[None]).backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_targets_that_are_no_class_are_nan():
    _logits, _targets, x, t = on_gpu((8, 1000), torch.float32)
    t[3], t[5] = 1000, -1
    loss = cross_entropy(x, t, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert loss.isnan().tolist() == [row in (3, 5) for row in range(8)]
    assert grad.isnan().any(1).tolist() == [row in (3, 5) for row in range(8)]
    assert cross_entropy(x, t).isnan()


def test_linear_in_chunks():
    hidden = torch.randn(500, 64, device="cuda", requires_grad=True)
    weight = torch.randn(5000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 5000, (500,), device="cuda")
    found = linear_cross_entropy(hidden, weight, targets, chunk=100)
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    for one, other in zip((found, *torch.autograd.grad(found, (hidden, weight))),
                          (wanted, *torch.autograd.grad(wanted, (hidden, weight))), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_in_a_captured_graph():
    _logits, _targets, x, t = on_gpu((16, 3000), torch.float32)
    static = x.detach().clone().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(cross_entropy(static, t), static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = cross_entropy(static, t)
        (grad,) = torch.autograd.grad(loss, static)
    other = on_gpu((16, 3000), torch.float32, 2)[2]
    static.data.copy_(other.detach())
    graph.replay()
    wanted = cross_entropy(other, t)
    assert_same_bits(loss.detach(), wanted.detach())
    assert_same_bits(grad, torch.autograd.grad(wanted, other)[0])
