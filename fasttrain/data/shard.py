"""A token file: a header, the tokens, where documents end, and a checksum of every chunk.

    0      magic, version, bytes of a token, vocabulary, tokens, documents, separator, bytes of a chunk, files left out,
           fingerprint of the tokenizer, xxh3 of the checksums, xxh3 of all this
    128    tokens, little-endian, filled up with zeros to a multiple of 8 bytes
    ...    for each document the number of the token after its last, uint64
    ...    for each chunk of what stands between the header and here, its xxh3, uint64

Every byte is under a checksum. Opening reads the header and the checksums, a 16,384th of the file; a chunk is checked
when it is first read.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fasttrain.data.errors import BadShard

MAGIC, VERSION = b"FTTOKENS", 1
LAYOUT = struct.Struct("<8sII3Qq2Q16sQ32xQ")  # the last is the checksum of what comes before it
CHUNK = 1 << 17  # bytes: what the kernel reads ahead
DTYPES: dict[int, Any] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True)
class Header:
    """What the first bytes of a token file say."""

    itemsize: int
    vocabulary: int
    tokens: int
    documents: int
    separator: int  # the token that ends every document; -1: none does
    tokenizer: bytes
    sums: int = 0  # xxh3 of the checksums
    chunk: int = CHUNK
    left_out: int = 0  # files that were not text

    @property
    def ends_at(self) -> int:
        """Where the ends of documents begin in the file."""
        return LAYOUT.size + -(-self.tokens * self.itemsize // 8) * 8

    @property
    def sums_at(self) -> int:
        """Where the checksums begin."""
        return self.ends_at + 8 * self.documents

    @property
    def chunks(self) -> int:
        return -(-(self.sums_at - LAYOUT.size) // self.chunk)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.sums_at + 8 * self.chunks

    def pack(self) -> bytes:
        packed = LAYOUT.pack(MAGIC, VERSION, self.itemsize, self.vocabulary, self.tokens, self.documents,
                             self.separator, self.chunk, self.left_out, self.tokenizer, self.sums, 0)[:-8]
        return packed + xxhash.xxh3_64_intdigest(packed).to_bytes(8, "little")

    @staticmethod
    def read(path: Path) -> Header:
        """The header of a file whose size is right.

        Raises:
            BadShard: it is missing, empty, short, no token file, of another version, or its header is damaged.
        """
        try:
            with open(path, "rb") as file:
                start = file.read(LAYOUT.size)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise BadShard(path, f"cannot be read: {error.strerror}; restore it") from error
        if not size:
            raise BadShard(path, "is empty; restore it, or make it again with `fasttrain tokenize`")
        if not start.startswith(MAGIC):
            raise BadShard(path, "is not a token file: it does not begin with FTTOKENS; make one with "
                                 "`fasttrain tokenize`", (0, min(size, len(MAGIC))))
        if len(start) < LAYOUT.size:
            raise BadShard(path, f"is cut off: it has {size} bytes, and its header alone {LAYOUT.size}; restore it")
        _, version, itemsize, *values, own = LAYOUT.unpack(start)
        if xxhash.xxh3_64_intdigest(start[:-8]) != own:
            raise BadShard(path, "the header is damaged: its checksum is wrong; restore the file", (0, LAYOUT.size))
        if version != VERSION:
            raise BadShard(path, f"is of version {version} of the format, and this package reads version {VERSION}; "
                                 f"make it again with `fasttrain tokenize`")
        vocabulary, tokens, documents, separator, chunk, left_out, tokenizer, sums = values
        header = Header(itemsize, vocabulary, tokens, documents, separator, tokenizer, sums, chunk, left_out)
        if itemsize not in DTYPES or not chunk:
            raise BadShard(path, f"tokens of {itemsize} bytes in chunks of {chunk}: nothing that this format has; make "
                                 f"it again with `fasttrain tokenize`", (0, LAYOUT.size))
        if header.size != size:
            raise BadShard(path, f"has {size} bytes and should have {header.size}: it is "
                                 f"{'cut off' if size < header.size else 'longer than it was written'}; restore it")
        return header


def itemsize_for(vocabulary: int) -> int:
    """Bytes of a token: the fewest that hold every token."""
    return 1 if vocabulary <= 1 << 8 else 2 if vocabulary <= 1 << 16 else 4


class Shard:
    """A token file in memory as far as it is read.

    Args:
        path: the file.

    Attributes:
        tokens: shape (header.tokens,), read-only, mapped. Reading it checks nothing: `check` does.

    Raises:
        BadShard: as `Header.read`, or the checksums do not fit the header.
    """

    def __init__(self, path: Path):
        self.path, self.header = path, Header.read(path)
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        h = self.header
        table = self.bytes[h.sums_at:]
        if xxhash.xxh3_64_intdigest(table) != h.sums:
            raise BadShard(path, "the checksums are damaged; restore the file", (h.sums_at, len(table)))
        self._sums = np.frombuffer(table, "<u8")
        self._sound = np.zeros(h.chunks, bool)  # as far as has been looked
        self._all_sound = False
        self._views: dict[int, np.ndarray] = {}  # of the tokens, each beginning with every token, by width
        self._ends: np.ndarray | None = None
        self.tokens = np.frombuffer(self.bytes, DTYPES[h.itemsize], h.tokens, LAYOUT.size)
        self._limited = h.vocabulary < 1 << 8 * h.itemsize

    def ends(self) -> np.ndarray:
        """Where documents end, checked: uint64, shape (documents,).

        Raises:
            BadShard: their bytes are damaged.
        """
        if self._ends is None:
            self.check(self.header.ends_at, self.header.sums_at)
            self._ends = np.frombuffer(self.bytes, "<u8", self.header.documents, self.header.ends_at)
        return self._ends

    def check_tokens(self, first: int, count: int) -> None:
        """Check the chunks that these tokens lie in, as far as they have not been.

        Raises:
            BadShard: one is damaged; the place is the chunk, or the token that is out of range.
        """
        self.check(LAYOUT.size + first * self.header.itemsize, LAYOUT.size + (first + count) * self.header.itemsize)

    def check(self, begin: int, end: int) -> None:
        """As `check_tokens`, of bytes `begin` to `end` of the file."""
        if begin >= end:
            return
        first, last = (begin - LAYOUT.size) // self.header.chunk, (end - 1 - LAYOUT.size) // self.header.chunk
        for number in range(first, last + 1):
            if not self._sound[number]:
                self._check_chunk(number)

    def gather(self, starts: np.ndarray, width: int, out: np.ndarray, checked: bool = True) -> None:
        """Copy `width` tokens from each of `starts` to a row of `out`; check what has not been.

        Raises:
            BadShard: as `check_tokens`.
        """
        h = self.header
        if checked and not self._all_sound:
            first = starts * h.itemsize // h.chunk
            last = ((starts + width) * h.itemsize - 1) // h.chunk
            if width * h.itemsize > h.chunk or not (self._sound[first].all() and self._sound[last].all()):
                for start in starts.tolist():
                    self.check_tokens(start, width)
                self._all_sound = bool(self._sound.all())
        if width not in self._views:
            self._views[width] = np.lib.stride_tricks.sliding_window_view(self.tokens, width)
        out[...] = self._views[width][starts]

    def _check_chunk(self, number: int) -> None:
        begin = LAYOUT.size + number * self.header.chunk
        end = min(begin + self.header.chunk, self.header.sums_at)
        if os.stat(self.path).st_size < end:  # to read the memory would end the process with SIGBUS
            raise BadShard(self.path, "was cut off after it was opened; restore it")
        with memoryview(self.bytes)[begin:end] as chunk:
            if xxhash.xxh3_64_intdigest(chunk) != self._sums[number]:
                raise BadShard(self.path, "the checksum is wrong: the bytes are not those that were written; restore "
                                          "the file, or choose on_bad='skip'", (begin, end - begin))
        if self._limited:
            self._check_range(begin, min(end, self.header.ends_at))
        self._sound[number] = True

    def _check_range(self, begin: int, end: int) -> None:
        h = self.header
        first, last = (begin - LAYOUT.size) // h.itemsize, min(-(-(end - LAYOUT.size) // h.itemsize), h.tokens)
        some = self.tokens[first:last]
        if len(some) and int(some.max()) >= h.vocabulary:
            place = first + int(np.argmax(some >= h.vocabulary))
            raise BadShard(self.path, f"token {place} is {self.tokens[place]}, out of range for a vocabulary of "
                                      f"{h.vocabulary}; make the file again with its tokenizer",
                           (LAYOUT.size + place * h.itemsize, h.itemsize))

    def damage(self) -> list[BadShard]:
        """Check every byte; all that is wrong."""
        found = []
        for number in range(self.header.chunks):
            try:
                self._check_chunk(number)
            except BadShard as error:
                found.append(error)
        return found
