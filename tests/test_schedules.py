"""Schedules: pure functions of the step."""

import itertools
import math

import pytest

from fasttrain.train.schedules import warmup_cosine


def test_shape():
    values = [warmup_cosine(t, steps=100, warmup=10) for t in range(100)]
    assert values[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert 0 < values[99] < 0.001


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (5, 5), (5, 50), (7, 0)])
def test_every_corner_is_a_share(steps, warmup):
    for t in range(steps):
        assert 0 < warmup_cosine(t, steps, warmup) <= 1


def test_middle_of_the_fall():
    assert warmup_cosine(20, steps=40, warmup=0) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
