"""Two processes, one core each: our exchanges between pairs of ranks beside gloo's own collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import harness
from benchmarks.processes import slowest, together
from fasttrain.dist import exchange
from fasttrain.dist.wire import Wire, _all_gather, _reduce_scatter

SIZES, ROUNDS = (25_000_448, 2**18), 15  # elements: whole blocks of 256 for each of two ranks
PEER = "gloo"


def measure(wire: Wire, elements: int, rounds: int) -> dict[str, Any]:
    """Seconds of each rival on this rank, and the bytes that it sent, by work."""
    bucket, shard = torch.randn(elements), torch.zeros(elements // wire.size)
    residual = torch.zeros(elements)

    def int8() -> None:
        exchange.int8_all_reduce(wire, bucket, 1 / wire.size, residual=residual).wait()

    works: dict[str, dict[str, Callable[[], Any]]] = {
        "reduce-scatter": {
            "fasttrain": lambda: wire.reduce_scatter(shard, bucket, "avg").wait(),
            "and squares": lambda: wire.reduce_scatter(shard, bucket, "avg", squares=True).wait(),
            PEER: lambda: _reduce_scatter(shard, bucket, group=wire.group)},
        "all-gather": {
            "fasttrain": lambda: wire.all_gather_into(bucket, shard).wait(),
            PEER: lambda: _all_gather(bucket, shard, group=wire.group)},
        "all-reduce": {
            "fasttrain": lambda: exchange.ordered_all_reduce(wire, bucket, 1 / wire.size).wait(),
            "bf16": lambda: exchange.ordered_all_reduce(wire, bucket, 1 / wire.size, wire=torch.bfloat16).wait(),
            "int8": int8,
            PEER: lambda: dist.all_reduce(bucket, group=wire.group)}}
    found: dict[str, Any] = {}
    for work, rivals in works.items():
        seconds = harness.interleave(rivals, rounds, before=lambda _: (bucket.fill_(1.0), wire.barrier()))
        sent = {}
        for name in rivals:
            before = wire.sent
            rivals[name]()
            sent[name] = wire.sent - before
        found[work] = seconds, sent
    return found


def run(elements: tuple[int, ...] = SIZES, rounds: int = ROUNDS, processes: int = 2) -> list[dict[str, Any]]:
    """Measure every work at every size."""
    rows = []
    for size in elements:
        ranks = together(measure, processes, size, rounds)
        for work in ranks[0]:
            seconds, sent = slowest([rank[work][0] for rank in ranks]), ranks[0][work][1]
            rows.append({"work": work, "elements": size, "processes": processes, "seconds": harness.medians(seconds),
                         "bytes_sent": {name: count for name, count in sent.items() if name != PEER},
                         "ratio": {name: harness.ratio(seconds, PEER, name) for name in seconds if name != PEER}})
    return rows


def report(figures: list[dict[str, Any]]) -> str:
    """The table of the figures."""
    lines = [f"{'work':16} {'fp32':>7} {'gloo':>9}  ours, times as fast (quartiles), bytes sent by each rank"]
    for row in figures:
        ours = ", ".join(f"{name} {row['seconds'][name] * 1e3:.2f} ms {ratio['median']:.2f}x "
                         f"({ratio['low']:.2f}-{ratio['high']:.2f}) {row['bytes_sent'][name] / 1e6:.1f} MB"
                         for name, ratio in row["ratio"].items())
        peer = row["seconds"][PEER] * 1e3
        lines.append(f"{row['work']:16} {row['elements'] * 4 / 1e6:4.0f} MB {peer:6.2f} ms  {ours}")
    return "\n".join(lines)
