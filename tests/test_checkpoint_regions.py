"""Spans and boxes: what parts of a tensor are, and what is read of parts of any other kind."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.checkpoint import Incomplete, Malformed, Piece, Reader, publish, write_rank
from fasttrain.checkpoint.regions import Region, intersection, overlap, tiling

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    if draw(st.booleans()):
        first = draw(st.integers(0, math.prod(shape)))
        return Region(shape, span=(first, draw(st.integers(0, math.prod(shape) - first))))
    lower = tuple(draw(st.integers(0, size)) for size in shape)
    return Region(shape, box=(lower, tuple(draw(st.integers(0, size - low)) for low, size in zip(lower, shape,
                                                                                                  strict=True))))


def elements(region: Region) -> list[int]:
    """Row-major numbers of its elements, in order: by numpy alone."""
    whole = np.arange(math.prod(region.shape)).reshape(region.shape)
    if region.span is not None:
        return whole.reshape(-1)[region.span[0] : sum(region.span)].tolist()
    if region.box is not None:
        return whole[tuple(slice(low, low + size) for low, size in zip(*region.box, strict=True))].reshape(-1).tolist()
    return whole.reshape(-1).tolist()


@given(SHAPES.flatmap(regions))
def test_blocks_are_the_elements_in_order(region: Region) -> None:
    found: list[int] = []
    for at, box in region.blocks():
        assert at == len(found)
        found += elements(Region(region.shape, box=box))
    assert found == elements(region)
    assert region.elements == len(found) == math.prod(region.extent)


@given(SHAPES.flatmap(lambda shape: st.lists(regions(shape), min_size=1, max_size=4)))
def test_overlap_and_tiling(parts: list[Region]) -> None:
    held = [element for part in parts for element in elements(part)]
    words = tiling(parts)
    if len(set(held)) < len(held):
        assert words == "its parts overlap"
    else:
        assert (words is None) == (len(held) == math.prod(parts[0].shape))
    boxes = [box for part in parts for _, box in part.blocks() if math.prod(box[1])]
    assert overlap(boxes) == (len(set(held)) < len(held))


@given(SHAPES.flatmap(lambda shape: st.tuples(regions(shape), regions(shape))))
def test_intersection(two: tuple[Region, Region]) -> None:
    for _, one in two[0].blocks():
        for _, other in two[1].blocks():
            shared = intersection(one, other)
            both = set(elements(Region(two[0].shape, box=one))) & set(elements(Region(two[0].shape, box=other)))
            assert both == (set(elements(Region(two[0].shape, box=shared))) if shared else set())


@pytest.mark.parametrize("wrong,words", [
    (dict(span=(3, 10)), "span .* runs past the 12 elements"), (dict(span=(-1, 2)), "2 non-negative integers"),
    (dict(span=(1,)), "2 non-negative integers"), (dict(span=(True, 1)), "non-negative integers"),
    (dict(box=((0, 0), (4, 4))), "runs out of shape"), (dict(box=((0,), (1,))), "2 non-negative integers"),
    (dict(box=(1, 2, 3)), "lower corner, extent"), (dict(span=(0, 1), box=((0, 0), (1, 1))), "both a span and a box"),
])
def test_what_is_no_part(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Region((4, 3), **wrong)


def cut(shape: tuple[int, ...], kind: str, world: int) -> list[Region]:
    """How `world` ranks share a tensor: intervals, or boxes along a dimension."""
    if kind == "span":
        whole = math.prod(shape)
        return [Region(shape, span=(whole * r // world, whole * (r + 1) // world - whole * r // world))
                for r in range(world)]
    axis = int(kind)
    lows = [shape[axis] * r // world for r in range(world + 1)]
    return [Region(shape, box=((*(0,) * axis, low, *(0,) * (len(shape) - axis - 1)),
                               (*shape[:axis], high - low, *shape[axis + 1 :])))
            for low, high in pairwise(lows)]


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """One tensor, saved by some ranks in every way to share it."""
    saved = {}
    for kind in ("span", "0", "1", "2"):
        for world in (1, 2, 3):
            root = tmp_path_factory.mktemp(f"by{kind}-{world}")
            for rank, region in enumerate(cut(WHOLE.shape, kind, world)):
                data = WHOLE.reshape(-1)[elements(region)]
                piece = Piece("w", "I32", WHOLE.shape, memoryview(data), region.span, region.box)
                write_rank(root / ".part", rank, world, [piece], {}, chunk=64)
            saved[kind, world] = publish(root, root / ".part", 1, world, deadline_s=0)
    return saved


WHOLE = np.arange(5 * 7 * 6, dtype=np.int32).reshape(5, 7, 6)


@pytest.mark.parametrize("kind", ["span", "0", "1", "2"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_saved_by_n_read_by_m(kind: str, world: int, cuts: dict[tuple[str, int], Path]) -> None:
    for path in cuts.values():
        with Reader(path) as reader:
            for region in cut(WHOLE.shape, kind, world):
                out = np.full(region.elements, -1, np.int32)
                assert reader.read("w", region.span, region.box, out=out).nbytes == out.nbytes
                assert out.tolist() == elements(region)


@settings(max_examples=60, deadline=None)
@given(wanted=regions(WHOLE.shape), which=st.sampled_from([(kind, world) for kind in ("span", "0", "1", "2")
                                                           for world in (1, 2, 3)]))
def test_any_part_is_read_from_any_parts(wanted: Region, which: tuple[str, int],
                                         cuts: dict[tuple[str, int], Path]) -> None:
    with Reader(cuts[which]) as reader:
        found = reader.read("w", wanted.span, wanted.box)
        assert np.frombuffer(found, np.int32).tolist() == elements(wanted)


def test_parts_that_leave_a_gap_or_overlap(tmp_path: Path) -> None:
    data = memoryview(np.arange(4, dtype=np.int32))
    for name, first, words in (("gap", 6, "10 elements were asked for, and its 2 parts hold 8"),
                               ("overlap", 2, "its 2 parts overlap")):
        part = tmp_path / f".part-{name}"
        for rank, low in enumerate((0, first)):
            write_rank(part, rank, 2, [Piece("w", "I32", (10,), data, span=(low, 4))], {})
        with Reader(publish(tmp_path, part, first, 2, deadline_s=0)) as reader:
            with pytest.raises((Incomplete, Malformed), match=words):
                reader.read("w")
            assert bytes(reader.read("w", span=(first, 2) if name == "gap" else (4, 2))) == bytes(
                data[:2] if name == "gap" else data[2:])
