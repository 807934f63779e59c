"""Buckets of gradients on the CPU: pack with cast and scale, sums of chunks, 8-bit codes, and one tensor on arrival."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from fasttrain.kernels import native
from fasttrain.kernels.chunks import encode_int8, sum_chunks, sum_int8, traffic
from fasttrain.kernels.pack import Slots

TENSORS, ELEMENTS, ROUNDS = 150, 25_000_000 // 150, 7
F32, BF16 = torch.float32, torch.bfloat16


class Work(NamedTuple):
    """One row: ours first among the rivals, and the bytes that ours moves."""

    name: str
    rivals: dict[str, Callable[[], Any]]
    bytes: int


def moved(counts: dict[str, int]) -> int:
    """Bytes read and written."""
    return counts["bytes_read"] + counts["bytes_written"]


def pack_work(tensors: int, elements: int, target: torch.dtype, scale: float) -> Work:
    given = [torch.randn(elements) for _ in range(tensors)]
    slots, theirs = (Slots(torch.zeros(tensors * elements, dtype=target), given, range(0, tensors * elements, elements))
                     for _ in "ab")

    def foreach() -> None:
        torch._foreach_copy_(theirs.views, given)
        if scale != 1:
            torch._foreach_mul_(theirs.views, scale)

    rivals: dict[str, Callable[[], Any]] = {"fasttrain": lambda: slots.pack_all(given, scale), "foreach": foreach}
    if scale == 1 and target == F32:
        rivals["cat"] = lambda: torch.cat(given, out=theirs.bucket)
    kind = f"fp32 -> {'fp32' if target == F32 else 'bf16'}{'' if scale == 1 else ', scaled'}"
    return Work(f"pack {tensors} tensors, {kind}", rivals, moved(traffic(tensors * elements, [F32], [target])))


def sum_work(ranks: int, elements: int, target: torch.dtype) -> Work:
    chunks, out, theirs = torch.randn(ranks, elements).bfloat16(), *(torch.zeros(elements, dtype=target) for _ in "ab")

    def torch_sum() -> None:
        theirs.copy_(torch.sum(chunks, 0, dtype=F32).mul_(1 / ranks))

    return Work(f"mean of {ranks} bf16 chunks -> {'fp32' if target == F32 else 'bf16'}",
                {"fasttrain": lambda: sum_chunks(chunks, out, 1 / ranks),
                 "and squares": lambda: sum_chunks(chunks, out, 1 / ranks, squares=True), "sum": torch_sum},
                moved(traffic(elements, [BF16] * ranks, [target])))


def code_works(ranks: int, elements: int) -> Sequence[Work]:
    values, residual, out = torch.randn(elements), torch.zeros(elements), torch.zeros(elements)
    codes = torch.empty(ranks, elements, dtype=torch.int8)
    units = torch.empty(ranks, -(-elements // 256))
    for rank in range(ranks):
        encode_int8(values, codes[rank], units[rank])
    return [Work("fp32 -> int8 blocks with error feedback",
                 {"fasttrain": lambda: encode_int8(values, codes[0], units[0], 1.0, residual)},
                 moved(traffic(elements, [F32, F32], [F32], coded_written=1))),
            Work(f"mean of {ranks} chunks of int8 blocks -> fp32",
                 {"fasttrain": lambda: sum_int8(codes, units, out, 1 / ranks)},
                 moved(traffic(elements, [], [F32], coded_read=ranks)))]


def on_arrival(tensors: int = 150, elements: int = 1000, rounds: int = 50) -> dict[str, float]:
    """Microseconds of packing one small tensor that has just arrived, and of `copy_` into its slot."""
    given: list[Tensor] = [torch.randn(elements) for _ in range(tensors)]
    slots = Slots(torch.zeros(tensors * elements, dtype=BF16), given, range(0, tensors * elements, elements))

    def each(call: Callable[[int], Any]) -> float:
        best = []
        for _ in range(rounds):
            start = time.perf_counter()
            for index in range(tensors):
                call(index)
            best.append((time.perf_counter() - start) / tensors * 1e6)
        return sorted(best)[rounds // 2]

    def copy_and_scale(index: int) -> None:
        slots.views[index].copy_(given[index]).mul_(0.5)

    return {"pack, scaled": each(lambda index: slots.pack(index, given[index], 0.5)),
            "copy_": each(lambda index: slots.views[index].copy_(given[index])), "copy_, mul_": each(copy_and_scale)}


def run(tensors: int = TENSORS, elements: int = ELEMENTS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure every row, and the ceiling beside it: an update of one stream and a second that is read."""
    whole = tensors * elements
    streams = [torch.zeros(whole, dtype=torch.int32).random_() for _ in range(2)]
    places = [stream.data_ptr() for stream in streams]
    rows = []
    for make in (lambda: [pack_work(tensors, elements, F32, 1.0)], lambda: [pack_work(tensors, elements, F32, 0.5)],
                 lambda: [pack_work(tensors, elements, BF16, 1.0)], lambda: [pack_work(tensors, elements, BF16, 0.5)],
                 lambda: [sum_work(2, whole, F32)], lambda: [sum_work(4, whole, F32)],
                 lambda: [sum_work(4, whole, BF16)], lambda: code_works(4, whole)):
        for work in make():
            rivals = {**work.rivals,
                      "ceiling": lambda: native.module().update_streams(places, whole, torch.get_num_threads())}
            seconds = harness.interleave(rivals, rounds)
            middle = harness.medians(seconds)
            rows.append({"work": work.name, "seconds": middle, "bytes": work.bytes,
                         "gigabytes_per_second": work.bytes / middle["fasttrain"] / 1e9,
                         "ceiling": 12 * whole / middle["ceiling"] / 1e9,
                         "ratio": {peer: harness.ratio(seconds, peer, "fasttrain") for peer in work.rivals
                                   if peer != "fasttrain"}})
    return {"elements": whole, "rows": rows, "microseconds_on_arrival": on_arrival()}


def report(figures: dict[str, Any]) -> str:
    """The table of the figures."""
    lines = [f"{'work':46} {'ours':>10} {'GB/s':>6} {'ceiling':>7}  against"]
    for row in figures["rows"]:
        peers = ", ".join(f"{peer} {ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"
                          for peer, ratio in row["ratio"].items())
        lines.append(f"{row['work']:46} {row['seconds']['fasttrain'] * 1e3:7.2f} ms {row['gigabytes_per_second']:6.1f} "
                     f"{row['ceiling']:7.1f}  {peers}")
    arrival = ", ".join(f"{name} {value:.2f} us" for name, value in figures["microseconds_on_arrival"].items())
    return "\n".join([*lines, f"one tensor of 1,000 on arrival, fp32 -> bf16: {arrival}"])
