"""Sequences packed from whole documents, as few of them cut as can be: worked out once, kept in an index file.

Documents that fit into a sequence stay whole; longer ones are cut into pieces that fit, each beginning with the last
token of the one before, so that every token but a document's first is predicted once. Pieces go, the longest first,
where least room would be left: best-fit decreasing (H. Ding et al., Fewer Truncations Improve Language Modeling,
arXiv:2404.10830).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fasttrain.data.errors import BadShard, DataError, TooSmall
from fasttrain.data.order import mix, mix_each, permuted_each
from fasttrain.data.windows import substitutes
from fasttrain.data.writing import write_durably

MAGIC, VERSION = b"FTPACKED", 1
LAYOUT = struct.Struct("<8sIIQQ16s8xQ")  # magic, version, length, sequences, pieces, data, xxh3 of all else


def pieces_of_documents(ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents as pieces of at most ``length + 1`` tokens: first tokens and numbers of tokens, int64.

    Args:
        ends: where documents end, ascending; the first begins at 0.

    Example:
        >>> pieces_of_documents(np.array([3, 3, 10]), length=4)
        (array([0, 3, 7]), array([3, 5, 3]))
    """
    begins = np.append(0, ends[:-1]).astype(np.int64)
    sizes = ends.astype(np.int64) - begins
    begins, sizes = begins[sizes >= 2], sizes[sizes >= 2]  # of one token nothing is predicted
    counts = -(-(sizes - 1) // length)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
    firsts = np.repeat(begins, counts) + length * number
    return firsts, np.minimum(length + 1, np.repeat(begins + sizes, counts) - firsts)


def best_fit(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Bins that hold `room` each, and the numbers of the items in each; none is larger.

    Example:
        >>> best_fit(np.array([3, 6, 2, 4]), room=8)
        [[1, 2], [3, 0]]
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # bins by how much they still hold
    some = 0  # bit r: there are bins that hold r more
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = some >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            number = with_room[left].pop()
            if not with_room[left]:
                some &= ~(1 << left)
            bins[number].append(item)
        else:
            left, number = room, len(bins)
            bins.append([item])
        with_room[left - size].append(number)
        some |= 1 << (left - size)
    return bins


def pack(dataset: Any, length: int, path: str | Path) -> Path:
    """Pack a data set's documents into sequences and write the index file that `Packed` reads.

    Args:
        dataset: a `TokenDataset`.
        length: inputs of a sequence; it has one more token, the last target.
        path: of the index file: 12 bytes for each piece, 8 for each sequence.

    Raises:
        TooSmall: there is no document of two tokens.
        BadShard: the ends of documents are damaged.
    """
    if length < 1:
        raise DataError(f"sequences of {length} tokens: a sequence needs at least one")
    firsts, sizes = pieces_of_documents(dataset.ends(), length)
    if not len(firsts):
        raise TooSmall(f"{dataset} has no document of two tokens or more: there is nothing to predict")
    bins = best_fit(sizes, length + 1)
    order = np.array([item for items in bins for item in items])
    ends = np.cumsum([len(items) for items in bins])
    body = ends.astype("<u8").tobytes() + firsts[order].astype("<u8").tobytes() + sizes[order].astype("<u4").tobytes()
    header = LAYOUT.pack(MAGIC, VERSION, length, len(bins), len(order), bytes.fromhex(dataset.fingerprint), 0)[:-8]
    write_durably(Path(path), header + xxhash.xxh3_64_intdigest(header + body).to_bytes(8, "little") + body)
    return Path(path)


class Packed:
    """Training samples of packed documents: sample i is a pure function of (seed, i).

    Args:
        dataset: the data set that was packed.
        path: the index file that `pack` wrote.
        seed: of the order.

    Attributes:
        filled: share of the places in sequences that hold tokens.

    Raises:
        BadShard: the index file is damaged.
        DataError: it is of other data.

    Example:
        >>> import tempfile
        >>> from fasttrain.data import ShardWriter, TokenDataset
        >>> folder = Path(tempfile.mkdtemp())
        >>> with ShardWriter(folder / "a.tokens", vocabulary=100, tokenizer=bytes(16)) as shard:
        ...     for n in (3, 6, 2, 4):
        ...         shard.add(np.arange(n) + 10 * n)
        >>> dataset = TokenDataset(folder / "a.tokens")
        >>> packed = Packed(dataset, pack(dataset, 7, folder / "packed"))
        >>> sorted(packed.fetch(np.arange(2))["tokens"].tolist())
        [[40, 41, 42, 43, 30, 31, 32, 0], [60, 61, 62, 63, 64, 65, 20, 21]]
    """

    def __init__(self, dataset: Any, path: str | Path, seed: int = 0):
        self.stream, self.path, self.seed = dataset, Path(path), seed
        self.length, self._ends, self._firsts, self._sizes = _read(self.path, dataset)
        self.per_pass, self.vocabulary = len(self._ends), dataset.vocabulary
        self.filled = int(self._sizes.sum()) / (self.per_pass * (self.length + 1))

    def __len__(self) -> int:
        return self.per_pass

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, (self.stream, self.path, self.seed)

    def reseeded(self, seed: int) -> Packed:
        """The same sequences in another order."""
        return Packed(self.stream, self.path, seed)

    def sequences(self, indices: np.ndarray) -> np.ndarray:
        """Which sequence each sample is: int64, shape as `indices`."""
        turns, places = np.divmod(indices, self.per_pass)
        return permuted_each(places, self.per_pass, mix_each(np.uint64(mix(self.seed)) ^ turns.astype(np.uint64)))

    def _pieces(self, sequence: int) -> zip[tuple[int, int]]:
        pieces = slice(int(self._ends[sequence - 1]) if sequence else 0, int(self._ends[sequence]))
        return zip(self._firsts[pieces].tolist(), self._sizes[pieces].tolist(), strict=True)

    def _sound(self, i: int) -> bool:
        sequence, = self.sequences(np.array([i])).tolist()
        return all(self.stream.sound(first, size) for first, size in self._pieces(sequence))

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Samples of these numbers.

        Returns:
            ``tokens``: (b, length + 1), filled up with the separator (or 0); ``positions``: int32, (b, length), of each
            input in its piece; ``counted``: bool, (b, length), whether the target at this place, the token after it,
            belongs to the same piece, so that its loss counts; ``replaced`` as `Windows.fetch`.
        """
        given: dict[str, np.ndarray] = {}
        if self.stream.on_bad == "skip":
            indices, given["replaced"] = substitutes(indices, self.per_pass, self.seed, self._sound, self.stream)
        tokens = np.full((len(indices), self.length + 1), self.stream.separator or 0, self.stream.dtype)
        positions = np.zeros((len(indices), self.length + 1), np.int32)
        for row, sequence in enumerate(self.sequences(indices).tolist()):
            place = 0
            for first, size in self._pieces(sequence):
                tokens[row, place : place + size] = self.stream.gather(np.array([first]), size)[0]
                positions[row, place : place + size] = np.arange(size)
                place += size
        return given | {"tokens": tokens, "positions": positions[:, :-1], "counted": positions[:, 1:] > 0}

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples."""
        return {"order": 1, "data": self.stream.fingerprint, "packed": True, "seed": self.seed, "length": self.length}


def _read(path: Path, dataset: Any) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    try:
        memory = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise BadShard(path, f"cannot be read: {error}; make it with fasttrain.data.pack") from error
    if len(memory) < LAYOUT.size or bytes(memory[:8]) != MAGIC:
        raise BadShard(path, "is not an index of packed sequences; make one with fasttrain.data.pack")
    header, body = bytes(memory[: LAYOUT.size]), memory[LAYOUT.size :]
    _, version, length, sequences, pieces, data, checksum = LAYOUT.unpack(header)
    hashed = xxhash.xxh3_64(header[:-8])
    hashed.update(body.data)
    if version != VERSION or len(body) != 8 * sequences + 12 * pieces or hashed.intdigest() != checksum:
        raise BadShard(path, "is damaged, or of another version: its size or checksum is wrong; make it again")
    if data.hex() != dataset.fingerprint:
        raise DataError(f"{path} was packed from other data than {dataset}: pack that")
    ends, firsts = body[: 8 * sequences].view("<u8"), body[8 * sequences : 8 * (sequences + pieces)].view("<u8")
    return length, ends, firsts, body[8 * (sequences + pieces) :].view("<u4")
