"""The files of a checkpoint, without torch: what writes, publishes, finds, reads, locks, keeps and verifies them."""

from fasttrain.checkpoint.commit import publish
from fasttrain.checkpoint.disk import DISK, Files
from fasttrain.checkpoint.errors import (
    CheckpointError,
    Damaged,
    Incomplete,
    Locked,
    Malformed,
    NoSpace,
    NotACheckpoint,
)
from fasttrain.checkpoint.find import Found, complete, leftovers
from fasttrain.checkpoint.lock import Lock
from fasttrain.checkpoint.pieces import Piece
from fasttrain.checkpoint.read import Reader, Stored
from fasttrain.checkpoint.write import write_rank

__all__ = ["Piece", "write_rank", "publish", "complete", "leftovers", "Found", "Reader", "Stored", "Lock",
           "Files", "DISK", "CheckpointError", "NotACheckpoint", "Incomplete", "Damaged", "Malformed", "Locked",
           "NoSpace"]
