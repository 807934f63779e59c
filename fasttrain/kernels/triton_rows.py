"""Rows by index in Triton; `fasttrain.kernels.rows` says what is computed. A program for each row that is written.

Where the columns divide into aligned blocks of a power of two, a row is read and written in accesses of 16 bytes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasttrain.kernels import triton_codecs
from fasttrain.kernels.item import STORAGES
from fasttrain.kernels.triton import compile_for, guard, wrapped

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl

    from fasttrain.kernels.triton_codecs import load, store

LEAST, BLOCK, MOST = 256, 1024, 4096  # columns read at once: the least of whole blocks, of others, and the most
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
POINTERS = {0: "*fp32", 2: "*bf16", 3: "*fp16"}  # by storage


# --- Kernels ----------------------------------------------------------------------------------------------------------

def take_row(rows, origins, out, columns, choices, storage: tl.constexpr, whole: tl.constexpr, block: tl.constexpr,
             interpreted: tl.constexpr):
    """A slot: the row of its token."""
    slot = tl.program_id(0).to(tl.int64)
    origin = tl.load(origins + slot)
    at = row_of(rows, tl.where(origin < 0, 0, origin) // choices, columns, storage)
    to = row_of(out, slot, columns, storage)
    for begin in range(0, columns, block):
        x = part(at, begin, columns, storage, whole, block, interpreted)
        write(to, begin, columns, tl.where(origin < 0, 0.0, x), storage, whole, block, interpreted)


def combine_row(slots, places, weights, out, columns, choices: tl.constexpr, weighted: tl.constexpr,
                storage: tl.constexpr, whole: tl.constexpr, block: tl.constexpr, interpreted: tl.constexpr):
    """A token: the sum of its slots, in the order of choices."""
    token = tl.program_id(0).to(tl.int64)
    to = row_of(out, token, columns, storage)
    for begin in range(0, columns, block):
        total = tl.full((block,), 0.0, tl.float32)
        for choice in tl.static_range(choices):
            place = tl.load(places + token * choices + choice)
            at = row_of(slots, tl.where(place < 0, 0, place), columns, storage)
            x = tl.where(place < 0, 0.0, part(at, begin, columns, storage, whole, block, interpreted))
            if weighted:
                x = x * tl.load(weights + token * choices + choice)
            total += x
        write(to, begin, columns, total, storage, whole, block, interpreted)


def differentiate_row(grad, slots, origins, weights, by_slots, by_weights, columns, choices, storage: tl.constexpr,
                      whole: tl.constexpr, block: tl.constexpr, interpreted: tl.constexpr):
    """A slot: the derivative by it, and that by its weight."""
    slot = tl.program_id(0).to(tl.int64)
    origin = tl.load(origins + slot)
    there = tl.where(origin < 0, 0, origin)
    at, own = row_of(grad, there // choices, columns, storage), row_of(slots, slot, columns, storage)
    to = row_of(by_slots, slot, columns, storage)
    weight = tl.load(weights + there)
    product = tl.full((block,), 0.0, tl.float32)
    for begin in range(0, columns, block):
        g = tl.where(origin < 0, 0.0, part(at, begin, columns, storage, whole, block, interpreted))
        product += g * part(own, begin, columns, storage, whole, block, interpreted)
        write(to, begin, columns, tl.where(origin < 0, 0.0, g * weight), storage, whole, block, interpreted)
    tl.store(by_weights + there, tl.reduce(product, 0, tl.standard._sum_combine), mask=origin >= 0)


def row_of(tensor, row, columns, storage: tl.constexpr):
    """The address of a row."""
    return tensor.to(tl.int64) + row * columns * (4 if storage == 0 else 2)


def part(at, begin, columns, storage: tl.constexpr, whole: tl.constexpr, block: tl.constexpr,
         interpreted: tl.constexpr):
    """A block of a row, from column `begin`."""
    size: tl.constexpr = 4 if storage == 0 else 2
    offsets = tl.arange(0, block)
    x = load(at + begin * size, offsets, begin + offsets < columns, storage, False, whole, interpreted)
    return x if whole else tl.where(begin + offsets < columns, x, 0.0)


def write(to, begin, columns, x, storage: tl.constexpr, whole: tl.constexpr, block: tl.constexpr,
          interpreted: tl.constexpr):
    """Write a block of a row."""
    size: tl.constexpr = 4 if storage == 0 else 2
    offsets = tl.arange(0, block)
    store(to + begin * size, offsets, begin + offsets < columns, x, storage, whole, interpreted)


FUNCTIONS = (row_of, part, write, take_row, combine_row, differentiate_row)


# --- Launches ---------------------------------------------------------------------------------------------------------

@cache
def kernels(interpreted: bool) -> dict[str, Any]:
    """The functions by name, for the compiler or for the interpreter."""
    return wrapped([*triton_codecs.FUNCTIONS, *FUNCTIONS], interpreted)


def take(rows: Tensor, origins: Tensor, choices: int) -> Tensor:
    """As `fasttrain.kernels.rows.take`."""
    if len(rows) == 0:
        return rows.new_zeros(len(origins), rows.shape[1])
    out = rows.new_empty(len(origins), rows.shape[1])
    _start("take_row", out, rows, origins, out, rows.shape[1], choices)
    return out


def combine(slots: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """As `fasttrain.kernels.rows.combine`."""
    if len(slots) == 0:
        return slots.new_zeros(len(places), slots.shape[1])
    out = slots.new_empty(len(places), slots.shape[1])
    factors = slots if weights is None else weights.float().contiguous()  # not read where there are none
    _start("combine_row", out, slots, places.contiguous(), factors, out, slots.shape[1], choices=places.shape[1],
           weighted=weights is not None)
    return out


def differentiate(grad: Tensor, slots: Tensor, origins: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As `fasttrain.kernels.rows.differentiate`."""
    by_weights = torch.zeros(weights.shape, device=weights.device)  # of choices without a slot
    if len(grad) == 0:
        return torch.zeros_like(slots), by_weights
    by_slots = torch.empty_like(slots)
    _start("differentiate_row", slots, grad, slots, origins, weights.float().contiguous(), by_slots, by_weights,
           slots.shape[1], weights.shape[1])
    return by_slots, by_weights


