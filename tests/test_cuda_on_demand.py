"""Kernels compiled at run time, stepped end to end without a GPU: the fake driver of tests/fake_driver.py loads
their images and starts them, and their text, compiled for the host, is walked.
"""

from __future__ import annotations

import threading
import warnings

import kept
import pytest
import torch
from fake_driver import COMPILER, GPU, NO_COMPILER, items_of
from fake_driver import fake as fake
from fake_driver import library as library
from helpers import assert_same_bits, generator, needs_native, normal
from own_kernels import CODECS, DESCENT, OPTIONS, PLAIN, RULE, Nothing, coded, on_host, plain
from own_kernels import nothing as nothing
from test_cuda_walk import oracle, states_of

from fasttrain.kernels import cuda, dispatch, nvrtc
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import Adam, Lion
from fasttrain.rule import Rule

pytestmark = [needs_native, pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)]


@pytest.fixture
def ready(fake, nothing: Nothing, monkeypatch):
    """The fake driver, and the compiler that compiles nothing."""
    monkeypatch.setattr(nvrtc, "cupy", lambda: (nothing, ""))
    return fake


def own_items(rule: Rule, dtypes, numbers, sizes=(5, 0, 4096, 10_001)) -> list[Item]:
    made = []
    for index, size in enumerate(sizes):
        p, g, s = dtypes
        tensors = (normal((size,), p, numbers), normal((size,), g, numbers), *states_of(rule, size, s, numbers))
        row = [0.5, *trace(rule).row(1 + index, OPTIONS)]
        made.append(Item(f"{rule.name} {size}", rule, tensors, row, torch.tensor(float(index))))
    return made


def test_your_own_rule(ready, nothing: Nothing, tmp_path):
    """One launch for each storage, one image for each kernel, and the reference's bits."""
    numbers, items = generator(1), []
    dtypes = [PLAIN[0], PLAIN[1], PLAIN[4], PLAIN[7]]
    for one in dtypes:
        name, walk = on_host(plain(RULE, one), tmp_path)
        ready.own[name] = walk
        items += own_items(RULE, one, numbers)
    for step in range(2):
        wanted = oracle(items)
        cuda.step(items)
        for item, right in zip(items, wanted, strict=True):
            for got, tensor in zip(item.tensors, right.tensors, strict=True):
                assert_same_bits(got, tensor, f"step {step}, {item.name}")
        assert len(ready.launches) == len(dtypes) * (step + 1)
    assert sum(item.counter.item() for item in items) == len(dtypes) * (1 + 2 + 3) + 2 * len(items)
    assert len(nothing.asked) == len(dtypes)
    log = ready.log()
    assert [f"cuModuleLoadData(image {i})" in log for i in range(1, 5)] == [True] * 4


def test_storages_that_are_not_in_the_list(ready, nothing: Nothing, tmp_path, monkeypatch):
    monkeypatch.setitem(kept.BY_NAME, RULE.name, RULE)
    monkeypatch.setattr(kept, "OPTIONS", OPTIONS)
    numbers, items = generator(2), []
    for codecs in CODECS[:2]:
        name, walk = on_host(coded(codecs), tmp_path)
        ready.own[name] = walk
        case = kept.Case(RULE.name, codecs, zero=True, clip=0.5, place=kept.SHARD)
        items += [case.random(size, numbers, key=size) for size in (0, 5, 513, 5000)]
    for step in range(2):
        wanted = kept.oracle(items)
        cuda.step(items)
        kept.compare(items, wanted, f"step {step}")
        kept.new_gradients(items, numbers)
    assert len(ready.launches) == 4
    assert len(nothing.asked) == 2


def test_a_rule_of_the_package_in_other_storages(ready, nothing: Nothing, tmp_path):
    """fp32 with bf16 gradients is not in the list."""
    rule = Lion.rules[0]
    name, walk = on_host(plain(rule, PLAIN[4]), tmp_path)
    ready.own[name] = walk
    items = items_of([rule], [PLAIN[4], PLAIN[0]], generator(5), sizes=(7, 300))
    wanted = oracle(items)
    cuda.step(items)
    for item, right in zip(items, wanted, strict=True):
        assert_same_bits(item.tensors[0], right.tensors[0], item.name)
    assert [launch[0] for launch in ready.launches] == [name, "step_Lion_F32_F32_F32"]
    assert len(nothing.asked) == 1


