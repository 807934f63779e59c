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
from fasttrain.kernels import emit_scalars, native, prologue
from fasttrain.kernels.trace import trace
from fasttrain.kernels.trace_scalars import ScalarGraph
from fasttrain.rule import Rule

ADAMW = optim.AdamW.rules[0]
GROUP = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def on_host(rule: Rule, values: Mapping[str, Any], step: int) -> list[float]:
    with np.errstate(all="ignore"):  # of second stages: norms that are zero or not finite
        return trace(rule).row(step, values)


def compiled(graph: ScalarGraph, words: np.ndarray, wide: bool, kept: bool = False) -> tuple[Tensor, Tensor]:
    """Rows by the C++ of the CUDA kernels."""
    rows, skip = native.module().cuda_host_prologue(emit_scalars.name_of(graph), words, wide, kept)
    return torch.from_numpy(rows), torch.from_numpy(skip)


def interpreted(graph: ScalarGraph, words: np.ndarray, wide: bool, kept: bool = False) -> tuple[Tensor, Tensor]:
    """Rows by Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed")
    shape = (len(words), prologue.width(graph, kept))
    out = torch.full(shape, 77.0, dtype=torch.float64 if wide else torch.float32)
    skip = torch.full((len(words),), 77, dtype=torch.int32)
    prologue.run(graph, torch.from_numpy(words), out, skip, kept)
    return out, skip
