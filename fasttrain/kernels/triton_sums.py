"""Norms in Triton, two launches each: a partial sum of each chunk, then the tree over them, as of stages with sums
(`fasttrain.kernels.triton_stages`).

The sums have the bits of `fasttrain.kernels.norm`, whatever the grid, and stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import resident, table, triton, triton_codecs, triton_lanes
from fasttrain.kernels.item import STORAGES, Item
from fasttrain.kernels.place import Place
from fasttrain.kernels.resident import Column, Resident, Tables
from fasttrain.kernels.ring import ring_of
from fasttrain.kernels.triton import compile_for, guard, wrapped
from fasttrain.kernels.triton_lanes import LANES, SUM_BLOCK
from fasttrain.rule import Rule

BLOCKS_INTERPRETED = 16
BRANCH = 512  # partial sums that are added at once; with 1,024, or on more warps, ptxas spills
OPTIONS = {"num_warps": 1, "maxnreg": 168, "enable_fp_fusion": False}  # of a norm's walk
ADDING = {"num_warps": 2, "enable_fp_fusion": False}
NOTHING = Rule("", (), lambda step: {}, lambda p, g, k: p)  # of items that are tensors to be walked


@cache
def kernels(interpreted: bool) -> dict[str, Any]:
    """`square` and `add_up`."""
    return wrapped([*triton_codecs.FUNCTIONS, *triton_lanes.FUNCTIONS, *triton_lanes.KERNELS], interpreted)


def blocks_of(storages: Sequence[int], interpreted: bool = False) -> int:
    """Blocks of 4,096 elements in a chunk: so many that a warp reads 16 bytes per thread of the narrowest operand."""
    return BLOCKS_INTERPRETED if interpreted else 8 if all(storage in (0, 1) for storage in storages) else 16


def elements_per_thread(storages: Sequence[int]) -> int:
    """Of each operand in a row of every block."""
    return blocks_of(storages) * LANES // 32


def together_in_norm(storage: int) -> int:
    """Rows that a thread reads at once: 16 bytes of each, eight or sixteen of them in flight.

    With sixteen of 16-bit elements, the ptxas of Triton 3.6 and 3.7 spills.
    """
    return 16 if storage == 0 else 8


def shape(blocks: int) -> dict[str, int]:
    """The constants of a walk over chunks of so many blocks."""
    return {"blocks": blocks, "size": blocks * LANES, "levels": (blocks * LANES).bit_length() - 1}


# --- Launches ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prepared:
    """Tables on the device: of each walk, and the segments of the sums. Live are rows, if there are any, and addresses.

    Attributes:
        parts: of each walk: what it is told, its blocks, its chunks, and the first of its partial sums.
        columns: of the addresses that move.
    """

    on_device: Resident
    parts: tuple[tuple[Any, int, int, int], ...]
    columns: tuple[Column, ...]
    partials: int

    @property
    def segments(self) -> Tensor:
        return self.on_device.view("fixed", len(self.parts), torch.int64).view(-1, 2)


kept: Tables[Prepared] = Tables()


def prepared(device: torch.device, about: tuple[Any, ...], moving: Callable[[Prepared], list[np.ndarray]],
             prepare: Callable[[Place], Prepared]) -> Prepared:
    """What is kept for such launches, with what moves, or made; in a capture it is made for the graph alone."""
    place = triton.place_of(device)
    with place.guard(), resident.making("the workspace of a norm", device):
        key, captured = (device, place.stream(), *about), place.capturing()
        made = None if captured else kept.get(key)
        if made is None:
            made = prepare(place)
        else:
            made.on_device.update(place, moving(made))
        if not captured:
            ring_of(place).spare(made.on_device.memory.nbytes)
            kept.keep(key, made, made.on_device.memory.nbytes)
    return made


def squares(flat: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `norm.squares`, of contiguous tensors: a launch for each dtype, and one for all. The host does not wait."""
    device, interpreted = flat[0].device, flat[0].device.type == "cpu"
    described = np.array([[tensor.data_ptr(), tensor.numel(), STORAGES[tensor.dtype]] for tensor in flat], np.int64)
    made = prepared(device, ("squares", described[:, 1:].tobytes()), lambda made: addresses(made, described[:, 0]),
                    lambda place: prepare_squares(place, flat, described))
    with guard(device):
        partials = torch.empty(max(made.partials, 1), 2, dtype=torch.float64, device=device)
        for index, (storage, blocks, chunks, first) in enumerate(made.parts):
            if chunks:
                kernels(interpreted)["square"][(chunks,)](
                    made.on_device.view("fixed", index, torch.int64), made.on_device.view("live", index, torch.int64),
                    partials[first:], storage=storage, **shape(blocks), together=together_in_norm(storage),
                    interpreted=interpreted, **({} if interpreted else OPTIONS))
        sums, bad = add_up(partials, made.segments, device)
    return sums, (bad != 0).any()


