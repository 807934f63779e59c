"""A checkpoint as the first release wrote it: it loads for ever.

``tests/golden/format-1`` was written by `write` below, and is not written again: a later format gets its own folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers import ROOT

from fasttrain.checkpoint import Piece, Reader, complete, manifest, publish, verify, write_rank

GOLDEN = ROOT / "tests" / "golden" / "format-1"
WEIGHT = np.arange(60, dtype=np.float32).reshape(5, 4, 3) / 8
CODES = np.arange(-100, 100, dtype=np.int16)
VALUES = {"step": 42, "lr": 3e-4, "text": "Zürich ∂", "best": float("inf"), "seed": 1 << 64,
          "nested": {"list": [1, [2.5, None], True]}}


def pieces(rank: int) -> list[Piece]:
    """What each of two ranks writes."""
    low, high = (0, 2) if rank == 0 else (2, 3)
    box = Piece("model/weight", "F32", WEIGHT.shape, memoryview(np.ascontiguousarray(WEIGHT[:, :, low:high])),
                box=((0, 0, low), (5, 4, high - low)))
    span = Piece("optimizer/weight/codes", "I16", (10, 20), memoryview(CODES[90 * rank : 90 + 110 * rank]),
                 span=(90 * rank, 90 + 20 * rank))
    return [box, span] if rank else [box, span, Piece("step", "I64", (), memoryview(np.array(42)))]


def write(root: Path) -> Path:
    for rank in range(2):
        write_rank(root / ".part", rank, 2, pieces(rank), {**VALUES, "rank": rank}, chunk=64)
    return publish(root, root / ".part", 42, 2, metrics={"validation": 1.25})


def test_it_loads() -> None:
    found, = complete(GOLDEN)
    assert (found.step, found.sequence, found.world, found.reason) == (42, 1, 2, None)
    assert found.metrics == {"validation": 1.25}
    with Reader(found.path) as reader:
        assert bytes(reader.read("model/weight")) == WEIGHT.tobytes()
        assert bytes(reader.read("optimizer/weight/codes")) == CODES.tobytes()
        assert bytes(reader.read("step")) == np.array(42).tobytes()
        assert {name: (stored.dtype, stored.shape) for name, stored in reader.tensors.items()} == {
            "model/weight": ("F32", (5, 4, 3)), "optimizer/weight/codes": ("I16", (10, 20)), "step": ("I64", ())}
        assert [reader.values(rank) for rank in range(2)] == [{**VALUES, "rank": rank} for rank in range(2)]
    assert verify(GOLDEN) == []


def test_the_same_state_makes_the_same_bytes(tmp_path: Path) -> None:
    """A change of the format is a decision, with another number: never an accident."""
    old, new = GOLDEN / "step-000000000042", write(tmp_path)
    assert manifest.FORMAT == 1
    for path in old.iterdir():
        if path.suffix == ".safetensors":
            assert (new / path.name).read_bytes() == path.read_bytes()
        else:
            trees = [manifest.decode(file, file.read_bytes()) for file in (path, new / path.name)]
            for tree in trees:
                for changes in ("time", "producer", "xxh3_128"):
                    tree.pop(changes, None)
                if path.name == "manifest.json":  # of manifests that name their producer
                    for entry in tree["ranks"]:
                        entry.pop("xxh3"), entry.pop("size")
            assert trees[0] == trees[1]
