"""A CUDA driver that the tests compile, whose launches walk the kernels' own text on the host, with host memory in the
place of device memory; and items to step with it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cuda_host
import kept
import numpy as np
import pytest
import torch
from fake_place import FakePlace
from helpers import assert_same_bits, needs_native, normal
from test_cuda_walk import oracle, row_of, states_of
from test_storage_cuda import COMBINATIONS, case_of, name_of

from fasttrain.kernels import cuda, cuda_factored, cuda_sums, kept_table, native, nvrtc, ring
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import RULES

SOURCE = Path(__file__).with_name("fake_libcuda.cpp")
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
NO_COMPILER = "no C++ compiler to build the fake driver with"
needs_driver = [needs_native, pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)]
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, *[ctypes.c_ulonglong] * 2,
                          ctypes.c_longlong, *[ctypes.c_ulonglong] * 2)
STREAM = FakePlace.STREAM
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
F32, BF16, F64 = ((torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float64,) * 3)  # of p, g and states
KEPT = {name_of(combination): kept.numbers_of(case_of(combination).codecs) for combination in COMBINATIONS}


def compile_library(source: Path, to: Path) -> Path:
    subprocess.run([str(COMPILER), "-std=c++17", "-shared", "-fPIC", "-O1", "-o", str(to), str(source)], check=True)
    return to


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Compiled once for all modules."""
    made = tmp_path_factory.getbasetemp() / "libcuda.so.1"
    return made if made.exists() else compile_library(SOURCE, made)


@pytest.fixture
def fake(library, tmp_path, monkeypatch):
    """The backend with the fake driver; `launches` holds (kernel, blocks, threads, stream) of each. `own` are kernels
    that the compiled module has not: of (table, chunks, rows, gradients, blocks, warps).
    """
    loaded = ctypes.CDLL(str(library))
    loaded.fake_log.restype = ctypes.c_char_p
    loaded.fake_reset()
    launches, errors, own, host = [], [], {}, cuda_host.Device()
    rules = {rule.name: rule for rule in RULES}

    @LAUNCH
    def launch(kernel, blocks, threads, stream, table_at, chunks, rows_at, gradients_at):
        try:
            name = kernel.decode()
            launches.append((name, blocks, threads, stream))
            if name in own:
                own[name](table_at, chunks, rows_at, gradients_at, blocks, threads)
                return 0
            if not name.startswith(("step_", "kept_")):
                cuda_host.walk(host, name, blocks, table_at, chunks, rows_at, gradients_at)
                return 0
            rule, wide = rules[name.split("_")[1]], name.split("_")[2] == "F64"
            columns, width = len(rule.state) + 5, 1 + len(trace(rule).coefficients)
            row_at = columns - 2
            if name in KEPT:
                columns, random = kept_table.columns(KEPT[name]), len(kept_table.random_operands(KEPT[name]))
                width += 3 + 2 * random
                row_at = columns - 2 - (4 if random else 0)
            words = (ctypes.c_longlong * (chunks * columns)).from_address(table_at)
            table = np.ctypeslib.as_array(words).reshape(chunks, columns).astype(np.int64)
            count = int(table[:, row_at].max()) + 1
            kept = ctypes.c_double if wide else ctypes.c_float
            rows = np.ctypeslib.as_array((kept * (count * width)).from_address(rows_at)).reshape(count, width)
            moving = np.ctypeslib.as_array((ctypes.c_longlong * chunks).from_address(gradients_at))
            native.module().cuda_host_walk(name, table, rows, blocks, threads, list(range(blocks)), moving)
        except Exception as error:  # it cannot pass through C
            errors.append(error)
            return 999
        return 0

    loaded.fake_set(launch, 13000, 9, 0)
    image = tmp_path / "step.fatbin"
    image.write_bytes(b"an image\0")
    for cached in (cuda.driver, cuda.code, cuda.kernel_of):
        cached.cache_clear()
    places = {}
    monkeypatch.setattr(cuda, "LIBRARY", str(library))
    monkeypatch.setattr(cuda, "IMAGE", image)
    monkeypatch.setattr(cuda, "place_of", lambda device: places.setdefault(device, FakePlace(device)))
    monkeypatch.setattr(ring, "rings", {})
    for owner, name in ((cuda, "tables"), (cuda_sums, "kept"), (cuda_factored, "kept")):
        monkeypatch.setattr(owner, name, cuda.Tables())
    monkeypatch.setattr(nvrtc, "cupy", lambda: (None, "CuPy is not here"))
    yield SimpleNamespace(lib=loaded, launches=launches, errors=errors, callback=launch, own=own, places=places,
                          place=cuda.place_of(CPU),
                          log=lambda: loaded.fake_log().decode().splitlines())
    for cached in (cuda.driver, cuda.code, cuda.kernel_of):
        cached.cache_clear()
    assert errors == []
    assert loaded.fake_current_contexts() == 0, "a context was left current"


def items_of(rules, dtypes, numbers, sizes=(5, 0, 4096, 10_001)):
    """Items with step counts, of each rule in each combination of dtypes (p, g, states)."""
    made = []
    for rule in rules:
        for p, g, s in dtypes:
            for index, size in enumerate(sizes):
                tensors = (normal((size,), p, numbers), normal((size,), g, numbers), *states_of(rule, size, s, numbers))
                counter = torch.tensor(float(index))
                made.append(Item(f"{rule.name} {size}", rule, tensors, row_of(rule, 1 + index), counter))
    return made


def moved(item, past=0):
    """The item with its gradient elsewhere, `past` elements behind a multiple of 16 bytes."""
    storage = torch.zeros(past + item.tensors[1].numel(), dtype=item.tensors[1].dtype)
    storage[past:] = item.tensors[1]
    return replace(item, tensors=(item.tensors[0], storage[past:], *item.tensors[2:]))


def stepped(fake, items):
    """Step, compare with the oracle, and return the bytes of the copies to the device."""
    wanted, before = oracle(items), len(fake.place.uploads)
    cuda.step(items)
    for item, right in zip(items, wanted, strict=True):
        for got, tensor in zip(item.tensors, right.tensors, strict=True):
            assert_same_bits(got, tensor, item.name)
    return fake.place.uploads[before:]
