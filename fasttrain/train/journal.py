"""The log of a run, one JSON object a line, which a killed and resumed run goes on writing."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from fasttrain.train.config import BadInput

Record = dict[str, Any]


class Journal:
    """Appends records to a file, each with one write, so that a kill leaves whole lines but for the last.

    Arguments:
        path: of the file; it may hold the records of an earlier part of the run.

    Raises:
        BadInput: another process writes into it; nothing was changed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "log.jsonl")
        >>> journal = Journal(path)
        >>> for step in (1, 2, 3):
        ...     journal.write({"event": "train", "step": step})
        >>> journal.close()                                       # killed; the newest checkpoint is that of step 2
        >>> journal = Journal(path)
        >>> journal.write({"event": "resume", "step": 2, "text": "resumed"})
        >>> journal.write({"event": "train", "step": 3, "loss": float("nan")})
        >>> journal.close()
        >>> [(record["event"], record["step"]) for record in records(path)]
        [('train', 1), ('train', 2), ('resume', 2), ('train', 3)]
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if not _lock(self._file):
            os.close(self._file)
            raise BadInput(f"{path} is being written by another process: a run is still going on there; end it, or "
                           "name another directory")
        content = _whole_lines(os.pread(self._file, os.fstat(self._file).st_size, 0))
        os.ftruncate(self._file, len(content))

    def write(self, record: Record) -> None:
        """Append a record. NaN and infinity, which JSON cannot hold, become text; single numbers of tensors are read.

        Raises:
            TypeError: a value is none of JSON's; nothing was written.
        """
        line = memoryview((json.dumps(_plain(record), allow_nan=False, default=_refuse) + "\n").encode())
        while line:
            line = line[os.write(self._file, line) :]

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def in_use(path: Path, patience_s: float = 0.0) -> bool:
    """Whether a process writes into a journal, and goes on doing so.

    Arguments:
        patience_s: how long it may take to end, as the ranks of a command that was killed do.
    """
    try:
        file = os.open(path, os.O_RDWR)
    except (FileNotFoundError, PermissionError):
        return False
    end = time.monotonic() + patience_s
    try:
        while not (free := _lock(file)) and time.monotonic() < end:
            time.sleep(0.1)
        return not free
    finally:
        os.close(file)


def _lock(file: int) -> bool:
    """The kernel's lock, which ends with the process; where the file system has none, everybody gets it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def records(path: Path) -> list[Record]:
    """The records of a run, without abandoned parts: what came after the step at which it was resumed, or of which it
    began again.

    Raises:
        OSError: the file cannot be read.
        json.JSONDecodeError: a line is no record; a last line without its end is what a kill leaves, and is left out.
    """
    found: list[Record] = []
    for text in _whole_lines(path.read_bytes()).splitlines():
        record = json.loads(text, object_hook=_numbers)
        if record["event"] in ("resume", "begin"):
            kept = record["step"] if record["event"] == "resume" else -1
            found = [earlier for earlier in found if earlier["step"] <= kept or earlier["event"] == "restart"]
        found.append(record)
    return found


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "dtype") and hasattr(value, "item") and not getattr(value, "shape", ()):
        value = value.item()  # of torch or numpy
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _refuse(value: Any) -> Any:
    raise TypeError(f"a record holds {value!r:.80}, a {type(value).__name__}: give numbers, texts, lists and dicts")


def _numbers(record: Record) -> Record:
    return {name: float(value) if value in ("nan", "inf", "-inf") else value for name, value in record.items()}
