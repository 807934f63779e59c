"""Adafactor in CUDA (`fasttrain.kernels.factored` has the mathematics): six launches, however many parameters.

1. `rows`: sums of squares of the rows and of the columns of each tile of a gradient (matrices);
2. `lines`: the states, moved by the means, and the sum of 32 moved row means;
3. `tree`: the sum of a matrix's moved row means;
4. `update`: sums of squares of p and of the update, of each tile;
5. `tree`: the same of each parameter;
6. `apply`: the new p, and the second moment where it is whole.

For each further dtype there is one launch more of 1, 2, 4 and 6; nothing is launched that has no work. The host waits
for nothing. In fp32 they touch 24 bytes an element. Every sum is made in float64, in one order: the same bits whatever
else is stepped. Tables and the workspace stay on the device from one step to the next; of new gradients only the
addresses are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fasttrain.kernels import cuda, dispatch, factored
from fasttrain.kernels.cuda_sums import SUMS, WARPS, Prepared, start, tree_rows, upload
from fasttrain.kernels.item import Item, in_turns
from fasttrain.kernels.resident import Column, making

LINES = 64  # rows of a tile, as in csrc/cuda/factored.cuh
GROUP = 32  # lines whose states one warp moves
WORDS = {"rows": 14, "lines": 10, "update": 14, "apply": 14}  # columns of the kernels' tables

Work = tuple[Item, Sequence[float]]  # as in fasttrain.kernels.factored
kept: cuda.Tables[Prepared] = cuda.Tables()


def runs(item: Item) -> bool:
    """Whether there are kernels for an item: for those of one dtype."""
    return len({tensor.dtype for tensor in item.tensors}) == 1 and item.tensors[0].dtype in cuda.NAMES


def step(works: Sequence[Work]) -> None:
    """Step parameters of one device; those that share memory one after the other, and the rest elsewhere."""
    others = [work for work in works if not runs(work[0])]
    if others:
        dispatch.choose_from(factored.STEPS, "none of these", others[0][0].tensors[0].device)(others)
    own = [work for work in works if runs(work[0])]
    row_of = {id(item): row for item, row in own}
    for together in in_turns([item for item, _ in own]):
        full = [item for item in together if item.tensors[0].numel()]
        walkable = [[tensor.contiguous() for tensor in item.tensors] for item in full]
        if full:
            launch([tuple(tensors) for tensors in walkable], [row_of[id(item)] for item in full])
        for item, tensors in zip(full, walkable, strict=True):
            for index, (old, new) in enumerate(zip(item.tensors, tensors, strict=True)):
                if new is not old and index != 1:
                    old.copy_(new)
    torch.autograd.graph.increment_version(
        [tensor for item, _ in own for tensor in item.written if tensor is not item.counter])
    counters = [item.counter for item, _ in own if item.counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)


def launches(works: Sequence[Work]) -> int:
    """How many kernels that is."""
    own = [item.tensors for item, _ in works if runs(item) and item.tensors[0].numel()]
    every, matrices = ({tensors[0].dtype for tensors in own if len(tensors) >= count} for count in (3, 4))
    return 2 * len(matrices) + bool(matrices) + 2 * len(every) + bool(every)


def launch(params: Sequence[tuple[torch.Tensor, ...]], rows: Sequence[Sequence[float]]) -> None:
    device = params[0][0].device
    place, loaded, _ = cuda.opened(device)
    dtypes = list(dict.fromkeys(tensors[0].dtype for tensors in params))
    described = tuple((tensors[0].dtype, *matrix_of(tensors), tensors[0].data_ptr(),
                       *(tensor.data_ptr() for tensor in tensors[2:])) for tensors in params)
    gradients = np.array([tensors[1].data_ptr() for tensors in params], np.int64)
    numbers = np.array([[*row, tensors[0].numel()] for row, tensors in zip(rows, params, strict=True)], np.float64)
    with place.guard():
        stream = place.stream()
        key = (device, stream, described)
        ready = kept.get(key)
        with making("the workspace of Adafactor", device):
            if ready is None:
                for what in WORDS:
                    for dtype in dtypes:
                        loaded.usage(f"factored_{what}_{cuda.NAMES[dtype]}", cuda.THREADS)
                ready = prepare(place, params, dtypes, numbers, gradients)
            else:
                ready.on_device.update(place, [numbers, *(one.addresses(gradients) for one in ready.columns)])
        kept.keep(key, ready, ready.on_device.memory.nbytes + ready.workspace.nbytes)
        live = ready.on_device.live
        for what, trees in (("rows", False), ("lines", True), ("update", True), ("apply", False)):
            at = list(WORDS).index(what) * len(dtypes)
            for index, dtype in enumerate(dtypes):
                name = f"factored_{what}_{cuda.NAMES[dtype]}"
                start(loaded, name, stream, ready, at + index, live[0], WARPS, live[1 + at + index])
            if trees:
                start(loaded, "tree", stream, ready, len(WORDS) * len(dtypes) + (what == "update"),
                      ready.workspace.data_ptr())


def matrix_of(tensors: Sequence[torch.Tensor]) -> tuple[int, int, int]:
    """Matrices, rows and columns; zero rows where the second moment is whole."""
    p = tensors[0]
    if len(tensors) == 3:
        return 1, 0, p.numel()
    return p.numel() // (p.shape[-1] * p.shape[-2]), p.shape[-2], p.shape[-1]


class Room:
    """Parts of a workspace, one after the other: offsets in bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, count: int, size: int) -> int:
        begin = self.bytes
        self.bytes += -(-count * size // SUMS) * SUMS
        return begin


def prepare(place: cuda.Place, params: Sequence[tuple[torch.Tensor, ...]], dtypes: Sequence[torch.dtype],
            numbers: np.ndarray, gradients: np.ndarray) -> Prepared:
    shapes = [matrix_of(tensors) for tensors in params]
    matrices = np.array([count if rows else 0 for count, rows, _ in shapes], np.int64)
    before = np.cumsum(matrices) - matrices
    room = Room()
    totals = room.take(int(matrices.sum()) + len(params), SUMS)
    of_params = totals + int(matrices.sum()) * SUMS
    tables: dict[tuple[str, torch.dtype], list[np.ndarray]] = {(what, dtype): [] for what in WORDS for dtype in dtypes}
    lists: tuple[list[Any], list[Any]] = ([], [])  # (where leaves begin, how many): of matrices, of parameters
    for index, (tensors, (count, rows, columns)) in enumerate(zip(params, shapes, strict=True)):
        dtype, total = tensors[0].dtype, of_params + index * SUMS
        if rows:
            tiles, lines = of_matrices(tensors, count, rows, columns, index, totals + int(before[index]) * SUMS, room)
            tables["rows", dtype].append(tiles)
            tables["lines", dtype].append(lines)
            blocks = -(-rows // GROUP)
            first = int(lines[0, 6])
            lists[0].extend((first + m * blocks * SUMS, blocks) for m in range(count))
        else:
            tiles = of_whole(tensors, index)
        leaves = room.take(len(tiles), SUMS)
        tiles[:, 10] = leaves + np.arange(len(tiles)) * SUMS
        tiles[:, 11] = total
        lists[1].append((leaves, len(tiles)))
        tables["update", dtype].append(tiles)
        tables["apply", dtype].append(tiles)
    trees = [tree_of(found, room, out) for found, out in zip(lists, (0, int(matrices.sum())), strict=True)]
    workspace = place.empty(room.bytes)
    parts: list[np.ndarray] = []
    moving: list[Column] = []
    for (what, _), found in tables.items():
        whole = np.concatenate([np.empty((0, WORDS[what]), np.int64), *found])
        if what == "lines":
            relative = [0, 5, 6]
            first_of_columns = whole[:, 6] < 0
            whole[:, relative] += workspace.data_ptr()
            whole[first_of_columns, 6] = 0
        else:
            factored_ones = whole[:, 3] >= 0
            whole[:, [10, 11]] += workspace.data_ptr()
            for column in (2, 3, 8, 12, 13):
                whole[factored_ones, column] += workspace.data_ptr()
            whole[~factored_ones, 3] = 0
        parts.append(whole)
        moving.append(gradient_column(whole, gradients) if what != "lines" else Column(*np.empty((2, 0), np.int64)))
    for rows_of_tree in trees:
        rows_of_tree[:, [0, 2]] += workspace.data_ptr()
    return upload(place, [*parts, *trees], workspace, moving,
                  [numbers, *(column.addresses(gradients) for column in moving)])


def gradient_column(tiles: np.ndarray, gradients: np.ndarray) -> Column:
    """The addresses of the gradients of tiles, which leave the table."""
    parameter = tiles[:, 7].copy()
    offset = tiles[:, 1] - gradients[parameter]
    tiles[:, 1] = 0
    return Column(parameter, offset)


def of_matrices(tensors: Sequence[torch.Tensor], count: int, rows: int, columns: int, index: int, totals: int,
                room: Room) -> tuple[np.ndarray, np.ndarray]:
    """Tiles and lines of one parameter. What lies in the workspace is an offset there; what does not exist is -1."""
    p, g, row_var, column_var = tensors
    size = p.element_size()
    width = 32 * 16 // size
    row_tiles, column_tiles = -(-rows // LINES), -(-columns // width)
    row_parts, column_parts = room.take(count * column_tiles * rows, 8), room.take(count * row_tiles * columns, 8)
    rows_moved, columns_moved = room.take(count * rows, 8), room.take(count * columns, 8)
    m, row_tile, column_tile = np.indices((count, row_tiles, column_tiles)).reshape(3, -1)
    row, column = row_tile * LINES, column_tile * width
    at = ((m * rows + row) * columns + column) * size
    full = np.full_like
    tiles = np.stack([
        p.data_ptr() + at, g.data_ptr() + at,
        rows_moved + (m * rows + row) * 8, columns_moved + (m * columns + column) * 8,
        np.minimum(LINES, rows - row), np.minimum(width, columns - column), full(m, columns), full(m, index),
        totals + m * SUMS, full(m, rows), full(m, 0), full(m, 0),
        row_parts + ((m * column_tiles + column_tile) * rows + row) * 8,
        column_parts + ((m * row_tiles + row_tile) * columns + column) * 8], axis=1)
    leaves = room.take(count * -(-rows // GROUP), SUMS)
    found = []
    for lines, others, parts, tiles_across, state, moved, sums in (
            (rows, columns, row_parts, column_tiles, row_var, rows_moved, leaves),
            (columns, rows, column_parts, row_tiles, column_var, columns_moved, -1)):
        m, block = np.indices((count, -(-lines // GROUP))).reshape(2, -1)
        begin = block * GROUP
        found.append(np.stack([
            parts + (m * tiles_across * lines + begin) * 8, full(m, tiles_across), full(m, 1), full(m, lines),
            state.data_ptr() + (m * lines + begin) * size, moved + (m * lines + begin) * 8,
            sums + np.arange(len(m)) * SUMS if sums >= 0 else full(m, -(1 << 60)), np.minimum(GROUP, lines - begin),
            full(m, index), full(m, others)], axis=1))
    return tiles, np.concatenate(found)


def of_whole(tensors: Sequence[torch.Tensor], index: int) -> np.ndarray:
    """Tiles of a parameter whose second moment is whole: rows as long as a tile's, and what remains."""
    p, g, variance = tensors
    count, size = p.numel(), p.element_size()
    width = 32 * 16 // size
    begin = np.arange(0, count // width * width, LINES * width)
    rows, columns = np.minimum(LINES, count // width - begin // width), np.full_like(begin, width)
    if count % width:
        begin = np.append(begin, count - count % width)
        rows, columns = np.append(rows, 1), np.append(columns, count % width)
    none = np.full_like(begin, -1)
    return np.stack([p.data_ptr() + begin * size, g.data_ptr() + begin * size, variance.data_ptr() + begin * size, none,
                     rows, columns, np.full_like(begin, width), np.full_like(begin, index), *[none * 0] * 6], axis=1)


def tree_of(found: Sequence[tuple[int, int]], room: Room, out: int) -> np.ndarray:
    """The table of `tree` for lists of leaves in the workspace."""
    first, counts = np.array(found, np.int64).reshape(-1, 2).T
    rows, size = tree_rows(np.zeros_like(first), counts)
    scratch = room.take(size - int(counts.sum()) * SUMS, 1)
    rows[:, 0] = first
    rows[:, 2] += scratch - int(counts.sum()) * SUMS
    rows[:, 3] += out
    return rows
