"""Cross-entropy in Triton; `fasttrain.kernels.cross_entropy` says what is computed. A program for each row.

Forward every lane keeps the largest logit that it has met and its own sum of exponentials, one of them for an element:
``exp(-|x - m|)`` rescales the sum if x is the larger, and else is added to it. Lanes meet once, at the end of the row.
Rows need not be aligned: a row of an odd number of 16-bit logits is read up to the first aligned address, then 16 bytes
at a time, then what is left.

The kernels are plain functions, wrapped like those of `fasttrain.kernels.triton_codecs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fasttrain.kernels import triton_codecs
from fasttrain.kernels.cross_entropy import PARTS, Measured, Terms, indices_of, only, rows_of
from fasttrain.kernels.item import STORAGES
from fasttrain.kernels.triton import compile_for, guard, wrapped

if TYPE_CHECKING:  # bound when the functions are wrapped
    import triton.language as tl

    from fasttrain.kernels.triton_codecs import load, store

BLOCK, BLOCK_INTERPRETED = 2048, 1024  # logits that a program reads at once: 16 for a thread
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
POINTERS = {0: "*fp32", 2: "*bf16", 3: "*fp16"}  # by storage


# --- Kernels ----------------------------------------------------------------------------------------------------------

def measure_row(logits, targets, parts, losses, zs, rows, columns, outer, inner, first, vocabulary, ignore, smoothing,
                z_loss, storage: tl.constexpr, smooth: tl.constexpr, finish: tl.constexpr, block: tl.constexpr,
                interpreted: tl.constexpr):
    """The parts of a row, and, with `finish`, its loss and its z term."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    to = parts + row * 5
    if target == ignore:
        tl.store(to, 0.0)
        tl.store(to + 1, 1.0)
        tl.store(to + 2, 0.0)
        tl.store(to + 3, 0.0)
        tl.store(to + 4, 0.0)
        if finish:
            tl.store(losses + row, 0.0)
            tl.store(zs + row, 0.0)
    else:
        at = address_of(logits, row, rows, outer, inner, storage)
        offsets = tl.arange(0, block)
        base = near(load(at, 0, columns > 0, storage, False, False, interpreted), smooth)
        most = tl.full((block,), -3.4028234663852886e38, tl.float32)  # finite: differences to it are
        total = tl.full((block,), 0.0, tl.float32)
        shifted = tl.full((block,), 0.0, tl.float32)
        lead = lead_of(at, columns, storage)
        if lead > 0:
            most, total, shifted = add(most, total, shifted, at, offsets, lead, base, storage, smooth, block, False,
                                       interpreted)
        count = (columns - lead) // block
        size: tl.constexpr = 4 if storage == 0 else 2
        at_aligned = at + lead * size
        for _ in range(count):
            most, total, shifted = add(most, total, shifted, at_aligned, offsets, block, base, storage, smooth, block,
                                       True, interpreted)
            at_aligned += block * size
        rest = columns - lead - count * block
        if rest > 0:
            most, total, shifted = add(most, total, shifted, at_aligned, offsets, rest, base, storage, smooth, block,
                                       False, interpreted)
        largest = tl.reduce(most, 0, tl.standard._elementwise_max)
        whole = tl.reduce(total * exponential(most - largest), 0, tl.standard._sum_combine)
        largest = tl.where(whole == 0.0, float("-inf"), largest)  # no logit but -inf
        here = target - first
        inside = (here >= 0) & (here < columns)
        own = load(at + here * size, 0, inside, storage, False, False, interpreted)
        own = tl.where(inside, own, float("nan"))
        beyond = tl.where(whole == 0.0, 0.0, largest)
        gone = tl.reduce(shifted, 0, tl.standard._sum_combine)
        if smooth:
            gone += columns * (base - beyond)
        tl.store(to, largest)
        tl.store(to + 1, whole)
        tl.store(to + 2, own)
        tl.store(to + 3, gone)
        tl.store(to + 4, columns * 1.0)
        if finish:
            tail = tl.log(whole)
            loss = (largest - own) + tail
            if smooth:
                loss = (1.0 - smoothing) * loss + smoothing * (tail - gone / columns)
            tl.store(losses + row, loss)
            tl.store(zs + row, z_loss * (largest + tail) * (largest + tail))