@pytest.fixture
def bare(ready, monkeypatch, tmp_path):
    """As a build without nvcc."""
    monkeypatch.setattr(cuda, "IMAGE", tmp_path / "absent.fatbin")
    return ready


def test_a_build_without_nvcc(bare, nothing: Nothing):
    """The smallest kernel is tried, and the others are compiled when they are stepped; images are shared."""
    assert cuda.why_not(GPU) is None
    assert len(nothing.asked) == 1
    items = items_of([Adam.rules[0], Lion.rules[0]], [PLAIN[0]], generator(6), sizes=(300,))
    for _ in range(2):
        wanted = oracle(items)
        cuda.step(items)
        for item, right in zip(items, wanted, strict=True):
            assert_same_bits(item.tensors[0], right.tensors[0], item.name)
    assert len(nothing.asked) == 3
    loaded = cuda.code(0)[0]
    assert loaded.hold("factored_rows_F32") is loaded.hold("factored_apply_F32")
    assert len(nothing.asked) == 4
    with pytest.raises(KeyError, match="no source is known for the kernel other"):
        loaded.launch(kernel="other")


def test_without_nvcc_and_without_cupy(bare, monkeypatch):
    """The message names the extra, and Triton serves."""
    monkeypatch.setattr(nvrtc, "cupy", lambda: (None, nvrtc.NO_CUPY))
    assert "none can be compiled at run time: CuPy, which" in cuda.why_not(GPU)
    assert "pip install 'fasttrain[cuda]'" in cuda.why_not(GPU)
    if dispatch.load("triton").why_not(GPU) is None:
        assert dispatch._best.__wrapped__(GPU) == "triton"


def test_without_cupy_triton_steps_your_own_rule(ready, monkeypatch):
    stepped: list[Item] = []
    monkeypatch.setattr(nvrtc, "cupy", lambda: (None, nvrtc.NO_CUPY))
    monkeypatch.setattr(cuda, "step_elsewhere", stepped.extend)
    items = own_items(DESCENT, PLAIN[0], generator(7))
    cuda.step(items)
    assert [id(item) for item in stepped] == [id(item) for item in items]
    assert cuda.kernel_of(DESCENT, (torch.float32,) * 2, (), items[0].tensors[0].device) == (None, nvrtc.NO_CUPY)
    assert ready.launches == []


def test_what_nvrtc_refuses_is_tried_once(ready, nothing: Nothing):
    """One warning says why; the step is made elsewhere."""
    nothing.refuses = "error: what is this"
    cuda.say_not_compiled.cache_clear()
    items = own_items(DESCENT, PLAIN[0], generator(8), sizes=(9,))
    wanted = oracle(items)
    with pytest.warns(RuntimeWarning) as said:
        cuda.step(items)
    assert_same_bits(items[0].tensors[0], wanted[0].tensors[0], "elsewhere")
    why = "NVRTC 13.0 failed: error: what is this"
    first, second = (str(one.message) for one in said)
    assert first.endswith(f"could not be compiled, so Triton steps in its place. The reason: {why}")
    assert f"Descent with float32, float32 has no CUDA kernel in this build, none was compiled ({why})" in second
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.step(own_items(DESCENT, PLAIN[0], generator(9), sizes=(9,)))
    assert len(nothing.asked) == 1


def test_what_the_driver_refuses(ready, nothing: Nothing):
    """It is compiled anew, once: what was on disk may be of another toolkit."""
    cuda.code(0)
    ready.lib.fake_fail(b"cuModuleLoadData", 222)
    items = own_items(DESCENT, PLAIN[0], generator(8), sizes=(9,))
    with pytest.warns(RuntimeWarning, match="the driver refused what NVRTC made: cuModuleLoadData: CUDA_ERROR_UNS"):
        cuda.step(items)
    assert len(nothing.asked) == 2


def test_threads_share_one_compilation(ready, nothing: Nothing):
    loaded = cuda.code(0)[0]
    found = []
    threads = [threading.Thread(target=lambda: found.append(loaded.find(None, *plain(DESCENT, PLAIN[0]))))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert found[0][1] == ""
    assert len(nothing.asked) == 1


def test_usage(ready):
    loaded = cuda.code(0)[0]
    name, _ = loaded.find(None, *plain(DESCENT, PLAIN[0]))
    assert loaded.usage(name, 256) == {"registers": 40, "local_bytes": 0, "blocks": 8}
