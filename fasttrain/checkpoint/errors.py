"""What can be wrong with a checkpoint, as types; each message names the file, and the tensor where there is one."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(RuntimeError):
    """Any of the errors below."""


class NotACheckpoint(CheckpointError):
    """The path is no checkpoint, or one that this version cannot read."""


class Incomplete(CheckpointError):
    """Something that the checkpoint is made of is not there: a file, a rank, a part of a tensor."""


class Damaged(CheckpointError):
    """Bytes are not those that were written.

    Attributes:
        file: the damaged file.
        tensor: the tensor whose bytes they are; None for what belongs to none.
        what: the damage in words.
    """

    def __init__(self, file: Path, what: str, tensor: str | None = None):
        super().__init__(f"{file}: {f'tensor {tensor!r}: ' if tensor is not None else ''}{what}")
        self.file, self.tensor, self.what = Path(file), tensor, what


class Malformed(Damaged):
    """A file that no writer of ours makes: refused before anything in it is believed."""


class Locked(CheckpointError):
    """Somebody else writes into this directory."""


class NoSpace(CheckpointError):
    """The disk is full, or would be.

    Attributes:
        needed: bytes that the checkpoint takes.
        free: bytes that were free.
    """

    def __init__(self, directory: Path, needed: int, free: int, when: str):
        super().__init__(f"{directory}: {when}: the checkpoint needs {needed:,} bytes and {free:,} are free; make "
                         f"room, keep fewer checkpoints, or name another directory")
        self.directory, self.needed, self.free = Path(directory), needed, free
