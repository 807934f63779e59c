"""Training samples: windows of a stream of tokens, each a pure function of (seed, number)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import xxhash

from fasttrain.data.errors import DataError, TooSmall
from fasttrain.data.order import mix, mix_each, permuted, permuted_each

BLOCK = 1024  # samples whose places are computed together: arrays of so many cost little more than of a few
HASHED = 1 << 28  # bytes of an array that are read for its hash
MOST_TRIES = 1000  # other windows for one that is damaged


class Source(Protocol):
    """What a `Loader` reads from. It is pickled to worker processes.

    Attributes:
        per_pass: samples of one pass over the data.
        vocabulary: one more than the largest token there may be; 0: not known.
    """

    per_pass: int
    vocabulary: int

    def reseeded(self, seed: int) -> Source:
        """The same samples in another order."""
        ...

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples of these numbers (int64, any, not negative): arrays whose first dimension is that of `indices`."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """JSON values: equal ones mean that all samples are equal."""
        ...


class Windows:
    """Training samples: sample i is a pure function of (seed, i), with no table and no state.

    One pass cuts the stream (from an offset that differs from pass to pass) into windows of `length` tokens, and takes
    each once, in an order that is a keyed bijection of their numbers. Sample i belongs to pass ``i // len(self)``.

    Args:
        stream: tokens, shape (n,), at least ``2 * length + 1`` of them: an array, or a `TokenDataset`.
        length: tokens in one sequence.
        seed: of the order.
        positions: also give each token's position in its document; the stream is a `TokenDataset`.

    Raises:
        TooSmall: the stream has fewer tokens than that.

    Example:
        >>> windows = Windows(np.arange(50, dtype=np.uint8), length=8, seed=0)
        >>> windows.batch(first=0, count=4).shape
        (4, 9)
        >>> windows.fetch(np.array([10**12]))["tokens"].shape
        (1, 9)
    """

    def __init__(self, stream: Any, length: int, seed: int = 0, positions: bool = False):
        if length < 1:
            raise DataError(f"windows of {length} tokens: a window needs at least one")
        self.stream, self.length, self.seed, self.positions = stream, length, seed, positions
        self._blocks: dict[int, np.ndarray] = {}
        self.per_pass = (len(stream) - 1) // length - 1
        if self.per_pass < 1:
            raise TooSmall(f"a stream of {len(stream)} tokens is too short for windows of {length}: it must have at "
                           f"least {2 * length + 1}; use shorter windows or more data")
        if positions and isinstance(stream, np.ndarray):
            raise DataError("positions=True needs to know where documents end: give a TokenDataset, not an array")
        if isinstance(stream, np.ndarray):  # wider ones are searched by nobody: they may be terabytes on a disk
            self.vocabulary = 1 << 8 * stream.itemsize if stream.itemsize <= 2 else 0
        else:
            self.vocabulary = stream.vocabulary

    def __len__(self) -> int:
        return self.per_pass

    def reseeded(self, seed: int) -> Windows:
        """The same windows in another order."""
        return Windows(self.stream, self.length, seed, self.positions)

    def start(self, i: int) -> int:
        """Where sample i begins in the stream."""
        turn, place = divmod(i, self.per_pass)
        key = mix(mix(self.seed) ^ turn)
        return mix(key) % self.length + self.length * permuted(place, self.per_pass, key)

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """`start` of each; int64, shape as `indices`."""
        turns, places = np.divmod(indices, self.per_pass)
        keys = mix_each(np.uint64(mix(self.seed)) ^ turns.astype(np.uint64))
        offsets = (mix_each(keys) % np.uint64(self.length)).astype(np.int64)
        return offsets + self.length * permuted_each(places, self.per_pass, keys)

    def _known_starts(self, indices: np.ndarray) -> np.ndarray:
        """As `starts`; the last blocks of numbers that were asked for are kept."""
        low, high = int(indices.min()) // BLOCK, int(indices.max()) // BLOCK
        if high > low + 1:
            return self.starts(indices)
        blocks = []
        for number in range(low, high + 1):
            block = self._blocks.get(number)
            if block is None:
                block = self.starts(np.arange(number * BLOCK, (number + 1) * BLOCK))
                self._blocks = {n: kept for n, kept in self._blocks.items() if n in (low, high)} | {number: block}
            blocks.append(block)
        return np.concatenate(blocks)[indices - low * BLOCK]

    def batch(self, first: int, count: int) -> np.ndarray:
        """Samples first, first + 1, ...: shape (count, length + 1). The extra token is the last target."""
        return self.fetch(np.arange(first, first + count))["tokens"]

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples of these numbers.

        Returns:
            ``tokens``: (b, length + 1), of the stream's dtype. With `positions` also ``positions``: int32, (b, length),
            of each input in its document; where a document does not begin in the window, counted from the window's
            begin. Of a `TokenDataset` that skips what is damaged also ``replaced``: bool, (b,), whether another window
            stands for this one: another function of (seed, number, files) alone, so every rank would choose the same.
        """
        given: dict[str, np.ndarray] = {}
        if isinstance(self.stream, np.ndarray):
            starts = self._known_starts(indices)
            return {"tokens": np.stack([self.stream[s : s + self.length + 1] for s in starts.tolist()])}
        if self.stream.on_bad == "skip":
            indices, given["replaced"] = substitutes(indices, self.per_pass, self.seed, self._sound, self.stream)
        starts = self._known_starts(indices)
        given["tokens"] = self.stream.gather(starts, self.length + 1)
        if self.positions:
            given["positions"] = self.stream.positions(starts, self.length)
        return given

    def _sound(self, i: int) -> bool:
        return self.stream.sound(self.start(i), self.length + 1, self.positions)

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples: the order's version, data, seed, length."""
        data = hash_of(self.stream) if isinstance(self.stream, np.ndarray) else self.stream.fingerprint
        return {"order": 1, "data": data, "seed": self.seed, "length": self.length}


def hash_of(stream: np.ndarray) -> str:
    """A hash of an array; of one of more than 256 MiB, which may lie on a disk, of its size and 4,096 pages."""
    if stream.nbytes <= HASHED:
        return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(stream).view(np.uint8).data)
    page = 4096 // stream.itemsize
    hashed = xxhash.xxh3_128(f"{stream.dtype.str} {len(stream)}".encode())
    for begin in np.linspace(0, len(stream) - page, 4096).astype(int).tolist():
        hashed.update(np.ascontiguousarray(stream[begin : begin + page]).view(np.uint8).data)
    return hashed.hexdigest()


def substitutes(indices: np.ndarray, per_pass: int, seed: int, sound: Callable[[int], bool],
                data: Any) -> tuple[np.ndarray, np.ndarray]:
    """Other samples of the same pass, drawn by hash, in the place of those that are not sound; and which were not.

    Raises:
        DataError: there are hardly any sound ones.
    """
    bad = np.array([not sound(i) for i in indices.tolist()])
    chosen = indices.copy()
    for place in np.flatnonzero(bad):
        i = int(indices[place])
        first = i - i % per_pass
        for attempt in range(MOST_TRIES):
            other = first + mix(mix(mix(seed) ^ i) + attempt) % per_pass
            if sound(other):
                chosen[place] = other
                break
        else:
            raise DataError(f"sample {i} is damaged, and so are {MOST_TRIES} others drawn in its place: too little of "
                            f"{data} is sound; restore its files")
    return chosen, bad
