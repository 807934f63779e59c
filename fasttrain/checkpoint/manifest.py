"""Manifests: JSON that checks itself. What they say is believed only after every number in it was checked."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from fasttrain import __version__
from fasttrain.checkpoint.errors import Damaged, Incomplete, Malformed, NotACheckpoint
from fasttrain.checkpoint.pieces import SIZES
from fasttrain.checkpoint.regions import Region

FORMAT = 1
NAME = "manifest.json"
LIMIT = 256 << 20  # bytes of a manifest; a larger one is neither written nor read
PRODUCER = f"fasttrain {__version__}"
RANK_FILE = re.compile(r"rank-(\d{5})-of-(\d{5})(-\d+)?\.(json|safetensors)")
_HEAD = re.compile(rb'\{"xxh3_128": "([0-9a-f]{32})",\n')
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Part:
    """Some elements of a tensor, and where their bytes lie."""

    region: Region
    file: str
    offset: int
    nbytes: int
    xxh3: str
    chunks: tuple[str, ...]
    chunk: int


@dataclass(frozen=True)
class RankManifest:
    """What one rank has written: its files by name (size, header, xxh3), the parts of its tensors, its values."""

    files: dict[str, dict[str, Any]]
    tensors: list[tuple[str, str, Part]]  # name, dtype
    values: dict[str, Any]


def stem(rank: int, world: int) -> str:
    """What the names of a rank's files begin with."""
    return f"rank-{rank:05}-of-{world:05}"


def digest(content: Any) -> str:
    """The checksum of some bytes, as it is written."""
    return xxhash.xxh3_128_hexdigest(content)


def encode(content: Mapping[str, Any]) -> bytes:
    """A manifest's bytes: JSON whose first member is the xxh3 of all that follows its line."""
    rest = ",\n".join(f"{json.dumps(name)}: {_lines(value)}" for name, value in content.items()).encode() + b"}\n"
    if len(rest) > LIMIT:
        raise ValueError(f"a manifest of {len(rest):,} bytes, but at most {LIMIT:,} are read again: keep large values "
                         f"as tensors")
    return b'{"xxh3_128": "%s",\n' % digest(rest).encode() + rest


def _lines(value: Any) -> str:
    """JSON; of a list of objects one on each line, so that people can read it."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(map(json.dumps, value)) + "]"
    return json.dumps(value)


def decode(path: Path, content: bytes) -> dict[str, Any]:
    """What `encode` was given.

    Raises:
        Damaged: a byte of it changed.
    """
    head = _HEAD.match(content)
    if head is None:
        raise Damaged(path, f"its first line is not a checksum ({len(content)} bytes are there)")
    if digest(memoryview(content)[head.end():]) != head[1].decode():
        raise Damaged(path, "its content is not what its checksum says")
    return parse(path, content)


def parse(path: Path, content: bytes) -> dict[str, Any]:
    """JSON of an object, in which no name comes twice."""
    try:
        tree = json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Malformed(path, f"no JSON that can be read: {error}") from error
    if not isinstance(tree, dict):
        raise Malformed(path, "no JSON object")
    return tree


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return found


def read_file(path: Path) -> bytes:
    """The content of a manifest: of a plain file, no link, of a size that is sensible."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise Malformed(path, "no plain file")
            if found.st_size > LIMIT:
                raise Malformed(path, f"{found.st_size:,} bytes; a manifest has at most {LIMIT:,}")
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Incomplete(f"{path}: not there") from error
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from error


