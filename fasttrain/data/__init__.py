"""Data: token files, the order of samples, and a loader whose position is one integer.

Nothing is imported here before it is asked for; only the loader needs torch. Read in this order: ``order`` (keyed
bijections), ``windows`` (samples of a stream), ``shard`` and ``dataset`` (token files), ``mixture``, ``position``,
``loader``; beside them ``processes``, ``prefetch`` and ``upload``; and ``make`` (``plan``, ``encoders``), which writes
token files.
"""

from importlib import import_module

HOMES = {
    "Windows": "windows", "Source": "windows", "Mixture": "mixture", "TokenDataset": "dataset",
    "cu_seqlens": "dataset", "Packed": "packing", "pack": "packing", "Loader": "loader", "ShardWriter": "writing",
    "tokenize": "make",
    **dict.fromkeys(("DataError", "BadShard", "TooSmall", "WrongTokenizer", "WrongState", "WorkerDied"), "errors"),
}
__all__ = list(HOMES)


def __getattr__(name: str) -> object:
    if name in HOMES:
        return getattr(import_module(f"fasttrain.data.{HOMES[name]}"), name)
    raise AttributeError(f"module 'fasttrain.data' has no attribute {name!r}")
