"""Manifests: JSON that checks itself. What they say is believed only after every number in it was checked."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from fasttrain import __version__
from fasttrain.checkpoint.errors import Damaged, Incomplete, Malformed, NotACheckpoint
from fasttrain.checkpoint.pieces import SIZES
from fasttrain.checkpoint.regions import Region

FORMAT = 1
NAME = "manifest.json"
LIMIT = 256 << 20  # bytes of a manifest; a larger one is neither written nor read
PRODUCER = f"fasttrain {__version__}"
_HEAD = re.compile(rb'\{"xxh3_128": "([0-9a-f]{32})",\n')
_DIGEST = re.compile(r"[0-9a-f]{32}")
Kind = TypeVar("Kind", int, str, dict, list)


@dataclass(frozen=True)
class Part:
    """Some elements of a tensor, and where their bytes lie: each `chunk` of them has a checksum."""

    region: Region
    file: str
    offset: int
    nbytes: int
    xxh3: str
    chunks: tuple[str, ...]
    chunk: int


@dataclass(frozen=True)
class DataFile:
    """A safetensors file of a rank: bytes in all, bytes of its header, that header's checksum, and the whole's."""

    size: int
    header: int
    header_xxh3: str
    xxh3: str


@dataclass(frozen=True)
class RankManifest:
    """What one rank has written: its files by name, the parts of its tensors, its values."""

    files: dict[str, DataFile]
    tensors: list[tuple[str, str, Part]]  # name, dtype
    values: dict[str, Any]


def stem(rank: int, world: int) -> str:
    """What the names of a rank's files begin with."""
    return f"rank-{rank:05}-of-{world:05}"


def data_name(rank: int, world: int, number: int) -> str:
    """The name of a rank's data file."""
    return f"{stem(rank, world)}{f'-{number}' if number else ''}.safetensors"


def digest(content: Any) -> str:
    """The checksum of some bytes, as it is written."""
    return xxhash.xxh3_128_hexdigest(content)


def combined(digests: Sequence[str]) -> str:
    """The checksum of what was hashed in pieces: of one its own, else the xxh3 of all theirs one after another."""
    return digests[0] if len(digests) == 1 else digest(b"".join(map(bytes.fromhex, digests)))


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
        NotACheckpoint: a later version wrote it.
    """
    head = _HEAD.match(content)
    if head is None:
        raise Damaged(path, f"its first line is not a checksum ({len(content):,} bytes are there)")
    if digest(memoryview(content)[head.end():]) != head[1].decode():
        raise Damaged(path, "its content is not what its checksum says (xxh3 differs)")
    tree = parse(path, content)
    version = take(path, tree, "format", int)
    need(path, version >= 1, f"format is {version}")
    if version > FORMAT:
        raise NotACheckpoint(f"{path}: written in format {version} by {tree.get('producer')!r}; this is {PRODUCER}, "
                             f"which reads formats up to {FORMAT}: install that version or a newer one")
    return tree


def parse(path: Path, content: bytes) -> dict[str, Any]:
    """JSON of an object, in which no name comes twice."""
    try:
        tree = json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Malformed(path, f"no JSON that can be read: {error}") from error
    need(path, isinstance(tree, dict), "no JSON object")
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
            need(path, stat.S_ISREG(found.st_mode), "no plain file")
            need(path, found.st_size <= LIMIT, f"{found.st_size:,} bytes; a manifest has at most {LIMIT:,}")
            return file.read()
    except FileNotFoundError as error:
        raise Incomplete(f"{path}: not there") from error
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from error


def read_rank(path: Path, content: bytes, rank: int, world: int) -> RankManifest:
    """A rank's manifest, every entry checked."""
    tree = decode(path, content)
    whose = take(path, tree, "rank", int), take(path, tree, "world", int)
    need(path, whose == (rank, world), f"it is that of rank {whose[0]} of {whose[1]}, not of rank {rank} of {world}")
    chunk = take(path, tree, "chunk", int)
    need(path, 1 <= chunk <= 1 << 30, f"chunks of {chunk} bytes")
    files = {}
    for number, (name, entry) in enumerate(take(path, tree, "files", dict).items()):
        need(path, name == data_name(rank, world, number) and isinstance(entry, dict),
             f"{name!r} is not how a file of this rank is named")
        files[name] = file = DataFile(take(path, entry, "size", int), take(path, entry, "header", int),
                                      checksum(path, entry.get("header_xxh3")), checksum(path, entry.get("xxh3")))
        need(path, 8 <= file.header <= file.size, f"{name} is to have a header of {file.header} in {file.size} bytes")
    tensors = [_tensor(path, entry, files, chunk) for entry in take(path, tree, "tensors", list)]
    _make_the_files(path, files, [(name, part) for name, _, part in tensors])
    return RankManifest(files, tensors, take(path, tree, "values", dict))


