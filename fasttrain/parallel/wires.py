"""How a bucket of gradients becomes its mean over the ranks.

======= =========================================================== ===================================================
name    what travels                                                 how it is added
======= =========================================================== ===================================================
same    the bucket                                                   the backend's all-reduce, in its own order
ordered the bucket                                                   in the order of ranks, in float32 (float64): bits
                                                                     that depend on no bucket and no arrival
bf16    bfloat16 there and back: half the bytes of float32           in float32, in the order of ranks
int8    codes of 8 bits there, bfloat16 back; what codes lack is     in float32, in the order of ranks
        added to the next step's (error feedback)
======= =========================================================== ===================================================
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.dist import accounting, exchange
from fasttrain.dist.layout import FlatLayout
from fasttrain.dist.wire import Wire
from fasttrain.kernels import norm
from fasttrain.parallel.buckets import Bucket

Parts = tuple[Tensor, Tensor]  # sum of squares, float64, and whether something is not finite, bool; of shape ()


class Method:
    """A way for buckets to travel; also the base of yours.

    Attributes:
        name: what users call it.
        divisor: what the sum over ranks is divided by: their number, or fewer if some have no data left.
        checksum: of the collectives that were issued since the reducer was made, in their order.
        grid: the ranks in rows, one for each node, of a method that tells these apart.
        holding: whether this rank has its part of gradients that no parameter shows (`Zero`).
        group: of the buckets that it sends (`fasttrain.dist.layout.Bucket`); None: all there are.
    """

    name = ""
    grid: list[list[int]] | None = None
    final = False  # no other may take its place
    holding = False
    group: str | None = None

    def __init__(self) -> None:
        self.checksum = 0

    def prepare(self, wire: Wire, layout: FlatLayout) -> None:
        """Learn who takes part; called once."""
        self.wire, self.layout, self.divisor = wire, layout, wire.size

    def of(self, group: str) -> Method:
        """The method of a group of parameters: itself, if it does not tell them apart."""
        return self

    @property
    def factor(self) -> float:
        """What gradients are multiplied with as they are packed; 1 where sending makes the mean."""
        return 1.0

    def staging(self, dtype: torch.dtype) -> torch.dtype:
        """In what a bucket of this dtype is sent: if in another, gradients are packed into `bucket.staged`."""
        return dtype

    def send(self, index: int, bucket: Bucket) -> Sent:
        """Begin to make `bucket.data` the mean over the ranks of `bucket.staged`, or of itself."""
        raise NotImplementedError

    def begin(self) -> None:
        """The first gradient of a backward pass has arrived, or a step without one is about to end."""

    def look(self) -> None:
        """A gradient has arrived: time to see what is over. Never waits."""

    def ended(self, used: Sequence[bool]) -> None:
        """A synchronised step is over; `used`: for each parameter, whether any rank has a gradient of it."""

    def drop(self) -> None:
        """Gradients are not wanted any longer: `zero_grad`."""

    def rescale(self, factor: float) -> None:
        """The loss scale has changed: what is kept from step to step is in units of it."""

    def widths(self, dtype: torch.dtype) -> tuple[float, float]:
        """Bytes on the wire of an element of a bucket of this dtype: on its way to be added, and back."""
        return float(dtype.itemsize), float(dtype.itemsize)

    def bytes_of(self, elements: int, dtype: torch.dtype) -> float:
        """Bytes that a rank sends to reduce so many elements, by the formula."""
        return accounting.bytes_per_step(1, elements, self.wire.size, *self.widths(dtype))

    def issued(self, index: int, elements: int) -> None:
        """Count a collective into the checksum, of 48 bits."""
        text = f"{self.name} {index} {elements}".encode()
        self.checksum = (zlib.crc32(text) + 0x5BD1E995 * (self.checksum + 1)) & ((1 << 48) - 1)


class Sent:
    """A bucket on its way.

    Arguments:
        work: what must be over, with `wait` and `done`; its result is this rank's `Parts` if nothing is `measured`.
        measured: the elements of which this rank tells the sum of squares, once they are there.
    """

    def __init__(self, work: Any, measured: Tensor | None = None):
        self.work, self.measured = work, measured

    def done(self) -> bool:
        """Whether the mean is there. Never waits."""
        return self.work.done()

    def wait(self) -> Parts:
        """Wait for the mean, and measure this rank's part of it."""
        result = self.work.wait()
        if self.measured is None:
            return result
        squares, found = norm.squares([self.measured])
        return squares[0], found


class Same(Method):
    """One all-reduce of the bucket; gradients are divided by the number of ranks as they are packed."""

    name = "same"

    @property
    def factor(self) -> float:
        return 1.0 / self.divisor

    def send(self, index: int, bucket: Bucket) -> Sent:
        self.issued(index, len(bucket.data))
        return Sent(self.wire.all_reduce(bucket.data), own_part(bucket.data, self.wire))


