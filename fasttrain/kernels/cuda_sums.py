"""Reductions of the CUDA backend: pass A (`squares`, `total`) and stages with sums (`measure`).

Whatever the number of tensors, in this order on torch's current stream:

- pass A: one launch for each storage, which leaves a sum of squares and a flag for every two blocks of 4,096 elements;
  one that adds those of each tensor, by the tree; and one that does the same over the tensors, for the flag;
- a stage: one launch for each (rule, storage combination), which steps and leaves the sums of every block; and, if the
  rules have sums, one that adds those of each item.

Nothing waits for the device. There are no atomics: the bits are those of `fasttrain.kernels.norm` whatever the grid.
Tables and the workspace stay on the device from one call to the next over the same tensors; the addresses of gradients
may change, and only they are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import cuda, dispatch, norm, stages, table
from fasttrain.kernels.emit_cpp import digest
from fasttrain.kernels.item import STORAGES, Item, dense
from fasttrain.kernels.resident import Column, Resident, making
from fasttrain.kernels.ring import ring_of
from fasttrain.rule import Rule

SUMS = 16  # bytes of the two sums of a block, as `Sums` in csrc/cuda/warp.cuh
TOGETHER = 256  # sums that a level of csrc/cuda/tree.cuh makes one of
WARPS = cuda.THREADS // 32  # of a block; each takes chunks of its own
CHUNKS_PER_PROCESSOR = 128  # so many that warps end at about the same time
MOST_BLOCKS = 16  # of 4,096 elements, in a chunk


@dataclass(frozen=True)
class Prepared:
    """Tables in device memory, and the workspace that they point to."""

    on_device: Resident
    rows: tuple[int, ...]  # of each table
    workspace: Tensor
    columns: tuple[Column, ...] = ()  # of addresses that move, for the first tables


kept: cuda.Tables[Prepared] = cuda.Tables()


def squares(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`fasttrain.kernels.norm.squares` of at least one tensor, on a GPU; it does not wait for it."""
    flat = [plain(tensor) for tensor in tensors]
    device, count = flat[0].device, len(flat)
    place, loaded, processors = cuda.opened(device)
    described = np.array([[tensor.data_ptr(), tensor.numel(), STORAGES[tensor.dtype]] for tensor in flat], np.int64)
    dtypes = list(dict.fromkeys(tensor.dtype for tensor in flat))
    with place.guard():
        stream = place.stream()
        key = ("squares", device, stream, described[:, 1:].tobytes())
        ready = known(place, key)
        with making("the workspace of a norm", device):
            if ready is None:
                ready = prepare_squares(place, described, dtypes, processors)
            else:
                ready.on_device.update(place, [column.addresses(described[:, 0]) for column in ready.columns])
            keep(place, key, ready)
            out = place.empty((count + 1) * SUMS + SUMS)
        for index, dtype in enumerate(dtypes):
            start(loaded, f"squares_{cuda.NAMES[dtype]}", stream, ready, index, out.data_ptr(), WARPS,
                  ready.on_device.live[index])
        start(loaded, "tree", stream, ready, len(dtypes), out.data_ptr())
        start(loaded, "tree", stream, ready, len(dtypes) + 1, out.data_ptr())
    sums = out[: count * SUMS].view(torch.float64).view(count, 2)[:, 0]
    return sums, out[(count + 1) * SUMS :].view(torch.bool)[0]


def total(sums: Tensor) -> Tensor:
    """`fasttrain.kernels.norm.total`: one launch."""
    count, (place, loaded, _) = len(sums), cuda.opened(sums.device)
    with place.guard():
        stream = place.stream()
        key = ("total", sums.device, stream, count)
        with making("the workspace of a norm", sums.device):
            ready = known(place, key) or prepare_total(place, count)
            keep(place, key, ready)
            out = place.empty((count + 1) * SUMS)
        pairs = out.view(torch.float64).view(count + 1, 2)
        pairs[:count, 0] = sums
        pairs[:count, 1] = 0
        start(loaded, "tree", stream, ready, 0, out.data_ptr())
    return pairs[count, 0]


def prepare_total(place: cuda.Place, count: int) -> Prepared:
    rows, size = tree_rows(np.zeros(1, np.int64), np.array([count]))
    workspace = place.empty(max(size, SUMS))
    rows[:, 0] = 0  # what is added lies in the memory of the result
    rows[:, 2] += workspace.data_ptr()
    rows[:, 3] = count
    return upload(place, [rows], workspace, apart=True)