def addresses(made: Prepared, pointers: np.ndarray) -> list[np.ndarray]:
    """The columns of addresses that move."""
    return [column.addresses(pointers) for column in made.columns]


def prepare_squares(place: Place, flat: Sequence[Tensor], described: np.ndarray) -> Prepared:
    tables, parts, columns, begin = [], [], [], 0
    segments = np.zeros((len(flat), 2), np.int64)
    for storage in dict.fromkeys(described[:, 2].tolist()):
        members = np.flatnonzero(described[:, 2] == storage)
        items = [Item("", NOTHING, (flat[index],), (), None) for index in members.tolist()]
        blocks = blocks_of((storage,), flat[0].device.type == "cpu")
        own = table.describe(items, [0] * len(items))
        own[:, 0] = 0
        tables.append(table.build(items, blocks * SUM_BLOCK, own))
        chunks = -(-own[:, 1] // (blocks * SUM_BLOCK))
        columns.append(Column(np.repeat(members, chunks), tables[-1][:, 0].copy()))
        segments[members] = segments_of(own[:, 1], blocks * SUM_BLOCK, begin)
        parts.append((storage, blocks, len(tables[-1]), begin))
        begin += len(tables[-1])
    moving = [column.addresses(described[:, 0]) for column in columns]
    return Prepared(Resident(place, moving, [*tables, checked(segments)], apart=True), tuple(parts), tuple(columns),
                    begin)


def total(sums: Tensor) -> Tensor:
    """As `norm.total`: one launch."""
    segments = np.array([[0, len(sums)]], np.int64)
    made = prepared(sums.device, ("total", len(sums)), lambda made: [],
                    lambda place: Prepared(Resident(place, [], [checked(segments)], apart=True), (), (), 0))
    with guard(sums.device):
        return add_up(sums.contiguous().view(-1, 1), made.segments, sums.device)[0, 0]


# --- Ahead of time ----------------------------------------------------------------------------------------------------

def compile_ahead(name: str, storage: int, arch: int) -> Any:
    """Compile `square` for one storage, or `add_up`, for a GPU that need not be here."""
    function = kernels(False)[name]
    if name == "add_up":
        return compile_for(function, arch, ADDING, {"partials": "*fp64", "segments": "*i64", "sums": "*fp64"},
                           {"width": 2, "size": BRANCH, "levels": BRANCH.bit_length() - 1})
    values = {"storage": storage, "together": together_in_norm(storage), "interpreted": False}
    return compile_for(function, arch, OPTIONS, {"table": "*i64", "addresses": "*i64", "partials": "*fp64"},
                       values | shape(blocks_of((storage,))))


# --- The tree ---------------------------------------------------------------------------------------------------------

def segments_of(elements: np.ndarray, chunk: int, begin: int) -> np.ndarray:
    """The first partial sum of each tensor and how many it has, where the first of all is number `begin`.

    >>> segments_of(np.array([5, 0, 9]), 4, 10).tolist()
    [[10, 2], [12, 0], [12, 3]]
    """
    chunks = -(-elements // chunk)
    return np.stack([begin + np.cumsum(chunks) - chunks, chunks], axis=1)


def checked(segments: np.ndarray) -> np.ndarray:
    """The segments, if sums can be made of them.

    Raises:
        ValueError: a segment has more than BRANCH^2 rows, which takes a tensor of 2^33 elements.
    """
    if segments[:, 1].max(initial=0) > BRANCH * BRANCH:
        raise ValueError(f"a tensor has {segments[:, 1].max()} chunks, and sums are made of {BRANCH * BRANCH} at most: "
                         "split it")
    return segments


def add_up(partials: Tensor, segments: Tensor, device: torch.device, out: Tensor | None = None) -> Tensor:
    """The trees over segments of rows of partial sums: one launch; (width, segments), in `out` if it is given."""
    interpreted, width = device.type == "cpu", partials.shape[1]
    sums = torch.empty(width, len(segments), dtype=torch.float64, device=device) if out is None else out
    kernels(interpreted)["add_up"][(len(segments), width)](
        partials, segments, sums, width=width, size=BRANCH, levels=BRANCH.bit_length() - 1,
        **({} if interpreted else ADDING))
    return sums
