"""Norms and stages with sums in Triton, two launches each: a partial sum of each chunk, then the tree over them.

The sums have the bits of `fasttrain.kernels.norm`, whatever the grid, and stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import table, triton_codecs, triton_lanes
from fasttrain.kernels.item import STORAGES, Item, dense
from fasttrain.kernels.triton import compile_for, compile_stage, count_up, guard, ready, upload, wrapped
from fasttrain.kernels.triton_lanes import LANES, SUM_BLOCK
from fasttrain.rule import Rule

BLOCKS_INTERPRETED = 16
BRANCH = 512  # partial sums that are added at once; with 1,024, or on more warps, ptxas spills
OPTIONS = {"num_warps": 1, "maxnreg": 168, "enable_fp_fusion": False}  # of a norm's walk
STAGE_OPTIONS = {**OPTIONS, "maxnreg": 255}  # LAMB takes up to 221
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


def together_in_stage(storages: Sequence[int]) -> int:
    """The same, of every operand: 16 elements in float32, and 8 in float64, where registers are scarce."""
    return 4 if all(storage == 0 for storage in storages) else 2


def shape(blocks: int) -> dict[str, int]:
    """The constants of a walk over chunks of so many blocks."""
    return {"blocks": blocks, "size": blocks * LANES, "levels": (blocks * LANES).bit_length() - 1}


# --- Launches ---------------------------------------------------------------------------------------------------------

def squares(flat: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `norm.squares`, of contiguous tensors: a launch for each dtype, and one for all. The host does not wait."""
    device, interpreted = flat[0].device, flat[0].device.type == "cpu"
    kinds: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(flat):
        kinds.setdefault(tensor.dtype, []).append(index)
    tables, segments, begin = [], np.zeros((len(flat), 2), np.int64), 0
    for dtype, members in kinds.items():
        items = [Item("", NOTHING, (flat[index],), (), None) for index in members]
        blocks = blocks_of((STORAGES[dtype],), interpreted)
        described = table.describe(items, [0] * len(items))
        tables.append((dtype, blocks, table.build(items, blocks * SUM_BLOCK, described), begin))
        segments[members] = segments_of(described[:, 1], blocks * SUM_BLOCK, begin)
        begin += len(tables[-1][2])
    with guard(device):
        partials = torch.empty(max(begin, 1), 2, dtype=torch.float64, device=device)
        for dtype, blocks, chunks, first in tables:
            if len(chunks):
                storage = STORAGES[dtype]
                kernels(interpreted)["square"][(len(chunks),)](
                    upload(chunks, device), partials[first:], storage=storage, **shape(blocks),
                    together=together_in_norm(storage), interpreted=interpreted, **({} if interpreted else OPTIONS))
        sums, bad = add_up(partials, segments, device)
    return sums, (bad != 0).any()


def total(sums: Tensor) -> Tensor:
    """As `norm.total`: one launch."""
    with guard(sums.device):
        return add_up(sums.contiguous().view(-1, 1), np.array([[0, len(sums)]], np.int64), sums.device)[0, 0]


def measure(items: Sequence[Item]) -> Tensor:
    """Step the items of one device, whose rules have as many sums; their sums, (items, sums), on the device.

    One launch for each (rule, storages), and one for all sums.
    """
    device, width = items[0].tensors[0].device, len(items[0].rule.sums or ())
    with dense(items) as walkable:
        if width:
            sums = _walk(walkable, device, width)
        else:
            sums = torch.empty(0, len(items), dtype=torch.float64)
            for kind, group in table.grouped(walkable).items():
                ready(kind.device, [(kind, group)])()
            count_up(walkable)
        torch.autograd.graph.increment_version([tensor for item in walkable for tensor in item.written])
    return sums.T


