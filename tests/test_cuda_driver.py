"""The CUDA backend end to end without a GPU: steps through the driver of tests/fake_driver.py, and what is sent."""

from __future__ import annotations

import warnings
from dataclasses import replace

import kept
import numpy as np
import pytest
import torch
from fake_driver import BF16, F32, F64, STREAM, items_of, moved, needs_driver, stepped
from fake_driver import fake as fake
from fake_driver import library as library
from helpers import Case, assert_same_bits, assert_same_run, generator, normal
from helpers import run as run_case
from test_cuda_walk import oracle, row_of
from test_storage_cuda import COMBINATIONS, case_of, name_of

from fasttrain.kernels import cuda, ring
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import SGD, Adam, Lion

pytestmark = needs_driver


def test_step_end_to_end(fake):
    """Values, counters, versions; one launch for each rule and combination, one upload for all, over several steps."""
    items = items_of([Adam.rules[0], SGD.rules[0], Lion.rules[0]], [F32, BF16, F64], generator(1))
    for step in range(3):
        wanted = oracle(items)
        versions = [[tensor._version for tensor in item.tensors] for item in items]
        cuda.step(items)
        for item, right, before in zip(items, wanted, versions, strict=True):
            for got, tensor in zip(item.tensors, right.tensors, strict=True):
                assert_same_bits(got, tensor, item.name)
            written = [1 if index != 1 else 0 for index in range(len(item.tensors))]
            assert [t._version - b for t, b in zip(item.tensors, before, strict=True)] == written
        assert len(fake.launches) == 9 * (step + 1)
    assert sum(item.counter.item() for item in items) == 9 * (0 + 1 + 2 + 3) + 3 * len(items)
    assert {(threads, stream) for _, _, threads, stream in fake.launches} == {(256, STREAM)}
    assert len(fake.place.uploads) == 1, "nothing changed"


def test_kept_items_end_to_end(fake):
    """One launch for each storage, whatever is zeroed or clipped; keys and coefficients change the rows, not the table.
    Versions count every array that is written.
    """
    numbers = generator(3)
    items = [case_of(combination, zero=size > 99, clip=0.5 if size > 999 else np.inf).random(size, numbers, key=size)
             for combination in COMBINATIONS for size in (0, 5, 100, 10_001)]
    items += items_of([Lion.rules[0]], [F32], numbers)
    for step in range(3):
        wanted = kept.oracle(items)
        arrays = [[*item.tensors, *(extra for extra in item.extras if extra is not None)] for item in items]
        before = [[array._version for array in own] for own in arrays]
        cuda.step(items)
        kept.compare(items, wanted, f"step {step}")
        for item, own, versions in zip(items, arrays, before, strict=True):
            counted = [1 if index != 1 or item.zero else 0 for index in range(len(own))]
            assert [array._version - b for array, b in zip(own, versions, strict=True)] == counted
        assert len(fake.launches) == (len(COMBINATIONS) + 1) * (step + 1)
        kept.new_gradients(items, numbers)
        items = [replace(item, key=item.key + 1) for item in items]
    first, *others = fake.place.uploads
    assert len(others) == 2
    assert max(others) < first / 2, "the tables did not change"


def test_kept_items_without_a_kernel_go_elsewhere(fake):
    """The reference takes them here, where nothing is on a GPU, and a warning says so."""
    items = [kept.Case("AdamW", "kahan_bf16 bf16 int4 int4+P f32").random(300, generator(4))]
    wanted = kept.oracle(items)
    with pytest.warns(RuntimeWarning, match="AdamW with kahanbf16, bf16, int4, int4p, f32 has no CUDA kernel"):
        cuda.step(items)
    kept.compare(items, wanted, "elsewhere")
    assert fake.launches == []


