"""A trainer that is really killed, at random moments and before every operation of a save; each restart goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpointing import proven
from helpers import ROOT

from fasttrain.checkpoint import complete, verify

KILLS = 26  # of each kind
ROWS = 1000


def said(function: str, *arguments: object) -> list[dict[str, Any]]:
    """What a function of saving.py says, in a new process: no fork of this one, which has torch."""
    code = f"import sys, pathlib, saving; saving.{function}(pathlib.Path(sys.argv[1]), *sys.argv[2:])"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
                          env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("how", ["at once", "in a thread"])
def test_killed_at_random_moments(how: str, tmp_path: Path) -> None:
    """Each restart finds the last step that was told as published, or the one that was being published: never a mix.

    Every byte of what it finds is compared with that step's state, there and once more here.
    """
    directory, published, left, kills, hit = tmp_path / "checkpoints", 0, [], 0, 0
    for line in said("killed_at_random", directory, how, KILLS):
        if "left" in line:
            assert line["left"] == left, "all that is left is named, and nothing else"
            assert (line["recovered"] is not None) == (kills > 0), "the lock is taken over, and that is told"
        if "step" in line:
            assert line["step"] in (published, published + 1)
            assert [reason for _, reason in line["found"] if reason is not None] == []
            published = line["step"]
        if "published" in line:
            assert line["published"] == published + 1
            published += 1
        if "killed" in line:
            left, kills = line["killed"], kills + 1
            hit += bool(left)
    assert kills == KILLS
    assert hit > KILLS // 4, "the kills come in the middle of saves"
    found = complete(directory)
    assert [one.reason for one in found] == [None] * len(found)
    assert proven(found[0].path, ROWS) in (published, published + 1)
    assert verify(directory) == []


def test_a_rank_is_killed(tmp_path: Path) -> None:
    """Three processes, no collective: the first says who is missing, publishes nothing, and the next save works."""
    lines = said("in_ranks", tmp_path)
    assert [line for line in lines if "before" not in line] == [
        {"published": "step-000000000001"}, {"ended": [0, 0, 0]},
        {"error": f"{tmp_path}/.part-2-x: within 0.1 s nothing came from rank 1 of 3; nothing was published"},
        {"ended": [0, 9, 0]},
        {"error": f"{tmp_path}/.part-3-x: within 0.1 s nothing came from rank 2 of 3; nothing was published"},
        {"ended": [0, 0, 9]}, {"published": "step-000000000004"}, {"ended": [0, 0, 0]}]
    assert [proven(one.path) for one in complete(tmp_path)] == [4, 1]


def test_killed_before_every_operation(tmp_path: Path) -> None:
    """Between any two operations of a save, and of the removal of an old one."""
    published, killed_before = 0, []
    lines = said("die_everywhere", tmp_path / "checkpoints")
    for line in lines:
        assert line.get("step", published) in (published, published + 1)
        published = line.get("published", line.get("step", published))
        killed_before += [line["before"]] if "before" in line else []
    assert set(killed_before) == {"make_directory", "create", "write", "sync", "close", "rename", "sync_directory",
                                  "unlink", "remove_directory"}
    assert len(killed_before) > 25
    assert lines[-1] == {"threads": 1, "torch": False}
    assert verify(tmp_path / "checkpoints") == []
