"""Kernels that NVRTC compiles at run time on a real GPU, through CuPy, against the reference, bit for bit. Needs torch,
CuPy, numpy and pytest only.
"""

from __future__ import annotations

from dataclasses import replace

import kept
import pytest
import torch
from helpers import assert_same_bits, generator, needs_native, normal
from own_kernels import CODECS, DESCENT, OPTIONS, PLAIN, RULE, coded, plain
from test_cuda_walk import states_of
from test_gpu_storage import run

from fasttrain.kernels import cuda, nvrtc, reference
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import AdamW

pytestmark = [pytest.mark.gpu, needs_native]
GPU = torch.device("cuda", 0)
SIZES = (0, 1, 33, 4099, 100_003)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache on disk and in this process."""
    if nvrtc.compiler()[0] is None:
        pytest.skip(nvrtc.compiler()[1])
    monkeypatch.setenv("FASTTRAIN_CACHE_DIR", str(tmp_path / "images"))
    for cached in (cuda.code, cuda.kernel_of):
        cached.cache_clear()
    yield
    for cached in (cuda.code, cuda.kernel_of):
        cached.cache_clear()


def runs_here(kernel) -> None:
    name, reason = cuda.kernel_of(*kernel, GPU)
    assert name is not None, reason
    usage = cuda.code(0)[0].usage(name, cuda.THREADS)
    assert usage["local_bytes"] == 0
    assert usage["blocks"] >= 2


@pytest.mark.parametrize("dtypes", PLAIN, ids=str)
@pytest.mark.parametrize("rule", [RULE, DESCENT], ids=lambda rule: rule.name)
def test_your_own_rule(rule, dtypes):
    runs_here(plain(rule, dtypes))
    numbers, (p, g, s) = generator(3), dtypes
    items = [Item(f"size {size}", rule, (normal((size,), p, numbers), normal((size,), g, numbers),
                                         *states_of(rule, size, s, numbers)), [0.5, *trace(rule).row(2, OPTIONS)], None)
             for size in SIZES]
    there = [replace(item, tensors=tuple(tensor.to(GPU) for tensor in item.tensors)) for item in items]
    for step in range(3):
        reference.step(items)
        cuda.step(there)
        for item, other in zip(items, there, strict=True):
            for right, got in zip(item.tensors, other.tensors, strict=True):
                assert_same_bits(got, right, f"{item.name}, step {step}")


@pytest.mark.parametrize("codecs", CODECS)
def test_every_storage(codecs, monkeypatch):
    monkeypatch.setitem(kept.BY_NAME, RULE.name, RULE)
    monkeypatch.setattr(kept, "OPTIONS", OPTIONS)
    runs_here(coded(codecs))
    case = kept.Case(RULE.name, codecs, zero=True, clip=0.5, place=kept.SHARD)
    run(cuda, [case.random(size, generator(4), key=size) for size in SIZES], codecs)


def test_a_build_without_nvcc(tmp_path, monkeypatch):
    """Steps and pass A, and what is in the cache afterwards is found by the next process."""
    monkeypatch.setattr(cuda, "IMAGE", tmp_path / "absent.fatbin")
    assert cuda.why_not(GPU) is None
    item = kept.Case("AdamW", "split16 bf16 int8 int8+P").random(5000, generator(5), key=1)
    run(cuda, [item], "split16")
    p = torch.nn.Parameter(normal((1000,), torch.float32, generator(6)).to(GPU))
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p], lr=0.1, backend="cuda")
    optimizer.step()
    right = torch.nn.Parameter(normal((1000,), torch.float32, generator(6)))
    right.grad = torch.ones_like(right)
    AdamW([right], lr=0.1, backend="reference").step()
    assert_same_bits(p.detach(), right.detach(), "AdamW")
    cuda.code.cache_clear()
    cuda.kernel_of.cache_clear()
    found = nvrtc.compiler()[0]
    monkeypatch.setattr(found, "compile", None)
    run(cuda, [item], "again")
