"""Symmetric products and Muon on a real GPU, against torch's products. Needs torch, triton, numpy and pytest only."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits, generator, normal
from test_symmetric import assert_near, assert_whole
from torch.nn import Parameter

from fasttrain.kernels import dispatch, symmetric
from fasttrain.optim import Muon
from fasttrain.optim.newton_schulz import orthogonalize
from fasttrain.optim.workspace import Workspace

triton_symmetric = pytest.importorskip("fasttrain.kernels.triton_symmetric")
pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 1, 1), (3, 7, 65), (2, 129, 63), (1, 1000, 333), (2, 333, 1000), (7, 768, 3072), (5, 3072, 768),
          (1, 2048, 2048), (300, 80, 96))


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor in the middle of its storage, all of it NaN; aligned."""
    storage = torch.full((torch.Size(shape).numel() + 64,), float("nan"), dtype=dtype, device=GPU)
    return storage[32:-32].view(shape), storage


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(dtype, shape):
    """Every form and tiling against float64, symmetric to the bit, nothing written outside."""
    x = (normal(shape, dtype, generator(1)) / 4).to(GPU)
    side, length = min(shape[1:]), max(shape[1:])
    cuts = [None, triton_symmetric.NARROW, triton_symmetric.SINGLE_NARROW]
    if dtype != torch.float32:
        major = torch.cuda.get_device_capability(GPU)[0]
        cuts += [triton_symmetric.SMALL, triton_symmetric.LARGE.get(major, triton_symmetric.LARGE_ELSEWHERE)]
    for cut in cuts:
        out, storage = poisoned((shape[0], side, side), dtype)
        triton_symmetric.gram(x, out, cut)
        assert_whole(out, storage)
        exact, sizes = (torch.empty(out.shape, dtype=torch.float64, device=GPU) for _ in range(2))
        symmetric.gram(x.double(), exact)
        symmetric.gram(x.double().abs(), sizes)
        assert_near(out, exact, sizes, length, f"gram, {cut}")

        result, storage = poisoned(tuple(out.shape), dtype)
        triton_symmetric.polynomial(out, -4.75, 2.0, result, cut)
        assert_whole(result, storage)
        symmetric.polynomial(out.double(), -4.75, 2.0, exact)
        symmetric.polynomial(out.double().abs(), 4.75, 2.0, sizes)
        assert_near(result, exact, sizes, side + 3, f"polynomial, {cut}")


def test_the_same_bits_every_time():
    x = normal((9, 768, 3072), torch.bfloat16, generator(2)).to(GPU)
    first, again = (torch.empty(9, 768, 768, dtype=x.dtype, device=GPU) for _ in range(2))
    triton_symmetric.gram(x, first)
    for _ in range(20):
        triton_symmetric.gram(x, again)
        assert_same_bits(again, first)


def test_more_than_two_to_the_31_elements():
    """Offsets are 64 bits wide: the last matrices of a batch, and the last rows of a matrix."""
    if torch.cuda.mem_get_info(GPU)[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    for shape in ((520, 2048, 2048), (2, 1 << 21, 528), (2, 528, 1 << 21)):
        x = torch.zeros(shape, dtype=torch.bfloat16, device=GPU)
        x[-1, -1], x[-1, 0] = 1.0, 2.0
        side = min(shape[1:])
        out = torch.full((shape[0], side, side), float("nan"), dtype=x.dtype, device=GPU)
        triton_symmetric.gram(x, out)
        wanted = torch.zeros(side, side, device=GPU)
        if shape[1] > shape[2]:
            wanted += 5.0
        else:
            wanted[0, 0], wanted[0, -1], wanted[-1, 0], wanted[-1, -1] = (i * shape[2] for i in (4.0, 2.0, 2.0, 1.0))
        assert_same_bits(out[-1], wanted.bfloat16(), str(shape))
        assert not bool(out[:-1].any())
        del x, out


def test_orthogonalize():
    """As near to float64 as torch's products are; chosen by itself; nothing waits."""
    for shape in ((3, 256, 1024), (3, 1024, 256)):
        x = normal(shape, torch.bfloat16, generator(3)).to(GPU)
        coefficients = (3.4445, -4.7750, 2.0315)
        assert symmetric.products(x) == (triton_symmetric.gram, triton_symmetric.polynomial)
        assert symmetric.products(x, "reference") == (symmetric.gram, symmetric.polynomial)
        exact = orthogonalize(x.double(), coefficients, 5, 1e-7, Workspace())
        off, space = {}, Workspace()
        for backend in (None, "reference"):
            for mode in ("default", "error"):  # the first time compiles and allocates
                torch.cuda.set_sync_debug_mode(mode)
                before = torch.cuda.memory_stats(GPU)["allocation.all.allocated"]
                copy = x.clone()
                got = orthogonalize(copy, coefficients, 5, 1e-7, space, backend)
                torch.cuda.set_sync_debug_mode("default")
                made = torch.cuda.memory_stats(GPU)["allocation.all.allocated"] - before
                assert mode == "default" or made == 1  # the copy
            off[backend] = ((got.double() - exact).norm() / exact.norm()).item()
        assert 0 < off[None] < 1.2 * off["reference"] < 0.05


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_muon(backend):
    """A step is within 3% of the update of torch's Muon, as on the CPU."""
    if reason := dispatch.load(backend).why_not(GPU):
        pytest.skip(reason)
    numbers = generator(4)
    mine = [Parameter(normal(shape, torch.float32, numbers).to(GPU))
            for shape in ((256, 768), (256, 768), (768, 256), (100, 72))]
    theirs = [Parameter(p.detach().clone()) for p in mine]
    before = [p.detach().clone() for p in mine]
    for p, q in zip(mine, theirs, strict=True):
        p.grad = normal(p.shape, torch.float32, numbers).to(GPU)
        q.grad = p.grad.clone()
    Muon(mine, lr=0.02, backend=backend).step()
    torch.optim.Muon(theirs, lr=0.02).step()
    for p, q, old in zip(mine, theirs, before, strict=True):
        assert (p - q).norm() <= 0.03 * (q - old).norm()
