"""Token files as one stream of tokens, and what it means that some of them are damaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from fasttrain.data.errors import BadShard, DataError, WrongTokenizer
from fasttrain.data.packing import Packed
from fasttrain.data.shard import Header, Shard
from fasttrain.data.windows import Windows

INDEX = "dataset.json"
FORMAT = "fasttrain tokens 1"
GIVEN = {1: np.uint8, 2: np.int32, 4: np.int64}  # what torch can compute with and holds every token


@dataclass(frozen=True)
class Part:
    """One token file of a data set, as its index lists it."""

    file: str
    tokens: int
    documents: int
    header: str  # xxh3 of the file's header, in hexadecimal

    @staticmethod
    def of(path: Path, header: Header) -> Part:
        return Part(path.name, header.tokens, header.documents, xxhash.xxh3_64_hexdigest(header.pack()))


def read_index(folder: Path) -> dict[str, Any]:
    """The index that `fasttrain tokenize` writes last.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        given = index.pop("xxh3")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; where `fasttrain tokenize` was stopped, the same "
                        f"command again goes on") from error
    except (ValueError, KeyError, AttributeError) as error:
        raise BadShard(path, "is damaged: no index of token files; make it again with `fasttrain "
                             "tokenize`") from error
    if given != checksum(index) or index.get("format") != FORMAT:
        raise BadShard(path, "is damaged or of another version: its checksum is wrong; make it again with "
                             "`fasttrain tokenize`")
    return index


def checksum(index: dict[str, Any]) -> str:
    """Of an index without its checksum."""
    return xxhash.xxh3_64_hexdigest(json.dumps(index, sort_keys=True).encode())