def blocks(columns: int, itemsize: int, *addresses: int) -> tuple[bool, int]:
    """(whether rows are whole blocks, aligned; columns of a block).

    Example:
        >>> blocks(5120, 2, 64), blocks(1000, 2, 64), blocks(1024, 2, 66)
        ((True, 1024), (False, 1024), (False, 1024))
    """
    largest = min(columns & -columns, MOST)
    whole = largest >= LEAST and all(address % 16 == 0 for address in (columns * itemsize, *addresses))
    return whole, largest if whole else BLOCK


def _start(name: str, written: Tensor, *arguments: Any, **constants: Any) -> None:
    """A program for each row of `written`."""
    interpreted = written.device.type == "cpu"
    matrices = [a for a in arguments if isinstance(a, Tensor) and a.dtype == written.dtype and a.dim() == 2]
    whole, block = blocks(written.shape[1], written.itemsize, *(a.data_ptr() for a in matrices))
    if len(written) and written.shape[1]:
        with guard(written.device):
            kernels(interpreted)[name][(len(written),)](
                *arguments, **constants, storage=STORAGES[written.dtype], whole=whole, block=block,
                interpreted=interpreted, **({} if interpreted else OPTIONS))


def compile_ahead(name: str, storage: int, arch: int, whole: bool, choices: int = 2) -> Any:
    """Compile a kernel for a GPU that need not be here, for blocks of `BLOCK` columns."""
    function = kernels(interpreted=False)[name]
    matrix = POINTERS[storage]
    types = {"rows": matrix, "slots": matrix, "grad": matrix, "out": matrix, "by_slots": matrix, "origins": "*i64",
             "places": "*i64", "weights": "*fp32", "by_weights": "*fp32", "columns": "i32", "choices": "i32"}
    constants = {"storage": storage, "whole": whole, "block": BLOCK, "interpreted": False}
    if name == "combine_row":
        constants |= {"choices": choices, "weighted": True}
    types = {argument: types[argument] for argument in function.arg_names if argument not in constants}
    return compile_for(function, arch, OPTIONS, types, constants)
