"""Steps of a pipeline are those of one process: loss, gradients, norm and parameters, by every schedule."""

import pytest
from pipelines import SCHEDULES, steps_alike
from ranks import run

from fasttrain.dist.mesh import Mesh


def alike(wire, schedule: str, micro_batches: int, tied: bool) -> list[str]:
    mesh = Mesh(pipeline=wire.size, watch=False)
    pipeline = steps_alike(mesh, schedule, micro_batches, tied)
    return [str(action) for action in pipeline.actions]


CASES = [(schedule, count, bool((place + count) % 2)) for place, schedule in enumerate(SCHEDULES)
         for count in (4, 6)]


@pytest.mark.parametrize(("schedule", "micro_batches", "tied"), CASES)
def test_two_ranks(schedule: str, micro_batches: int, tied: bool) -> None:
    run(alike, 2, schedule, micro_batches, tied)
