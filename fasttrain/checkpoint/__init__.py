"""Checkpoints: what is saved survives kills, full disks and flipped bits, and loads at any number of ranks.

Two halves. The files (``files``) know bytes, names and disks, and import no torch; the state above them knows models
and optimizers. Names are imported when they are asked for.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "fasttrain.checkpoint.files": "Piece write_rank publish complete leftovers Found Reader Stored Lock Files DISK "
                                  "CheckpointError NotACheckpoint Incomplete Damaged Malformed Locked NoSpace",
}  # module: what it gives
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
