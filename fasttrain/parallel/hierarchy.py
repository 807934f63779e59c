"""Gradients reduced inside a node first, then across nodes: the slow link carries one shard for each rank of a node.

Reduce-scatter inside, all-reduce of the shard across, all-gather inside (`exchange.hierarchical_all_reduce`), in one
chain that goes on while backward does.

Source: R. Thakur, R. Rabenseifner, W. Gropp, IJHPCA 19 (2005), sections 4 and 6, of algorithms that scatter and gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from fasttrain.dist import accounting, exchange
from fasttrain.dist.layout import FlatLayout
from fasttrain.dist.wire import Wire
from fasttrain.parallel.buckets import Bucket
from fasttrain.parallel.wires import Method, Sent, method_of

Grid = list[list[int]]


class Hierarchical(Method):
    """Reduces over a grid of ranks; what `Reducer` and `DataParallel` take for a DeviceMesh of two dimensions.

    Sums are made in float32 (float64), and those of a row travel on in the dtype of the bucket.

    Arguments:
        grid: a DeviceMesh of two dimensions, or the numbers of the ranks in rows: each row is a node.

    Attributes:
        inside, across: the wires along this rank's row and column, which count bytes.

    Raises:
        ValueError: it is no grid, or the numbers in a row do not ascend.
    """

    name = "hierarchical"

    def __init__(self, grid: DeviceMesh | Sequence[Sequence[int]]):
        super().__init__()
        found = grid_of(grid)
        if found is None:
            raise ValueError(f"{grid} is no grid of ranks: give a DeviceMesh of two dimensions (across nodes, inside a "
                             "node), or lists of equal length, one for each node")
        if any(row != sorted(row) for row in found):
            raise ValueError(f"the ranks of a node are numbered {found}: the numbers must ascend in each row")
        self.grid: Grid = found

    def prepare(self, wire: Wire, layout: FlatLayout) -> None:
        """Make the wires of the row and of the column, unless that is done.

        Raises:
            ValueError: the reducer's ranks are others than those of the grid.
        """
        super().prepare(wire, layout)
        if sorted(rank for row in self.grid for rank in row) != wire.ranks:
            raise ValueError(f"the grid {self.grid} does not consist of the reducer's ranks {wire.ranks}: make both of "
                             "one mesh")
        if not hasattr(self, "inside"):
            mine = wire.ranks[wire.rank]
            row = next(row for row in self.grid if mine in row)
            column = [other[row.index(mine)] for other in self.grid]
            self.inside, self.across = (Wire(wire.device, wire.timeout_s, line, wire.watch) for line in (row, column))

    def send(self, index: int, bucket: Bucket) -> Sent:
        self.issued(index, len(bucket.data))
        return Sent(exchange.hierarchical_all_reduce(
            self.inside, self.across, bucket.data, (1.0 / self.inside.size, self.inside.size / self.divisor), True))

    def bytes_of(self, elements: int, dtype: torch.dtype) -> float:
        return sum(accounting.hierarchical_bytes(elements, self.inside.size, self.across.size, dtype.itemsize))


def grid_of(mesh: Any) -> Grid | None:
    """The ranks of a mesh of two dimensions in rows, or of lists that are such rows; None of anything else."""
    if isinstance(mesh, DeviceMesh):
        return mesh.mesh.tolist() if mesh.ndim == 2 else None
    rows = list(mesh) if isinstance(mesh, (list, tuple)) else []
    if rows and all(isinstance(row, (list, tuple)) and len(row) == len(rows[0]) and row for row in rows):
        return [list(row) for row in rows]
    return None


def ranks_and_method(mesh: Any, wire: str | Method) -> tuple[Any, Method]:
    """What `Wire` takes for these ranks, and how gradients travel between them.

    Raises:
        ValueError: there is no such wire, or none that takes two dimensions.
    """
    grid = grid_of(mesh)
    if grid is None:
        return mesh, method_of(wire)
    flat = sorted(rank for row in grid for rank in row)
    if isinstance(wire, Method):
        return flat, wire
    if wire != "same":
        raise ValueError(f"wire={wire!r} does not go with a mesh of two dimensions, over which gradients travel in "
                         "their own dtype: take wire='same', or a mesh of one dimension")
    return flat, Hierarchical(grid)
