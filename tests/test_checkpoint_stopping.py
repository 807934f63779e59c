"""Signals and ends: every rank saves the same step, or none saves anything."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import forks
import pytest
import ranks
import torch
from torch import nn

from fasttrain.checkpoint import Checkpointer, complete
from fasttrain.checkpoint.stopping import STOPPED, Stopping
from fasttrain.dist.failures import INTERRUPTED, PEER_FAILED
from fasttrain.optim import SGD
from fasttrain.parallel import DataParallel

ENOUGH = 400


def trains(wire: Any, watcher: Any, folder: str, how: str) -> None:
    """Steps until somebody asks to stop; `how`: who is sent what, after which step."""
    model = DataParallel(nn.Linear(2, 2), mesh=wire)
    optimizer = SGD(model.parameters(), lr=0.1)
    plan = {one.split("@")[0]: int(one.split("@")[1]) for one in how.split(",")}
    over = wire if "wire" in plan else model
    with watcher.guard(), Checkpointer(folder, wire=wire) as checkpoints, Stopping(over) as stopping:
        for step in range(1, ENOUGH):
            watcher.step = step
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if plan.get(f"term{wire.rank}") == step:
                os.kill(os.getpid(), signal.SIGTERM)
            if plan.get(f"int{wire.rank}") == step:
                os.kill(os.getpid(), signal.SIGINT)
            if plan.get(f"kill{wire.rank}") == step:
                os.kill(os.getpid(), signal.SIGKILL)
            if plan.get(f"orphan{wire.rank}") == step:  # torchrun's way with the others
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.005)
            if reason := stopping.requested(step):
                checkpoints.save(step, {"model": model, "optimizer": optimizer}).wait()
                os.write(2, f"stopped {step} {reason}\n".encode())
                checkpoints.close()
                wire.barrier()
                watcher.close()
                os._exit(stopping.exit_code)


@pytest.mark.parametrize("how, reasons, codes", [
    ("term1@3", ["another rank", "SIGTERM"], [STOPPED, STOPPED]),
    ("term0@2,term1@6", None, [STOPPED, STOPPED]),
    ("int0@4", ["SIGINT", "another rank"], [INTERRUPTED, STOPPED]),
    ("wire@0,term1@3", ["another rank", "SIGTERM"], [STOPPED, STOPPED]),
])
def test_all_ranks_save_the_same_step(how: str, reasons: Any, codes: list[int], tmp_path: Path) -> None:
    ended = ranks.faulty(trains, 2, str(tmp_path), how)
    lines = [next(line.split(maxsplit=2) for line in rank.text.splitlines() if line.startswith("stopped"))
             for rank in ended]
    assert lines[0][1] == lines[1][1]
    if reasons is not None:
        assert [line[2] for line in lines] == reasons
    assert [rank.code for rank in ended] == codes
    (found,) = complete(tmp_path)
    assert (found.step, found.world, found.reason) == (int(lines[0][1]), 2, None)


def test_after_a_loss_nothing_is_saved(tmp_path: Path) -> None:
    """A rank is killed, and the other is sent SIGTERM for it."""
    killed, other = ranks.faulty(trains, 2, str(tmp_path), "kill0@3,orphan1@3")
    assert (killed.code, other.code) == (-signal.SIGKILL, PEER_FAILED)
    assert "rank 0" in other.text
    assert "stopped" not in other.text
    assert complete(tmp_path) == []


TWICE = """
import os, signal, sys, threading
from fasttrain.checkpoint import Checkpointer, Stopping, checkpointer
import torch
state = {"model": torch.nn.Linear(2, 2)}
with Checkpointer(sys.argv[1]) as checkpoints, Stopping() as stopping:
    checkpoints.save(1, state).wait()
    write = checkpointer.write_rank
    checkpointer.write_rank = lambda *a, **k: (threading.Event().wait(), write(*a, **k))
    os.kill(os.getpid(), signal.SIGINT)
    assert stopping.requested(2) == "SIGINT"
    saving = checkpoints.save(2, state)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    saving.wait()
"""


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    done = forks.python(TWICE, str(tmp_path), timeout=30)
    assert done.returncode == INTERRUPTED, done.stderr
    assert "the second Ctrl-C" in done.stderr
    assert [(found.step, found.reason) for found in complete(tmp_path)] == [(1, None)]


def test_exceptions() -> None:
    saved: list[str] = []
    stopping = Stopping()
    with pytest.raises(ZeroDivisionError), stopping.saving(saved.append):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), stopping.saving(saved.append):
        raise KeyboardInterrupt
    assert saved == ["ZeroDivisionError"]

    def fails(reason: str) -> None:
        raise OSError("disk full")

    with pytest.raises(ZeroDivisionError) as raised, stopping.saving(fails):
        raise ZeroDivisionError
    assert raised.value.__notes__ == ["and its state could not be saved: OSError: disk full"]
    with pytest.raises(TypeError, match="not a Linear"):
        Stopping(nn.Linear(2, 2))  # type: ignore[arg-type]


def alone_or_together(wire: Any) -> list[bool]:
    stopping = Stopping(wire)
    return [stopping.may_save(), stopping.may_save(ValueError()), stopping.may_save(FloatingPointError())]


def test_an_exception_of_one_rank_saves_nothing() -> None:
    assert ranks.run(alone_or_together, 2) == [[True, False, True]] * 2


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Stopping() as stopping:
        assert signal.getsignal(signal.SIGTERM) == stopping._asked
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