class Ordered(Method):
    """Pairs of ranks exchange chunks, which our kernels add, scale and measure in one pass.

    Arguments:
        travels, back: the dtypes in which chunks travel to be added, and in which sums travel back; None: the bucket's.
    """

    name = "ordered"

    def __init__(self, travels: torch.dtype | None = None, back: torch.dtype | None = None):
        super().__init__()
        self.travels, self.back = travels, back

    def staging(self, dtype: torch.dtype) -> torch.dtype:
        return self.travels or dtype

    def widths(self, dtype: torch.dtype) -> tuple[float, float]:
        there = self.travels or dtype
        return accounting.width(there), accounting.width(self.back or there)

    def send(self, index: int, bucket: Bucket) -> Sent:
        self.issued(index, len(bucket.data))
        return Sent(exchange.ordered_all_reduce(self.wire, bucket.data, 1.0 / self.divisor, True, self.travels,
                                                self.back, bucket.staged))


class Bf16(Ordered):
    """Halves the bytes of float32 gradients; sums in float32."""

    name = "bf16"

    def __init__(self) -> None:
        super().__init__(torch.bfloat16)


class Int8(Method):
    """8-bit codes with error feedback.

    What the codes have lacked so far is a state, of which every rank has its own: `fasttrain.checkpoint` saves it with
    the method (`reducer.method`), as any other object.

    Attributes:
        residuals: of each bucket, what its codes have lacked so far, float32.
    """

    name = "int8"
    per_rank = True

    def prepare(self, wire: Wire, layout: FlatLayout) -> None:
        super().prepare(wire, layout)
        mine = [bucket for bucket in layout.buckets if self.group in (None, bucket.group)]
        if wide := [bucket.dtype for bucket in mine if bucket.dtype == torch.float64]:
            raise TypeError(f"wire='int8' cannot carry {wide[0]}: its codes have 8 bits; take wire='same'")
        self.residuals = [torch.zeros(bucket.elements, device=wire.device) for bucket in mine]
        self._place = {bucket.index: place for place, bucket in enumerate(mine)}

    def rescale(self, factor: float) -> None:
        for residual in self.residuals:
            residual.mul_(factor)

    def state_dict(self) -> dict[str, Any]:
        """The residuals of this rank."""
        return {"residuals": list(self.residuals)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over residuals of this rank.

        Raises:
            ValueError: they are of other buckets; nothing was changed.
        """
        given = state["residuals"]
        if [len(one) for one in given] != [len(one) for one in self.residuals]:
            raise ValueError(f"residuals of buckets of {[len(one) for one in given]} elements, and these have "
                             f"{[len(one) for one in self.residuals]}")
        for mine, one in zip(self.residuals, given, strict=True):
            mine.copy_(one)

    def of_rank(self, state: Mapping[str, Any], rank: int, world: int) -> None:
        """Take over the residuals of a rank of as many. Those of another number of ranks are of other shares of the
        gradients: they begin at zero then, and a warning says so."""
        if world == self.wire.size:
            self.load_state_dict(state)
            return
        for residual in self.residuals:
            residual.zero_()
        if self.wire.rank == 0:
            warnings.warn(f"wire='int8': what the codes of {world} ranks have lacked is not what those of "
                          f"{self.wire.size} will: error feedback begins anew", stacklevel=2)

    def widths(self, dtype: torch.dtype) -> tuple[float, float]:
        return accounting.width(torch.int8), accounting.width(torch.bfloat16)

    def send(self, index: int, bucket: Bucket) -> Sent:
        self.issued(index, len(bucket.data))
        return Sent(exchange.int8_all_reduce(self.wire, bucket.data, 1.0 / self.divisor, True,
                                             self.residuals[self._place[index]]))


def own_part(data: Tensor, wire: Wire) -> Tensor:
    """This rank's share of a bucket: all shares have one size."""
    share = len(data) // wire.size
    return data[wire.rank * share : (wire.rank + 1) * share]


METHODS: dict[str, Callable[[], Method]] = {method.name: method for method in (Same, Ordered, Bf16, Int8)}


def method_of(wire: str | Method | Callable[[], Method]) -> Method:
    """A method by its name, or by what makes one.

    Raises:
        ValueError: there is none of this name.
    """
    if isinstance(wire, Method):
        return wire
    if callable(wire):
        return wire()
    if wire not in METHODS:
        raise ValueError(f"wire={wire!r}: gradients travel as {', '.join(METHODS)}, or as a Method of yours")
    return METHODS[wire]()


def total(parts: list[Parts]) -> tuple[Tensor, Tensor]:
    """The sum of squares of all parts, and how many have something that is not finite; both float64."""
    if not parts:
        return torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return (norm.total(torch.stack([squares for squares, _ in parts])),
            torch.stack([bad for _, bad in parts]).double().sum())