def add(most, total, shifted, at, offsets, count, base, storage: tl.constexpr, smooth: tl.constexpr,
        block: tl.constexpr, whole: tl.constexpr, interpreted: tl.constexpr):
    """Add `count` logits to the lanes; `whole`: all of a block, aligned."""
    inside = offsets < count
    x = load(at, offsets, inside, storage, False, whole, interpreted)
    if not whole:
        x = tl.where(inside, x, float("-inf"))
    e = exponential(-tl.abs(x - most))
    larger = x > most
    if smooth:
        shifted += x - base if whole else tl.where(inside, x - base, 0.0)
    return tl.where(larger, x, most), tl.where(larger, total * e + 1.0, total + e), shifted


def differentiate_row(logits, targets, parts, scales, out, rows, columns, outer, inner, out_rows, out_outer, out_inner,
                      first, vocabulary, ignore, smoothing, z_loss, one: tl.constexpr, storage: tl.constexpr,
                      block: tl.constexpr, interpreted: tl.constexpr):
    """The derivative by a row of logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    ignored = target == ignore
    scale = tl.load(scales) if one else tl.load(scales + row)
    scale = tl.where((target < 0) | (target >= vocabulary), float("nan"), scale)
    most, total = tl.load(parts + row * 5), tl.load(parts + row * 5 + 1)
    each = tl.div_rn(scale * (1.0 + 2.0 * z_loss * (most + tl.log(total))), total)
    offset = scale * smoothing / vocabulary
    own = scale * (1.0 - smoothing)
    here = target - first
    at = address_of(logits, row, rows, outer, inner, storage)
    to = address_of(out, row, out_rows, out_outer, out_inner, storage)
    offsets = tl.arange(0, block)
    lead = lead_of(at, columns, storage)
    if lead > 0:
        write(at, to, offsets, lead, here, most, each, offset, own, ignored, storage, False, False, interpreted)
    size: tl.constexpr = 4 if storage == 0 else 2
    count = (columns - lead) // block
    begin = lead
    if (to + lead * size) % 16 == 0:
        for _ in range(count):
            write(at + begin * size, to + begin * size, offsets, block, here - begin, most, each, offset, own, ignored,
                  storage, True, True, interpreted)
            begin += block
    else:
        for _ in range(count):
            write(at + begin * size, to + begin * size, offsets, block, here - begin, most, each, offset, own, ignored,
                  storage, True, False, interpreted)
            begin += block
    rest = columns - begin
    if rest > 0:
        write(at + begin * size, to + begin * size, offsets, rest, here - begin, most, each, offset, own, ignored,
              storage, False, False, interpreted)


def write(at, to, offsets, count, here, most, each, offset, own, ignored, storage: tl.constexpr, whole: tl.constexpr,
          stored_whole: tl.constexpr, interpreted: tl.constexpr):
    """The derivative by `count` logits; `here`: the place of the target among them, if it is one of them."""
    inside = offsets < count
    x = load(at, offsets, inside, storage, False, whole, interpreted)
    y = exponential(x - most) * each - offset
    y = tl.where(offsets == here, y - own, y)
    y = tl.where(ignored, 0.0, y)
    store(to, offsets, inside, y, storage, stored_whole, interpreted)


def exponential(x):
    """By the hardware's power of two, for x <= 0."""
    return tl.exp2(x * 1.4426950408889634)


