"""The tensors of an optimizer on any device, compared at every step with what they were.

A pointer alone proves nothing: dtype, device, shape and strides are compared with it. `Roster` is the naive way, one
tensor after the other; `_native.Roster` (csrc/cpu/roster.h) does the same in one call, and is taken where it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import native
from fasttrain.optim.local import dtensor_type, is_dtensor, local, version

PLAIN = (Tensor, torch.nn.Parameter)
COUNTED = (torch.float32, torch.float64, torch.int32, torch.int64)


class Look(NamedTuple):
    """Where and what a tensor is."""

    type: type
    at: int
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # zero of dimensions of size 1, and where there is no element: any will do there


def look(tensor: Any, types: tuple[type, ...] | None) -> Look | None:
    """None if it is of another type, or has no strided elements in memory."""
    if not isinstance(tensor, Tensor):
        return None
    own: Any = getattr(tensor, "_local_tensor", tensor) if types and is_dtensor(tensor) else local(tensor)
    if (types and type(own) not in types) or own.layout != torch.strided or own.is_meta:
        return None
    count = own.numel()
    if count and own.data_ptr() == 0:
        return None
    strides = tuple(0 if size == 1 or not count else stride
                    for size, stride in zip(own.shape, own.stride(), strict=True))
    return Look(type(own), own.data_ptr(), own.dtype, own.device, tuple(own.shape), strides)


def look_at_gradient(p: Any, grad: Any, types: tuple[type, ...] | None) -> Look | None:
    """None, too, if it is placed in another way than its parameter, or is to be read negated or conjugated."""
    if is_dtensor(p) != is_dtensor(grad):
        return None
    if is_dtensor(p) and (p.device_mesh is not grad.device_mesh or p.placements != grad.placements):
        return None
    found = look(grad, types)
    return None if found is None or local(grad).is_neg() or local(grad).is_conj() else found


@dataclass
class Known:
    """A parameter as it was told."""

    p: Look
    grad: Look
    state: dict[str, Any]
    held: list[tuple[str, Any, Look]]
    counter: Tensor | None
    fresh: bool
    zero: bool
    watched: bool
    version: int


class Roster:
    """As `_native.Roster`, which says what each method does.

    Arguments:
        types: of tensors that are taken; None: any.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], types: tuple[type, ...] | None = PLAIN) -> None:
        self.types = types
        self.groups = [list(params) for params in groups]
        self.params = [(group, p) for group, params in enumerate(self.groups) for p in params]
        self.known: dict[int, Known] = {}
        self.found: dict[int, Look] = {}  # the gradients of the active parameters
        self.grads: dict[int, Tensor] = {}

    def scan(self, state: Any, groups: Sequence[Sequence[Tensor]]) -> list[int] | None:
        self.release()
        if [list(map(id, params)) for params in groups] != [list(map(id, params)) for params in self.groups]:
            return None
        return [index for index, (_, p) in enumerate(self.params)
                if not self.again(index, state) and p.grad is not None]

    def again(self, index: int, state: Any) -> bool:
        _, p = self.params[index]
        grad = self._same(index, p, state)
        if grad is None:
            self.found.pop(index, None)
            return False
        assert p.grad is not None
        self.found[index], self.grads[index] = grad, p.grad
        return True

    def _same(self, index: int, p: Tensor, state: Any) -> Look | None:
        """How its gradient lies now, if everything else is as it was told."""
        known = self.known.get(index)
        if known is None or p.grad is None or look(p, self.types) != known.p:
            return None
        grad = look_at_gradient(p, p.grad, self.types)
        if grad is None or grad._replace(at=0) != known.grad._replace(at=0):
            return None
        if known.held and state.get(p) is not known.state:
            return None
        for key, tensor, before in known.held:
            if known.state.get(key) is not tensor or look(tensor, self.types) != before:
                return None
        return None if known.watched and version(p) != known.version else grad

    def set(self, index: int, state: dict[str, Any], keys: tuple[str, ...], counted: bool = False, fresh: bool = False,
            zero: bool = False, watched: bool = False) -> bool:
        self.forget(index)
        _, p = self.params[index]
        own = look(p, self.types)
        grad = None if p.grad is None else look_at_gradient(p, p.grad, self.types)
        if own is None or grad is None:
            return False
        held = []
        for key in keys:
            if (found := look(state[key], self.types)) is None:
                return False
            held.append((key, state[key], found))
        counter = state[keys[-1]] if counted else None
        if counter is not None and (counter.device.type != "cpu" or counter.ndim or counter.dtype not in COUNTED):
            return False
        self.known[index] = Known(own, grad, state, held, counter, fresh, zero, watched, version(p) if watched else -1)
        assert p.grad is not None
        self.found[index], self.grads[index] = grad, p.grad
        return True

    def forget(self, index: int) -> None:
        self.known.pop(index, None)
        self.found.pop(index, None)

    def active(self) -> bytes:
        return bytes(index in self.found for index in range(len(self.params)))

    def addresses(self) -> np.ndarray:
        return np.array([self.found[index].at for index in sorted(self.found)], np.int64)

    def rows(self) -> tuple[list[tuple[int, float]], np.ndarray]:
        rows: dict[tuple[int, float], int] = {}
        row_of = []
        for index in sorted(self.found):
            known, (group, _) = self.known[index], self.params[index]
            step = float(known.counter) + 1 if known.counter is not None else 1.0 if known.fresh else 2.0
            row_of.append(rows.setdefault((group, step), len(rows)))
        return list(rows), np.array(row_of, np.int64)

    def stepped(self, increment: Callable[[list[Tensor]], None]) -> None:
        written: list[Tensor] = []
        for index in sorted(self.found):
            known, (_, p) = self.known[index], self.params[index]
            if known.counter is not None:
                known.counter.numpy()[...] += 1  # the version is counted below, with all others
            known.fresh = False
            own = [p, *(tensor for _, tensor, _ in known.held)]
            written += [one for tensor in own for one in dict.fromkeys((tensor, local(tensor)))]
            if known.zero:
                assert p.grad is not None
                written.append(p.grad)
        increment(written)

    def remember(self) -> None:
        for index in self.found:
            if self.known[index].watched:
                self.known[index].version = version(self.params[index][1])

    def version(self, index: int) -> int:
        return self.known[index].version if index in self.known else -1

    def release(self) -> None:
        self.grads.clear()


