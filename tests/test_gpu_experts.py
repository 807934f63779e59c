"""Mixtures of experts on a real GPU: against the loop over tokens, and without waiting for the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_same_bits
from mixtures import grads, naive, values
from test_rows import check_products, draw

from fasttrain.kernels import rows as kernel
from fasttrain.parallel.experts import MoE, auxiliary, carry, metrics
from fasttrain.parallel.experts import grouped as products

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-2, torch.bfloat16: 3e-2}  # float32: products may be of TF32


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("options", [{}, {"gated": True, "top_k": 3}, {"capacity": 0.75}], ids=str)
def test_against_the_loop(options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = MoE(16, 24, 8, device="cuda", dtype=dtype, balance=0.3, z=0.02, **options)
    x = torch.randn(30, 16, dtype=dtype, device="cuda", requires_grad=True)
    output = layer(x)
    (output.pow(2).sum() + auxiliary(layer)).backward()
    weights = {name: p.detach().double().cpu().requires_grad_() for name, p in values(layer).items()}
    y = x.detach().double().cpu().requires_grad_()
    known = {key: value for key, value in options.items() if key != "gated"}
    wanted = naive(weights, y, activation="silu" if "gated" in options else "squared_relu", **known)
    (wanted.output.pow(2).sum() + 0.3 * wanted.balance + 0.02 * wanted.z).backward()
    assert metrics(layer)[""].counts.tolist() == wanted.counts
    pairs = [(output, wanted.output), (x.grad, y.grad), *((g, weights[n].grad) for n, g in grads(layer).items())]
    for found, exact in pairs:
        assert (found.detach().double().cpu() - exact.detach()).norm() <= BOUNDS[dtype] * exact.detach().norm()


def test_the_same_bits_again() -> None:
    layer = MoE(64, 128, 8, device="cuda", dtype=torch.bfloat16)
    again, x = copy.deepcopy(layer), torch.randn(500, 64, dtype=torch.bfloat16, device="cuda")
    for one in (layer, again):
        (one(x).sum() + auxiliary(one)).backward()
    for name, grad in grads(layer).items():
        assert_same_bits(grad, grads(again)[name], name)


@pytest.mark.parametrize("capacity", [None, 1.25])
def test_nobody_waits_for_the_device(capacity: float | None) -> None:
    """In bfloat16 on one rank; what is compiled at first use comes before."""
    layer = MoE(64, 128, 8, device="cuda", dtype=torch.bfloat16, capacity=capacity, router_bias=True)
    carry(layer, 0.5)
    x = torch.randn(512, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_groups_without_rows() -> None:
    """In memory that held something else."""
    counts = torch.tensor([0, 40, 0, 24, 0], device="cuda")
    left, right = (torch.randn(64, n, dtype=torch.bfloat16, device="cuda") for n in (128, 256))
    assert products.in_one_call(left, right)
    for _ in range(3):
        torch.full((5, 128, 256), torch.nan, dtype=torch.bfloat16, device="cuda")
        found = products._matrices(left, right, counts)
        assert bool((found[[0, 2, 4]] == 0).all())
        torch.testing.assert_close(found[1], left[:40].t() @ right[:40], rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 100, 1024, 5120])
def test_rows(dtype: torch.dtype, columns: int) -> None:
    rows, slots, origins, places, weights = draw(50, 3, columns, dtype)
    there = [tensor.cuda() for tensor in (rows, slots, origins, places, weights)]
    assert_same_bits(kernel.take(there[0], there[2], 3), kernel.take(rows, origins, 3))
    assert_same_bits(kernel.combine(there[1], there[3], there[4]), kernel.combine(slots, places, weights))
    by_slots, by_weights = kernel.differentiate(there[0], there[1], there[2], there[4])
    wanted = kernel.differentiate(rows, slots, origins, weights)
    assert_same_bits(by_slots, wanted[0])
    scale = torch.einsum("nc,njc->nj", rows.double().abs(), slots[places.clamp_min(0)].double().abs())
    check_products(by_weights.cpu(), wanted[1].double(), 2 * scale, columns)
