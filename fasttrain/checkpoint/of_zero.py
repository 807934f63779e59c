"""A divided optimizer (`Zero`) as an entry of a state: this rank's intervals, under the addresses of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint import encoding
from fasttrain.checkpoint.intervals import begin, in_memory_order
from fasttrain.checkpoint.parts import ALONE, BY_NAME, Among, Part, parts_of, tensor_of
from fasttrain.checkpoint.regions import Region
from fasttrain.checkpoint.saved import Saved
from fasttrain.optim.local import cuts, is_dtensor
from fasttrain.parallel import Zero
from fasttrain.parallel.zero_pieces import Piece, row_major
from fasttrain.parallel.zero_state import Array, arrays
from fasttrain.precision.codecs import codec

Reads = list[tuple[str, Region]]


def save(zero: Zero, key: str, names: Mapping[int, str],
         everyone: Among) -> tuple[dict[str, Any], list[Part]]:
    """By the names of parameters what this rank tells of their states; and its parts.

    Arguments:
        key: of the entry.
        names: of the parameters, by their ids.
        everyone: the ranks that hold the same plain tensors; of a mesh they are more than those that `zero` divides by.
    """
    told: dict[str, Any] = {}
    parts: list[Part] = []
    for piece in zero._pieces:
        state = zero.inner.state.get(piece.param, {})
        if not state:
            continue
        name, known = names[id(piece.whole)], arrays(zero, piece.where)

        def take(path: str, value: Any, piece: Piece = piece, name: str = name,
                 known: Mapping[str, Array] = known) -> Mapping[str, Any]:
            address, value = f"{key}/{name}/{path}", tensor_of(f"{key}/{name}/{path}", value)
            among = (everyone.copies(piece.whole) if is_dtensor(piece.whole) else everyone).beyond(
                zero.ranks_of(piece))
            parts.extend(replace(part, among=among) for part in _parts(address, value, piece, known.get(path)))
            return _reference(address, value, piece, known.get(path))

        told[name] = encoding.encode(dict(state), take)
    return told, parts


def _parts(name: str, value: Tensor, piece: Piece, array: Array | None) -> list[Part]:
    """Numbers of a parameter that is cut (its step) are the same on all that have a part of it: the first writes."""
    if array is None:
        whole: Any = piece.whole
        later = piece.first > 0 or any(whole.device_mesh.get_local_rank(dim) for dim, _ in cuts(whole))
        return [replace(part, silent=later) for part in parts_of(name, value, ALONE)]
    return _cut(name, value, piece, array)


def _cut(name: str, flat: Tensor, piece: Piece, array: Array) -> list[Part]:
    """The parts of an array that is cut as its parameter is."""
    shape = array.shape(piece.whole.shape)
    if not math.prod(shape):
        return [Part(name, flat.detach().reshape(shape), Region(shape))]
    if codec(array.number).block or (row_major(piece.whole) and not is_dtensor(piece.whole)):
        first = array.length(begin(name, piece.whole) + piece.first)
        return [Part(name, flat.detach(), Region(shape, span=(first, flat.numel())))]
    return in_memory_order(name, flat.detach(), piece.whole, array.length(piece.first), row_major(piece.whole))


def _reference(name: str, value: Tensor, piece: Piece, array: Array | None) -> dict[str, Any]:
    told: dict[str, Any] = {"name": name}
    like = array is not None and array.shape(piece.whole.shape) == tuple(piece.whole.shape)
    if like or (value.dim() and value.shape == piece.whole.shape and value.stride() == piece.whole.stride()):
        told["like"] = True
    if piece.whole.device.type != "cpu" and value.device.type == "cpu":
        told["host"] = True
    return told


def plan(zero: Zero, saved: Saved, states: Mapping[str, Any], groups: list[dict[str, Any]],
         names: Mapping[int, str]) -> tuple[Reads, Callable[[], None]]:
    """What this rank reads, and what loads it."""
    reads: Reads = []
    for piece in zero._pieces:
        tree = states.get(names[id(piece.whole)], {})
        for path, one in _top(tree):
            for part in _home(one, piece, saved, _array(zero, piece, path), "meta"):
                reads.append((one["name"], part.region))

    def apply() -> None:
        inner_groups, state = [], {}
        numbers = {id(piece.param): number for number, piece in enumerate(zero._pieces)}
        for index, options in enumerate(groups):
            mine = [numbers[id(piece.param)] for piece in zero._pieces if piece.where[0] == index]
            inner_groups.append({**options, "params": mine})
        for piece in zero._pieces:
            if tree := states.get(names[id(piece.whole)]):
                state[numbers[id(piece.param)]] = {
                    key: encoding.decode(value, lambda one, piece=piece, key=key: _read(  # type: ignore[misc]
                        saved, one, piece, _array(zero, piece, key))) for key, value in tree.items()}
        zero.inner.load_state_dict({"state": state, "param_groups": inner_groups})
        for piece in zero._pieces:
            for key, value in state.get(numbers[id(piece.param)], {}).items():
                loaded = zero.inner.state[piece.param].get(key)
                if isinstance(value, Tensor) and loaded.dtype != value.dtype and key != "step":
                    zero.inner.state[piece.param][key] = value.to(piece.param.device)
        zero._pull()
        zero._remember()

    return reads, apply


def _array(zero: Zero, piece: Piece, path: str) -> Array | None:
    return arrays(zero, piece.where).get(path)


def _top(tree: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What refers to tensors, with the first step of its path."""
    return [(key, one) for key, value in tree.items() for one in encoding.references(value)]


def _home(one: Mapping[str, Any], piece: Piece, saved: Saved, array: Array | None,
          device: torch.device | str) -> list[Part]:
    """Empty memory for what this rank holds of a state; `memory` of the first part begins it."""
    kind = saved.kinds[one["name"]]
    dtype = BY_NAME[kind.dtype]
    if array is None:
        like = one.get("like") and kind.shape == tuple(piece.whole.shape)
        memory = torch.empty_like(piece.whole, dtype=dtype, device=device, requires_grad=False) if like else \
            torch.empty(kind.shape, dtype=dtype, device=device)
        return parts_of(one["name"], memory, ALONE)
    length = array.length(piece.first + piece.numel) - array.length(piece.first)
    return _cut(one["name"], torch.empty(length, dtype=dtype, device=device), piece, array)


def _read(saved: Saved, one: Mapping[str, Any], piece: Piece, array: Array | None) -> Tensor:
    device = "cpu" if one.get("host") else piece.param.device
    parts = _home(one, piece, saved, array, device)
    for part in parts:
        saved.read_into(part.memory, one["name"], part.region)
    if array is None:
        return parts[0].memory
    flat = parts[0].memory
    return flat if len(parts) == 1 and flat.dim() == 1 else _flat(parts, array, piece)


def _flat(parts: list[Part], array: Array, piece: Piece) -> Tensor:
    """The interval that the parts are views of."""
    length = array.length(piece.first + piece.numel) - array.length(piece.first)
    return parts[0].memory.new_empty(0).set_(parts[0].memory.untyped_storage(), 0, (length,), (1,))
