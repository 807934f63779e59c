"""An interval of what is held of a tensor that is cut anyhow, as boxes of the whole: against numpy's own numbering."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.checkpoint.intervals import interval
from fasttrain.checkpoint.parts import Among, Part, mine
from fasttrain.checkpoint.regions import Region, overlap

SHAPES = st.lists(st.integers(1, 7), max_size=4).map(tuple)


@st.composite
def helds(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], tuple[int, ...]]:
    """A shape, the indices of each dimension that are held, and an order of the dimensions in memory.

    Indices are those of any cuts one after the other, as `fully_shard` over tensor parallelism makes them.
    """
    shape = draw(SHAPES)
    index = [draw(st.lists(st.integers(0, size - 1), unique=True).map(sorted)) for size in shape]
    return shape, index, tuple(draw(st.permutations(range(len(shape)))))


@given(helds(), st.data())
def test_an_interval_is_its_elements_wherever_they_lie(held: tuple, data: st.DataObject) -> None:
    shape, index, order = held
    numbers = np.arange(math.prod(shape)).reshape(shape)
    mine = numbers[np.ix_(*index)] if shape else numbers
    flat = np.transpose(mine, order).reshape(-1)  # as the elements follow one another in memory
    first = data.draw(st.integers(0, flat.size))
    length = data.draw(st.integers(0, flat.size - first))
    local = torch.from_numpy(np.array(np.transpose(mine, order), order="C")).permute(np.argsort(order).tolist())
    assert local.shape == mine.shape
    some = torch.from_numpy(flat[first : first + length].copy())
    parts = interval("t", some, local, first, shape, [torch.tensor(one, dtype=torch.int64) for one in index])
    found = []
    for part in parts:
        assert part.region.shape == shape
        (lower, extent), = [box for _, box in part.region.blocks()]
        there = numbers[tuple(slice(low, low + size) for low, size in zip(lower, extent, strict=True))]
        assert part.memory.shape == there.shape
        assert (part.memory.numpy() == there).all(), "each element lies where its number says"
        found += there.reshape(-1).tolist()
    assert sorted(found) == sorted(flat[first : first + length].tolist())
    assert not overlap([box for part in parts for _, box in part.region.blocks()])
    storage = some.untyped_storage().data_ptr()
    assert all(part.memory.untyped_storage().data_ptr() == storage for part in parts if part.memory.numel())


@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([0, 1]), st.data())
def test_boxes_and_intervals_are_divided_among_those_who_hold_them(count: int, rows: int, dim: int,
                                                                  data: st.DataObject) -> None:
    """Large ones by rows, small ones as they are; all that hold the same take every element once."""
    shape = (rows + 3, 900) if dim == 0 else (900, rows + 3)
    low = data.draw(st.integers(0, 3))
    box = ((low, 0), (rows, 900)) if dim == 0 else ((0, low), (900, rows))
    first = data.draw(st.integers(0, 3 * 900))
    taken = []
    for index in range(count):
        among = Among(index, count)
        parts = [Part("a", torch.empty(5), Region((5,)), among),
                 Part("box", torch.empty(box[1], dtype=torch.float64), Region(shape, box=box), among),
                 Part("span", torch.empty(rows * 900, dtype=torch.float64), Region(shape, span=(first, rows * 900)),
                      among)]
        own = mine(parts)
        assert all(part.memory.numel() == part.region.elements for part in own)
        taken.append(own)
    everything = [part for own in taken for part in own]
    for part in parts:
        pieces = [one.region for one in everything if one.name == part.name]
        assert sum(piece.elements for piece in pieces) == part.region.elements
        blocks = list(itertools.chain.from_iterable(piece.blocks() for piece in pieces))
        assert not overlap([block for _, block in blocks if math.prod(block[1])])
    sizes = [sum(part.nbytes for part in own) for own in taken]
    assert max(sizes) - min(sizes) <= 2 * (1 << 16) + 2 * 900 * 8
