"""Adafactor in Triton (`fasttrain.kernels.factored` has the mathematics): eight launches, whatever the parameters.

1. `square_tile`: sums of squares of the rows and of the columns of each tile of a gradient (matrices);
2. `move_lines`: the states, moved by the means of 64 rows or columns, and the sum of 64 moved row means;
3. `add_up`: the sum of a matrix's moved row means;
4. `measure_tile` and 5. `measure_whole`: sums of squares of p and of the update, of each tile or chunk;
6. `add_up`: the same of each parameter;
7. `apply_tile` and 8. `apply_whole`: the new p, and the second moment where it is whole.

Where dtypes differ among parameters there is one launch more for each combination; nothing is launched that has no
work. The host waits for nothing: rates are computed from the sums on the device. Sums are made in float64, each by one
program in one order: the same numbers whatever else is stepped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import resident, table, triton_codecs, triton_tiles
from fasttrain.kernels.item import STORAGES, Item, in_turns
from fasttrain.kernels.triton import compile_for, count_up, guard, patched, wrapped
from fasttrain.kernels.triton_sums import add_up, checked

ROWS, WIDTH = 64, 256  # of a tile; `move_lines` takes as many lines as a tile has rows
COLUMNS = {"square_tile": 64, "measure_tile": 32, "apply_tile": 32}  # so many at once, as registers allow
kept: resident.Tables[resident.Resident] = resident.Tables()
TOGETHER = 16  # parts of a sum that are read at once
BLOCK = 1024  # elements of a chunk of parameters whose second moment is whole
BLOCK_INTERPRETED = 1 << 16  # the interpreter costs the same whatever the size
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
LINE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

Work = tuple[Item, Sequence[float]]  # as in fasttrain.kernels.factored


@cache
def kernels(interpreted: bool) -> dict[str, Any]:
    """Those of `fasttrain.kernels.triton_tiles`."""
    return wrapped([*triton_codecs.FUNCTIONS, *triton_tiles.FUNCTIONS, *triton_tiles.KERNELS], interpreted)


def step(works: Sequence[Work]) -> None:
    """Step parameters of one device; those that share memory one after the other."""
    row_of = {id(item): row for item, row in works}
    for together in in_turns([item for item, _ in works]):
        _step(together, [row_of[id(item)] for item in together])
    torch.autograd.graph.increment_version([tensor for item, _ in works for tensor in item.written])


def _step(given: Sequence[Item], rows: Sequence[Sequence[float]]) -> None:
    items = [replace(item, tensors=tuple(tensor.contiguous() for tensor in item.tensors)) for item in given]
    full = [(item, row) for item, row in zip(items, rows, strict=True) if item.tensors[0].numel()]
    if full:
        with guard(full[0][0].tensors[0].device):
            Launches(full).run()
    for old, new in zip(given, items, strict=True):
        for index, (mine, copy) in enumerate(zip(old.tensors, new.tensors, strict=True)):
            if copy is not mine and index != 1:
                mine.copy_(copy)
    count_up(given)


def constants(name: str, interpreted: bool = False) -> dict[str, int]:
    """How a kernel walks."""
    if name in COLUMNS:
        columns = WIDTH if interpreted else COLUMNS[name]
        return {"rows": ROWS, "columns": columns, "steps": WIDTH // columns}
    if name == "move_lines":
        return {"together": TOGETHER, "count": ROWS}
    return {"block": BLOCK_INTERPRETED if interpreted else BLOCK}


def options(name: str) -> dict[str, Any]:
    """How a kernel is compiled."""
    return OPTIONS if name in COLUMNS else LINE_OPTIONS


def elements_per_thread(name: str) -> int:
    """Of each operand at once."""
    return (ROWS * COLUMNS[name] if name in COLUMNS else BLOCK) // (32 * options(name)["num_warps"])


class Tables:
    """Rows of a kernel's table by what the launch needs to be compiled for, in the order of their arrival."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[Any, ...], list[np.ndarray]] = {}

    def add(self, kind: tuple[Any, ...], rows: np.ndarray) -> tuple[tuple[Any, ...], int]:
        """Returns where they begin in their table."""
        known = self.kinds.setdefault(kind, [])
        begin = sum(map(len, known))
        known.append(rows)
        return kind, begin

    def begins(self, begin: int = 0) -> dict[tuple[Any, ...], int]:
        """The number of the first program of each launch, counted over all from a number on."""
        starts = {}
        for kind, parts in self.kinds.items():
            starts[kind] = begin
            begin += sum(map(len, parts))
        return starts

    def __len__(self) -> int:
        return sum(len(rows) for parts in self.kinds.values() for rows in parts)