def near(x, smooth: tl.constexpr):
    """What logits are measured from while their largest is not known: the first of them, if it is finite."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0) if smooth else 0.0


def address_of(tensor, row, rows, outer, inner, storage: tl.constexpr):
    """Of a row's first element."""
    return tensor.to(tl.int64) + (row // rows * outer + row % rows * inner) * (4 if storage == 0 else 2)


def lead_of(at, columns, storage: tl.constexpr):
    """How many elements lie before the first one at a multiple of 16 bytes."""
    return tl.minimum((16 - at % 16) % 16 // (4 if storage == 0 else 2), columns)


FUNCTIONS = (exponential, near, address_of, lead_of, add, write, measure_row, differentiate_row)


# --- Launches ---------------------------------------------------------------------------------------------------------

@cache
def kernels(interpreted: bool) -> dict[str, Any]:
    """The functions by name, for the compiler or for the interpreter."""
    return wrapped([*triton_codecs.FUNCTIONS, *FUNCTIONS], interpreted)


def measure(logits: Tensor, targets: Tensor, terms: Terms, whole: bool) -> Measured:
    """As `fasttrain.kernels.cross_entropy.measure`; what is counted is counted by torch, on the device."""
    x, classes = rows_of(logits), indices_of(targets)
    rows = len(classes)
    parts = torch.empty(rows, PARTS, device=x.device)
    losses, z = torch.empty(2, rows if whole else 0, device=x.device)
    if rows:
        _start("measure_row", x, classes, parts, losses, z, x.shape[1], x.shape[2], *x.stride()[:2], *terms,
               storage=STORAGES[x.dtype], smooth=terms.label_smoothing != 0, finish=whole)
    if not whole:
        return only(parts)
    counted = classes != terms.ignore_index
    return Measured(parts, losses, z, losses.double().sum() + z.double().sum(), counted.sum(),
                    (counted & (parts[:, 0] == parts[:, 2])).sum())


def differentiate(logits: Tensor, targets: Tensor, terms: Terms, parts: Tensor, scales: Tensor, out: Tensor) -> None:
    """As `fasttrain.kernels.cross_entropy.differentiate`."""
    x, classes, to = rows_of(logits), indices_of(targets), rows_of(out)
    if len(classes):
        _start("differentiate_row", x, classes, parts, scales, to, x.shape[1], x.shape[2], *x.stride()[:2], to.shape[1],
               *to.stride()[:2], *terms, one=len(scales) == 1, storage=STORAGES[x.dtype])


def _start(name: str, logits: Tensor, classes: Tensor, *arguments: Any, **constants: Any) -> None:
    interpreted = logits.device.type == "cpu"
    options = {} if interpreted else OPTIONS
    with guard(logits.device):
        kernels(interpreted)[name][(len(classes),)](
            logits, classes, *arguments, **constants, block=BLOCK_INTERPRETED if interpreted else BLOCK,
            interpreted=interpreted, **options)


def compile_ahead(name: str, storage: int, arch: int, smooth: bool = False, ones: Sequence[str] = (),
                  finish: bool = True) -> Any:
    """Compile `measure_row` or `differentiate_row` for a GPU that need not be here.

    Arguments:
        ones: the integers that are 1, for which Triton compiles a version of its own.
        finish: measure whole rows; else the columns of some classes.
    """
    function = kernels(interpreted=False)[name]
    numbers = {"smoothing": "fp32", "z_loss": "fp32", "first": "i32", "vocabulary": "i32", "ignore": "i32"}
    pointers = {"logits": POINTERS[storage], "out": POINTERS[storage], "targets": "*i64", "parts": "*fp32",
                "losses": "*fp32", "zs": "*fp32", "scales": "*fp32"}
    constants = {"storage": storage, "smooth": smooth, "finish": finish, "one": True, "block": BLOCK,
                 "interpreted": False}
    constants |= dict.fromkeys(ones, 1)
    types = {argument: (pointers | numbers).get(argument, "i32") for argument in function.arg_names
             if argument not in constants}
    return compile_for(function, arch, OPTIONS, types,
                       {key: value for key, value in constants.items() if key in function.arg_names})
