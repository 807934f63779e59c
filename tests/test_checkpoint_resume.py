"""A run that goes on from a checkpoint ends in the bits of the run that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from checkpointed import Run, assert_same

from fasttrain.checkpoint import Checkpointer, Rng

STEPS, AT = 5, 2


def unbroken(wire: Any, folder: str, stage: int | None, stored: str) -> dict[str, Any]:
    run = Run(wire, stage, stored)
    with Checkpointer(folder, wire=wire) as checkpoints:
        for number in range(STEPS):
            run.step(number, wire.rank)
            if number + 1 == AT:
                checkpoints.save(AT, run.state())
        checkpoints.check()
    return run.whole()


def resumed(wire: Any, folder: str, stage: int | None, stored: str) -> dict[str, Any]:
    run = Run(wire, stage, stored, seed=7)
    with Checkpointer(folder, wire=wire) as checkpoints:
        loaded = checkpoints.load(run.state())
    assert loaded is not None
    assert loaded.step == AT
    for number in range(AT, STEPS):
        run.step(number, wire.rank)
    return run.whole()


@pytest.mark.parametrize("world, stage, stored", [
    (1, None, "8-byte"), (2, 0, "fp32"), (2, 1, "5-byte"), (2, 2, "split bf16"), (2, 3, "8-byte"), (1, None, "torch"),
    (1, None, "soap"), (2, 1, "schedule-free"), (2, 2, "adafactor"), (1, None, "mixed")])
def test_it_ends_in_the_same_bits(world: int, stage: int | None, stored: str, tmp_path: Path) -> None:
    wanted = ranks.run(unbroken, world, str(tmp_path), stage, stored)
    got = ranks.run(resumed, world, str(tmp_path), stage, stored)
    for rank, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert_same(mine, theirs, f"rank {rank}")


def moves(wire: Any, folder: str, stage: int, before: int) -> dict[str, Any]:
    run = Run(wire, stage, "fp32", seed=before)
    with Checkpointer(folder, wire=wire) as checkpoints:
        if before:
            loaded = checkpoints.load(run.state())
            assert loaded is not None
            assert loaded.step == before
        for number in range(before, before + 2):
            torch.manual_seed(number)  # the same batch and dropout on every rank, so that their number changes nothing
            run.step(number)
        checkpoints.save(before + 2, run.state()).wait()
    return run.whole()


def test_a_run_that_moves_between_numbers_of_ranks_goes_on_as_one_that_stays(tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 1 ranks, at other stages. Means of equal gradients are exact, so every bit is the same."""
    for folder, places in (("moves", ((1, 0), (2, 1), (4, 2), (1, 0))), ("stays", ((1, 0),) * 4)):
        for number, (world, stage) in enumerate(places):
            whole = ranks.run(moves, world, str(tmp_path / folder), stage, 2 * number)[0]
        if folder == "moves":
            got = whole
    assert_same(got, whole)


def draws(wire: Any, folder: str, load: bool) -> list[float]:
    torch.manual_seed(100 + wire.rank)
    with Checkpointer(folder, wire=wire) as checkpoints:
        if load:
            assert checkpoints.load({"rng": Rng()}) is not None
        else:
            checkpoints.save(1, {"rng": Rng()}).wait()
    return torch.rand(4).tolist()


def test_generators_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    """Those that there were go on; new ones begin anew, each another way and always the same one."""
    wanted = ranks.run(draws, 2, str(tmp_path), False)
    assert ranks.run(draws, 1, str(tmp_path), True) == wanted[:1]
    four = ranks.run(draws, 4, str(tmp_path), True)
    assert four[:2] == wanted
    assert len({str(one) for one in four}) == 4
    assert ranks.run(draws, 4, str(tmp_path), True) == four
