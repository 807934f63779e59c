"""What is loaded from: a checkpoint of any number of ranks, or tensors that another package saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fasttrain.checkpoint import encoding
from fasttrain.checkpoint.errors import Incomplete
from fasttrain.checkpoint.parts import BY_NAME, DTYPES, is_plain_memory, resolved
from fasttrain.checkpoint.pieces import SIZES
from fasttrain.checkpoint.problems import Problem
from fasttrain.checkpoint.read import Reader
from fasttrain.checkpoint.regions import Region, intersection


class Kind(NamedTuple):
    """Of a tensor: safetensors' name of its dtype, and its whole shape."""

    dtype: str
    shape: tuple[int, ...]


class Source(Protocol):
    """A store of tensors by address, and of one tree of values for each rank that wrote it."""

    world: int

    def kinds(self) -> Mapping[str, Kind]: ...
    def values(self, rank: int) -> Mapping[str, Any]: ...
    def verify(self, reads: Sequence[tuple[str, Region]]) -> None: ...
    def read(self, name: str, region: Region, out: memoryview) -> None: ...


class OfReader:
    """A checkpoint of this package as a source."""

    def __init__(self, reader: Reader):
        self.reader, self.world = reader, reader.world
        self._kinds = {name: Kind(stored.dtype, stored.shape) for name, stored in reader.tensors.items()}

    def kinds(self) -> Mapping[str, Kind]:
        return self._kinds

    def values(self, rank: int) -> Mapping[str, Any]:
        return self.reader.values(rank)

    def verify(self, reads: Sequence[tuple[str, Region]]) -> None:
        for name, region in reads:
            held = [box for part in self.reader.tensors[name].parts for _, box in part.region.blocks()]
            got = sum(math.prod(shared[1]) for _, wanted in region.blocks() for box in held
                      if (shared := intersection(wanted, box)) is not None)
            if got < region.elements:
                raise Incomplete(f"{self.reader.path}: tensor {name!r}: {region.elements:,} elements are wanted, and "
                                 f"{got:,} of them are there")
        self.reader.verify_all(reads)

    def read(self, name: str, region: Region, out: memoryview) -> None:
        self.reader.read(name, region.span, region.box, out)


class OfTensors:
    """Whole tensors in memory as a source.

    Arguments:
        tensors: by address.
        entries: of the tree of values.
    """

    world = 1

    def __init__(self, tensors: Mapping[str, Tensor], entries: Mapping[str, Any]):
        self.tensors, self._entries = tensors, entries

    def kinds(self) -> Mapping[str, Kind]:
        return {name: Kind(DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in self.tensors.items()}

    def values(self, rank: int) -> Mapping[str, Any]:
        return {"entries": self._entries}

    def verify(self, reads: Sequence[tuple[str, Region]]) -> None:
        """Nothing is known of what they were."""

    def read(self, name: str, region: Region, out: memoryview) -> None:
        whole = self.tensors[name].detach().cpu()
        held = resolved(region_of(whole, region)).contiguous()
        np.frombuffer(out, np.uint8)[:] = bytes_of(held)


def region_of(whole: Tensor, region: Region) -> Tensor:
    """The elements of a region of a whole tensor."""
    if region.span is not None:
        return whole.reshape(-1)[region.span[0] : sum(region.span)]
    for dim, (low, size) in enumerate(zip(*region.box, strict=True) if region.box is not None else ()):
        whole = whole.narrow(dim, low, size)
    return whole


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the host, as an array of the same memory."""
    # One element is contiguous with any stride, and is no bytes before it has that of one.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


class Saved:
    """What a load has before it: the source, and what is counted of it.

    Attributes:
        bytes_read: of tensors, by this process.
    """

    def __init__(self, source: Source):
        self.source, self.kinds = source, source.kinds()
        self.world, self.bytes_read = source.world, 0

    def entry(self, key: str, rank: int = 0) -> Any:
        """What one rank has saved of an entry of the state beside tensors; None if nothing."""
        return self.source.values(rank).get("entries", {}).get(key)

    def names(self, key: str) -> list[str]:
        """The addresses of an entry's tensors."""
        return [name for name in self.kinds if name.startswith(f"{key}/")]

    def read_into(self, memory: Tensor, name: str, region: Region) -> None:
        """Read elements into where they lie in this process: of the region's extent or flat, with any strides."""
        self.bytes_read += memory.numel() * memory.element_size()
        if is_plain_memory(memory):
            self.source.read(name, region, memoryview(bytes_of(memory)))  # type: ignore[arg-type]
            return
        held = torch.empty(region.extent, dtype=memory.dtype)
        self.source.read(name, region, memoryview(bytes_of(held)))  # type: ignore[arg-type]
        if 0 in memory.stride():  # expanded: what was saved of it says the same again and again
            held = held.view(memory.shape)
            for dim, stride in enumerate(memory.stride()):
                if not stride and memory.shape[dim] > 1:
                    memory, held = memory.narrow(dim, 0, 1), held.narrow(dim, 0, 1)
        memory.copy_(held.view(memory.shape))

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A whole tensor."""
        kind = self.kinds[name]
        found = torch.empty(kind.shape, dtype=BY_NAME[kind.dtype], device=device)
        self.read_into(found, name, Region(kind.shape))
        return found

    def nbytes(self, name: str) -> int:
        """Bytes of a whole tensor."""
        return Region(self.kinds[name].shape).elements * SIZES[self.kinds[name].dtype]


class Plan(NamedTuple):
    """How one entry of a state would be loaded.

    Attributes:
        problems: why it cannot be; none if it can.
        reads: what is read of it here: verified before anything is changed.
        apply: load it.
        order: entries of smaller numbers are loaded first.
    """

    problems: list[Problem]
    reads: list[tuple[str, Region]]
    apply: Callable[[], None]
    order: int = 0


def refuse(*problems: Problem | str) -> Plan:
    """What cannot be loaded."""

    def never() -> None:
        raise AssertionError("a plan with problems was applied")

    return Plan([Problem(one) if isinstance(one, str) else one for one in problems], [], never)


def given(saved: Saved, device: torch.device | str = "cpu") -> Callable[[Mapping[str, Any]], Any]:
    """For `encoding.decode`: reads whole tensors and arrays."""

    def give(told: Mapping[str, Any]) -> Any:
        tensor = saved.read(told["name"], device if told.get("device") == "cuda" else "cpu")
        return tensor.numpy() if told[encoding.MARK] == "array" else tensor

    return give


def states_of(saved: Saved, key: str) -> dict[str, dict[str, Any]]:
    """What all ranks together tell of the states of an optimizer, by the names of parameters."""
    states: dict[str, dict[str, Any]] = {}
    for rank in range(saved.world):
        for name, state in (saved.entry(key, rank) or {}).get("state", {}).items():
            states.setdefault(name, {}).update(state)
    return states


def whole_reads(tree: Any, saved: Saved) -> list[tuple[str, Region]]:
    """What `given` would read."""
    return [(told["name"], Region(saved.kinds[told["name"]].shape)) for told in encoding.references(tree)]

