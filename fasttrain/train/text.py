"""Where the text comes from, which files are held out, and which window of it sample number i is.

Everything here is a pure function of the files and the seed: two processes, or two runs a year apart, agree without
talking to each other.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

import numpy as np

from fasttrain.train.config import BadInput

SEPARATOR = b"\0"  # ends every file in the stream; a file that contains it is not text
NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}


@dataclass(frozen=True)
class Text:
    """Two streams of bytes, each the concatenation of whole files, each file followed by `SEPARATOR`.

    Attributes:
        train: uint8, shape (bytes,).
        held_out: uint8, shape (bytes,).
        train_files, held_out_files: how many files each part has.
        sha256: of both streams; equal texts have equal sums.
    """

    train: np.ndarray
    held_out: np.ndarray
    train_files: int
    held_out_files: int
    sha256: str


def load(path: Path | None, held_out: float, sequence: int) -> Text:
    """Read the files under `path` (None: the standard library's source) and divide them.

    A file is held out when the hash of its path, relative to `path`, falls in the first `held_out` of all hashes: the
    division does not depend on where the directory lies, nor on which other files it has. If that leaves a part
    empty, the file with the lowest (highest) hash is moved there. A single file is cut: its end is held out.

    Raises:
        BadInput: no text, unreadable files, only empty files, or less text than `sequence` needs.
    """
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    files = [(name, data) for name, data in _read(root, only_source=path is None) if data]
    if not files:
        raise BadInput(f"no text in {root}: it holds no text file that is not empty; give another with --text")
    if len(files) == 1:
        (name, data), = files
        cut = len(data) - max(1, round(held_out * len(data)))
        parts = [(name, data[:cut])], [(name, data[cut:])]
    else:
        by_hash = sorted(files, key=lambda file: _share(file[0]))
        inside = sum(_share(name) < held_out for name, _ in files)
        inside = min(max(inside, 1), len(files) - 1)
        chosen = {name for name, _ in by_hash[:inside]}
        parts = [f for f in files if f[0] not in chosen], [f for f in files if f[0] in chosen]
    train, rest = (b"".join(data + SEPARATOR for _, data in part) for part in parts)
    for part, stream, needed in (("to train on", train, 2 * sequence + 1), ("held out", rest, sequence + 1)):
        if len(stream) < needed:
            raise BadInput(
                f"--sequence {sequence} is too long for {root}: the text {part} has {len(stream)} bytes, and must have "
                f"at least {needed}; use a shorter sequence or more text"
            )
    digest = hashlib.sha256(len(train).to_bytes(8, "little") + train + rest).hexdigest()
    return Text(_array(train), _array(rest), len(parts[0]), len(parts[1]), digest)


def _read(root: Path, only_source: bool) -> list[tuple[str, bytes]]:
    """(path relative to `root` with forward slashes, contents) of each text file, in the order of the paths."""
    try:
        names = _walk(root, only_source) if root.is_dir() else {root.name: root}
        contents = [(name, names[name].read_bytes()) for name in sorted(names)]
    except OSError as error:
        raise BadInput(f"cannot read the text: {error.filename}: {error.strerror}; give another with --text") from error
    if not root.is_dir() and SEPARATOR in contents[0][1]:
        raise BadInput(f"{root} is not text: it contains a zero byte; give another with --text")
    return [(name, data) for name, data in contents if SEPARATOR not in data]


def _walk(root: Path, only_source: bool) -> dict[str, Path]:
    def stop(error: OSError) -> None:
        raise error

    found = {}
    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = [f for f in folders if not f.startswith(".") and not (only_source and f in NOT_SOURCE)]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or (only_source and path.suffix != ".py"):
                continue
            if S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
                found[path.relative_to(root).as_posix()] = path
    return found


def _share(name: str) -> float:
    """The hash of a path, as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def _array(stream: bytes) -> np.ndarray:
    return np.frombuffer(stream, dtype=np.uint8)


class Windows:
    """Training samples: sample i is a pure function of (seed, i), with no table and no state.

    One pass cuts the stream (from an offset that differs from pass to pass) into windows of `length` bytes, and takes
    each once, in an order that is a keyed bijection of their numbers. Sample i belongs to pass ``i // len(self)``.

    Args:
        stream: uint8, shape (bytes,), at least ``2 * length + 1`` of them.
        length: bytes in one sequence.
        seed: of the order.

    Example:
        >>> windows = Windows(np.arange(50, dtype=np.uint8), length=8, seed=0)
        >>> windows.batch(first=0, count=4).shape
        (4, 9)
    """

    def __init__(self, stream: np.ndarray, length: int, seed: int):
        self.stream, self.length, self.seed = stream, length, seed
        self.per_pass = (len(stream) - 1) // length - 1
        if self.per_pass < 1:
            raise ValueError(f"a stream of {len(stream)} bytes is too short for windows of {length}")

    def __len__(self) -> int:
        return self.per_pass

    def start(self, i: int) -> int:
        """Where sample i begins in the stream."""
        turn, place = divmod(i, self.per_pass)
        key = _mix(_mix(self.seed) ^ turn)
        return _mix(key) % self.length + self.length * permuted(place, self.per_pass, key)

    def batch(self, first: int, count: int) -> np.ndarray:
        """Samples first, first + 1, ...: uint8, shape (count, length + 1). The extra byte is the last target."""
        starts = [self.start(i) for i in range(first, first + count)]
        return np.stack([self.stream[s : s + self.length + 1] for s in starts])


def overlapping(n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows that predict every byte of a stream but the first exactly once, nearly all from half a window or more.

    Window w reads the bytes from ``starts[w]`` on and predicts the `length` bytes after the first. Consecutive windows
    overlap by half, and of each only the predictions from ``fresh_from[w]`` on, which no earlier one made, count.

    Args:
        n: bytes of the stream, more than `length`.
        length: bytes read by a window.

    Returns:
        starts, fresh_from: int64, shape (windows,).

    Example:
        >>> overlapping(n=12, length=4)
        (array([0, 2, 4, 6, 7]), array([0, 2, 2, 2, 3]))
    """
    last = n - 1 - length
    starts = np.append(np.arange(0, last, max(1, length // 2)), last)
    return starts, np.append(0, starts[:-1] + length - starts[1:])


def permuted(i: int, n: int, key: int) -> int:
    """Where i goes under the bijection of 0 .. n-1 that `key` names.

    A Feistel network over the smallest even number of bits that holds n is a bijection of a power of four; walking on
    until the value is below n makes it one of 0 .. n-1 (Black and Rogaway, Ciphers with arbitrary finite domains,
    2002). Fewer than four walks are expected.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(key + turn ^ right << 8) & mask)
        i = left << half | right
        if i < n:
            return i


def _mix(x: int) -> int:
    """One step of splitmix64: a bijection of 64 bits whose every output bit depends on every input bit."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
