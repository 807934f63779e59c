"""What autograd keeps between the forward and the backward pass of a micro-batch, item by item.

Of the main job's GPT these are the tensors that its operators keep, on a CPU counted by a test to the byte. Of
published models it is the count of Korthikanti et al., arXiv 2205.05198, section 4: one list, of which equations 1 to 4
are sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from fasttrain.plan.job import Job, Way
from fasttrain.plan.shapes import Shape
from fasttrain.plan.tensors import Stage, of_part, on_rank

Divided = Literal["tensor", "stream", "input", ""]
FP32, INT64, BOOL = 4, 8, 1
TERMS = 20  # bytes of what a cross-entropy over a divided vocabulary keeps and gathers of each row


class Item(NamedTuple):
    """Something that is kept for each position.

    Attributes:
        what: it is.
        each: bytes of a position.
        divided: by the ranks of the tensor axis: "tensor": always, as heads and hidden features are; "stream": where
            sequence parallelism divides the positions between blocks; "input" of layers cut by columns: it is gathered
            before them and kept whole, but with `regather`; "": never.
    """

    what: str
    each: float
    divided: Divided = ""

    def on_rank(self, tensor: int, sequence: bool, regather: bool = False) -> float:
        """Bytes of a position on a rank."""
        apart = self.divided == "tensor" or (sequence and (
            self.divided == "stream" or (self.divided == "input" and regather)))
        return self.each / tensor if apart else self.each


def block(job: Job, context: int = 1) -> list[Item]:
    """What a block keeps; for each position of this rank, of which there are 1 / context of all."""
    return list(_ours(job, context) if job.shape.family == "ours" else _published(job, context))


def _ours(job: Job, context: int) -> Iterator[Item]:
    shape, a, cpu = job.shape, job.act, job.kernels == "cpu"
    yield from _our_norm(job, "attention")
    if context == 1:
        yield Item("queries and keys, rotated", a * (shape.queries + shape.keys), "tensor")
        yield Item("queries, keys and values, of which a view is kept", a * (shape.queries + 2 * shape.keys), "tensor")
    else:
        yield Item("queries, rotated", a * shape.queries, "tensor")
        yield Item("keys and values of all ranks", a * 2 * shape.keys * context, "tensor")
    yield Item("logarithms of attention's sums", FP32 * shape.heads, "tensor")
    yield Item("what attention gives", a * shape.queries, "tensor")
    if cpu or context > 1:  # kernels of GPUs write it as the next layer reads it
        yield Item("the same, heads side by side", a * shape.queries, "tensor")
    yield from _our_norm(job, "feed")
    if shape.experts:
        yield from _mixture(job)
    elif shape.gated:
        if job.precision == "bf16":  # autocast casts it for each of the two layers
            yield Item("input of the other up layer", a * shape.width, "input")
        yield Item("gate, its activation, what goes up, and their product", 4 * a * shape.hidden, "tensor")
    else:
        yield Item("activations, and their squares", 2 * a * shape.hidden, "tensor")


def _our_norm(job: Job, name: str) -> Iterator[Item]:
    """A norm and the input of the layer after it."""
    width = job.shape.width
    yield Item(f"input of the norm before {name}", FP32 * width, "stream")
    yield Item("its roots", FP32, "stream")
    if job.kernels == "cpu":  # it is made of several operators there
        yield Item("what it has divided", FP32 * width, "stream")
    yield Item(f"input of the layer after it, {name}", job.act * width, "input")


def _published(job: Job, context: int) -> Iterator[Item]:
    """Section 4.1 of Korthikanti et al.: "attention block", "MLP", "layer norm"; for 16 bits, with masks of 1 byte."""
    shape, a = job.shape, job.act
    mask = 1 if shape.dropout else 0
    yield Item("inputs of the norms", 2 * a * shape.width, "stream")
    yield Item("input of queries, keys and values", a * shape.width, "input")
    yield Item("queries", a * shape.queries, "tensor")
    yield Item("keys and values", a * 2 * shape.keys * context, "tensor")
    if job.flash:
        yield Item("logarithms of attention's sums", FP32 * shape.heads, "tensor")
    else:
        each = job.sequence * shape.heads
        yield Item("softmax", a * each, "tensor")
        if mask:
            yield Item("its mask, and what is left of it", (mask + a) * each, "tensor")
    yield Item("what attention gives, the input of the layer after it", a * shape.queries, "tensor")
    if shape.experts:
        yield from _mixture(job)
    else:
        inside = 4 if shape.gated else 2  # gate, activation, up, product; or what the activation reads and gives
        yield Item("input of the feed-forward part", a * shape.width, "input")
        yield Item("within the feed-forward part", inside * a * shape.hidden, "tensor")
    if mask:
        yield Item("masks of drop-out", 2 * mask * shape.width, "stream")


def _mixture(job: Job) -> Iterator[Item]:
    """A mixture of experts, estimated: each token is `top_k` rows, and experts get all equally many."""
    rows = job.act * job.shape.top_k
    yield Item("rows of tokens, to the experts", rows * job.shape.width, "stream")
    yield Item("gate, its activation, what goes up, their product, of rows", 4 * rows * job.shape.hidden, "tensor")
    yield Item("rows of tokens, from the experts", rows * job.shape.width, "stream")


def once_a_block(job: Job, tensor: int) -> int:
    """Bytes that a block keeps whatever the number of positions: under autocast its matrices in 16 bits."""
    if job.precision != "bf16":
        return 0
    return sum(on_rank(held, tensor, 1).numel for held in of_part(job.shape, "blocks.0") if held.product) * job.act


def stream(job: Job) -> int:
    """Bytes of a feature of what blocks hand on."""
    return FP32 if job.precision == "bf16" else job.act


def recomputed(job: Job, way: Way) -> list[Item]:
    """What is kept of a block that is recomputed: its input; where selectively, products and attention too."""
    shape, a = job.shape, job.act
    items = [Item("input of the block", stream(job) * shape.width, "stream")]
    if way.recompute == "selective":
        inside = (2 if shape.gated else 1) * shape.hidden * (shape.top_k or 1)
        items += [
            Item("queries, keys and values", a * (shape.queries + 2 * shape.keys), "tensor"),
            Item("what attention gives", a * shape.queries + FP32 * shape.heads, "tensor"),
            Item("results of out and down", 2 * a * shape.width),
            Item("results of up and gate", a * inside, "tensor")]
    return items


def of_block(job: Job, way: Way, regather: bool = False) -> float:
    """Bytes that a block keeps of a micro-batch on a rank."""
    if way.recompute != "none":
        return way.tokens(job) * total(recomputed(job, way), way, regather)
    return whole_block(job, way, regather)


def whole_block(job: Job, way: Way, regather: bool = False) -> float:
    """Bytes that a block keeps where nothing is recomputed, or while it is."""
    return (way.tokens(job) * total(block(job, way.context), way, regather) + once_a_block(job, way.tensor)
            + masks(job, way))


def masks(job: Job, way: Way) -> float:
    """Bytes that a block keeps of a cut sequence, whatever the micro-batch: the angles of its positions, and masks.

    Where a CPU needs masks as numbers: of each of its two chunks of s / 2c positions a rank has one over the positions
    up to its end, 2c + 1 chunks for both. The first chunk of all needs none: the first rank has less.
    """
    if way.context == 1 or job.shape.family != "ours":
        return 0
    angles = FP32 * job.shape.head * job.sequence / way.context  # a cosine and a sine for two features
    size = job.sequence // (2 * way.context)
    return angles + (job.act * size * size * (2 * way.context + 1) if job.kernels == "cpu" else 0)


def total(items: Sequence[Item], way: Way, regather: bool = False) -> float:
    """Bytes of a position on a rank."""
    return sum(item.on_rank(way.tensor, way.sequence, regather) for item in items)


def of_embedding(job: Job, way: Way) -> float:
    """Bytes that the embedding keeps: tokens, and the rows of endings; masks of drop-out."""
    shape, whole = job.shape, job.micro_batch * job.sequence
    if shape.family != "ours":
        return INT64 * whole / way.context + (way.tokens(job) * shape.width if shape.dropout else 0)
    if way.tensor > 1:  # of each table which row of this rank's it is, and whether it is none of these
        return (INT64 + BOOL) * whole * shape.ngrams
    return INT64 * (_window(job) + whole * (shape.ngrams - 1))  # each rank of the context axis looks all of them up


def _window(job: Job) -> int:
    """Tokens, of which inputs and targets are views."""
    return job.micro_batch * (job.sequence + 1)


def of_head(job: Job, way: Way) -> float:
    """Bytes that the last norm and the loss keep: the logits foremost.

    Whole, they are kept as logarithms of probabilities in fp32, and divided as they are, beside the terms of each row.
    """
    shape, tokens = job.shape, way.tokens(job)
    columns = -(-shape.vocabulary // way.tensor)
    if shape.family != "ours":
        norms = [Item("input of the norm", job.act * shape.width, "stream"),
                 Item("of the head", job.act * shape.width, "input")]
        return tokens * total(norms, way) + FP32 * tokens * columns
    norm = tokens * total(list(_our_norm(job, "head")), way)
    cast = columns * shape.width * job.act if job.precision == "bf16" else 0
    if way.tensor == 1:
        return norm + cast + FP32 * tokens * columns + INT64 * tokens + FP32
    targets = tokens if way.context > 1 else _window(job)
    return norm + cast + job.act * tokens * columns + TERMS * tokens + INT64 * targets + INT64


def of_stage(here: Stage, job: Job, way: Way) -> tuple[float, float]:
    """Bytes that a rank's parts keep of a micro-batch, without the head, and those of the head."""
    found = here.blocks * of_block(job, way)
    if "embedding" in here.parts:
        found += of_embedding(job, way)
    return found, of_head(job, way) if "head" in here.parts else 0.0


def formula(shape: Shape, sequence: int, batch: int, tensor: int = 1, sequence_parallel: bool = False) -> float:
    """Equations 1, 2 and 4 of Korthikanti et al.: bytes of a layer of a GPT with drop-out, in 16 bits.

    Example:
        >>> from fasttrain.plan.shapes import named
        >>> formula(named("gpt2"), 1024, 1) == 1024 * 768 * (34 + 5 * 12 * 1024 / 768)
        True
    """
    s, b, h, a = sequence, batch, shape.width, shape.heads
    if sequence_parallel:
        return s * b * h / tensor * (34 + 5 * a * s / h)
    return s * b * h * (10 + 24 / tensor + 5 * a * s / (h * tensor))
