"""The CUDA backend with host memory in the place of a GPU's: a launch walks the kernel's own text, block by block."""

from __future__ import annotations

import ctypes

import numpy as np
from fake_place import FakePlace

from fasttrain.kernels import cuda, cuda_factored, cuda_pack, cuda_sums, native, ring
from fasttrain.kernels.trace import trace
from fasttrain.optim.header import STAGES

RULES = {rule.name: rule for rule in STAGES}


class Device(FakePlace):
    """Torch's side of it, the loaded code, and what was asked of both."""

    def __init__(self):
        super().__init__()
        self.launches, self.counts = [], {}
        self.numbers = np.random.default_rng(0)

    # --- As DeviceCode

    def usage(self, kernel, threads):
        assert kernel in cuda.compiled()
        return {"registers": 32, "local_bytes": 0, "blocks": 2}

    def launch(self, kernel, blocks, threads, stream, table, chunks, rows, gradients):
        assert threads == cuda.THREADS
        assert stream == self.STREAM
        assert blocks > 0
        self.launches.append((kernel, blocks))
        blocks = self.grid or blocks
        walk(self, kernel, blocks, table, chunks, rows, gradients)

    grid: int | None = None  # instead of what was asked for
    warps = 8


def walk(device: Device, kernel: str, blocks: int, table: int, chunks: int, rows: int,
         gradients: int) -> None:
    """The blocks in a random order."""
    columns = {"squares": 3, "tree": 5, "prologue": 6, "keyed": 9, "chunks": 5, "count": 3,
               "factored": 10 if "_lines_" in kernel else 14, "move": 3 + kernel.count("_"),
               "encode": 6, "sum": 2}.get(kernel.split("_")[0])
    array = np.zeros(1, np.uint8)
    if kernel.startswith("stage_"):
        rule = RULES[kernel.split("_")[1]]
        columns = len(rule.state) + 5
    words = np.ctypeslib.as_array((ctypes.c_longlong * (chunks * columns)).from_address(table)).reshape(chunks, columns)
    if kernel.startswith("stage_"):
        wide, width = "_F64" in kernel, 1 + len(trace(rule).coefficients)
        count = int(words[:, columns - 2].max()) + 1
        kind = ctypes.c_double if wide else ctypes.c_float
        array = np.ctypeslib.as_array((kind * (count * width)).from_address(rows)).reshape(count, width)
    elif kernel.startswith("factored_"):
        count = int(words[:, 8 if columns == 10 else 7].max()) + 1
        array = np.ctypeslib.as_array((ctypes.c_double * (count * 8)).from_address(rows)).reshape(count, 8)
    elif rows:
        array = np.ctypeslib.as_array((ctypes.c_ubyte * 16).from_address(rows))
    order = device.numbers.permutation(blocks).tolist()
    moving = np.ctypeslib.as_array((ctypes.c_longlong * chunks).from_address(gradients)) \
        if gradients and "_lines_" not in kernel else None
    device.counts[kernel] = native.module().cuda_host_walk(kernel, words, array, blocks, device.warps, order, moving)


def install(monkeypatch, processors: int = 4) -> Device:
    """A device in the place of every GPU, with nothing kept from others."""
    device = Device()
    monkeypatch.setattr(cuda, "opened", lambda asked: (device, device, processors))
    monkeypatch.setattr(ring, "rings", {})
    monkeypatch.setattr(cuda_sums, "kept", cuda.Tables())
    monkeypatch.setattr(cuda_factored, "kept", cuda.Tables())
    monkeypatch.setattr(cuda_pack, "kept", cuda.Tables())
    monkeypatch.setattr(cuda_pack, "slots", cuda.Tables(cuda_pack.SLOTS))
    return device
