"""One rank's part of a checkpoint: tensors hashed and written in one pass, then the manifest that names them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from fasttrain.checkpoint import header, manifest, tree
from fasttrain.checkpoint.disk import DISK, Files, write_whole
from fasttrain.checkpoint.pieces import SIZES, Piece
from fasttrain.checkpoint.space import room

CHUNK = 16 << 20  # bytes with a checksum of their own: what a partial read has to verify
BLOCK = 1 << 20  # bytes hashed and then written while they lie in the cache
EARLY = 8 << 20  # bytes after which the disk is told to begin: measured against 1 to 64 MiB, and against not at all
FILE = 4 << 30  # bytes after which another file is begun
Progress = Callable[[int, int], None]  # bytes written, bytes in all


def write_rank(part: Path, rank: int, world: int, pieces: Sequence[Piece], values: Mapping[str, Any], *,
               progress: Progress | None = None, files: Files = DISK, chunk: int = CHUNK, file_bytes: int = FILE,
               ) -> None:
    """Write what one rank gives to a checkpoint; durable on return, and not yet part of any checkpoint.

    Arguments:
        part: the directory that all ranks of this save write into; it is made if it is not there. It is of one save
            only: a second attempt takes another.
        rank, world: whose, of how many.
        pieces: in any order, of different keys. They must not change meanwhile.
        values: a tree of JSON.
        progress: told the bytes written and the bytes in all, now and then.

    Raises:
        ValueError, TypeError: two pieces of one key, or values that JSON cannot hold; nothing is written.
        NoSpace: the disk filled up. What this rank has written is removed.
        OSError: the disk's own error; likewise.

    Example:
        >>> import tempfile
        >>> from array import array
        >>> from pathlib import Path
        >>> from fasttrain.checkpoint import Piece, Reader, publish, write_rank
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     part = Path(folder, ".part-7-a")
        ...     data = array("f", [1.0, 2.0])
        ...     write_rank(part, 0, 1, [Piece("model/bias", "F32", (2,), memoryview(data))], {"lr": 0.1})
        ...     path = publish(Path(folder), part, 7, 1)
        ...     reader = Reader(path)
        ...     print(path.name, reader.values(0), bytes(reader.read("model/bias")) == data.tobytes())
        step-000000000007 {'lr': 0.1} True
    """
    tree.check(dict(values))
    if not 0 <= rank < world <= 99999:
        raise ValueError(f"rank {rank} of {world}")
    keys = [piece.key for piece in pieces]
    if twice := {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else None:
        raise ValueError(f"pieces are given twice: {', '.join(sorted(twice)[:5])}")
    # By size of element, so that every tensor is aligned; by name, so that equal states make equal files.
    ordered = sorted(pieces, key=lambda piece: (-SIZES[piece.dtype], piece.key))
    total = sum(piece.nbytes for piece in ordered)
    plan = [(manifest.data_name(rank, world, number), group)
            for number, group in enumerate(_groups(ordered, file_bytes))]
    headers = [header.encode((piece.key, piece.dtype, piece.region.extent, piece.nbytes) for piece in group)
               for _, group in plan]
    ours = part / f"{manifest.stem(rank, world)}.json"
    made = [ours, ours.with_name(ours.name + ".tmp"), *(part / name for name, _ in plan)]
    if there := [path for path in made if os.path.lexists(path)]:
        raise ValueError(f"{there[0]} is there already: each save, and each attempt at it, has a directory of its own")
    with room(part.parent, total):
        with suppress(FileExistsError):
            files.make_directory(part)
        try:
            listed, entries, before = {}, [], 0
            for (name, group), head in zip(plan, headers, strict=True):
                def tell(done: int, before: int = before) -> None:
                    if progress is not None:
                        progress(before + done, total)

                listed[name], written = _write_file(files, part / name, head, group, chunk, tell)
                entries += written
                before += sum(piece.nbytes for piece in group)
            content = {"format": manifest.FORMAT, "producer": manifest.PRODUCER, "rank": rank, "world": world,
                       "chunk": chunk, "files": listed, "tensors": entries, "values": dict(values)}
            files.sync_directory(part)  # before the manifest has its name: it must not name what may vanish
            write_whole(ours, manifest.encode(content), files)
            files.sync_directory(part)
        except BaseException:
            for path in made:  # the manifest first: what is left is no rank's work
                with suppress(OSError):
                    files.unlink(path)
            with suppress(OSError):
                files.remove_directory(part)  # unless another rank has written
            raise


def _groups(pieces: list[Piece], limit: int) -> Iterator[list[Piece]]:
    """The pieces of each file: as many as fit; a larger one has a file of its own."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.nbytes > limit:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.nbytes
    if group:
        yield group


def _write_file(files: Files, path: Path, head: bytes, pieces: list[Piece], chunk: int, tell: Callable[[int], None],
                ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write one file and sync it. Returns its entry and its tensors' entries in the manifest."""
    entries = []
    at = len(head)
    file = files.create(path)
    try:
        waiting, waits = [memoryview(head)], at
        begin = begun = 0  # where in the file what waits is to go, and up to where the disk was told to begin
        for piece in pieces:
            digests = []
            data = piece.bytes
            for first in range(0, len(data), chunk):
                running = xxhash.xxh3_128()
                end = min(first + chunk, len(data))
                for low in range(first, end, BLOCK):
                    block = data[low : min(low + BLOCK, end)]
                    running.update(block)
                    waiting.append(block)
                    waits += len(block)
                    if waits >= BLOCK or len(waiting) >= 512:
                        files.write(file, begin, waiting)
                        begin, waiting, waits = begin + waits, [], 0
                        tell(begin - len(head))
                        if begin - begun >= EARLY:
                            files.hasten(file, begun, begin - begun)
                            begun = begin
                digests.append(running.hexdigest())
            entry = {"name": piece.name, "dtype": piece.dtype, "shape": list(piece.region.shape),
                     **piece.region.as_json(), "file": path.name, "offset": at, "nbytes": piece.nbytes,
                     "xxh3": manifest.combined(digests)}
            entries.append(entry if len(digests) <= 1 else {**entry, "chunks": digests})
            at += piece.nbytes
        if waiting:
            files.write(file, begin, waiting)
        files.sync(file)
    finally:
        files.close(file)
    tell(at - len(head))
    digests = [manifest.digest(head), *(entry["xxh3"] for entry in entries)]
    return {"size": at, "header": len(head), "header_xxh3": digests[0], "xxh3": manifest.combined(digests)}, entries
