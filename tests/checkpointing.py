"""States to save, each a function of its step, and the proof that a checkpoint holds one of them and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.checkpoint.commit import publish
from fasttrain.checkpoint.disk import DISK, Files
from fasttrain.checkpoint.pieces import Piece
from fasttrain.checkpoint.read import Reader
from fasttrain.checkpoint.write import write_rank

CHUNK = 1024
ROWS, COLUMNS = 40, 30


def arrays(step: int, rows: int = ROWS) -> dict[str, np.ndarray]:
    """The whole state after a step: tensors of several dtypes, a scalar and an empty one among them."""
    draw = np.random.default_rng(step)
    return {
        "model/weight": draw.standard_normal((rows, COLUMNS)).astype(np.float32),
        "model/bias": draw.integers(0, 1 << 16, 7).astype(np.uint16),
        "optimizer/weight/exp_avg": draw.standard_normal((rows, COLUMNS)),
        "optimizer/weight/codes": draw.integers(-128, 128, 77).astype(np.int8),
        "optimizer/step": np.array(step),
        "model/none": np.empty((0, 3), np.float32),
        "rng/rank0/torch": draw.integers(0, 256, 50).astype(np.uint8),
    }


DTYPES = {"float32": "F32", "uint16": "BF16", "float64": "F64", "int8": "I8", "int64": "I64", "uint8": "U8"}


def pieces(step: int, rank: int = 0, world: int = 1, rows: int = ROWS) -> list[Piece]:
    """What a rank saves: one tensor is divided by rows, one by columns, the others are one rank's."""
    found = []
    for number, (name, array) in enumerate(arrays(step, rows).items()):
        dtype = DTYPES[array.dtype.name]
        if name == "model/weight":
            low, high = (array.size * end // world for end in (rank, rank + 1))
            data = memoryview(array.reshape(-1)[low:high])
            found.append(Piece(name, dtype, array.shape, data, span=(low, high - low)))
        elif name == "optimizer/weight/exp_avg":
            low, high = (COLUMNS * end // world for end in (rank, rank + 1))
            data = memoryview(np.ascontiguousarray(array[:, low:high]))
            found.append(Piece(name, dtype, array.shape, data, box=((0, low), (rows, high - low))))
        elif number % world == rank:
            found.append(Piece(name, dtype, array.shape, memoryview(array)))
    return found


def values(step: int, rank: int) -> dict[str, Any]:
    """What a rank saves beside tensors."""
    return {"step": step, "rank": rank, "lr": 0.1 / (step + 1),
            "data": {"index": step * 10, "skipped": [step, None, True]}}


def save(directory: Path, step: int, world: int = 1, files: Files = DISK, *, attempt: str = "a", rows: int = ROWS,
         metrics: dict[str, float] | None = None, **options: Any) -> Path:
    """One whole checkpoint, every rank's part written by this process."""
    part = directory / f".part-{step}-{attempt}"
    for rank in range(world):
        write_rank(part, rank, world, pieces(step, rank, world, rows), values(step, rank), files=files,
                   **{"chunk": CHUNK, **options})
    return publish(directory, part, step, world, deadline_s=1, files=files, metrics=metrics)


def proven(path: Path, rows: int = ROWS) -> int:
    """The step of a checkpoint, after every byte of it was compared with that step's state."""
    with Reader(path) as reader:
        whole = arrays(reader.step, rows)
        assert set(reader.tensors) == set(whole)
        for name, array in whole.items():
            assert reader.tensors[name].shape == array.shape
            assert bytes(reader.read(name)) == array.tobytes(), name
        for rank in range(reader.world):
            assert reader.values(rank) == values(reader.step, rank)
        return reader.step
