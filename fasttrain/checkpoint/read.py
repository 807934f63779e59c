"""Reading a checkpoint: memory-mapped, only the bytes that are asked for, verified before they are given out."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fasttrain.checkpoint import find, manifest
from fasttrain.checkpoint.errors import Damaged, Incomplete, Malformed
from fasttrain.checkpoint.manifest import Part
from fasttrain.checkpoint.mapped import check_header, check_size, chunk_of, flat, is_good, map_file, unmap
from fasttrain.checkpoint.pieces import SIZES
from fasttrain.checkpoint.regions import Box, Region, intersection, overlap
from fasttrain.checkpoint.stored import Stored, gathered

BLOCK = 1 << 20  # bytes hashed and then copied
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # to move elements by, whatever they mean


class Reader:
    """A checkpoint, open for reading; several threads may read different tensors at a time.

    A read error of the disk under a mapped file ends the process (SIGBUS): so do all mapped files.

    Arguments:
        path: of one checkpoint: ``DIRECTORY/step-...``.
        verify: compare every chunk (16 MiB) of a tensor with its checksum when it is first read. Manifests are always
            verified.

    Attributes:
        path, step, sequence, world, metrics: as in `Found`.
        tensors: every tensor by its name.

    Raises:
        NotACheckpoint, Incomplete, Damaged: what is wrong with it, and in which file.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True):
        self.path = Path(path)
        told = find.peek(self.path)
        self.step: int = told["step"]
        self.sequence: int = told["sequence"]
        self.world: int = told["world"]
        self.metrics: dict[str, float] = told["metrics"]
        self._verify = verify
        ranks = []
        for rank, (entry, content) in enumerate(zip(told["ranks"], find.contents(self.path, told), strict=True)):
            ranks.append(manifest.read_rank(self.path / entry["file"], content, rank, self.world))
            manifest.need(self.path / entry["file"],
                          {name: file.size for name, file in ranks[-1].files.items()} == entry["files"],
                          f"it tells of other files than {manifest.NAME}")
        self._values = [read.values for read in ranks]
        self._files = {name: file for read in ranks for name, file in read.files.items()}
        self._maps: dict[str, memoryview] = {}
        self._mapping = threading.Lock()
        self._verified: dict[tuple[str, int], set[int]] = {}
        self.tensors: Mapping[str, Stored] = dict(sorted(gathered(self.path, ranks).items()))

    def values(self, rank: int = 0) -> dict[str, Any]:
        """The tree of JSON that a rank saved. It is the caller's own to change only after a copy."""
        if not 0 <= rank < self.world:
            raise ValueError(f"{self.path} was written by ranks 0 to {self.world - 1}, not {rank}")
        return self._values[rank]

    def read(self, name: str, span: tuple[int, int] | None = None, box: Box | None = None,
             out: memoryview | np.ndarray | None = None) -> memoryview:
        """Elements of a tensor: all of it, an interval of its row-major order, or a box.

        Arguments:
            name: one of `tensors`.
            span: first element and number of elements; or
            box: lower corner and extent.
            out: where to write the bytes: writable, contiguous, of exactly that size. None: newly allocated.

        Returns:
            A flat view of the bytes of `out`.

        Raises:
            KeyError: there is no such tensor.
            ValueError: no such span or box, or `out` does not fit.
            Damaged: bytes are not those that were written; `out` may hold some of them.
            Incomplete: the checkpoint does not hold these elements.
        """
        if name not in self.tensors:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        stored = self.tensors[name]
        wanted = Region(stored.shape, span, box)
        size = SIZES[stored.dtype]
        into = flat(out, wanted.elements * size, name)
        got = 0
        covered: list[Box] = []
        for part in stored.parts:
            if wanted.span is None and wanted.box is None and part.region == wanted:
                self._copy(name, part, 0, part.nbytes, into)
                return into
            if {wanted.box, part.region.box} == {None}:
                got += self._interval(name, part, wanted, size, into, covered)
            else:
                got += self._boxes(name, part, wanted, size, into, covered)
        if overlap(covered):
            raise Malformed(self.path, f"its {len(stored.parts)} parts overlap", name)
        if got != wanted.elements:
            raise Incomplete(f"{self.path}: tensor {name!r}: {wanted.elements:,} elements were asked for, and its "
                             f"{len(stored.parts)} parts hold {got:,} of them")
        return into

    def close(self) -> None:
        """Give the mapped files back. Views that `read` returned are no part of them."""
        for view in self._maps.values():
            unmap(view)
        self._maps.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def verify_all(self, reads: Iterable[tuple[str, Region]], threads: int | None = None) -> None:
        """Verify what several reads need, without copying it: each chunk once, by several threads.

        Arguments:
            reads: names, and which elements of them.
            threads: how many; None: one for each core, up to four.

        Raises:
            KeyError: there is no such tensor.
            Damaged: bytes are not those that were written; the first by the order of the reads.
        """
        if not self._verify:
            return
        chunks: dict[tuple[str, int, int], tuple[str, Part]] = {}
        for name, region in reads:
            for part in self.tensors[name].parts:
                for low, high in _bytes_of(region, part, SIZES[self.tensors[name].dtype]):
                    chunks |= {(part.file, part.offset, index): (name, part)
                               for index in range(low // part.chunk, -(-high // part.chunk))
                               if index not in self._seen(part)}
        views = {file: self._map(file) for file, _, _ in chunks}
        with ThreadPoolExecutor(threads or min(4, len(os.sched_getaffinity(0)))) as pool:
            good = pool.map(lambda key: is_good(views[key[0]], chunks[key][1], key[2]), chunks)
            for ((_, _, index), (name, part)), this in zip(chunks.items(), good, strict=True):
                self._judge(name, part, index, this)

    def _interval(self, name: str, part: Part, wanted: Region, size: int, into: memoryview, covered: list[Box]) -> int:
        """What an interval and a part that is one have in common."""
        first, length = wanted.span or (0, wanted.elements)
        begin, there = part.region.span or (0, part.region.elements)
        low, high = max(first, begin), min(first + length, begin + there)
        if low >= high:
            return 0
        covered.append(((low,), (high - low,)))
        self._copy(name, part, (low - begin) * size, (high - begin) * size,
                   into[(low - first) * size : (high - first) * size])
        return high - low

    def _boxes(self, name: str, part: Part, wanted: Region, size: int, into: memoryview, covered: list[Box]) -> int:
        """What they have in common, box by box: an interval is a few boxes too."""
        got = 0
        for to, mine, at, box, shared in _shared(wanted, part.region):
            covered.append(shared)
            source, target = _slices(shared, box), _slices(shared, mine)
            for low, high in _needed(source, box[1], size, part.chunk):
                self._check(name, part, at * size + low, at * size + high)
            begin = part.offset + at * size
            held = self._map(part.file)[begin : begin + math.prod(box[1]) * size]
            given = into[to * size : (to + math.prod(mine[1])) * size]
            np.frombuffer(given, _WORDS[size]).reshape(mine[1])[target] = (
                np.frombuffer(held, _WORDS[size]).reshape(box[1])[source])
            got += math.prod(shared[1])
        return got

    def _copy(self, name: str, part: Part, low: int, high: int, into: memoryview) -> None:
        """Bytes of a part, each chunk verified before or while it is copied."""
        data = self._map(part.file)[part.offset : part.offset + part.nbytes]
        for index in range(low // part.chunk, -(-high // part.chunk)):
            begin, end = chunk_of(part, index)
            first, last = max(low, begin), min(high, end)
            if not self._verify or index in self._seen(part) or (first, last) != (begin, end):
                self._check(name, part, first, last)
                into[first - low : last - low] = data[first:last]
                continue
            running = xxhash.xxh3_128()
            for at in range(begin, end, BLOCK):  # copied while it lies in the cache
                block = data[at : min(at + BLOCK, end)]
                running.update(block)
                into[at - low : at - low + len(block)] = block
            self._judge(name, part, index, running.hexdigest() == part.chunks[index])

    def _check(self, name: str, part: Part, low: int, high: int) -> None:
        """Verify the chunks that these bytes of a part lie in, if they were not yet."""
        if self._verify:
            for index in range(low // part.chunk, -(-high // part.chunk)):
                if index not in self._seen(part):
                    self._judge(name, part, index, is_good(self._map(part.file), part, index))

    def _seen(self, part: Part) -> set[int]:
        """The chunks of a part that were verified."""
        return self._verified.setdefault((part.file, part.offset), set())

    def _judge(self, name: str, part: Part, index: int, good: bool) -> None:
        if not good:
            first, last = chunk_of(part, index)
            raise Damaged(self.path / part.file, f"bytes {first:,} to {last:,} of {part.nbytes:,} are not those that "
                                                 f"were written (xxh3 differs)", name)
        self._seen(part).add(index)

    def _map(self, file: str) -> memoryview:
        """A file, mapped when it is first needed; its size and header are compared with the manifest."""
        with self._mapping:
            if file not in self._maps:
                path, told = self.path / file, self._files[file]
                view = map_file(path)
                check_size(path, view, told)
                if self._verify:
                    check_header(path, view, told)
                self._maps[file] = view
            return self._maps[file]


def _shared(one: Region, other: Region) -> Iterator[tuple[int, Box, int, Box, Box]]:
    """What two parts of a tensor share, box by box: (place in one, its box, place in the other, its box, shared)."""
    theirs = list(other.blocks())
    for to, mine in one.blocks():
        for at, box in theirs:
            if (shared := intersection(mine, box)) is not None:
                yield to, mine, at, box, shared


def _bytes_of(region: Region, part: Part, size: int) -> Iterator[tuple[int, int]]:
    """Intervals of a part's bytes that hold what it has of a region."""
    for _, _, at, box, shared in _shared(region, part.region):
        for low, high in _needed(_slices(shared, box), box[1], size, part.chunk):
            yield at * size + low, at * size + high


def _slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box lies in the array of another."""
    return tuple(slice(low - base, low - base + size)
                 for low, size, base in zip(inner[0], inner[1], outer[0], strict=True))


def _needed(source: tuple[slice, ...], shape: tuple[int, ...], size: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Intervals of bytes of an array that hold these elements; gaps are left out where they are larger than a chunk."""
    if not shape:
        yield 0, size
        return
    row = size * math.prod(shape[1:])
    if len(shape) > 1 and row > chunk:
        for index in range(source[0].start, source[0].stop):
            yield from ((index * row + low, index * row + high)
                        for low, high in _needed(source[1:], shape[1:], size, chunk))
        return
    strides = np.cumprod([1, *shape[:0:-1]], dtype=np.int64)[::-1]
    first = sum(part.start * int(stride) for part, stride in zip(source, strides, strict=True))
    last = sum((part.stop - 1) * int(stride) for part, stride in zip(source, strides, strict=True))
    yield first * size, (last + 1) * size
