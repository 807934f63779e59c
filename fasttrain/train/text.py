"""Where the text comes from, and which files are held out.

Everything here is a pure function of the files and the seed: two processes, or two runs a year apart, agree without
talking to each other.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data.documents import SEPARATOR, division, share_of_path, walk
from fasttrain.train.config import BadInput

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

    unit = "byte"
    vocabulary = 256

    def about(self) -> dict[str, Any]:
        """What ``config.json`` says of it."""
        return {"train_bytes": len(self.train), "train_files": self.train_files,
                "held_out_bytes": len(self.held_out), "held_out_files": self.held_out_files, "sha256": self.sha256}


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
        chosen = division({name: share_of_path(name) for name, _ in files}, held_out)
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
    if only_source:
        return walk(root, enter=lambda folder: folder not in NOT_SOURCE, take=lambda path: path.suffix == ".py")
    return walk(root)


def _array(stream: bytes) -> np.ndarray:
    return np.frombuffer(stream, dtype=np.uint8)
