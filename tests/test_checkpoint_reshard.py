"""Saved by any number of ranks at any stage of ZeRO, loaded by any other: nothing is lost, and no more is read."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import ranks
from checkpointed import Run, assert_same

from fasttrain.checkpoint import Checkpointer, Reader

STEPS = 3


def saves(wire: Any, folder: str, stage: int | None, stored: str) -> tuple[dict[str, Any], int]:
    run = Run(wire, stage, stored)
    for number in range(STEPS):
        run.step(number)
    with Checkpointer(folder, wire=wire) as checkpoints:
        saving = checkpoints.save(STEPS, run.state(position=(STEPS, "kept")))
        saving.wait()
    return run.whole(), saving.nbytes


def loads(wire: Any, folder: str, stage: int | None, stored: str, fresh: bool) -> tuple[dict[str, Any], int]:
    run = Run(wire, stage, stored, seed=1)
    if not fresh:
        run.step(9)
    with Checkpointer(folder, wire=wire) as checkpoints:
        loaded = checkpoints.load(run.state(position=None))
        assert loaded is not None
        assert (loaded.step, loaded.values["position"]) == (STEPS, (STEPS, "kept"))
        again = checkpoints.save(STEPS + 1, run.state(position=(STEPS, "kept")))
        again.wait()
    return run.whole(), loaded.bytes_read


# stage and ranks that save, stage and ranks that load, storage; every pair of neighbours occurs somewhere
COVERING = [
    (None, 1, 1, 2, "fp32"), (0, 2, 2, 4, "torch"), (1, 4, 0, 1, "split bf16"), (2, 2, 3, 2, "8-byte"),
    (3, 4, 1, 2, "5-byte"), (3, 2, None, 1, "split bf16"), (1, 2, 3, 4, "fp8 kahan"), (0, 4, 1, 1, "mixed"),
    (2, 4, 0, 2, "schedule-free"), (1, 2, None, 1, "muon"), (3, 2, 2, 2, "adafactor"), (0, 1, 2, 2, "soap"),
    (2, 2, 1, 4, "momentum"), (3, 2, 3, 4, "adafactor"), (None, 1, 3, 2, "soap"), (3, 4, 0, 2, "muon"),
    (None, 1, 3, 4, "adafactor"), (3, 1, 2, 2, "8-byte"),
]  # fmt: skip
PLACES = list(itertools.product((0, 1, 2, 3), (1, 2, 4)))
EVERYTHING = [(*a, *b, stored) for a, b, stored in itertools.product(PLACES, PLACES, ("fp32", "8-byte"))]


def check(before: int | None, world: int, after: int | None, other: int, stored: str, folder: Path) -> None:
    done = ranks.run(saves, world, str(folder), before, stored)
    wanted = done[0][0]
    got = ranks.run(loads, other, str(folder), after, stored, world % 2 == 0)
    leave = ("/draw",) if world != other else ()
    for rank, (whole, _) in enumerate(got):
        assert_same(whole, wanted, f"rank {rank}", leave if rank else ())
    tensors = Reader(sorted(folder.glob("step-*"))[0]).tensors
    everything = sum(stored.nbytes for stored in tensors.values())
    assert sum(nbytes for _, nbytes in done) == everything  # nothing is written twice
    shared = sum(stored.nbytes for name, stored in tensors.items() if name.startswith("rng/"))
    for _, nbytes in got:
        assert nbytes <= everything - shared * (world - 1) // world


@pytest.mark.parametrize("before, world, after, other, stored", COVERING)
def test_a_load_loses_nothing(before: Any, world: int, after: Any, other: int, stored: str, tmp_path: Path) -> None:
    check(before, world, after, other, stored, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("before, world, after, other, stored", EVERYTHING)
def test_every_pair_of_stages(before: Any, world: int, after: Any, other: int, stored: str, tmp_path: Path) -> None:
    check(before, world, after, other, stored, tmp_path)
