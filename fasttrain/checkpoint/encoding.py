"""Trees of values: JSON for what is no tensor, and the way back to what it was.

JSON alone knows no tuples, no keys but texts, no infinity, and whole numbers as exact as a double. What it does not
know is written as an object with the member ``"$"``, which says what it was. Nothing that would have to be executed is
written; what is not known here is refused.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

MARK = "$"
EXACT = 2**53  # whole numbers up to here are doubles
LONG = 4096  # bits: Python does not write much longer whole numbers with decimals
Take = Callable[[str, Any], Mapping[str, Any]]  # path and tensor or array -> what refers to it
Give = Callable[[Mapping[str, Any]], Any]


def encode(value: Any, take: Take | None = None, path: str = "") -> Any:
    """A tree as JSON.

    Arguments:
        take: called with the path and every tensor or array; what it returns refers to it. None: there must be none.

    Raises:
        TypeError: an object of a kind that cannot be kept; its path is named.

    Example:
        >>> encode({"betas": (0.9, 0.99), "best": float("inf")})
        {'betas': {'$': 'tuple', 'of': [0.9, 0.99]}, 'best': {'$': 'float', 'of': 'inf'}}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor | np.ndarray) and take is not None:
        return {MARK: "array" if isinstance(value, np.ndarray) else "tensor", **take(path, value)}
    plain = _scalar(value)
    if plain is not None or value is None:
        return plain

    def inner(key: Any, one: Any) -> Any:
        step = str(key)
        if "/" in step or "%2F" in step:  # no two paths are the same
            step = step.replace("%", "%25").replace("/", "%2F")
        return encode(one, take, f"{path}/{step}" if path else step)

    kind = type(value)
    if kind is list:
        return [inner(place, one) for place, one in enumerate(value)]
    if kind in (tuple, torch.Size):
        return {MARK: "tuple", "of": [inner(place, one) for place, one in enumerate(value)]}
    if kind is deque:
        return {MARK: "deque", "of": [inner(place, one) for place, one in enumerate(value)], "most": value.maxlen}
    if isinstance(value, dict):
        if kind is not Counter and MARK not in value and all(type(key) is str for key in value):
            return {key: inner(key, one) for key, one in value.items()}
        pairs = [[encode(key, None, f"{path}, a key"), inner(key if type(key) is str else f"{place}:{key}", one)]
                 for place, (key, one) in enumerate(value.items())]
        return {MARK: "counter" if kind is Counter else "dict", "of": pairs}
    raise TypeError(f"{path or 'the value'} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot "
                    "hold: it holds tensors, arrays, numbers, texts, bytes, None, and lists, tuples, deques and dicts "
                    "of these")


def _scalar(value: Any) -> Any:
    """A value without parts as JSON; None if it is none."""
    kind = type(value)
    if kind in (bool, str):
        return value
    if kind is int:
        if abs(value) <= EXACT:
            return value
        return {MARK: "int", "of": str(value) if value.bit_length() < LONG else hex(value)}
    if kind is float:
        if math.isfinite(value):
            return value
        return {MARK: "float", "of": struct.pack(">d", value).hex() if math.isnan(value) else str(value)}
    if kind is complex:
        return {MARK: "complex", "of": [_scalar(value.real), _scalar(value.imag)]}
    if kind is bytes:
        return {MARK: "bytes", "of": base64.b64encode(value).decode()}
    if kind is torch.dtype:
        return {MARK: "dtype", "of": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {MARK: "device", "of": str(value)}
    return None


def decode(tree: Any, give: Give | None = None) -> Any:
    """What `encode` was given.

    Arguments:
        give: called with what `take` returned, for every tensor and array.

    Raises:
        ValueError: it is none of `encode`'s.

    Example:
        >>> decode({"$": "tuple", "of": [1, {"$": "int", "of": "9007199254740993"}]})
        (1, 9007199254740993)
    """
    if isinstance(tree, list):
        return [decode(one, give) for one in tree]
    if not isinstance(tree, Mapping):
        return tree
    kind = tree.get(MARK)
    if kind is None:
        return {key: decode(one, give) for key, one in tree.items()}
    if kind in ("tensor", "array") and give is not None:
        return give(tree)
    of = tree.get("of")
    if kind in LEAVES:
        return LEAVES[kind](of)
    if kind in ("tuple", "deque") and isinstance(of, list):
        parts = [decode(one, give) for one in of]
        return tuple(parts) if kind == "tuple" else deque(parts, tree["most"])
    if kind in ("dict", "counter") and isinstance(of, list):
        pairs = {decode(key): decode(one, give) for key, one in of}
        return pairs if kind == "dict" else Counter(pairs)
    raise ValueError(f"a value of the kind {kind!r} is not known here: was it written by a newer version?")


def _float(text: str) -> float:
    return float(text) if text.endswith("inf") else struct.unpack(">d", bytes.fromhex(text))[0]


def _dtype(name: str) -> torch.dtype:
    if isinstance(found := getattr(torch, name, None), torch.dtype):
        return found
    raise ValueError(f"torch has no dtype {name!r}")


LEAVES: dict[str, Callable[[Any], Any]] = {
    "int": lambda of: int(of, 0), "float": _float, "bytes": base64.b64decode, "dtype": _dtype, "device": torch.device,
    "complex": lambda of: complex(decode(of[0]), decode(of[1])),
}


def references(tree: Any) -> list[Mapping[str, Any]]:
    """What refers to the tensors and arrays of a tree."""
    found: list[Mapping[str, Any]] = []
    decode(tree, found.append)
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same: tensors among them, and NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and bool(one == other or (one != one and other != other))