class Launches:
    """The tables of one step of dense parameters that have elements, and its launches."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.device = works[0][0].tensors[0].device
        self.interpreted = self.device.type == "cpu"
        self.parameters, self.first = len(works), works[0][0].tensors[0].data_ptr()
        self.numbers = np.array([[*row, item.tensors[0].numel()] for item, row in works], np.float64)
        self.parts = self.lines = self.matrices = 0  # sizes of workspaces
        self.squares, self.moves, self.tiles, self.chunks = Tables(), Tables(), Tables(), Tables()
        self.mean_of: list[tuple[tuple[Any, ...], int, int, int]] = []  # kind, begin, matrices, programs of each
        self.sum_of: list[tuple[Tables, tuple[Any, ...], int, int]] = []  # kind, begin, programs
        for parameter, (item, _) in enumerate(works):
            (self._factored if len(item.tensors) == 4 else self._whole)(parameter, item)

    def _factored(self, parameter: int, item: Item) -> None:
        p, g, row_var, col_var = item.tensors
        rows, columns = p.shape[-2:]
        matrices = p.numel() // (rows * columns)
        wide = item.dtype == torch.float64
        down, across = -(-rows // ROWS), -(-columns // WIDTH)
        row_parts, column_parts = self.parts, self.parts + across * matrices * rows
        row_lines, column_lines = self.lines, self.lines + matrices * rows

        matrix, i, j = (axis.reshape(-1) for axis in np.indices((matrices, down, across), np.int64))
        row, column = i * ROWS, j * WIDTH
        start = (matrix * rows + row) * columns + column
        tiles = np.empty((len(matrix), 13), np.int64)
        tiles[:, 0] = p.data_ptr() + start * p.element_size()
        tiles[:, 1] = g.data_ptr() + start * g.element_size()
        tiles[:, 2] = np.minimum(rows - row, ROWS)
        tiles[:, 3] = np.minimum(columns - column, WIDTH)
        tiles[:, 4] = columns
        tiles[:, 5] = parameter
        tiles[:, 6] = ((columns % 8 == 0) & (tiles[:, :2] % table.ALIGNED == 0).all(axis=1)
                       & (tiles[:, 2] == ROWS) & (tiles[:, 3] == WIDTH))
        tiles[:, 7] = row_parts + j * matrices * rows + matrix * rows + row
        tiles[:, 8] = column_parts + i * matrices * columns + matrix * columns + column
        tiles[:, 9] = row_lines + matrix * rows + row
        tiles[:, 10] = column_lines + matrix * columns + column
        tiles[:, 11] = self.matrices + matrix
        tiles[:, 12] = rows
        self.squares.add((STORAGES[g.dtype],), tiles)
        kind, begin = self.tiles.add((STORAGES[p.dtype], STORAGES[g.dtype], wide), tiles)
        self.sum_of.append((self.tiles, kind, begin, len(tiles)))

        moved = [(row_var, rows, row_parts, matrices * rows, across, columns, row_lines),
                 (col_var, columns, column_parts, matrices * columns, down, rows, column_lines)]
        for index, (state, count, parts, distance, pieces, divisor, lines) in enumerate(moved):
            groups = -(-count // ROWS)
            matrix, group = (axis.reshape(-1) for axis in np.indices((matrices, groups), np.int64))
            line = matrix * count + group * ROWS
            chunk = np.empty((len(line), 8), np.int64)
            chunk[:, 0] = parts + line
            chunk[:, 1] = distance
            chunk[:, 2] = pieces
            chunk[:, 3] = np.minimum(count - group * ROWS, ROWS)
            chunk[:, 4] = state.data_ptr() + line * state.element_size()
            chunk[:, 5] = parameter
            chunk[:, 6] = divisor
            chunk[:, 7] = lines + line
            kind, begin = self.moves.add((STORAGES[state.dtype], wide), chunk)
            if index == 0:
                self.mean_of.append((kind, begin, matrices, groups))
        self.parts = column_parts + down * matrices * columns
        self.lines = column_lines + matrices * columns
        self.matrices += matrices

    def _whole(self, parameter: int, item: Item) -> None:
        plain = replace(item, rule=None, row=())  # type: ignore[arg-type]
        block = constants("apply_whole", self.interpreted)["block"]
        rows = table.build([plain], block, table.describe([plain], [parameter]))
        kind, begin = self.chunks.add((*(STORAGES[tensor.dtype] for tensor in item.tensors),
                                       item.dtype == torch.float64), rows)
        self.sum_of.append((self.chunks, kind, begin, len(rows)))

    # --- The launches -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All of them, in order, on the current stream."""
        self.arrays = {id(tables): {kind: self._there((index, kind), np.concatenate(parts))
                                    for kind, parts in tables.kinds.items()}
                       for index, tables in enumerate((self.squares, self.moves, self.tiles, self.chunks))}
        numbers = self._there(("numbers",), self.numbers.view(np.int64)).view(torch.float64)
        parts, lines = self._space(self.parts), self._space(self.lines)
        partials = self._space(len(self.tiles) + len(self.chunks), 2)
        means = self._space(1)
        if len(self.tiles):
            row_means, starts = self._space(len(self.moves), 1), self.moves.begins()
            self._launch("square_tile", self.squares, lambda kind: (parts,))
            self._launch("move_lines", self.moves, lambda kind: (numbers, parts, lines, row_means[starts[kind]:]))
            of_means = [np.stack([starts[kind] + begin + np.arange(matrices) * groups, np.full(matrices, groups)], 1)
                        for kind, begin, matrices, groups in self.mean_of]
            means = add_up(row_means, self._segments("means", np.concatenate(of_means)), self.device)
        begins = {id(self.tiles): self.tiles.begins(), id(self.chunks): self.chunks.begins(len(self.tiles))}
        self._launch("measure_tile", self.tiles,
                     lambda kind: (numbers, lines, means, partials[begins[id(self.tiles)][kind]:]))
        self._launch("measure_whole", self.chunks, lambda kind: (numbers, partials[begins[id(self.chunks)][kind]:]))
        segments = [[begins[id(tables)][kind] + begin, programs] for tables, kind, begin, programs in self.sum_of]
        sums = add_up(partials, self._segments("sums", np.array(segments, np.int64)), self.device)
        self._launch("apply_tile", self.tiles, lambda kind: (numbers, lines, means, sums, self.parameters))
        self._launch("apply_whole", self.chunks, lambda kind: (numbers, sums, self.parameters))

    def _segments(self, name: str, segments: np.ndarray) -> Tensor:
        return self._there((name,), checked(segments))

    def _there(self, key: tuple[Any, ...], array: np.ndarray) -> Tensor:
        """A table on the device, to which only is sent what is not as in the step before of these parameters."""
        return patched(kept, (self.first, *key), np.ascontiguousarray(array), self.device, "the tables of a step")

    def _space(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float64, device=self.device)

    def _launch(self, name: str, tables: Tables, arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
        for kind, array in self.arrays[id(tables)].items():
            kernels(self.interpreted)[name][(len(array),)](
                array, *arguments(kind), *kind, **constants(name, self.interpreted), interpreted=self.interpreted,
                **({} if self.interpreted else options(name)))


def launches(works: Sequence[Work]) -> int:
    """How many kernels a step takes of parameters that do not share memory.

    >>> p = torch.ones(2, 3)
    >>> row = (1.0, 1.0, 0.5, 0.1, 1e-30, 1e-3, 1.0)
    >>> launches([(Item("p", None, (p, p, p[:, :1], p[:1]), (), None), row)])
    6
    """
    items = [item for item, _ in works if item.tensors[0].numel()]
    dtypes = [tuple(tensor.dtype for tensor in item.tensors) for item in items]
    factored = [kind for kind in dtypes if len(kind) == 4]
    if not items:
        return 0
    matrices = {kind[1] for kind in factored}, {(state, kind[0] == torch.float64) for kind in factored
                                                for state in kind[2:]}, {kind[:2] for kind in factored}
    count = len(matrices[0]) + len(matrices[1]) + 1 + 2 * len(matrices[2]) if factored else 0
    return count + 2 * len({kind for kind in dtypes if len(kind) == 3}) + 1


# --- Ahead of time ----------------------------------------------------------------------------------------------------

def compile_ahead(name: str, storages: tuple[int, ...], arch: int) -> Any:
    """Compile a kernel of `triton_tiles` for a GPU that need not be here.

    Arguments:
        storages: what the kernel reads, in the order of its arguments: of g, of a state, or of p, g and variance.
    """
    function = kernels(False)[name]
    stated = [argument for argument in function.arg_names if argument.endswith("storage")]
    values = {"wide": storages[0] == 1, "interpreted": False, **dict(zip(stated, storages, strict=True)),
              **constants(name)}
    types = {"table": "*i64", "parameters": "i32"} | dict.fromkeys(
        ("numbers", "parts", "lines", "means", "partials", "sums"), "*fp64")
    return compile_for(function, arch, options(name), {key: kind for key, kind in types.items()
                                                          if key in function.arg_names},
                       {key: value for key, value in values.items() if key in function.arg_names})