def plain(tensor: Tensor) -> Tensor:
    """`norm.memory_order`, copied where it has strides; at once where there is nothing to do."""
    if tensor.dtype in STORAGES and type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_contiguous() \
            and not tensor.is_neg():
        return tensor
    return norm.memory_order(tensor).contiguous()


def prepare_squares(place: cuda.Place, described: np.ndarray, dtypes: Sequence[torch.dtype],
                    processors: int) -> Prepared:
    elements = described[:, 1]
    sums = -(-elements // (2 * norm.BLOCK))  # of each tensor
    first = np.cumsum(sums) - sums
    lists, size = tree_rows(first, sums)
    total, more = tree_rows(np.zeros(1, np.int64), np.array([len(elements)]))
    workspace = place.empty(max(size + more, SUMS))
    lists[:, [0, 2]] += workspace.data_ptr()
    total[:, 0] = 0  # the sums of the tensors, which are in the memory of the results
    total[:, 2] += workspace.data_ptr() + size
    total[:, 3:] = len(elements), (len(elements) + 1) * SUMS
    chunk = blocks_of_chunk(int(elements.sum()), processors) * norm.BLOCK
    parts, columns = [], []
    for dtype in dtypes:
        own = np.flatnonzero((described[:, 2] == STORAGES[dtype]) & (elements > 0))
        chunks = -(-elements[own] // chunk)
        item = np.repeat(own, chunks)
        begin = (np.arange(len(item)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * chunk
        columns.append(Column(item, begin * dtype.itemsize))
        parts.append(np.stack([np.zeros_like(begin), np.minimum(elements[item] - begin, chunk),
                               workspace.data_ptr() + (first[item] + begin // (2 * norm.BLOCK)) * SUMS], axis=1))
    return upload(place, [*parts, lists, total], workspace, columns,
                  [column.addresses(described[:, 0]) for column in columns], apart=True)


def tree_rows(first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, int]:
    """The table of `tree` for lists that lie one after the other, and the bytes of their workspace, lists included.
    Addresses are counted from its start; sum i goes to place i.
    """
    levels, rest = np.zeros_like(counts), counts
    while (rest > TOGETHER).any():
        rest = np.where(rest > TOGETHER, -(-rest // TOGETHER), 0)
        levels = levels + rest
    before = int(counts.sum())
    rows = np.stack([first * SUMS, counts, (before + np.cumsum(levels) - levels) * SUMS, np.arange(len(counts)),
                     np.full(len(counts), -1)], axis=1)
    return rows, (before + int(levels.sum())) * SUMS


def blocks_of_chunk(elements: int, processors: int) -> int:
    """Blocks of 4,096 elements in a chunk, which one warp takes: an even number, so that pairs of them are whole."""
    wanted = elements // (processors * CHUNKS_PER_PROCESSOR * 2 * norm.BLOCK)
    return min(max(2 * wanted, 2), MOST_BLOCKS)


def upload(place: cuda.Place, parts: Sequence[np.ndarray], workspace: Tensor, columns: Sequence[Column] = (),
           live: Sequence[np.ndarray] = (), apart: bool = False) -> Prepared:
    """Tables, and what is live beside them, in device memory."""
    return Prepared(Resident(place, live, [part.astype(np.int64) for part in parts], apart), tuple(map(len, parts)),
                    workspace, tuple(columns))


def known(place: cuda.Place, key: tuple[Any, ...]) -> Prepared | None:
    """What is kept; in a capture nothing, since replays write their tables again."""
    return None if place.capturing() else kept.get(key)


def keep(place: cuda.Place, key: tuple[Any, ...], ready: Prepared) -> None:
    """Keep it, with the pinned memory that the same takes in a capture."""
    if not place.capturing():
        ring_of(place).spare(ready.on_device.memory.nbytes)
        kept.keep(key, ready, ready.on_device.memory.nbytes + ready.workspace.nbytes)


def start(loaded: Any, kernel: str, stream: int, ready: Prepared, index: int, rows: int, each: int = 1,
          gradients: int = 0) -> None:
    """Launch a kernel over one of the tables, of which a block takes `each` rows at a time."""
    if ready.rows[index]:
        loaded.launch(kernel=kernel, blocks=-(-ready.rows[index] // each), threads=cuda.THREADS, stream=stream,
                      table=(ready.on_device.fixed or ready.on_device.live)[index], chunks=ready.rows[index],
                      rows=rows, gradients=gradients)


# --- Stages -----------------------------------------------------------------------------------------------------------

@cache
def stage_name(rule: Rule, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The kernel of a stage whose p, g and states have these dtypes, or None if it is not compiled ahead of time."""
    p, g, *states = dtypes
    if any(dtype != states[0] for dtype in states) or (rule.name, digest(rule)) not in cuda.native.module().stages():
        return None
    name = f"stage_{rule.name}_{cuda.NAMES[p]}_{cuda.NAMES[g]}_{cuda.NAMES[states[0] if states else p]}"
    return name if name in cuda.compiled() else None


def runs(item: Item) -> bool:
    """Whether there is a kernel for a stage's item."""
    return stage_name(item.rule, tuple(tensor.dtype for tensor in item.tensors)) is not None


def measure(items: Sequence[Item]) -> Tensor:
    """`fasttrain.kernels.stages.measure`: what has no kernel here runs in Triton, or on the reference."""
    own = [runs(item) for item in items]
    if all(own):
        return run_stages(items)
    device = items[0].tensors[0].device
    elsewhere = dispatch.choose_from(stages.STAGES, "none of these", device)
    sums = torch.empty(len(items), len(items[0].rule.sums or ()), dtype=torch.float64, device=device)
    for wanted, step in ((True, run_stages), (False, elsewhere)):
        places = [place for place, one in enumerate(own) if one == wanted]
        if places:
            sums[places] = step([items[place] for place in places])
    return sums


def run_stages(items: Sequence[Item]) -> Tensor:
    """The same for items that have kernels."""
    with dense(items) as walkable:
        out = launch_stages(walkable)
        torch.autograd.graph.increment_version(
            [tensor for item in walkable for tensor in item.written if tensor is not item.counter])
    counters = [item.counter for item in items if item.counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    return out[:, : len(items[0].rule.sums or ())]


def launch_stages(items: Sequence[Item]) -> Tensor:
    device = items[0].tensors[0].device
    place, loaded, processors = cuda.opened(device)
    groups = table.grouped(items)
    at = {id(item): index for index, item in enumerate(items)}
    order = [at[id(item)] for group in groups.values() for item in group]
    names = [stage_name(kind.rule, kind.dtypes) for kind in groups]
    with place.guard():
        stream = place.stream()
        rows, described, moving = [], [], []
        for group in groups.values():
            own, row_of = table.rows(group)
            rows.append(own)
            described.append(table.describe(group, row_of))
            moving.append(described[-1][:, 1].copy())
            described[-1][:, 1] = 0
        key = ("stages", device, stream, *zip(names, (one.tobytes() for one in described), strict=True), tuple(order))
        ready = kept.get(key)
        with making("the workspace of a step", device):
            if ready is None:
                for name in names:
                    loaded.usage(name, cuda.THREADS)
                ready = prepare_stages(place, list(groups.values()), described, order, processors, rows, moving)
            else:
                ready.on_device.update(place, cuda.live(rows, ready.columns, moving))
            kept.keep(key, ready, ready.on_device.memory.nbytes + ready.workspace.nbytes)
            out = place.empty(len(items) * SUMS)
        addresses = ready.on_device.live
        for index, name in enumerate(names):
            start(loaded, str(name), stream, ready, index, addresses[index], WARPS, addresses[len(names) + index])
        if items[0].rule.sums:
            start(loaded, "tree", stream, ready, len(names), out.data_ptr())
    return out.view(torch.float64).view(len(items), 2)


def prepare_stages(place: cuda.Place, groups: Sequence[list[Item]], described: Sequence[np.ndarray], order: list[int],
                   processors: int, rows: Sequence[np.ndarray], moving: Sequence[np.ndarray]) -> Prepared:
    elements = np.array([item.tensors[0].numel() for group in groups for item in group], np.int64)
    sums = -(-elements // norm.BLOCK)  # of each item
    lists, size = tree_rows(np.cumsum(sums) - sums, sums)
    workspace = place.empty(max(size, SUMS))
    lists[:, [0, 2]] += workspace.data_ptr()
    lists[:, 3] = order
    chunk = blocks_of_chunk(int(elements.sum()), processors) * norm.BLOCK
    parts, columns, before = [], [], 0
    for group, known in zip(groups, described, strict=True):
        built = table.build(group, chunk, known)
        blocks = -(-built[:, -3] // norm.BLOCK)  # of each chunk
        built[:, -1] = workspace.data_ptr() + (before + np.cumsum(blocks) - blocks) * SUMS
        before += int(blocks.sum())
        parts.append(built)
        item = np.repeat(np.arange(len(group)), -(-known[:, -2] // chunk))
        columns.append(Column(item, built[:, 1].copy()))
    return upload(place, [*parts, lists], workspace, columns, cuda.live(rows, columns, moving))