def read_rank(path: Path, content: bytes, rank: int, world: int) -> RankManifest:
    """A rank's manifest, every entry checked."""
    tree = decode(path, content)
    check_format(path, tree)
    _need(path, tree.get("rank") == rank and tree.get("world") == world,
          f"it is rank {tree.get('rank')!r}'s of {tree.get('world')!r}, not rank {rank}'s of {world}")
    files, chunk, values, tensors = (tree.get(key) for key in ("files", "chunk", "values", "tensors"))
    _need(path, isinstance(values, dict) and isinstance(files, dict) and isinstance(tensors, list),
          "members are missing")
    _need(path, type(chunk) is int and 1 <= chunk <= 1 << 30, f"chunk is {chunk!r}")
    for name, file in files.items():  # type: ignore[union-attr]
        match = RANK_FILE.fullmatch(name)
        _need(path, match is not None and name.startswith(stem(rank, world)) and name.endswith(".safetensors"),
              f"{name!r} is no name of a file of this rank")
        _need(path, isinstance(file, dict) and _count(file.get("size")) and _count(file.get("header"))
              and 8 <= file["header"] <= file["size"] and _is_digest(file.get("xxh3"))
              and _is_digest(file.get("header_xxh3")), f"entry of {name} makes no sense")
    found = [_tensor(path, entry, files, chunk) for entry in tensors]  # type: ignore[union-attr]
    _do_not_overlap(path, found)
    return RankManifest(files, found, values)  # type: ignore[arg-type]


def _tensor(path: Path, entry: Any, files: dict[str, Any], chunk: int) -> tuple[str, str, Part]:
    _need(path, isinstance(entry, dict), "an entry of tensors is no object")
    name, dtype, file, offset, nbytes = (entry.get(key) for key in ("name", "dtype", "file", "offset", "nbytes"))
    _need(path, isinstance(name, str), f"a tensor is named {name!r}")
    _need(path, dtype in SIZES, f"tensor {name!r} has the unknown dtype {dtype!r}")
    _need(path, file in files, f"tensor {name!r} lies in {file!r}, which is not listed")
    try:
        region = Region(entry.get("shape"), entry.get("span"), entry.get("box"))  # type: ignore[arg-type]
    except ValueError as error:
        raise Malformed(path, f"tensor {name!r}: {error}") from error
    _need(path, _count(offset) and nbytes == region.elements * SIZES[dtype] and type(nbytes) is int
          and offset >= files[file]["header"] and offset + nbytes <= files[file]["size"],
          f"tensor {name!r} of {nbytes!r} bytes at {offset!r} does not fit its shape or its file")
    count = -(-nbytes // chunk)
    chunks = entry.get("chunks", [entry.get("xxh3")] if count == 1 else [])
    _need(path, isinstance(chunks, list) and len(chunks) == count and all(map(_is_digest, chunks))
          and entry.get("xxh3") == combined(chunks), f"tensor {name!r}: its checksums do not belong together")
    return name, dtype, Part(region, file, offset, nbytes, entry["xxh3"], tuple(chunks), chunk)


def _do_not_overlap(path: Path, tensors: list[tuple[str, str, Part]]) -> None:
    ends: dict[str, tuple[int, str]] = {}
    for name, _, part in sorted(tensors, key=lambda entry: (entry[2].offset, entry[2].nbytes)):
        end, before = ends.get(part.file, (0, ""))
        _need(path, part.offset >= end, f"tensors {before!r} and {name!r} overlap in {part.file}")
        ends[part.file] = part.offset + part.nbytes, name


def combined(digests: list[str]) -> str:
    """The checksum of what was hashed in chunks: of one chunk its own, else the xxh3 of all chunks' one after another."""
    return digests[0] if len(digests) == 1 else digest(b"".join(bytes.fromhex(one) for one in digests))


def check_format(path: Path, tree: dict[str, Any]) -> None:
    """Refuse what another version has to read."""
    version = tree.get("format")
    _need(path, type(version) is int and version >= 1, f"format is {version!r}")
    if version > FORMAT:  # type: ignore[operator]
        raise NotACheckpoint(f"{path}: written in format {version} by {tree.get('producer')!r}; this is {PRODUCER}, "
                             f"which reads formats up to {FORMAT}: install that version or a newer one")


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _need(path: Path, holds: bool, otherwise: str) -> None:
    if not holds:
        raise Malformed(path, otherwise)
