"""The chunk table and the rows of items that are not plain (`fasttrain.kernels.table` is that of plain ones).

=================  ===================================================================================================
columns            meaning
=================  ===================================================================================================
0 ... streams - 1  addresses of the chunk's first element in the first arrays: p, g, the rule's states, the EMA
next               the same of the second arrays, of those operands that have one
next               elements in the chunk
next               the chunk's row in the table of rows
next               bit 0: every array is aligned to 16 bytes (units of blocks aside); bit 1: the gradient is zeroed
four more          where the chunk lies in the full parameter, if something is rounded at random: `origin`, `lead`,
                   `run`, `gap`; element i is number origin + i + (lead + i) // run * gap
=================  ===================================================================================================

A chunk starts at a multiple of 512 elements, so that it holds whole blocks, and whole bytes of 4-bit codes. All that
changes from step to step is in the rows: scale, coefficients, clip, keep, add, and then, for each operand that is
rounded at random, the lower and the upper half of its key, as the bits of two fp32 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fasttrain.kernels import table
from fasttrain.kernels.item import Item
from fasttrain.kernels.table import ALIGNED
from fasttrain.precision.codecs import NUMBER, PLAIN, STOCHASTIC, codec
from fasttrain.precision.draws import WORD, operand_key

WHOLE = 512  # elements: two blocks of 256, and 4-bit codes of 256 bytes
FAR = 1 << 30  # no chunk is longer


def random_operands(codecs: Sequence[int]) -> list[int]:
    """The operands that are rounded at random."""
    return [operand for operand, number in enumerate(codecs) if number & STOCHASTIC]


def extra_operands(codecs: Sequence[int]) -> list[int]:
    """The operands that have a second array."""
    return [operand for operand, number in enumerate(codecs) if codec(number).extra is not None]


def columns(codecs: Sequence[int]) -> int:
    """Columns of the table."""
    return len(codecs) + len(extra_operands(codecs)) + 3 + (4 if random_operands(codecs) else 0)


def rows(items: Sequence[Item]) -> tuple[np.ndarray, list[int]]:
    """The distinct rows of items of one rule and storage, in the type that they are computed in, and each item's row.

    Raises:
        ValueError: float64 items are kept as something else than what torch has.

    Example:
        >>> import torch
        >>> from fasttrain.optim import SGD
        >>> p, g = torch.ones(2).bfloat16(), torch.ones(2)
        >>> row = (1.0, 0.5, float("inf"), 1.0, 0.0)
        >>> one, two = (Item("w", SGD.rules[0], (p, g), row, None, (34, 0), (None, None), key=key) for key in (1, 2))
        >>> made, row_of = rows([one, two, one])
        >>> made.shape, row_of
        ((2, 7), [0, 1, 0])
    """
    made, row_of = table.rows(items)
    check_wide(items[0])
    if items[0].dtype == torch.float64:
        return made, row_of
    random = random_operands(items[0].codecs)
    if not random:
        return made, row_of
    keys, key_of = np.unique(np.array([item.key for item in items], np.uint64), return_inverse=True)
    pairs, pair_of = np.unique(np.stack([np.array(row_of), key_of.reshape(-1)], 1), axis=0, return_inverse=True)
    return np.concatenate([made[pairs[:, 0]], words_of(keys, random)[pairs[:, 1]]], 1), pair_of.reshape(-1).tolist()


def words_of(keys: np.ndarray, random: Sequence[int]) -> np.ndarray:
    """What rows have for each operand that is rounded at random, by keys of parameters, uint64."""
    own = np.stack([operand_key(keys, operand) for operand in random], 1)
    return np.stack([own & WORD, own >> 32], 2).astype(np.uint32).reshape(len(keys), -1).view(np.float32)


def check_wide(item: Item) -> None:
    """Raise if a float64 item is kept as something else than what torch has."""
    if item.dtype == torch.float64 and not all(number in PLAIN.values() for number in item.codecs):
        raise ValueError(f"{item.name} is float64 and computed so, but an operand of it is kept with codec "
                         f"{max(item.codecs)}, which holds no float64: keep its states and EMA unrounded")


def describe(items: Sequence[Item], row_of: Sequence[int]) -> np.ndarray:
    """What the table is made from, one row for each item: the table of two lists of items is the same if this and
    their codecs are. Addresses, elements, row, whether the gradient is zeroed, place.
    """
    extras = extra_operands(items[0].codecs)
    return np.array([[*(tensor.data_ptr() for tensor in item.tensors), *(_address(item, operand) for operand in extras),
                      item.tensors[0].numel(), row, item.zero, *item.place]
                     for item, row in zip(items, row_of, strict=True)], np.int64)


def _address(item: Item, operand: int) -> int:
    extra = item.extras[operand]
    assert extra is not None
    return extra.data_ptr()


def build(items: Sequence[Item], chunk: int, described: np.ndarray) -> np.ndarray:
    """The table of items that are flat, of one rule and of the same codecs (`fasttrain.kernels.table.grouped`).

    Arguments:
        items: what is stepped; an item without elements has no chunk.
        chunk: elements of one chunk at most; a multiple of 512, at most 2^30.
        described: `describe(items, ...)`.

    Returns:
        An int64 array of shape (chunks, columns).

    Raises:
        ValueError: `chunk` is not such a number.
    """
    if not 0 < chunk <= FAR or chunk % WHOLE:
        raise ValueError(f"chunk is {chunk}: give a positive multiple of {WHOLE} up to 2^30")
    codecs = items[0].codecs
    arrays = [_stretch(number, first=True) for number in codecs]
    arrays += [_stretch(codecs[operand], first=False) for operand in extra_operands(codecs)]
    sizes, shared = np.array(arrays, np.int64).T
    count = len(arrays)
    elements, row, zero, first, run, pitch = described[:, count:].T

    chunks = -(-elements // chunk)
    item_of = np.repeat(np.arange(len(items)), chunks)
    begin = (np.arange(len(item_of)) - (np.cumsum(chunks) - chunks)[item_of]) * chunk
    built = np.empty((len(item_of), columns(codecs)), np.int64)
    built[:, :count] = described[item_of, :count] + begin[:, None] // shared * sizes
    built[:, count] = np.minimum(elements[item_of] - begin, chunk)
    built[:, count + 1] = row[item_of]
    wide = [index for index in range(count) if shared[index] <= 2]
    built[:, count + 2] = (built[:, wide] % ALIGNED == 0).all(axis=1) + 2 * zero[item_of]
    if random_operands(codecs):
        built[:, count + 3 :] = np.stack(places(begin, first[item_of], run[item_of], pitch[item_of]), 1)
    return built


def _stretch(number: int, first: bool) -> tuple[int, int]:
    """Bytes of an element of an array, and how many elements of the operand share it."""
    kept = codec(number)
    if first:
        return kept.main.itemsize, 2 if number & 15 == NUMBER["int4"] else 1
    assert kept.extra is not None
    return kept.extra.itemsize, max(kept.block, 1)


def places(begin: np.ndarray, first: np.ndarray, run: np.ndarray, pitch: np.ndarray) -> tuple[np.ndarray, ...]:
    """origin, lead, run and gap of chunks; run and lead below 2^31, whatever the run of the shard is."""
    endless = run == 0
    past = np.where(endless, 0, begin % np.maximum(run, 1))
    origin = first + np.where(endless, begin, begin // np.maximum(run, 1) * pitch + past)
    left = np.where(endless, FAR, np.minimum(run - past, FAR))
    shown = np.where(endless, FAR, np.minimum(run, FAR))
    return origin, shown - left, shown, np.where(endless, 0, pitch - run)
