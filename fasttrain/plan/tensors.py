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
        yield Held("mixture.router.weight", (shape.experts, width), product=True)
        up, down = (shape.hidden, width), (width, shape.hidden)
        for name, size in (("up", up), ("gate", up), ("down", down)):
            yield Held(f"mixture.experts.{name}", (shape.experts, *size), "row" if name == "down" else "column", True,
                       True)
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


def stages(shape: Shape, sequence: int, pipeline: int, chunks: int = 1, v_shaped: bool = False) -> list[list[str]]:
    """The parts of each rank of a pipeline, `chunks` stages each, cut by the pipeline's own function.

    Arguments:
        sequence: tokens of a sequence, on which the operations of attention depend.
        v_shaped: a rank has stages r and 2p - 1 - r, and not r, r + p, ...

    Example:
        >>> from fasttrain.plan.shapes import ours
        >>> stages(ours(3, 32, 2), 16, 2)
        [['embedding', 'blocks.0', 'blocks.1'], ['blocks.2', 'head']]
    """
    names = iter(parts(shape))
    divided = [[next(names) for _ in range(size)] for size in _cut(shape, sequence, pipeline * chunks)]
    return [[part for stage in of_rank(rank, pipeline, chunks, v_shaped) for part in divided[stage]]
            for rank in range(pipeline)]


@functools.lru_cache(None)
def _cut(shape: Shape, sequence: int, count: int) -> list[int]:
    from fasttrain.parallel.pipeline.cuts import cut  # torch, which shapes do without

    costs = {part: 3.0 * forward_flops(shape, (part,), sequence) for part in ("embedding", "blocks.0", "head")}
    return cut([costs["blocks.0" if part.startswith("blocks.") else part] for part in parts(shape)], count)


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
          expert: int = 1, sequence: int = 1) -> Stage:
    """What a rank of a pipeline has."""
    mine = stages(shape, sequence, pipeline, chunks, v_shaped)[rank]
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


def forward_flops(shape: Shape, parts: Sequence[str], sequence: int) -> float:
    """Operations of a token in a forward pass: two for each element of a matrix it is multiplied with, and attention.

    A mixture uses `top_k` of its experts. Attention counts in full, masked or not: s keys for each query, for the
    products and for what they weigh. For a GPT that is Narayanan et al., arXiv 2104.04473, equation 3: without its head
    24 h^2 + 4 s h in a layer.

    Example:
        >>> from fasttrain.plan.shapes import named
        >>> gpt2 = named("gpt2")
        >>> forward_flops(gpt2, ["blocks.0"], 1024) == 24 * 768**2 + 4 * 1024 * 768
        True
    """
    blocks = sum(part.startswith("blocks.") for part in parts)
    return 2.0 * used(shape, tuple(parts)) + blocks * 4.0 * sequence * shape.queries
