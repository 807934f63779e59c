"""The records of a layout: what is laid out, where it lies, and the options by which it was cut."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MiB = 1 << 20
REALS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Entry:
    """One tensor of a model, as far as a layout needs to know it.

    Arguments:
        name: unique within a layout.
        shape: may hold zeros; () is a single number.
        dtype: float32, float64, bfloat16 or float16.
        device: where it lies: "cpu", "cuda:0".
        group: the name of the processes that share its gradient: "data", or "expert" for an expert's weights.
        stride: in elements; None: row-major. The stride of a dimension of one element, and all of a tensor of none, mean
            nothing and become those of a row-major tensor.
        requires_grad: an entry without a gradient has no slot.

    Raises:
        TypeError, ValueError: a dtype that gradients cannot have, a negative size, as many strides as there are not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cpu"
    group: str = "data"
    stride: tuple[int, ...] | None = None
    requires_grad: bool = True

    def __post_init__(self) -> None:
        shape = tuple(int(size) for size in self.shape)
        if min(shape, default=0) < 0:
            raise ValueError(f"{self.name!r} has the shape {shape}: sizes are zero or more")
        if self.dtype not in REALS:
            raise TypeError(f"{self.name!r} is {self.dtype}; buckets hold {', '.join(map(dtype_name, REALS))} only: give a "
                            "complex parameter as view_as_real, and leave out what has no gradient")
        rows = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
        stride = rows if self.stride is None or math.prod(shape) == 0 else tuple(int(step) for step in self.stride)
        if len(stride) != len(shape):
            raise ValueError(f"{self.name!r} has the shape {shape} and strides {stride}: give one for each dimension")
        stride = tuple(row if size == 1 else step for size, step, row in zip(shape, stride, rows, strict=True))
        for name, value in (("shape", shape), ("stride", stride), ("device", str(self.device))):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, name: str, tensor: Tensor, group: str = "data") -> Entry:
        """The entry of a tensor; of a DTensor, give the local part."""
        if hasattr(tensor, "to_local"):
            raise TypeError(f"{name!r} is a DTensor, of which a bucket holds the local part: give tensor.to_local()")
        return cls(name, tuple(tensor.shape), tensor.dtype, str(tensor.device), group, tensor.stride(),
                   tensor.requires_grad)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Slot:
    """The place of an entry: `numel` elements from element `start` of a bucket. `index`: its place among the entries."""

    name: str
    bucket: int
    start: int
    numel: int
    index: int


@dataclass(frozen=True)
class Bucket:
    """What travels in one collective of `world` ranks: `elements` of one dtype, of which each rank owns `shard`.

    `index` counts buckets in the order of launching; `slots` are in the order of their starts.
    """

    index: int
    dtype: torch.dtype
    device: str
    group: str
    world: int
    elements: int
    slots: tuple[Slot, ...]

    @property
    def shard(self) -> int:
        """Elements that each rank owns: rank r those from r * shard."""
        return self.elements // self.world

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def used(self) -> int:
        """Elements that are no padding."""
        return sum(slot.numel for slot in self.slots)


class Piece(NamedTuple):
    """`numel` elements of an entry, from element `first` of it, that lie from element `offset` of a shard of a bucket.

    Elements of an entry are counted as a slot holds them: in the order of its memory if they fill one stretch of it
    (so row-major, unless it is transposed or channels-last), else row-major.
    """

    name: str
    bucket: int
    first: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Options:
    """How a layout is cut; see `FlatLayout.of`. Sizes in bytes are those of the bucket's memory."""

    bucket_bytes: int | Sequence[int] = 25 * MiB
    first_bucket_bytes: int = MiB
    align_bytes: int = 128
    block: int = 256
    bucket_dtype: torch.dtype | None = None
    wire_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bucket_bytes, Sequence):
            object.__setattr__(self, "bucket_bytes", tuple(self.bucket_bytes))
            if not self.bucket_bytes:
                raise ValueError("bucket_bytes is an empty sequence: give one size, or some for the buckets after the first")
        for size in self.limits[1:]:
            positive("bucket_bytes", size)
        for name in ("first_bucket_bytes", "align_bytes", "block"):
            positive(name, getattr(self, name))
        if self.bucket_dtype is not None and self.bucket_dtype not in REALS:
            raise TypeError(f"bucket_dtype is {self.bucket_dtype}: give {', '.join(map(dtype_name, REALS))} or None")
        if self.wire_dtype is not None and not isinstance(self.wire_dtype, torch.dtype):
            raise TypeError(f"wire_dtype is {self.wire_dtype!r}: give a torch.dtype, or None to send what is in the bucket")

    @property
    def limits(self) -> tuple[int, ...]:
        """Bytes of the first, second, ... bucket of a chain; the last holds for all that follow."""
        later = self.bucket_bytes if isinstance(self.bucket_bytes, Sequence) else (self.bucket_bytes,)
        return (self.first_bucket_bytes, *later)

    def unit(self, dtype: torch.dtype) -> int:
        """Elements of which every start and every cut of a bucket of this dtype is a multiple."""
        dtypes = (dtype, dtype if self.wire_dtype is None else self.wire_dtype)
        return math.lcm(self.block, *(self.align_bytes // math.gcd(self.align_bytes, each.itemsize) for each in dtypes))


def positive(name: str, value: Any) -> int:
    """Raise unless the value is an integer of at least one."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}: give an integer")
    if value < 1:
        raise ValueError(f"{name} is {value}: give at least 1")
    return value


def dtype_name(dtype: torch.dtype) -> str:
    """As a layout is printed and kept: float32.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def ordinals(entries: Iterable[Entry]) -> dict[str, str]:
    """Devices renamed by type and order of first use.

    Example:
        >>> import torch
        >>> ordinals([Entry(f"{n}", (1,), torch.float32, device) for n, device in enumerate(("cuda:5", "cpu", "cuda:3"))])
        {'cuda:5': 'cuda:0', 'cpu': 'cpu:0', 'cuda:3': 'cuda:1'}
    """
    seen: Counter[str] = Counter()
    names: dict[str, str] = {}
    for entry in entries:
        if entry.device not in names:
            kind = entry.device.split(":")[0]
            names[entry.device] = f"{kind}:{seen[kind]}"
            seen[kind] += 1
    return names
