"""Token files and small ones on their way to the disk: there as a whole, and durable, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fasttrain.data.errors import DataError
from fasttrain.data.shard import CHUNK, DTYPES, LAYOUT, Header, itemsize_for


class ShardWriter:
    """Writes a token file next to its place and moves it there when it is complete and durable.

    Args:
        path: where to.
        vocabulary, separator, tokenizer: as in `Header`.

    Example:
        >>> import tempfile
        >>> from fasttrain.data.shard import Shard
        >>> path = Path(tempfile.mkdtemp(), "words.tokens")
        >>> with ShardWriter(path, vocabulary=256, tokenizer=bytes(16)) as shard:
        ...     shard.add(np.frombuffer(b"one document", np.uint8))
        ...     shard.add(np.frombuffer(b"and another", np.uint8))
        >>> Shard(path).tokens.tobytes()
        b'one documentand another'
        >>> Shard(path).ends().tolist()
        [12, 23]
    """

    def __init__(self, path: Path, vocabulary: int, tokenizer: bytes, separator: int = -1):
        self.path, self.vocabulary, self.tokenizer, self.separator = path, vocabulary, tokenizer, separator
        self.itemsize, self.tokens, self.left_out = itemsize_for(vocabulary), 0, 0
        self._ends: list[int] = []
        self._sums: list[int] = []
        self._waiting = bytearray()

    def __enter__(self) -> ShardWriter:
        self.part = self.path.with_name(f".{self.path.name}.part-{os.getpid()}")
        self._file: Any = open(self.part, "wb")
        self._file.write(bytes(LAYOUT.size))
        return self

    def add(self, tokens: np.ndarray, end: bool = True) -> None:
        """Append tokens; a document ends with them, or goes on.

        Raises:
            DataError: a token is not below the vocabulary.
        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            raise DataError(f"{self.path}: tokens from {tokens.min()} to {tokens.max()} for a vocabulary of "
                            f"{self.vocabulary}: the tokenizer gives tokens that it does not count")
        self._write(np.ascontiguousarray(tokens, DTYPES[self.itemsize]).view(np.uint8).data)
        self.tokens += len(tokens)
        if end:
            self._ends.append(self.tokens)

    def _write(self, data: Any) -> None:
        self._waiting += data
        whole = len(self._waiting) // CHUNK * CHUNK
        self._flush(whole)

    def _flush(self, size: int) -> None:
        with memoryview(self._waiting) as waiting:
            for begin in range(0, size, CHUNK):
                self._sums.append(xxhash.xxh3_64_intdigest(waiting[begin : min(begin + CHUNK, size)]))
            self._file.write(waiting[:size])
        del self._waiting[:size]

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            self.part.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._write(bytes(-self.tokens * self.itemsize % 8))
        self._write(np.array(self._ends, "<u8").tobytes())
        self._flush(len(self._waiting))
        table = np.array(self._sums, "<u8").tobytes()
        self._file.write(table)
        self._file.seek(0)
        self._file.write(Header(self.itemsize, self.vocabulary, self.tokens, len(self._ends), self.separator,
                                self.tokenizer, xxhash.xxh3_64_intdigest(table), left_out=self.left_out).pack())
        self._file.flush()
        os.fsync(self._file.fileno())
        replace(self.part, self.path)


def replace(part: Path, path: Path) -> None:
    """Rename a file that is durable, and make the new name durable."""
    os.rename(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_durably(path: Path, data: bytes) -> None:
    """A small file that is there as a whole or not at all."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    replace(part, path)