def _walk(items: Sequence[Item], device: torch.device, width: int) -> Tensor:
    interpreted = device.type == "cpu"
    place = {id(item): index for index, item in enumerate(items)}
    plans, segments, begin = [], np.zeros((len(items), 2), np.int64), 0
    for kind, group in table.grouped(items).items():
        storages = tuple(STORAGES[dtype] for dtype in kind.dtypes)
        blocks = blocks_of(storages, interpreted)
        rows, row_of = table.rows(group)
        described = table.describe(group, row_of)
        chunks = table.build(group, blocks * SUM_BLOCK, described)
        plans.append((kind.rule, storages, blocks, rows, chunks, begin, group))
        segments[[place[id(item)] for item in group]] = segments_of(described[:, len(storages)], blocks * SUM_BLOCK,
                                                                    begin)
        begin += len(chunks)
    with guard(device):
        partials = torch.empty(max(begin, 1), width, dtype=torch.float64, device=device)
        for rule, storages, blocks, rows, chunks, first, group in plans:
            if len(chunks):
                compile_stage(rule, interpreted, together_in_stage(storages))[(len(chunks),)](
                    upload(chunks, device), upload(rows, device), rows.shape[1], partials[first:], *storages,
                    wide=group[0].dtype == torch.float64, **shape(blocks), interpreted=interpreted,
                    **({} if interpreted else STAGE_OPTIONS))
            count_up(group)
        return add_up(partials, segments, device)


# --- Ahead of time ----------------------------------------------------------------------------------------------------

def compile_ahead(name: str, storage: int, arch: int) -> Any:
    """Compile `square` for one storage, or `add_up`, for a GPU that need not be here."""
    function = kernels(False)[name]
    if name == "add_up":
        return compile_for(function, arch, ADDING, {"partials": "*fp64", "segments": "*i64", "sums": "*fp64"},
                           {"width": 2, "size": BRANCH, "levels": BRANCH.bit_length() - 1})
    values = {"storage": storage, "together": together_in_norm(storage), "interpreted": False}
    return compile_for(function, arch, OPTIONS, {"table": "*i64", "partials": "*fp64"},
                       values | shape(blocks_of((storage,))))


def compile_stage_ahead(rule: Rule, storages: tuple[int, ...], arch: int) -> Any:
    """Compile a stage with sums; the storages are of p, g and the states."""
    function, wide = compile_stage(rule, False, together_in_stage(storages)), storages[0] == 1
    stated = [name for name in function.arg_names if name.endswith("_storage")]
    types = {"table": "*i64", "rows": "*fp64" if wide else "*fp32", "width": "i32", "partials": "*fp64"}
    return compile_for(function, arch, STAGE_OPTIONS, types, {**dict(zip(stated, storages, strict=True)), "wide": wide,
                                                        "interpreted": False} | shape(blocks_of(storages)))


# --- The tree ---------------------------------------------------------------------------------------------------------

def segments_of(elements: np.ndarray, chunk: int, begin: int) -> np.ndarray:
    """The first partial sum of each tensor and how many it has, where the first of all is number `begin`.

    >>> segments_of(np.array([5, 0, 9]), 4, 10).tolist()
    [[10, 2], [12, 0], [12, 3]]
    """
    chunks = -(-elements // chunk)
    return np.stack([begin + np.cumsum(chunks) - chunks, chunks], axis=1)


def add_up(partials: Tensor, segments: np.ndarray, device: torch.device) -> Tensor:
    """The trees over segments of rows of partial sums: one launch; (width, segments).

    Raises:
        ValueError: a segment has more than BRANCH^2 rows, which takes a tensor of 2^33 elements.
    """
    if segments[:, 1].max(initial=0) > BRANCH * BRANCH:
        raise ValueError(f"a tensor has {segments[:, 1].max()} chunks, and sums are made of {BRANCH * BRANCH} at most: "
                         "split it")
    interpreted, width = device.type == "cpu", partials.shape[1]
    sums = torch.empty(width, len(segments), dtype=torch.float64, device=device)
    kernels(interpreted)["add_up"][(len(segments), width)](
        partials, upload(segments, device), sums, width=width, size=BRANCH, levels=BRANCH.bit_length() - 1,
        **({} if interpreted else ADDING))
    return sums
