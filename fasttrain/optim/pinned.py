"""Pinned memory of an offloaded optimizer: how much there is of it, known before any is taken, and what lies where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttrain.kernels.link import Link
from fasttrain.optim.groups import Groups
from fasttrain.precision.codecs import array_shapes, code_dtype, codec
from fasttrain.precision.storage import is_plain

ALIGNED = 64  # bytes


class Array(NamedTuple):
    """A tensor that is to be made."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """With what aligns the next one."""
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return -(-size // ALIGNED) * ALIGNED

    def at(self, memory: Tensor, begin: int) -> Tensor:
        """The tensor, at so many bytes behind the start of the memory; a storage of its own, for who saves it alone."""
        first = memory.storage_offset() + begin
        storage = memory.untyped_storage()[first:first + torch.Size(self.shape).numel() * self.dtype.itemsize]
        return torch.empty(0, dtype=self.dtype).set_(storage, 0, self.shape, self.stride)


def array(like: Tensor, dtype: torch.dtype) -> Array:
    """One that torch would make with `empty_like`: in the memory order of the other where that leaves no gaps."""
    return Array(dtype, tuple(like.shape), torch.empty_like(like, device="meta").stride())


def states(optimizer: Groups, where: tuple[int, int]) -> dict[str, Array]:
    """The states of a parameter that have an element for each of its own, by name, as they will be kept.

    An optimizer that is no one rule over elements decides when it makes them: of such there are none here.
    """
    group, p = optimizer.param_groups[where[0]], optimizer._param(where)
    rule = optimizer.rule_of(group)
    if not optimizer.takes_storage(group):
        return {}
    if is_plain(group):
        return dict.fromkeys(rule.state, array(p, p.dtype))
    layout = optimizer._layout(optimizer._name(where), p, p.dtype, group, rule)
    found = {}
    for number, *names in zip(layout.codecs, layout.keys, layout.extras, strict=True):
        dtypes = (code_dtype(number), codec(number).extra)
        for name, dtype, shape in zip(names, dtypes, array_shapes(number, p.shape), strict=True):
            if name is not None and dtype is not None and shape is not None:
                flat = torch.empty(shape, device="meta")
                found[name] = array(flat if codec(number).block else p, dtype)
    return found


@dataclass(frozen=True)
class PinnedBytes:
    """Pinned memory that an offloaded optimizer takes, in bytes; `optimizer.pinned_bytes()`.

    Attributes:
        parameters: a copy of every parameter, in its own dtype.
        gradients: where they land, a bucket at a time, in one or two slots.
        states: with masters, remainders and averages. An optimizer that is no one rule over elements has its states in
            ordinary memory.
        slots: how many there are for gradients.
    """

    parameters: int
    gradients: int
    states: int
    slots: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.states


def buckets(sizes: Iterable[int], most: int) -> list[int]:
    """How many of the sizes go into each bucket, in their order; one that is larger than a bucket goes alone."""
    counts: list[int] = []
    filled = most
    for size in sizes:
        if filled + size > most or not counts:
            counts.append(0)
            filled = 0
        counts[-1] += 1
        filled += size
    return counts


def landing(sizes: Sequence[int], most: int) -> int:
    """The bytes that the largest bucket may have, whatever the order in which gradients come."""
    return max([min(sum(sizes), most), *sizes], default=0)


def needs(optimizer: Groups, places: Sequence[tuple[int, int]], most: int) -> PinnedBytes:
    """What the parameters at these places take."""
    params = [optimizer._param(where) for where in places]
    grads = [array(p, getattr(p, "grad_dtype", None) or p.dtype).bytes for p in params]
    slots = min(2, len(buckets(grads, most)))
    return PinnedBytes(sum(array(p, p.dtype).bytes for p in params), slots * landing(grads, most),
                       sum(kept.bytes for where in places for kept in states(optimizer, where).values()), slots)


def pin(link: Link, size: int, what: str, remedy: str) -> Tensor:
    """So many bytes of pinned memory.

    Raises:
        RuntimeError: there is not as much; the message says what to do.
    """
    try:
        return link.pinned(size)
    except RuntimeError as error:  # the driver's, or torch's where the host has no memory
        raise RuntimeError(
            f"the host gives no {size / 2**30:.2f} GiB of pinned memory for {what}, and no parameter was stepped: "
            f"{remedy}, or allow the process more (the memory limit of its container, `ulimit -l`, under WSL the "
            f"memory in .wslconfig). {error}") from error


def laid_out(memory: Tensor, arrays: Sequence[Mapping[str, Array]]) -> list[dict[str, Tensor]]:
    """The tensors of each mapping, one after the other in the memory."""
    made: list[dict[str, Tensor]] = []
    begin = 0
    for named in arrays:
        made.append({})
        for name, one in named.items():
            made[-1][name] = one.at(memory, begin)
            begin += one.bytes
    return made


def settle(state: dict[str, Any], homes: Mapping[str, Tensor]) -> None:
    """Move states into their places in pinned memory; and any that are on a device to the host."""
    for name, value in state.items():
        if not isinstance(value, Tensor) or value is homes.get(name):
            continue
        home = homes.get(name)
        if home is not None and (value.dtype, value.shape, value.stride()) == (home.dtype, home.shape, home.stride()):
            state[name] = home.copy_(value)
        elif value.device.type != "cpu":
            state[name] = value.cpu()
