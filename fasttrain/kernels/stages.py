"""Run stages: rules whose elements' terms are summed in the same walk (`Rule.sums`).

The sums are made in float64 by the tree of `fasttrain.kernels.norm`: the same bits from the compiled module and from
the reference. What a stage does not change is not written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from fasttrain.kernels import dispatch, native, norm
from fasttrain.kernels.emit_cpp import digest
from fasttrain.kernels.item import Item, dense, table_of_rows
from fasttrain.kernels.reference import evaluate
from fasttrain.kernels.table import grouped
from fasttrain.kernels.trace import trace
from fasttrain.rule import Rule


@cache
def number_of(rule: Rule) -> int | None:
    """The number of a stage in the compiled module; None if that very equation is not in it."""
    if native.load()[0] is None:
        return None
    return {key: number for number, key in enumerate(native.module().stages())}.get((rule.name, digest(rule)))


def run(items: Sequence[Item], backend: str) -> np.ndarray:
    """Step the items of one device; returns their sums, float64 of shape (len(items), sums).

    The items are plain, and of rules with as many sums. What a backend has no kernel for runs as
    `dispatch.choose_from` says. For items that are not in CPU memory the host waits for the sums, if there are any.
    """
    if not items:
        return np.zeros((0, 0))
    sums = measure(items, backend)
    return sums.cpu().numpy() if sums.numel() else np.zeros(tuple(sums.shape))


def measure(items: Sequence[Item], backend: str) -> torch.Tensor:
    """The same; the sums stay where the items are, and the host does not wait."""
    if backend == "cpu" and not all(number_of(item.rule) is not None for item in items):
        backend = "reference"
    return dispatch.choose_from(STAGES, backend, items[0].tensors[0].device)(items)


def launches(items: Iterable[Item], sums: bool, backend: str, device: torch.device) -> int:
    """How many kernels that is, or walks of all: on a GPU one for each (rule, storages), and one for all sums."""
    if dispatch.choose_from(STAGES, backend, device) not in (_cuda, _triton):
        return 1
    return len(grouped([item for item in items if item.tensors[0].numel()])) + sums


def _native(items: Sequence[Item]) -> torch.Tensor:
    with dense(items) as walkable:
        work = [(number_of(item.rule), item.dtype == torch.float64, item.tensors, item.counter) for item in walkable]
        sums = native.module().run_stages(native.reader(), work, table_of_rows([item.row for item in items]),
                                          torch.get_num_threads())
        torch.autograd.graph.increment_version([tensor for item in walkable for tensor in item.written])
    return torch.from_numpy(sums[:, : len(items[0].rule.sums or ())])


def _cuda(items: Sequence[Item]) -> torch.Tensor:
    return dispatch.part("cuda_sums").measure(items)


def _triton(items: Sequence[Item]) -> torch.Tensor:
    return dispatch.part("triton_stages").measure(items)


def _reference(items: Sequence[Item]) -> torch.Tensor:
    return torch.stack([_measure_one(item) for item in items])


def _measure_one(item: Item) -> torch.Tensor:
    graph = trace(item.rule)
    scalars = dict(zip(graph.coefficients, item.row[1 : 1 + len(graph.coefficients)], strict=True))
    new = evaluate(item.rule, [tensor.to(item.dtype) for tensor in item.tensors], item.row[0], scalars)
    written = [item.tensors[0], *item.tensors[2:]]
    for tensor, value, changed in zip(written, new[: len(written)], graph.changed, strict=True):
        if changed:
            tensor.copy_(value)
    if item.counter is not None:
        item.counter.add_(1)
    in_order = [term.new_empty(0) if term.numel() == 0 else _like(term, item.tensors[0]) for term in new[len(written):]]
    sums = [norm.sum_in_blocks(norm.memory_order(term).double()) for term in in_order]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def _like(term: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The terms in the order in which the walk meets them: that of p's memory, or of a contiguous copy."""
    return torch.empty_like(p, dtype=term.dtype).copy_(term)


# By backend; `dispatch.choose_from` says what stands in for one that is not here.
STAGES: dict[str, Callable[..., Any]] = {"cuda": _cuda, "triton": _triton, "cpu": _native, "reference": _reference}
