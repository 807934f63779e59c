"""A rank that is killed, raises or stops in the middle of a pipeline: all end, with the cause, within seconds."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from ranks import faulty, mark, times
from torch import Tensor, nn

from fasttrain.dist.failures import FAILED, PEER_FAILED
from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.pipeline import Pipeline, split

RANKS = 3


class Fails(nn.Module):
    """A linear layer; in the second step, when the third micro-batch comes, this happens to its rank."""

    def __init__(self, what: str, here: bool):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.what, self.here, self.calls = what, here, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += torch.is_grad_enabled()
        if self.here and self.calls == 4 + 3:
            mark("fault")
            if self.what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            raise ArithmeticError("the block is out of order")
        return self.linear(x)


def steps(wire: Any, watcher: Any, what: str, schedule: str) -> None:
    mesh = Mesh(pipeline=wire.size, watch=watcher, timeout_s=5)
    each = 2 if schedule == "zbv" else 1
    blocks = [Fails(what, wire.rank == 1) for _ in range(each * wire.size)]
    pipeline = Pipeline(split(blocks, mesh, schedule=schedule), mesh, lambda y, t: (y - t).square().mean(),
                        micro_batches=4)
    try:
        for _ in range(5):
            pipeline.step(torch.ones(8, 4), torch.zeros(8, 4))
    except ArithmeticError as error:  # the stage's own, which torch had put another around
        if "Stage" not in error.__notes__[0]:
            raise RuntimeError("it does not say which stage") from error
        while what == "caught":  # lives on without a word: it is ended
            signal.pause()
        raise


@pytest.mark.parametrize(("what", "schedule"), [
    ("killed", "1f1b"), ("killed", "zbv"), ("raises", "zbv"), ("caught", "1f1b"), ("stopped", "1f1b")])
def test_all_end_with_the_cause(what: str, schedule: str) -> None:
    ended = faulty(steps, RANKS, what, schedule, timeout_s=5, stopped=what == "stopped")
    assert times("fault", ended)
    others = [ended[0], ended[2]]
    assert all(rank.code == PEER_FAILED for rank in others), [rank.text[-2000:] for rank in others]
    if what in ("killed", "stopped"):
        assert all("rank 1" in rank.text for rank in others)
    else:
        assert ended[1].code == FAILED
        assert all("the block is out of order" in rank.text for rank in ended)
