"""What a checkpoint holds, as text."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fasttrain.checkpoint import find
from fasttrain.checkpoint.damage import checkpoints
from fasttrain.checkpoint.errors import NotACheckpoint
from fasttrain.checkpoint.read import Reader, Stored

VALUES = 4000  # characters of a rank's values that are shown


def inspect(path: str | os.PathLike[str]) -> str:
    """The contents of a checkpoint: its tensors (dtype, shape, bytes, parts) and values; of a directory a line each.

    Raises:
        NotACheckpoint, Incomplete, Damaged: what is wrong with it.

    Example:
        >>> from fasttrain.checkpoint import inspect
        >>> inspect("/nowhere")
        Traceback (most recent call last):
            ...
        fasttrain.checkpoint.errors.NotACheckpoint: /nowhere: no directory
    """
    path = Path(path)
    if checkpoints(path) != [path]:
        return _directory(path)
    with Reader(path) as reader:
        names = max((len(name) for name in reader.tensors), default=0)
        rows = [_row(name, stored, names) for name, stored in reader.tensors.items()]
        total = sum(stored.nbytes for stored in reader.tensors.values())
        head = (f"{path}\nstep {reader.step}, sequence {reader.sequence}, written by {_count(reader.world, 'rank')}, "
                f"metrics {json.dumps(reader.metrics)}\n{_count(len(rows), 'tensor')}, {total:,} bytes")
        return "\n".join([head, *rows, *_values(reader)])


def _row(name: str, stored: Stored, width: int) -> str:
    shape = "x".join(map(str, stored.shape)) or "scalar"
    parts = f"  {len(stored.parts)} parts" if len(stored.parts) > 1 else ""
    return f"  {name:{width}}  {stored.dtype:5} {shape:>20} {stored.nbytes:>16,}{parts}"


def _values(reader: Reader) -> list[str]:
    """The values of all ranks; equal ones once."""
    ranks: dict[str, list[int]] = {}
    for rank in range(reader.world):
        ranks.setdefault(json.dumps(reader.values(rank), indent=1), []).append(rank)
    rows = []
    for text, whose in ranks.items():
        cut = f"\n... {len(text) - VALUES:,} more characters" if len(text) > VALUES else ""
        who = f"rank {whose[0]}" if len(whose) == 1 else f"ranks {', '.join(map(str, whose))}"
        rows.append(f"values of {who}: {text[:VALUES]}{cut}")
    return rows


def _directory(path: Path) -> str:
    """A line for each checkpoint, newest first, and what else lies there."""
    rows = []
    for found in find.complete(path):
        if found.sequence < 0:
            rows.append(f"  {found.path.name}  cannot be used: {found.reason}")
            continue
        metrics = "".join(f"  {name} {value:g}" for name, value in found.metrics.items())
        rows.append(f"  {found.path.name}  sequence {found.sequence}  {found.time}  {_count(found.world, 'rank')}  "
                    f"{found.nbytes:,} bytes{metrics}{f'  cannot be used: {found.reason}' if found.reason else ''}")
    rows += [f"  {left.name}  left by an unfinished save or removal" for left in find.leftovers(path)]
    if not rows:
        raise NotACheckpoint(f"{path}: holds no checkpoint")
    return "\n".join([f"{path}: newest first", *rows])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
