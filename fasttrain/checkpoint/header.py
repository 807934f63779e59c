"""The header of a safetensors file: written, and read without believing it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.checkpoint.manifest import need, parse
from fasttrain.checkpoint.pieces import SIZES

LIMIT = 32 << 20  # bytes of a header; a larger one is neither written nor read
METADATA = {"format": "pt"}  # without it transformers refuses a file


@dataclass(frozen=True)
class Entry:
    """A tensor of the file; `offset` from the file's begin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def encode(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The header of a file that holds these tensors (key, dtype, shape, bytes), one behind the other."""
    tree: dict[str, Any] = {"__metadata__": METADATA}
    at = 0
    for key, dtype, shape, nbytes in tensors:
        tree[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LIMIT:
        raise ValueError(f"the header of a file would have {len(text):,} bytes for {len(tree) - 1:,} tensors, but at "
                         f"most {LIMIT:,} are read again: save fewer, larger tensors")
    return struct.pack("<Q", len(text)) + text


def read(path: Path, content: memoryview) -> dict[str, Entry]:
    """The tensors of any safetensors file.

    Arguments:
        content: of the whole file.

    Raises:
        Malformed: it is no such file, or its entries overlap, leave holes, or run out of it.
    """
    length = header_size(path, bytes(content[:8]), len(content))
    tree = parse(path, bytes(content[8:length]))
    tree.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for key, entry in tree.items():
        entries[key] = _entry(path, key, entry, length)
    at = length
    for key, found in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        need(path, found.offset == at, f"begins at byte {found.offset}, where {at} was to be: tensors overlap or leave "
                                       f"a hole", key)
        at += found.nbytes
    need(path, at == len(content), f"its tensors end at byte {at}, but it has {len(content)}")
    return entries


def header_size(path: Path, first: bytes, size: int) -> int:
    """Where the data begins, by the first eight bytes of a file of `size` bytes."""
    need(path, len(first) == 8, f"{size} bytes are no safetensors file")
    length = struct.unpack("<Q", first)[0]
    need(path, length <= LIMIT, f"a header of {length:,} bytes; at most {LIMIT:,} are read")
    need(path, 8 + length <= size, f"a header of {length:,} bytes in a file of {size:,}")
    return 8 + length


def _entry(path: Path, key: str, entry: Any, begin: int) -> Entry:
    need(path, isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
         f"its entry is {str(entry)[:100]}", key)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    need(path, isinstance(dtype, str) and dtype in SIZES, f"unknown dtype {dtype!r}", key)
    for numbers in (shape, offsets):
        need(path, isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers),
             f"shape {str(shape)[:100]} and offsets {str(offsets)[:100]} are no lists of counts", key)
    need(path, len(offsets) == 2 and offsets[1] - offsets[0] == math.prod(shape) * SIZES[dtype],
         f"offsets {offsets} do not fit shape {shape} of {dtype}", key)
    return Entry(dtype, tuple(shape), begin + offsets[0], offsets[1] - offsets[0])
