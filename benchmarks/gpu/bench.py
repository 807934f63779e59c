"""What a work is given: where it runs and how large, and the timing of rivals in turn.

A rival is timed between two events on the device. The device is kept busy for as long as the host needs to start the
rival's kernels, so that what is measured is the device's time and not the gaps; where the gaps are the question
(`ahead=False`), the device is idle at the start. Every rival has enough copies of its data that no cache holds them
from one turn to its next.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks import harness
from benchmarks.gpu import peers
from benchmarks.gpu.shapes import Shape, count, equal, scaled

OURS, AGAIN = "fasttrain", "fasttrain again"
Step = Callable[[], Any]
Make = Callable[[list[Parameter]], Step]  # called with parameters that have gradients; returns what is timed
CACHES = 8  # times the L2: what the copies of one rival's data have together, at least
LONGEST_AHEAD = 0.2  # seconds that a device is kept busy before a rival
CYCLES = 2.5e9  # of a second; no GPU's clock is faster


@dataclass
class Rival:
    """What is timed under one name: a call for each copy of its data, in turn."""

    name: str
    steps: Sequence[Step]
    before: Callable[[int], Any] | None = None
    memory: float | None = None  # bytes for each parameter that it allocated and kept
    ahead: float = 0.0
    _order: Any = field(init=False)

    def __post_init__(self) -> None:
        self._order = cycle(range(len(self.steps)))

    def next(self) -> Step:
        """The call on the next copy, which is made ready."""
        turn = next(self._order)
        if self.before is not None:
            self.before(turn)
        return self.steps[turn]


@dataclass
class Bench:
    """Where and how large.

    Attributes:
        dry: tiny sizes, two rounds: only that the code runs.
        ceiling: bytes per second of a copy on the device, read plus written; None before it is measured.
    """

    device: torch.device
    dry: bool = False
    ceiling: float | None = None

    # --- Sizes -------------------------------------------------------------------------------------------------------

    @property
    def rounds(self) -> int:
        return 2 if self.dry else 30

    def free(self) -> int:
        """Bytes that may be allocated."""
        if self.device.type != "cuda":
            return 1 << 28
        gc.collect()  # optimizers are in cycles
        torch.cuda.empty_cache()
        return int(0.85 * torch.cuda.mem_get_info(self.device)[0])

    def fitting(self, shapes: Sequence[Shape], each: float) -> tuple[list[Shape], str]:
        """The shapes, cut to what fits at so many bytes for each element, and a note if that is less than all."""
        if self.dry:
            shapes = [tuple(min(size, 24) for size in shape) for shape in shapes[:9]]
            return shapes, "tiny"
        whole, most = count(shapes), int(self.free() / each)
        if whole <= most:
            return list(shapes), ""
        alike = all(shape == shapes[0] for shape in shapes)
        kept = equal(len(shapes), most // len(shapes)) if alike else scaled(shapes, most)
        return kept, f"{count(kept) / 1e9:.2f}e9 of {whole / 1e9:.2f}e9 elements: the memory holds no more"

    def copies(self, size: int) -> int:
        """How many copies of so many bytes no cache holds."""
        if self.device.type != "cuda" or self.dry:
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, -(-CACHES * cache // max(size, 1)))

    def parameters(self, shapes: Iterable[Shape], dtype: torch.dtype, scale: float = 1.0) -> list[Parameter]:
        """Random parameters with random gradients."""
        params = [Parameter(torch.randn(shape, device=self.device).to(dtype)) for shape in shapes]
        for p in params:
            p.grad = (torch.randn(p.shape, device=self.device) * scale).to(dtype)
        return params

    # --- Time --------------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def host_seconds(self, call: Step) -> float:
        """How long the host takes for a call; the device is idle at the start."""
        self.wait()
        begin = time.perf_counter()
        call()
        taken = time.perf_counter() - begin
        self.wait()
        return taken

    def seconds(self, call: Step, ahead: float) -> float:
        """How long the device takes for a call, behind so many seconds of other work."""
        if self.device.type != "cuda":
            return self.host_seconds(call)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        if ahead:
            torch.cuda._sleep(int(ahead * CYCLES))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def interleave(self, rivals: Mapping[str, Rival], ahead: bool = True, budget: float = 12.0, least: int = 3,
                   timed: Callable[[Step, float], float] | None = None) -> dict[str, list[float]]:
        """Seconds of each rival in each round, all in every round, in an order that rotates.

        Arguments:
            ahead: keep the device busy while the host starts a rival.
            budget: seconds after which no further round begins.
            least: rounds that are measured whatever they take.
            timed: what measures a call, instead of `seconds`.
        """
        for rival in rivals.values():
            for _ in rival.steps:
                self.host_seconds(rival.next())  # compiles what is compiled at first use
            host = self.host_seconds(rival.next())
            rival.ahead = min(1.5 * host + 50e-6, LONGEST_AHEAD) if ahead else 0.0
        names = list(rivals)
        found: dict[str, list[float]] = {name: [] for name in names}
        begin = time.monotonic()
        for turn in range(self.rounds):
            if turn >= least and time.monotonic() - begin > budget:
                break
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                rival = rivals[name]
                found[name].append((timed or self.seconds)(rival.next(), rival.ahead))
        return found

    # --- Rivals ------------------------------------------------------------------------------------------------------

    def rivals(self, makers: Mapping[str, Make], models: Sequence[list[Parameter]],
               before: Callable[[int], Any] | None = None) -> tuple[dict[str, Rival], dict[str, str]]:
        """Each maker's steps on all models, after their first; and why those of other packages that failed did."""
        made, failed = {}, {}
        for name, make in makers.items():
            held = self.allocated()
            try:
                steps = []
                for turn, model in enumerate(models):
                    steps.append(make(model))
                    if before is not None:
                        before(turn)
                    steps[-1]()
                self.wait()
            except Exception as error:  # another package's, whatever it raises, is reported; our own is a failure
                if not name.startswith(tuple(peers.PACKAGES)):
                    raise
                failed[name] = peers.reason(error)
                continue
            parameters = sum(p.numel() for model in models for p in model)
            memory = (self.allocated() - held) / parameters if self.device.type == "cuda" else None
            made[name] = Rival(name, steps, before, memory)
        return made, failed

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def row(self, work: str, rivals: Mapping[str, Rival], *, section: str, elements: int = 0, each: float = 0.0,
            ahead: bool = True, budget: float = 12.0, **more: Any) -> dict[str, Any]:
        """Time the rivals, ours twice, and say what came out.

        Arguments:
            section: of the README's table.
            elements, each: how many, and the bytes that ours must move for each; 0 where bytes do not decide.
            more: what the row says besides.
        """
        again = Rival(AGAIN, rivals[OURS].steps, rivals[OURS].before)
        seconds = self.interleave({**rivals, AGAIN: again}, ahead, budget)
        row = summary(work, seconds, section=section, **more)
        if elements and each:
            row |= {"elements": elements, "bytes": each}
            if self.ceiling:
                row["of_copy"] = elements * each / statistics.median(seconds[OURS]) / self.ceiling
        row["memory"] = {name: rival.memory for name, rival in rivals.items() if rival.memory is not None}
        return row


def summary(work: str, seconds: Mapping[str, list[float]], *, section: str, unit: str = "ms",
            **more: Any) -> dict[str, Any]:
    """Medians in a unit of time, ratios to ours, and how far ours is from itself."""
    factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    row = {"work": work, "section": section, "unit": unit, "rounds": len(seconds[OURS]),
           "value": {name: value * factor for name, value in harness.medians(seconds).items() if name != AGAIN},
           "ratio": {name: harness.ratio(seconds, name, OURS) for name in seconds if name not in (OURS, AGAIN)}}
    if AGAIN in seconds:
        row["spread"] = abs(statistics.median(seconds[AGAIN]) / statistics.median(seconds[OURS]) - 1)
    return row | {key: value for key, value in more.items() if value}


def refill(grads: Sequence[Sequence[Tensor]]) -> Callable[[int], Any]:
    """Gives each model its gradients again: for steps that zero or rewrite them."""
    kept = [[grad.clone() for grad in each] for each in grads]
    return lambda turn: torch._foreach_copy_(list(grads[turn]), kept[turn])
