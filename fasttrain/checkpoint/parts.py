"""Where the elements of a state lie in this process, and which of them this process writes."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fasttrain.checkpoint.regions import Box, Region
from fasttrain.optim.local import is_dtensor, local, positions

DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.int64: "I64",
    torch.uint64: "U64", torch.float64: "F64", torch.complex64: "C64",
}  # fmt: skip
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
WHOLE = 1 << 16  # bytes: smaller tensors are not divided
GRAIN = 4096  # bytes: where a tensor is divided


@dataclass(frozen=True)
class Among:
    """The processes that hold the same: this one is number `index` of `count`. `who` tells them from others.

    What they hold alike is plain tensors. Of a DTensor it is the parts that are not cut, within its DeviceMesh; within
    a `Mesh`, others hold the same too (`fasttrain.checkpoint.place`).
    """

    index: int
    count: int
    who: Hashable = "all"

    def copies(self, tensor: Any) -> Among:
        """The processes that hold the same part of a DTensor as this one."""
        mesh = tensor.device_mesh
        dims = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
        index, count = 0, 1
        for dim in dims:
            index, count = index * mesh.size(dim) + mesh.get_local_rank(dim), count * mesh.size(dim)
        return Among(index, count, ("mesh", tuple(mesh.mesh.flatten().tolist()), tuple(dims)))

    def beyond(self, ranks: Sequence[int]) -> Among:
        """The processes that hold the same as this one of what is divided over some ranks, itself among them."""
        return ALONE


ALONE = Among(0, 1, "here")


@dataclass(frozen=True)
class Part:
    """Some elements of a tensor, and where they lie in this process.

    Attributes:
        name: the tensor's address.
        memory: the elements, of the region's extent or flat; with any strides, on any device.
        region: which they are.
        among: who holds the same.
        silent: whether another process writes them for sure.
    """

    name: str
    memory: Tensor
    region: Region
    among: Among = ALONE
    silent: bool = False

    @property
    def dtype(self) -> str:
        """Safetensors' name of the dtype.

        Raises:
            TypeError: safetensors has none for it.
        """
        if self.memory.dtype not in DTYPES:
            raise TypeError(f"{self.name} is {self.memory.dtype}, which safetensors files cannot hold; they hold "
                            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}")
        return DTYPES[self.memory.dtype]

    @property
    def nbytes(self) -> int:
        return self.memory.numel() * self.memory.element_size()


def tensor_of(name: str, value: Any) -> Tensor:
    """A tensor or an array of a state as a tensor.

    Raises:
        TypeError: an array of what tensors do not hold.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ma.MaskedArray) or value.dtype.kind not in "biufc":
        raise TypeError(f"{name} is a {type(value).__name__} of {value.dtype}, which a checkpoint cannot hold: it "
                        "holds arrays of numbers without a mask")
    if not value.flags.c_contiguous or not value.flags.writeable or not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="), order="C", copy=True)
    try:
        return torch.as_tensor(value)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error


def need_memory(name: str, tensor: Tensor) -> None:
    """Refuse what has no elements in memory: there is nothing to save, and nowhere to load it.

    Raises:
        ValueError: it is on the meta device, or of a lazy module that has not run.
        TypeError: its elements are those of other tensors, which it keeps in a way of its own.
    """
    if is_lazy(tensor):
        raise ValueError(f"{name} has no shape yet (a lazy module): run a batch through the model before it is saved "
                         "or loaded")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device: give the model memory (model.to_empty(device=...)) before it "
                         "is saved or loaded; what is not in its state dict is to be set then too")
    if not is_dtensor(tensor) and is_traceable_wrapper_subclass(tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, a tensor that is made of others: save those "
                        "that it is made of (tensor.__tensor_flatten__), or tensor.dequantize()")


