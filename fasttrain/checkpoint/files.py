"""The files of a checkpoint, without torch: what writes, publishes, finds, reads, locks, keeps and verifies them."""

from fasttrain.checkpoint.commit import publish
from fasttrain.checkpoint.damage import Damage, verify
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
from fasttrain.checkpoint.find import Found, complete, leftovers, newest
from fasttrain.checkpoint.lock import Lock
from fasttrain.checkpoint.pieces import Piece
from fasttrain.checkpoint.read import Reader, Stored
from fasttrain.checkpoint.removal import clean, prune
from fasttrain.checkpoint.retention import Keep
from fasttrain.checkpoint.show import inspect
from fasttrain.checkpoint.space import preflight
from fasttrain.checkpoint.write import write_rank
from fasttrain.checkpoint.writer import Job, Writer, WriterDied

__all__ = ["Piece", "write_rank", "publish", "complete", "newest", "leftovers", "Found", "Reader", "Stored", "Lock",
           "Keep", "prune", "clean", "preflight", "verify", "Damage", "inspect", "Writer", "Job", "Files", "DISK",
           "CheckpointError", "NotACheckpoint", "Incomplete", "Damaged", "Malformed", "Locked", "NoSpace", "WriterDied"]
