"""Checkpoints: what is saved survives kills, full disks and flipped bits, and loads at any number of ranks.

Two halves. The files (``files``) know bytes, names and disks, and import no torch; the state above them knows models
and optimizers. Names are imported when they are asked for.
"""

from importlib import import_module
from typing import Any

_NAMES = {  # module: what it gives
    "files": "Piece write_rank publish complete newest leftovers Found Reader Stored Lock Keep prune clean preflight "
             "verify Damage inspect Writer Job Files DISK CheckpointError NotACheckpoint Incomplete Damaged Malformed "
             "Locked NoSpace WriterDied",
    "checkpointer": "Checkpointer",
    "saving": "Saving",
    "loading": "load Loaded",
    "state": "Mismatch",
    "rng": "Rng",
    "of_object": "PerRank",
    "stopping": "Stopping",
    "exports": "export_safetensors export_torch export_dcp",
    "imports": "load_torch import_dcp",
}
_WHERE = {name: f"fasttrain.checkpoint.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
