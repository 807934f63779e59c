"""Steps of a pipeline are those of one process: loss, gradients, norm and parameters, by every schedule."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from pipelines import SCHEDULES, steps_alike
from ranks import run

from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.pipeline import schedules


def alike(wire: Any, schedule: str, micro_batches: int, tied: bool) -> None:
    steps_alike(Mesh(pipeline=wire.size, watch=False), schedule, micro_batches, tied)


COVERING = {  # (schedule, ranks, micro-batches, tied): pairs of these; the product of all is slow
    ("gpipe", 2, 2, True), ("gpipe", 4, 4, False), ("1f1b", 2, 6, False), ("1f1b", 4, 4, True), ("1f1b", 2, 5, True),
    ("interleaved", 2, 4, True), ("interleaved", 4, 10, False), ("interleaved", 2, 6, False),
    ("breadth-first", 2, 3, False), ("breadth-first", 4, 4, True), ("zero-bubble", 2, 4, False),
    ("zero-bubble", 4, 8, True), ("zbv", 2, 2, True), ("zbv", 4, 5, False), ("dualpipev", 2, 5, True),
    ("dualpipev", 4, 8, False)}


def cases() -> Iterator[Any]:
    for schedule, ranks, tied in itertools.product(SCHEDULES, (2, 4), (False, True)):
        for count in sorted({ranks, 2 * ranks, 3 * ranks, 5, 10}):
            try:
                schedules.check_micro_batches(schedule, schedules.placed(schedule, ranks, None), count)
            except ValueError:
                continue
            one = schedule, ranks, count, tied
            yield pytest.param(*one, marks=[] if one in COVERING else [pytest.mark.slow])


@pytest.mark.parametrize(("schedule", "ranks", "micro_batches", "tied"), [*cases()])
def test_steps_are_those_of_one_process(schedule: str, ranks: int, micro_batches: int, tied: bool) -> None:
    run(alike, ranks, schedule, micro_batches, tied)


