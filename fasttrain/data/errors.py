"""What can be wrong with data. Each is a `DataError`, and says what was found, where, and what to do."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Data, or what was asked of it, cannot work."""


class BadShard(DataError):
    """A token file is missing, short, or not what it was when it was written.

    Attributes:
        path: the file.
        place: first byte and number of bytes of what is damaged; None: the whole file.
        why: what was found.
    """

    def __init__(self, path: Path, why: str, place: tuple[int, int] | None = None):
        self.path, self.why, self.place = path, why, place
        where = "" if place is None else f", bytes {place[0]} to {sum(place) - 1}"
        super().__init__(f"{path}{where}: {why}")

    def __reduce__(self) -> tuple[type, tuple[Path, str, tuple[int, int] | None]]:
        return type(self), (self.path, self.why, self.place)


class TooSmall(DataError):
    """There is less data than one window, or one batch, needs."""


class WrongTokenizer(DataError):
    """Tokens, and what is to be done with them, belong to different tokenizers or vocabularies."""


class WrongState(DataError):
    """A saved position belongs to other data, another seed or another length of windows."""


class WorkerDied(RuntimeError):
    """A worker process ended before its work did."""
