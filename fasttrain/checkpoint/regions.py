"""Which elements of a tensor: all of them, an interval of the row-major order, or an n-dimensional box."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Box = tuple[tuple[int, ...], tuple[int, ...]]  # lower corner, extent


@dataclass(frozen=True)
class Region:
    """A part of a tensor of `shape`. Neither span nor box: all of it, and so is a span or a box of all elements.

    Raises:
        ValueError: it is no part of such a tensor.

    Example:
        >>> from fasttrain.checkpoint.regions import Region
        >>> Region((4, 3), span=(2, 5)).elements
        5
        >>> Region((4, 3), box=((0, 0), (4, 3))) == Region((4, 3))
        True
    """

    shape: tuple[int, ...]
    span: tuple[int, int] | None = None
    box: Box | None = None

    def __post_init__(self) -> None:
        shape = _sizes(self.shape, "shape")
        object.__setattr__(self, "shape", shape)
        if self.span is not None and self.box is not None:
            raise ValueError("both a span and a box are given; a part is one of them")
        if self.span is not None:
            first, length = span = _sizes(self.span, "span", 2)
            if first + length > math.prod(shape):
                raise ValueError(f"span {span} runs past the {math.prod(shape)} elements of shape {shape}")
            object.__setattr__(self, "span", None if length == math.prod(shape) else span)
        if self.box is not None:
            if not isinstance(self.box, tuple | list) or len(self.box) != 2:
                raise ValueError(f"a box is (lower corner, extent), not {self.box!r}")
            lower, extent = (_sizes(side, "box", len(shape)) for side in self.box)
            if any(low + size > whole for low, size, whole in zip(lower, extent, shape, strict=True)):
                raise ValueError(f"box {(lower, extent)} runs out of shape {shape}")
            object.__setattr__(self, "box", None if extent == shape else (lower, extent))

    @property
    def elements(self) -> int:
        """How many elements it has."""
        if self.span is not None:
            return self.span[1]
        return math.prod(self.box[1] if self.box is not None else self.shape)

    @property
    def extent(self) -> tuple[int, ...]:
        """The shape of its own array: a span has one dimension."""
        if self.span is not None:
            return (self.span[1],)
        return self.box[1] if self.box is not None else self.shape

    @property
    def suffix(self) -> str:
        """What is put behind the tensor's name in the key of a safetensors file."""
        if self.span is not None:
            return f"@{self.span[0]}+{self.span[1]}"
        if self.box is not None:
            return "@" + "+".join(",".join(map(str, side)) for side in self.box)
        return ""

    def as_json(self) -> dict[str, Any]:
        """`span` or `box`, whichever it has."""
        if self.span is not None:
            return {"span": list(self.span)}
        return {"box": [list(side) for side in self.box]} if self.box is not None else {}

    def blocks(self) -> Iterator[tuple[int, Box]]:
        """The boxes that it is made of, each with the place of its first element among the region's own elements."""
        if self.span is None:
            yield 0, self.box if self.box is not None else ((0,) * len(self.shape), self.shape)
            return
        at = 0
        for box in _boxes(self.shape, *self.span):
            yield at, box
            at += math.prod(box[1])


def _boxes(shape: tuple[int, ...], first: int, length: int) -> Iterator[Box]:
    """The boxes that make an interval of the row-major order, in order; at most two for each dimension."""
    if length == 0:
        return
    if len(shape) <= 1:
        yield ((first,), (length,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    head, low = first // row, first % row
    if low:  # the end of a row that began before
        part = min(length, row - low)
        yield from (((head, *lower), (1, *extent)) for lower, extent in _boxes(shape[1:], low, part))
        head, length = head + 1, length - part
    if rows := length // row:
        yield (head, *(0,) * len(shape[1:])), (rows, *shape[1:])
        head, length = head + rows, length - rows * row
    if length:
        yield from (((head, *lower), (1, *extent)) for lower, extent in _boxes(shape[1:], 0, length))


def intersection(one: Box, other: Box) -> Box | None:
    """The box that two boxes share, if they share an element."""
    lower = tuple(map(max, one[0], other[0]))
    extent = tuple(min(a + m, b + n) - low for a, m, b, n, low in zip(*one, *other, lower, strict=True))
    return (lower, extent) if all(size > 0 for size in extent) else None


def overlap(boxes: Sequence[Box]) -> bool:
    """Whether two of these boxes share an element."""
    ordered = sorted(boxes)
    if ordered and len(ordered[0][0]) == 1:
        return any(a[0][0] + a[1][0] > b[0][0] for a, b in itertools.pairwise(ordered))
    return any(intersection(a, b) for a, b in itertools.combinations(ordered, 2))


def tiling(regions: Sequence[Region]) -> str | None:
    """What keeps parts of one tensor from making the whole of it, in words; None if nothing does."""
    held, whole = sum(region.elements for region in regions), math.prod(regions[0].shape)
    if all(region.box is None for region in regions):
        spans = [region.span or (0, whole) for region in regions]
        boxes: list[Box] = [((first,), (length,)) for first, length in spans if length]
    else:
        boxes = [box for region in regions for _, box in region.blocks() if math.prod(box[1])]
    if overlap(boxes):
        return "its parts overlap"
    return f"its parts hold {held:,} of {whole:,} elements" if held != whole else None


def _sizes(values: Any, what: str, count: int | None = None) -> tuple[int, ...]:
    """A tuple of plain non-negative integers."""
    if (not isinstance(values, tuple | list) or (count is not None and len(values) != count)
            or any(type(value) is not int or value < 0 for value in values)):
        wanted = "non-negative integers" if count is None else f"{count} non-negative integers"
        raise ValueError(f"{what} must be {wanted}, not {values!r}")
    return tuple(values)