def _tensor(path: Path, entry: Any, files: dict[str, DataFile], chunk: int) -> tuple[str, str, Part]:
    need(path, isinstance(entry, dict), "an entry of its tensors is no object")
    name, dtype, file = (take(path, entry, key, str) for key in ("name", "dtype", "file"))
    need(path, dtype in SIZES, f"unknown dtype {dtype!r}", name)
    need(path, file in files, f"it is to lie in {file!r}, which is not among the files", name)
    try:
        region = Region(*(entry.get(key) for key in ("shape", "span", "box")))
    except ValueError as error:
        raise Malformed(path, str(error), name) from error
    offset, nbytes = take(path, entry, "offset", int), take(path, entry, "nbytes", int)
    need(path, nbytes == region.elements * SIZES[dtype] and offset >= files[file].header
         and offset + nbytes <= files[file].size,
         f"{nbytes} bytes at {offset} fit neither its {region.elements} elements nor its file", name)
    count = -(-nbytes // chunk)
    chunks = take(path, entry, "chunks", list) if count > 1 else [entry.get("xxh3")] * count
    need(path, len(chunks) == count, f"{len(chunks)} checksums of {count} chunks", name)
    chunks = [checksum(path, one, name) for one in chunks]
    need(path, entry.get("xxh3") == combined(chunks), "its checksums do not belong together", name)
    return name, dtype, Part(region, file, offset, nbytes, entry["xxh3"], tuple(chunks), chunk)


def _make_the_files(path: Path, files: dict[str, DataFile], tensors: list[tuple[str, Part]]) -> None:
    """Refuse tensors that are not all of their files, one behind the other."""
    for name, file in files.items():
        at, before = file.header, "its header"
        own = [(tensor, part) for tensor, part in tensors if part.file == name]
        for tensor, part in own:
            need(path, part.offset == at, f"overlaps {before} in {name} or leaves a hole behind it", tensor)
            at, before = at + part.nbytes, repr(tensor)
        need(path, at == file.size, f"the tensors of {name} end at byte {at}, the file at {file.size}")
        need(path, file.xxh3 == combined([file.header_xxh3, *(part.xxh3 for _, part in own)]),
             f"the checksum of {name} is not that of its header and tensors")


def take(path: Path, tree: dict[str, Any], key: str, kind: type[Kind]) -> Kind:
    """A member of a manifest, if it is what it must be; integers are counts."""
    value = tree.get(key)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise Malformed(path, f"{key} is {str(value)[:100]!r}, no {'count' if kind is int else kind.__name__}")
    return value


def checksum(path: Path, value: Any, tensor: str | None = None) -> str:
    """A checksum of a manifest, if it is one."""
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise Malformed(path, f"{str(value)[:100]!r} is no checksum", tensor)
    return value


def need(path: Path, holds: bool, otherwise: str, tensor: str | None = None) -> None:
    """Refuse a file of which something does not hold."""
    if not holds:
        raise Malformed(path, otherwise, tensor)
