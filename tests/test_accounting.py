"""Formulas of bytes and seconds against collectives that are played through, and bucket sizes against all others."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from fasttrain.dist.accounting import (
    all_reduce_s,
    bytes_per_step,
    exposed_s,
    hierarchical_bytes,
    overlapped,
    width,
)
from fasttrain.dist.layout import Entry, FlatLayout

MiB = 1 << 20


class Ring:
    """Ranks that hold one number for each chunk, and count the chunks that they send to the next rank."""

    def __init__(self, world: int):
        self.world, self.sent = world, 0
        self.held = [[float(10**rank) for _ in range(world)] for rank in range(world)]

    def _turn(self, chunk_of: Any, receive: Any) -> None:
        sent = [(rank, chunk_of(rank), self.held[rank][chunk_of(rank)]) for rank in range(self.world)]
        for rank, chunk, value in sent:
            to = (rank + 1) % self.world
            self.held[to][chunk] = receive(self.held[to][chunk], value)
        self.sent += 1

    def reduce_scatter(self) -> None:
        for turn in range(self.world - 1):
            self._turn(lambda rank, turn=turn: (rank - turn) % self.world, lambda old, new: old + new)

    def all_gather(self) -> None:
        for turn in range(self.world - 1):
            self._turn(lambda rank, turn=turn: (rank + 1 - turn) % self.world, lambda old, new: new)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_formulas_are_those_of_a_ring(world: int) -> None:
    """Of 1,000 elements: gradients of 2 bytes, parameters of 4."""
    chunk = 1000 / world
    gradients, parameters, forward = Ring(world), Ring(world), Ring(world)
    gradients.reduce_scatter()
    scattered = gradients.sent
    gradients.all_gather()
    total = float("1" * world)
    assert gradients.held == [[total] * world] * world, "the ring is no all-reduce"
    parameters.all_gather()
    forward.all_gather()
    assert bytes_per_step(0, 1000, world, 2, 4) == pytest.approx(gradients.sent * chunk * 2)
    reduced, gathered = scattered * chunk * 2, parameters.sent * chunk * 4
    assert bytes_per_step(1, 1000, world, 2, 4) == pytest.approx(reduced + gathered)
    assert bytes_per_step(2, 1000, world, 2, 4, micro_batches=3) == pytest.approx(3 * reduced + gathered)
    again = forward.sent * chunk * 4
    assert bytes_per_step(3, 1000, world, 2, 4, micro_batches=3) == pytest.approx(3 * (reduced + gathered + again))
    assert all_reduce_s(1000, world, 50, 7) == pytest.approx(gradients.sent * (7 + chunk / 50))


def test_known_ratios() -> None:
    """ZeRO, section 7: stages 1 and 2 send as much as an all-reduce, stage 3 half more."""
    whole = bytes_per_step(0, 10**6, 64, 2, 2)
    assert [bytes_per_step(stage, 10**6, 64, 2, 2) / whole for stage in (1, 2, 3)] == [1, 1, 1.5]
    assert sum(hierarchical_bytes(10**6, 8, 1, 2)) == bytes_per_step(0, 10**6, 8, 2, 2)
    assert hierarchical_bytes(10**6, 1, 8, 2) == (0, bytes_per_step(0, 10**6, 8, 2, 2))
    inside, across = hierarchical_bytes(10**6, 8, 4, 2)
    assert inside == bytes_per_step(0, 10**6, 8, 2, 2)
    assert across == bytes_per_step(0, 10**6 // 8, 4, 2, 2)
    assert [width(dtype) for dtype in (torch.float32, torch.bfloat16)] == [4, 2]
    assert 256 * width(torch.int8) == 256 + 4


@pytest.mark.parametrize("call, told", [
    (lambda: bytes_per_step(4, 10, 2, 2, 2), "there is no stage 4"),
    (lambda: bytes_per_step(0, 10, 0, 2, 2), "0 ranks"),
    (lambda: bytes_per_step(1, 10, 2, 2, 2, micro_batches=2), "stage 1 communicates once in a step"),
    (lambda: hierarchical_bytes(10, 0, 2, 2), "2 nodes of 0 ranks cannot be"),
])
def test_what_cannot_be(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()


def test_overlap_played_in_small_steps() -> None:
    """A clock that ticks: at each tick the link works on the first bucket that is ready and whose elders are done."""
    ready, seconds = [5, 3, 20, 21, 22], [4, 2, 3, 6, 1]
    left, ended, clock = list(seconds), {}, 0
    while len(ended) < len(ready):
        now = len(ended)
        if ready[now] <= clock:
            left[now] -= 1
        clock += 1
        if left[now] == 0:
            ended[now] = clock
    spans = overlapped(ready, seconds)
    assert [span.end for span in spans] == list(ended.values())
    assert [span.end - span.start for span in spans] == seconds
    assert exposed_s(spans, 22) == ended[4] - 22
    assert exposed_s(spans, 100) == exposed_s([], 1) == 0


# --- Sizes of buckets -------------------------------------------------------------------------------------------------

def entries() -> list[Entry]:
    shapes = [(512, 512), (2048, 512), (512,), (300, 7), (1, 64)] * 6
    dtypes = (torch.float32, torch.bfloat16, torch.bfloat16)
    return [Entry(f"{place}", shape, dtypes[place % 3]) for place, shape in enumerate(shapes)]


def ends(layout: FlatLayout, world: int, bandwidth: float, latency: float, backward_s: float) -> float:
    """When the last bucket of a layout is reduced: its slots counted again."""
    place = {name: number for number, name in enumerate(layout.order)}
    sizes = [layout.entries[layout.slot(name).index].numel for name in layout.order]
    free = 0.0
    for bucket in layout.buckets:
        there = backward_s * sum(sizes[: 1 + max(place[slot.name] for slot in bucket.slots)]) / sum(sizes)
        free = max(free, there) + 2 * (world - 1) * (latency + bucket.bytes / world / bandwidth)
    return free


@pytest.mark.parametrize("world, bandwidth, latency, backward_s", [
    (8, 1e9, 1e-4, 0.1), (2, 1e8, 1e-3, 0.5), (8, 1e10, 1e-6, 0.01), (4, 1e9, 1e-4, 0.0), (1, 1e9, 1e-4, 0.1)])
def test_a_plan_is_the_best_of_all(world: int, bandwidth: float, latency: float, backward_s: float) -> None:
    made = FlatLayout.plan(entries(), world, bandwidth, latency, backward_s)
    powers = [1 << power for power in range(16, 25)]
    found = {}
    for first, later in itertools.product(powers, powers):
        if first <= later:
            other = FlatLayout.of(entries(), world, first_bucket_bytes=first, bucket_bytes=later)
            found[ends(other, world, bandwidth, latency, backward_s)] = other
    end = ends(made, world, bandwidth, latency, backward_s)
    assert end <= 1.002 * min(found) + 1e-12
    near = [len(other.buckets) for other_end, other in found.items() if other_end <= 1.002 * min(found)]
    assert len(made.buckets) <= min(near)


def test_a_plan_follows_link_and_backward() -> None:
    def buckets(bandwidth: float, latency: float, backward_s: float | None) -> int:
        return len(FlatLayout.plan(entries(), 8, bandwidth, latency, backward_s).buckets)

    assert buckets(1e9, 1e-6, 0.05) > buckets(1e9, 1e-3, 0.05)
    assert buckets(1e9, 1e-5, 0.0) == 2  # nothing to hide under: one of each dtype
    assert buckets(1e9, 1e-6, None) > buckets(1e9, 1e-3, None)


def test_a_plan_counts_what_travels() -> None:
    """float32 buckets that travel in 16 bits need a link of half the bandwidth."""
    def sizes(bandwidth: float, wire_dtype: torch.dtype | None = None) -> tuple[int, ...]:
        return FlatLayout.plan(entries(), 8, bandwidth, 1e-4, 0.01, bucket_dtype=torch.float32,
                               wire_dtype=wire_dtype).options.limits

    assert sizes(1e9, wire_dtype=torch.bfloat16) == sizes(2e9) != sizes(1e9)


def test_a_plan_without_backward_is_a_share_of_latency() -> None:
    options = FlatLayout.plan(entries(), 8, 1e9, 1e-3, align_bytes=512).options
    assert options.align_bytes == 512
    for size, share in ((options.first_bucket_bytes, 1 / 2), (options.bucket_bytes, 1 / 16)):
        assert 2 * 7 * 1e-3 / all_reduce_s(size, 8, 1e9, 1e-3) == pytest.approx(share)


def test_a_plan_from_recorded_times() -> None:
    """All gradients at the end, but for the first: a bucket that ends with it, and one with the rest."""
    many = [Entry(f"{place}", (MiB // 4,), torch.float32) for place in range(8)]
    made = FlatLayout.plan(many, 2, 1e8, 1e-5, [0.0] + [1.0] * 7)
    assert [len(bucket.slots) for bucket in made.buckets] == [1, 7]
    assert made.order == tuple(f"{place}" for place in range(7, -1, -1))


def test_bad_plans() -> None:
    for given, told in (((0, 1e-3), "a bandwidth of 0"), ((1e9, -1), "latency of -1 s cannot be"),
                        ((1e9, 0, -0.1), "backward_s is -0.1"), ((1e9, 0, [0.1]), "1 times for 30 gradients"),
                        ((1e9, 0, [float("nan")] * 30), "give seconds")):
        with pytest.raises(ValueError, match=told):
            FlatLayout.plan(entries(), 2, *given)
