"""Stages with sums in Triton (`fasttrain.kernels.stages`): a launch for each (rule, storages), and one for all sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import table
from fasttrain.kernels.item import STORAGES, Item, dense
from fasttrain.kernels.launches import chunked, live
from fasttrain.kernels.place import Place
from fasttrain.kernels.resident import Column, Resident
from fasttrain.kernels.triton import compile_for, compile_stage, count_up, guard, ready
from fasttrain.kernels.triton_lanes import SUM_BLOCK
from fasttrain.kernels.triton_sums import OPTIONS, Prepared, add_up, blocks_of, checked, prepared, segments_of, shape
from fasttrain.rule import Rule

STAGE_OPTIONS = {**OPTIONS, "maxnreg": 255}  # LAMB takes up to 221


def together_in_stage(storages: Sequence[int]) -> int:
    """The same, of every operand: 16 elements in float32, and 8 in float64, where registers are scarce."""
    return 4 if all(storage == 0 for storage in storages) else 2


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
    groups = [(kind, group, *table.rows(group)) for kind, group in table.grouped(items).items()]
    described = [table.describe(group, row_of) for _, group, _, row_of in groups]
    moving = [own[:, 1].copy() for own in described]
    for own in described:
        own[:, 1] = 0
    place = {id(item): index for index, item in enumerate(items)}
    order = [place[id(item)] for _, group, *_ in groups for item in group]
    rows = [own for _, _, own, _ in groups]
    kinds = ((kind, own.tobytes()) for (kind, *_), own in zip(groups, described, strict=True))
    about = ("stages", tuple(order), *kinds)

    def prepare(on: Place) -> Prepared:
        walks = [walk_of(kind, group, own) for (kind, group, *_), own in zip(groups, described, strict=True)]
        segments, begins = segments_of_walks(walks, order)
        fixed = [walk.chunks for walk in walks]
        columns = tuple(walk.column for walk in walks)
        parts = tuple((walk.storages, walk.blocks, len(walk.chunks), begin)
                      for walk, begin in zip(walks, begins, strict=True))
        return Prepared(Resident(on, live(rows, columns, moving), [*fixed, checked(segments)]), parts, columns,
                        sum(map(len, fixed)))

    made = prepared(device, about, lambda made: live(rows, made.columns, moving), prepare)
    with guard(device):
        partials = torch.empty(max(made.partials, 1), width, dtype=torch.float64, device=device)
        for index, ((kind, group, own, _), part) in enumerate(zip(groups, made.parts, strict=True)):
            storages, blocks, chunks, first = part
            begin_stage(kind.rule, storages, blocks, chunks, made.on_device.view("fixed", index, torch.int64),
                        made.on_device.view("live", index, group[0].dtype), own.shape[1],
                        made.on_device.view("live", len(groups) + index, torch.int64), None, partials[first:])
        count_up(items)
        return add_up(partials, made.segments, device)


@dataclass(frozen=True)
class Walk:
    """The chunks of items of one stage.

    Attributes:
        elements: of each item.
    """

    storages: tuple[int, ...]
    blocks: int
    chunks: np.ndarray
    column: Column
    elements: np.ndarray


def walk_of(kind: table.Kind, items: Sequence[Item], described: np.ndarray) -> Walk:
    """The walk over items, described without the addresses of their gradients."""
    storages = tuple(STORAGES[dtype] for dtype in kind.dtypes)
    blocks = blocks_of(storages, kind.device.type == "cpu")
    chunks, column = chunked(items, blocks * SUM_BLOCK, described)
    return Walk(storages, blocks, chunks, column, described[:, len(storages)])


def segments_of_walks(walks: Sequence[Walk], order: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Where the partial sums of each item lie, by its place in `order`; and the first of each walk."""
    segments, begins, begin, known = np.zeros((len(order), 2), np.int64), [], 0, 0
    for walk in walks:
        own = segments_of(walk.elements, walk.blocks * SUM_BLOCK, begin)
        segments[list(order[known : known + len(own)])] = own
        known += len(own)
        begins.append(begin)
        begin += len(walk.chunks)
    return segments, begins


def begin_stage(rule: Rule, storages: tuple[int, ...], blocks: int, chunks: int, table_of: Tensor, rows: Tensor,
                width: int, gradients: Tensor, skip: Tensor | None, partials: Tensor) -> None:
    """Start the kernel of a stage with sums, over a table of chunks on the device."""
    interpreted = rows.device.type == "cpu"
    if chunks:
        compile_stage(rule, interpreted, together_in_stage(storages))[(chunks,)](
            table_of, rows, width, gradients, skip, partials, *storages, wide=rows.dtype == torch.float64,
            **shape(blocks), interpreted=interpreted, **({} if interpreted else STAGE_OPTIONS))


def compile_stage_ahead(rule: Rule, storages: tuple[int, ...], arch: int) -> Any:
    """Compile a stage with sums; the storages are of p, g and the states."""
    function, wide = compile_stage(rule, False, together_in_stage(storages)), storages[0] == 1
    stated = [name for name in function.arg_names if name.endswith("_storage")]
    types = {"table": "*i64", "rows": "*fp64" if wide else "*fp32", "width": "i32", "gradients": "*i64",
             "partials": "*fp64"}
    values = {**dict(zip(stated, storages, strict=True)), "wide": wide, "skip": None, "interpreted": False}
    return compile_for(function, arch, STAGE_OPTIONS, types, values | shape(blocks_of(storages)))