class TokenDataset:
    """A stream of tokens in files that are mapped into memory: nothing is read before it is asked for.

    Args:
        path: a directory written by ``fasttrain tokenize``, or one token file.
        split: "train" or "validation", of a directory.
        on_bad: "raise": a damaged, missing or short file raises `BadShard`, at construction where its header, size or
            checksums tell, else when the damaged chunk is first read. "skip": the stream keeps its length, and whoever
            reads it asks `sound` first (`Windows` takes other windows, and counts). Which windows are damaged is a
            function of the files alone: ranks that read the same files agree without talking.
        verify: "touch": each chunk of 128 KiB is checked when it is first read, in each process; "open": everything, at
            once; "never": only headers and sizes.
        vocabulary: of the model that will read the tokens; a smaller one than the tokens' is refused.
        tokenizer: fingerprint that the tokens' must equal (`fasttrain.data.fingerprint_of`).

    Attributes:
        vocabulary: one more than the largest token there may be.
        separator: the token that ends every document; None: none does.
        documents: how many there are.
        bad: the files that cannot be read at all, as errors (read-only); empty unless `on_bad` is "skip".
        fingerprint: hexadecimal; equal ones have equal tokens.

    Raises:
        BadShard: see `on_bad`; names the file and the place.
        WrongTokenizer: files of different tokenizers, or not that of `tokenizer` or `vocabulary`.
        DataError: no such data, no tokens at all, unknown options.

    Example:
        >>> import tempfile
        >>> from fasttrain.data.writing import ShardWriter
        >>> path = Path(tempfile.mkdtemp(), "numbers.tokens")
        >>> with ShardWriter(path, vocabulary=100, tokenizer=bytes(16)) as shard:
        ...     shard.add(np.arange(100))
        >>> dataset = TokenDataset(path)
        >>> len(dataset), dataset.documents
        (100, 1)
        >>> dataset.gather(np.array([0, 50]), 4)
        array([[ 0,  1,  2,  3],
               [50, 51, 52, 53]], dtype=uint8)
    """

    def __init__(self, path: str | Path, split: str = "train", *, on_bad: Literal["raise", "skip"] = "raise",
                 verify: Literal["touch", "open", "never"] = "touch", vocabulary: int | None = None,
                 tokenizer: str | None = None):
        if on_bad not in ("raise", "skip") or verify not in ("touch", "open", "never"):
            raise DataError(f"on_bad={on_bad!r}, verify={verify!r}: on_bad is 'raise' or 'skip', verify is 'touch', "
                            f"'open' or 'never'")
        if on_bad == "skip" and verify == "never":
            raise DataError("on_bad='skip' with verify='never': what is damaged is found by checking; use "
                            "verify='touch'")
        self.path, self.split, self.on_bad, self.verify = Path(path), split, on_bad, verify
        self._wanted = vocabulary, tokenizer
        parts = self._parts()
        self._lost: dict[int, BadShard] = {}
        self.shards = [self._open(number, part) for number, part in enumerate(parts)]
        self._offsets = np.cumsum([0, *(part.tokens for part in parts)])
        self.documents = sum(part.documents for part in parts)
        self.fingerprint = xxhash.xxh3_128_hexdigest(json.dumps([part.header for part in parts]).encode())
        self._describe()
        if not len(self):
            raise DataError(f"{self} has no tokens")
        if verify == "open" and on_bad == "raise" and (damage := self.damage()):
            raise damage[0]

    def _parts(self) -> list[Part]:
        if not self.path.is_dir():
            return [Part.of(self.path, Header.read(self.path))]
        splits = read_index(self.path)["splits"]
        if self.split not in splits:
            raise DataError(f"split={self.split!r}: {self.path} has {', '.join(sorted(splits))}")
        return [Part(**part) for part in splits[self.split]["shards"]]

    @property
    def bad(self) -> list[BadShard]:
        return list(self._lost.values())

    def _open(self, number: int, part: Part) -> Shard | None:
        path = self.path / part.file if self.path.is_dir() else self.path
        try:
            shard = Shard(path)
            if Part.of(path, shard.header) != part:
                raise BadShard(path, f"is another file than the one that {INDEX} lists under this name; restore it")
            return shard
        except BadShard as error:
            if self.on_bad == "raise":
                raise
            self._lost[number] = error
            return None

    def _describe(self) -> None:
        headers = [shard.header for shard in self.shards if shard]
        if not headers:
            raise self.bad[0] if self.bad else DataError(f"{self} has no token files")
        kinds = {(h.tokenizer, h.vocabulary, h.separator, h.itemsize) for h in headers}
        if len(kinds) > 1:
            raise WrongTokenizer(f"the files of {self} were made with {len(kinds)} different tokenizers: make them "
                                 f"again with one")
        (known, self.vocabulary, separator, itemsize), = kinds
        self.tokenizer, self.separator = known.hex(), None if separator < 0 else separator
        self.dtype = np.dtype(GIVEN[itemsize])
        vocabulary, tokenizer = self._wanted
        if vocabulary is not None and vocabulary < self.vocabulary:
            raise WrongTokenizer(f"a model with a vocabulary of {vocabulary} cannot read {self}, whose tokens go up to "
                                 f"{self.vocabulary - 1}: give the model at least {self.vocabulary}, or tokenize again")
        if tokenizer is not None and tokenizer != self.tokenizer:
            raise WrongTokenizer(f"{self} was made with the tokenizer {self.tokenizer}, not with {tokenizer}: use that "
                                 f"one, or tokenize again")

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __repr__(self) -> str:
        return f"{self.path}" + (f" ({self.split})" if self.path.is_dir() else "")

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files for itself."""
        return _reopen, (self.path, self.split, self.on_bad, "touch" if self.verify == "open" else self.verify)

    def windows(self, length: int, seed: int = 0, positions: bool = False) -> Windows:
        """Training samples of `length` tokens each, as `Windows`."""
        return Windows(self, length, seed, positions)

    def packed(self, path: str | Path, seed: int = 0) -> Packed:
        """Training samples of whole documents, packed by `fasttrain.data.pack`, as `Packed`."""
        return Packed(self, path, seed)

    def gather(self, starts: np.ndarray, width: int) -> np.ndarray:
        """`width` tokens from each of `starts`, which lie in the stream: uint8, int32 or int64, (len(starts), width).

        Raises:
            BadShard: some of them are damaged.
        """
        out = np.empty((len(starts), width), self.dtype)
        if len(self.shards) == 1:
            self._shard(0).gather(starts, width, out, self.verify != "never")
            return out
        homes = np.searchsorted(self._offsets, starts, "right") - 1
        inside = starts + width <= self._offsets[homes + 1]
        for home in np.unique(homes[inside]):
            rows = np.flatnonzero(inside & (homes == home))
            some = np.empty((len(rows), width), self.dtype) if len(rows) < len(starts) else out
            self._shard(int(home)).gather(starts[rows] - self._offsets[home], width, some, self.verify != "never")
            if some is not out:
                out[rows] = some
        for row in np.flatnonzero(~inside):
            for home, first, count, place in self._pieces(int(starts[row]), width):
                self._shard(home).gather(np.array([first]), count, out[row : row + 1, place : place + count],
                                         self.verify != "never")
        return out

    def _pieces(self, start: int, width: int) -> list[tuple[int, int, int, int]]:
        """(shard, first token in it, how many, place among the `width`) of a window, in order."""
        found, place = [], 0
        home = int(np.searchsorted(self._offsets, start, "right")) - 1
        while place < width:
            count = min(width - place, int(self._offsets[home + 1]) - start - place)
            if count:
                found.append((home, start + place - int(self._offsets[home]), count, place))
            place, home = place + count, home + 1
        return found

    def _shard(self, number: int) -> Shard:
        shard = self.shards[number]
        if shard is None:
            raise self._lost[number]
        return shard

    def ends(self) -> np.ndarray:
        """Where documents end in the stream, checked: int64, shape (documents,).

        Raises:
            BadShard: the file is lost, or its list of ends damaged.
        """
        found = [self._shard(number).ends().astype(np.int64) + self._offsets[number]
                 for number in range(len(self.shards))]
        return np.concatenate(found)

    def sound(self, start: int, count: int, documents: bool = False) -> bool:
        """Whether these tokens can be read and are those that were written; with `documents`, their ends too."""
        try:
            for home, first, some, _ in self._pieces(start, count):
                self._shard(home).check_tokens(first, some)
                if documents:
                    self._shard(home).ends()
        except BadShard:
            return False
        return True

    def positions(self, starts: np.ndarray, length: int) -> np.ndarray:
        """For windows of `length` tokens, each token's place in its document, or in the window if that began before.

        Where it is 0 attention starts anew; `fasttrain.data.cu_seqlens` makes of it what varlen kernels take.

        Returns:
            int32, shape (len(starts), length).
        """
        begins = np.zeros((len(starts), length), np.int32)
        for row, start in enumerate(starts.tolist()):
            for home, first, count, place in self._pieces(start, length):
                ends = self._shard(home).ends()
                low, high = np.searchsorted(ends, np.array([first, first + count], np.uint64))
                inside = ends[low:high].astype(np.int64) - first + place
                begins[row, inside[inside < length]] = inside[inside < length]
                if place:
                    begins[row, place] = place  # a file begins with a document
        return np.arange(length, dtype=np.int32) - np.maximum.accumulate(begins, axis=1)

    def damage(self) -> list[BadShard]:
        """Read and check everything; all that is damaged, one error for each place."""
        return [*self.bad, *(error for shard in self.shards if shard for error in shard.damage())]


def _reopen(path: Path, split: str, on_bad: Any, verify: Any) -> TokenDataset:
    return TokenDataset(path, split, on_bad=on_bad, verify=verify)


def cu_seqlens(positions: np.ndarray) -> np.ndarray:
    """Where sequences begin in a batch laid out in one row, and its end: what varlen attention takes.

    Args:
        positions: integers, shape (b, t), 0 where a sequence begins, as each row's first.

    Returns:
        int32, shape (sequences + 1,).

    Example:
        >>> cu_seqlens(np.array([[0, 1, 2, 0], [0, 0, 1, 2]]))
        array([0, 3, 4, 5, 8], dtype=int32)
    """
    return np.append(np.flatnonzero(positions.reshape(-1) == 0), positions.size).astype(np.int32)