def test_only_what_changed_is_sent(fake):
    """In one copy: the rows, the addresses of new gradients, both, or nothing; all of it for new parameters."""
    adam, numbers = Adam.rules[0], generator(2)
    sizes = (5, 4096, 3 * 4096 + 1, 7)
    chunks = 1 + 1 + 4 + 1
    items = items_of([adam], [F32, BF16], numbers, sizes)
    rows = len(sizes) * (1 + len(trace(adam).coefficients)) * 4
    whole, = stepped(fake, items)
    assert whole > 2 * chunks * 8 * 7, "tables of at least seven columns"
    assert stepped(fake, items) == []
    items = [replace(item, row=row_of(adam, 9 + index)) for index, item in enumerate(items)]
    sent, = stepped(fake, items)
    assert rows < sent <= 2 * rows + 16, "rows of both launches"
    other = [moved(item) for item in items]
    assert stepped(fake, other) == [2 * chunks * 8 + 8], "both columns of gradients, and what aligns the second"
    one = [*other[:3], moved(other[3]), *other[4:]]
    assert stepped(fake, one) == [8], "one address"
    both = [replace(moved(item), row=row_of(adam, 20 + index)) for index, item in enumerate(one)]
    sent, = stepped(fake, both)
    assert 2 * chunks * 8 + rows < sent <= 2 * (rows + chunks * 8) + 64
    new = items_of([adam], [F32, BF16], numbers, sizes)
    assert stepped(fake, new) == [whole]
    assert stepped(fake, both) == [], "what was known stays"
    assert len(fake.launches) == 2 * 8


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_gradients_that_lose_their_alignment(fake, combination):
    """A table that was made for aligned gradients serves others; a misaligned wide access would stop the walk."""
    numbers = generator(12)
    case = case_of(combination)
    items = [case.random(size, numbers, key=size) for size in (5, 1000, 9001)]
    for past in (0, 1, 3, 0):
        items = [moved(item, past) for item in items]
        wanted = kept.oracle(items)
        cuda.step(items)
        kept.compare(items, wanted, f"{past} past")
    assert len(cuda.tables.known) == 1


def test_report_of_a_step(fake, monkeypatch):
    """What an optimizer sends: once its tables, then rows and new addresses; nothing where neither changed."""
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    params = [torch.nn.Parameter(normal((size,), torch.float32, generator(size))) for size in (5, 4096, 9000)]
    for make, changes in ((Adam, True), (Lion, False)):
        optimizer = make(params, lr=0.1, backend="cuda")
        reports = []
        for step in range(4):
            for p in params:
                p.grad = torch.ones_like(p) if step != 3 else p.grad
            kept_alive = [p.grad for p in params]
            optimizer.step()
            reports.append((optimizer.last_step.copies, optimizer.last_step.bytes_sent))
            del kept_alive
        assert reports[0][0] == 1
        assert reports[0][1] > 200
        assert all(copies <= 1 and size <= 5 * 8 + 64 for copies, size in reports[1:])
        assert reports[3] == ((1, reports[3][1]) if changes else (0, 0))
        assert optimizer.last_step.host_syncs == 0


# --- Several GPUs -----------------------------------------------------------------------------------------------------

class OnSecond(torch.Tensor):
    """A tensor in host memory that says that it is on the second GPU."""

    device = torch.device("cuda:1")


class OnFirst(torch.Tensor):
    device = torch.device("cuda:0")


def test_several_gpus(fake):
    """One launch on each, with its own context, stream, tables and ring, while it is the current device."""
    items = items_of([Lion.rules[0]], [F32], generator(13), (5, 4096, 9000, 70))
    wanted = oracle(items)
    kinds = (OnFirst, OnSecond, OnFirst, OnSecond)
    there = [replace(item, tensors=tuple(tensor.as_subclass(kind) for tensor in item.tensors), counter=None)
             for item, kind in zip(items, kinds, strict=True)]
    cuda.step(there)
    for item, right in zip(items, wanted, strict=True):
        assert_same_bits(item.tensors[0], right.tensors[0], item.name)
    assert [(name, stream) for name, _, _, stream in fake.launches] == [
        ("step_Lion_F32_F32_F32", STREAM), ("step_Lion_F32_F32_F32", STREAM + 1)]
    first, second = (fake.places[torch.device("cuda", index)] for index in (0, 1))
    assert len(first.uploads) == len(second.uploads) == 1
    assert first.guards == second.guards == 0
    log = fake.log()
    assert log.count("cuDevicePrimaryCtxRetain(100)") == log.count("cuDevicePrimaryCtxRetain(101)") == 1
    assert set(ring.rings) == {OnFirst.device, OnSecond.device}

    second.room = 0
    before = [item.tensors[0].clone() for item in items]
    with pytest.raises(torch.OutOfMemoryError, match="on cuda:1, and no parameter was stepped"):
        cuda.step([moved(there[index]) for index in (2, 0, 3, 1)])
    assert len(fake.launches) == 2, "nor of the other GPU"
    for item, old in zip(items, before, strict=True):
        assert_same_bits(item.tensors[0], old)


