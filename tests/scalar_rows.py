"""Rows of coefficients made by the code of the GPU backends: by the CUDA kernels' C++ on the host, and by Triton's
interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttrain import optim
from fasttrain.kernels import native, prologue
from fasttrain.kernels.program import Addresses, described, program, with_slots
from fasttrain.kernels.trace import trace
from fasttrain.kernels.trace_scalars import ScalarGraph
from fasttrain.rule import Rule

ADAMW = optim.AdamW.rules[0]
GROUP = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def on_host(rule: Rule, values: Mapping[str, Any], step: int) -> list[float]:
    with np.errstate(all="ignore"):  # of second stages: norms that are zero or not finite
        return trace(rule).row(step, values)


def compiled(graph: ScalarGraph, words: np.ndarray, wide: bool, kept: bool = False) -> tuple[Tensor, Tensor]:
    """Rows by the text of the CUDA kernel, whose last slot lies before memory that nothing may write."""
    made, rows, width = program(graph), len(words), prologue.width(graph, kept)
    out = torch.full((rows, width), 77.0, dtype=torch.float64 if wide else torch.float32)
    skip = torch.full((rows,), 77, dtype=torch.int32)
    slots = np.full(rows * made.slots + 1, 77.0)
    at = Addresses(made.words.ctypes.data, words.ctypes.data, out.data_ptr(), skip.data_ptr())
    table = with_slots(described(at, rows, words.shape[1] // 3, width, wide, kept), slots.ctypes.data)
    native.module().cuda_host_walk("prologue", table, np.zeros(1, np.uint8), 3, 5, [2, 0, 1])
    assert slots[-1] == 77.0
    return out, skip


def interpreted(graph: ScalarGraph, words: np.ndarray, wide: bool, kept: bool = False) -> tuple[Tensor, Tensor]:
    """Rows by Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    shape = (len(words), prologue.width(graph, kept))
    out = torch.full(shape, 77.0, dtype=torch.float64 if wide else torch.float32)
    skip = torch.full((len(words),), 77, dtype=torch.int32)
    prologue.run(graph, torch.from_numpy(words), out, skip, kept)
    return out, skip
