"""The parameters of a model by its parts, and what of each a rank holds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from fasttrain.plan.shapes import Shape

Cut = Literal["", "column", "row", "vocabulary"]


class Held(NamedTuple):
    """A parameter, or a rank's part of one.

    Attributes:
        name: within the model.
        shape: of what is held.
        cut: along what tensor parallelism divides it: "column": dimension 0, "row": the last, "vocabulary": dimension
            0, the first ranks having one more where it does not divide; "": not.
        expert: it is stacked over experts along dimension 0, which the expert axis divides.
        product: it is a matrix that each token is multiplied with (as opposed to looked up).
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut = ""
    expert: bool = False
    product: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def parts(shape: Shape) -> list[str]:
    """The parts of a model in the order in which they run, as a pipeline divides them.

    Example:
        >>> from fasttrain.plan.shapes import ours
        >>> parts(ours(2, 32, 2))
        ['embedding', 'blocks.0', 'blocks.1', 'head']
    """
    return ["embedding", *(f"blocks.{number}" for number in range(shape.layers)), "head"]


def of_part(shape: Shape, part: str) -> list[Held]:
    """The parameters of a part, whole, in the order of registration."""
    if part == "embedding":
        return list(_embedding(shape))
    if part == "head":
        return list(_head(shape))
    return [held._replace(name=f"{part}.{held.name}") for held in _block(shape)]


def _embedding(shape: Shape) -> Iterator[Held]:
    yield Held("embedding.bytes.weight", (shape.vocabulary, shape.width), "vocabulary")
    for number in range(shape.ngrams - 1):
        yield Held(f"embedding.endings.{number}.weight", (shape.rows, shape.width), "vocabulary")
    if shape.positions:
        yield Held("embedding.positions.weight", (shape.positions, shape.width))


def _head(shape: Shape) -> Iterator[Held]:
    yield from _norm(shape, "norm")
    yield Held("head.weight", (shape.vocabulary, shape.width), "vocabulary", product=True)


def _norm(shape: Shape, name: str) -> Iterator[Held]:
    yield Held(f"{name}.weight", (shape.width,))
    if shape.family == "gpt2":
        yield Held(f"{name}.bias", (shape.width,))


def _linear(shape: Shape, name: str, out: int, into: int, cut: Cut) -> Iterator[Held]:
    yield Held(f"{name}.weight", (out, into), cut, product=True)
    if shape.family == "gpt2":
        yield Held(f"{name}.bias", (out,), "column" if cut == "column" else "")


def _block(shape: Shape) -> Iterator[Held]:
    width = shape.width
    yield from _norm(shape, "norm_attention")
    yield from _linear(shape, "qkv", shape.queries + 2 * shape.keys, width, "column")
    yield from _linear(shape, "out", width, shape.queries, "row")
    yield from _norm(shape, "norm_feed")
    if shape.experts:
        yield Held("router.weight", (shape.experts, width), product=True)
        up, down = (shape.hidden, width), (width, shape.hidden)
        for name, size in (("gate", up), ("up", up), ("down", down)):
            yield Held(f"experts.{name}", (shape.experts, *size), "row" if name == "down" else "column", True, True)
        return
    if shape.gated:
        yield from _linear(shape, "gate", shape.hidden, width, "column")
    yield from _linear(shape, "up", shape.hidden, width, "column")
    yield from _linear(shape, "down", width, shape.hidden, "row")


def on_rank(held: Held, tensor: int, expert: int) -> Held:
    """What the first rank holds, over so many ranks of the tensor and of the expert axis: the largest part."""
    size = list(held.shape)
    if held.expert:
        size[0] = -(-size[0] // expert)
    if held.cut == "row":
        size[-1] = -(-size[-1] // tensor)
    elif held.cut:
        place = 1 if held.expert else 0
        size[place] = -(-size[place] // tensor)
    return held._replace(shape=tuple(size))


def stages(shape: Shape, pipeline: int, chunks: int = 1, v_shaped: bool = False) -> list[list[str]]:
    """The parts of each rank of a pipeline: `chunks` stages each, or fewer blocks where they do not divide.

    Blocks are divided as evenly as they can be, earlier stages have one more; the embedding goes with the first stage
    and the head with the last.

    Arguments:
        v_shaped: a rank has stages r and 2p - 1 - r, and not r, r + p, ...

    Example:
        >>> from fasttrain.plan.shapes import ours
        >>> stages(ours(3, 32, 2), 2)
        [['embedding', 'blocks.0', 'blocks.1'], ['blocks.2', 'head']]
    """
    count = pipeline * chunks
    least, more = divmod(shape.layers, count)
    divided: list[list[str]] = []
    first = 0
    for stage in range(count):
        size = least + (stage < more)
        divided.append([f"blocks.{number}" for number in range(first, first + size)])
        first += size
    divided[0].insert(0, "embedding")
    divided[-1].append("head")
    return [[part for stage in of_rank(rank, pipeline, chunks, v_shaped) for part in divided[stage]]
            for rank in range(pipeline)]


def of_rank(rank: int, pipeline: int, chunks: int, v_shaped: bool) -> Sequence[int]:
    """The stages of a rank, in their order."""
    if v_shaped:
        return (rank, 2 * pipeline - 1 - rank)
    return range(rank, pipeline * chunks, pipeline)


def held_by(shape: Shape, mine: Sequence[str], tensor: int, expert: int) -> list[Held]:
    """What a rank of a pipeline holds of the parameters of its parts, tied ones once where both places are its own."""
    found = []
    for part in mine:
        for held in of_part(shape, part):
            if shape.tied and held.name == "head.weight" and "embedding" in mine:
                continue  # the same tensor
            found.append(on_rank(held, tensor, expert))
    return found


def count(shape: Shape) -> int:
    """Elements of all parameters, tied ones once.

    Example:
        >>> from fasttrain.plan.shapes import named
        >>> f"{count(named('gpt2')):,}"
        '124,439,808'
    """
    return sum(held.numel for held in held_by(shape, parts(shape), 1, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A rank's part of a pipeline: one object for each, so that what is counted of it is kept beside it.

    Attributes:
        rank: its place in the pipeline.
        parts: of the model.
        held: what it has of each parameter, before ZeRO divides it.
    """

    rank: int
    parts: tuple[str, ...]
    held: tuple[Held, ...]

    @functools.cached_property
    def blocks(self) -> int:
        return sum(part.startswith("blocks.") for part in self.parts)

    @functools.cached_property
    def elements(self) -> int:
        return sum(one.numel for one in self.held)


@functools.lru_cache(None)
def stage(shape: Shape, rank: int = 0, pipeline: int = 1, chunks: int = 1, v_shaped: bool = False, tensor: int = 1,
          expert: int = 1) -> Stage:
    """What a rank of a pipeline has."""
    mine = stages(shape, pipeline, chunks, v_shaped)[rank]
    return Stage(rank, tuple(mine), tuple(held_by(shape, mine, tensor, expert)))


@functools.lru_cache(None)
def used(shape: Shape, parts: tuple[str, ...]) -> float:
    """Elements of the matrices with which each token is multiplied in these parts."""
    found = 0.0
    for part in parts:
        for held in of_part(shape, part):
            if held.product:
                found += held.numel * shape.top_k / shape.experts if held.expert else held.numel
    return found