class Both:
    """The compiled one, and for the parameters that it cannot read (subclasses of tensors, results of collectives that
    are under way) the other. What the host counts is not here.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self.compiled = native.module().Roster(native.reader(dtensor_type()), [list(params) for params in groups])
        self.other, self.odd = Roster(groups, None), set[int]()

    def scan(self, state: Any, groups: Sequence[Sequence[Tensor]]) -> list[int] | None:
        self.other.release()
        found = self.compiled.scan(state, groups)
        for index in self.odd:
            self.other.again(index, state)
        return None if found is None else [index for index in found if index not in self.other.found]

    def again(self, index: int, state: Any) -> bool:
        return bool(self.compiled.again(index, state)) or (index in self.odd and self.other.again(index, state))

    def set(self, index: int, *told: Any, **keywords: Any) -> bool:
        self.odd.discard(index)
        self.other.forget(index)
        if self.compiled.set(index, *told, **keywords):
            return True
        self.odd.add(index)
        return self.other.set(index, *told, **keywords)

    def active(self) -> bytes:
        found = bytearray(self.compiled.active())
        for index in self.other.found:
            found[index] = 1
        return bytes(found)

    def addresses(self) -> np.ndarray:
        own: np.ndarray = self.compiled.addresses()
        if not self.other.found:
            return own
        merged = np.zeros(len(self.other.params), np.int64)
        merged[np.frombuffer(self.compiled.active(), np.uint8) != 0] = own
        for index, found in self.other.found.items():
            merged[index] = found.at
        return merged[np.frombuffer(self.active(), np.uint8) != 0]

    def remember(self) -> None:
        self.compiled.remember()
        self.other.remember()

    def release(self) -> None:
        self.compiled.release()
        self.other.release()


def compiled(groups: Sequence[Sequence[Tensor]]) -> Any:
    """The compiled one, or where there is none, what takes as much."""
    if native.load()[0] is None:
        return Roster(groups)
    return native.module().Roster(native.reader(dtensor_type()), [list(params) for params in groups])


def roster(groups: Sequence[Sequence[Tensor]]) -> Any:
    """What compares any parameters."""
    return Roster(groups, None) if native.load()[0] is None else Both(groups)


def versions(tensors: Sequence[Any]) -> list[int]:
    """The version of each tensor."""
    if native.load()[0] is None:
        return [version(tensor) for tensor in tensors]
    found: list[int] = native.module().versions(native.reader(dtensor_type()), tensors)
    return found