def test_strided_and_empty_and_none(fake):
    """What no flat loop can walk is copied and copied back; nothing to do is no launch."""
    cuda.step([])
    empty = items_of([Lion.rules[0]], [F32], generator(3), sizes=(0,))
    cuda.step(empty)
    assert fake.launches == []
    assert empty[0].counter.item() == 1
    numbers = generator(4)
    base = normal((40, 3), torch.float32, numbers)
    item = Item("strided", Lion.rules[0], (base.t()[:, ::2], normal((3, 20), torch.float32, numbers),
                                           normal((20, 3), torch.float32, numbers).t()), row_of(Lion.rules[0], 1), None)
    before, wanted = base.clone(), oracle([item])
    cuda.step([item])
    for got, right in zip(item.tensors, wanted[0].tensors, strict=True):
        assert_same_bits(got, right, "strided")
    assert_same_bits(base[1::2], before[1::2], "between the rows")
    assert len(fake.launches) == 1


def test_other_combinations_run_elsewhere(fake):
    """fp32 with bf16 gradients is not compiled ahead of time: the reference takes it on the CPU, and says so once."""
    cuda.say_not_compiled.cache_clear()
    items = items_of([Lion.rules[0]], [(torch.float32, torch.bfloat16, torch.float32), F32], generator(5), sizes=(7,))
    wanted = oracle(items)
    with pytest.warns(RuntimeWarning, match="rule Lion with float32, bfloat16, float32 has no CUDA kernel"):
        cuda.step(items)
    for item, right in zip(items, wanted, strict=True):
        assert_same_bits(item.tensors[0], right.tensors[0], item.name)
    assert len(fake.launches) == 1
    assert [item.counter.item() for item in items] == [1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.step(items)


@pytest.mark.parametrize("configuration", ["AdamW", "Adam L2 amsgrad maximize", "SGD nesterov L2", "Lion"])
def test_optimizer(fake, monkeypatch, configuration):
    """Whole optimizers, all layouts, gradients that come and go."""
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    case = Case(configuration, steps=3)
    assert_same_run(run_case(case, "cuda"), run_case(case, "reference"), str(case))
    assert fake.launches


def test_contexts_and_functions(fake):
    """The primary context is retained once and current around each call; a function is looked up once."""
    items = items_of([SGD.rules[0]], [F32], generator(6), sizes=(100,))
    cuda.step(items)
    cuda.step(items)
    log = fake.log()
    assert log.count("cuDevicePrimaryCtxRetain(100)") == log.count("cuModuleLoadData(an image)") == 1
    assert log.count("cuModuleGetFunction(step_SGD_F32_F32_F32)") == 1
    assert log.count("cuCtxPushCurrent()") == log.count("cuCtxPopCurrent()") == 4, "load, usage, two launches"
    assert log.count(f"cuLaunchKernel(step_SGD_F32_F32_F32 1 256 {STREAM})") == 2
    assert cuda.code(0)[0].usage("step_SGD_F32_F32_F32", 256) == {"registers": 40, "local_bytes": 0, "blocks": 8}


def test_each_device_has_its_code(fake):
    first, second = cuda.code(0)[0], cuda.code(1)[0]
    assert first is not second
    assert "cuDevicePrimaryCtxRetain(101)" in fake.log()
    assert cuda.code(2) == (None, cuda.code(2)[1])
    assert "cuDeviceGet(2): CUDA_ERROR_INVALID_DEVICE, text of the driver" in cuda.code(2)[1]


def test_chunk_size():
    assert cuda.chunk_size(0, 132) == cuda.TILE
    assert cuda.chunk_size(64 << 20, 132) == 4 * cuda.TILE
    assert cuda.chunk_size(1 << 40, 132) == 16 * cuda.TILE