def is_plain_memory(tensor: Tensor) -> bool:
    """Whether the bytes at its address are its elements, in order: on the host, and nothing to be done to them."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def resolved(tensor: Tensor) -> Tensor:
    """Its elements themselves, where it is marked as the conjugate or the negative of others."""
    return tensor.resolve_conj().resolve_neg()


def parts_of(name: str, tensor: Any, everyone: Among) -> list[Part]:
    """The parts of a tensor, or of a DTensor, that this process holds.

    Arguments:
        everyone: who holds the same, if it is no DTensor.

    Raises:
        ValueError: each process holds an addend of it.
    """
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is {tensor.layout}: a checkpoint holds strided tensors; save tensor.to_dense()")
    shape = tuple(tensor.shape)
    if not is_dtensor(tensor):
        return [Part(name, tensor.detach(), Region(shape), everyone)]
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"{name} is placed {tensor.placements}: each process holds an addend of it; redistribute it "
                         "to Replicate or Shard before it is saved")
    if tensor.device_mesh.get_coordinate() is None:
        return []
    try:
        among = everyone.copies(tensor)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    held = local(tensor.detach())
    if not tensor.numel():
        return [Part(name, held.reshape(shape) if held.numel() == 0 else held, Region(shape), everyone)]
    return [Part(name, view, Region(shape, box=box), among) for box, view in boxes(held, positions(tensor))]


def first_writes(part: Part, everyone: Among) -> Part:
    """A part that processes hold which may differ: the first one's is written."""
    return replace(part, among=ALONE, silent=everyone.index > 0) if part.among is everyone else part


def boxes(held: Tensor, positions: Sequence[Tensor]) -> Iterator[tuple[Box, Tensor]]:
    """The boxes of the whole that a local tensor is made of, each with its elements.

    Arguments:
        positions: for each dimension, the indices in the whole, ascending in runs.
    """
    runs = [list(_runs(index)) for index in positions]
    for chosen in itertools.product(*runs):
        view = held
        for dim, (_, at, length) in enumerate(chosen):
            view = view.narrow(dim, at, length)
        if view.numel():
            yield (tuple(first for first, _, _ in chosen), tuple(length for _, _, length in chosen)), view


def _runs(index: Tensor) -> Iterator[tuple[int, int, int]]:
    """First index, place and length of every run of indices that follow one another."""
    if not len(index):
        return
    starts = [0, *((index.diff() != 1).nonzero().flatten() + 1).tolist()]
    for start, end in itertools.pairwise([*starts, len(index)]):
        yield int(index[start]), start, end - start


# --- Who writes what --------------------------------------------------------------------------------------------------

def mine(parts: Sequence[Part]) -> list[Part]:
    """What this process writes: what only it holds, and its share, by bytes, of what others hold too.

    A pure function of what all that hold the same have given in the same order: nothing is asked, nothing is written
    twice.
    """
    kept = [part for part in parts if not part.silent]
    groups: dict[Hashable, list[Part]] = {}
    for part in kept:
        if part.among.count > 1:
            groups.setdefault(part.among.who, []).append(part)
    alone = [part for part in kept if part.among.count == 1]
    return alone + [piece for group in groups.values() for piece in _share(group)]


def _share(group: Sequence[Part]) -> Iterator[Part]:
    among, total = group[0].among, sum(part.nbytes for part in group)
    low, high = (total * rank // among.count for rank in (among.index, among.index + 1))
    start = 0
    for part in group:
        if part.nbytes < WHOLE or (part.region.box is None and not part.memory.is_contiguous()):
            place = min(start, max(total - 1, 0))
            if low <= place < high or (total == 0 and among.index == 0):
                yield part
        else:
            yield from (_rows if part.region.box is not None else _stretch)(part, low - start, high - start)
        start += part.nbytes


def _stretch(part: Part, low: int, high: int) -> Iterator[Part]:
    """What lies between two bytes of a whole tensor or an interval."""
    size, before = part.memory.element_size(), part.region.span[0] if part.region.span is not None else 0
    first, last = (_cut(bound, part.nbytes, GRAIN) // size for bound in (low, high))
    if first < last:
        yield replace(part, memory=part.memory.view(-1)[first:last],
                      region=Region(part.region.shape, span=(before + first, last - first)))


def _rows(part: Part, low: int, high: int) -> Iterator[Part]:
    """The rows of a box that begin between two bytes, counted as if it was row-major."""
    assert part.region.box is not None
    lower, extent = part.region.box
    dim = next(dim for dim, size in enumerate(extent) if size > 1)
    row = part.nbytes // extent[dim]
    first, last = (_cut(bound + row - 1, part.nbytes, row) // row for bound in (low, high))
    if first < last:
        box = ((*lower[:dim], lower[dim] + first, *lower[dim + 1:]), (*extent[:dim], last - first, *extent[dim + 1:]))
        yield replace(part, memory=part.memory.narrow(dim, first, last - first),
                      region=Region(part.region.shape, box=box))


def _cut(place: int, nbytes: int, grain: int) -> int:
    return nbytes if place >= nbytes else max(0, place) // grain * grain
