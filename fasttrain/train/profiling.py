"""``--profile``: a trace of a few steps for a viewer, a snapshot of memory, and a table of where a step went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

PHASES = ("data", "forward_backward", "optimizer", "checkpoint")
SHOWN = 12  # operations in the table


class Profile:
    """Records some steps of a loop with torch's profiler.

    Call `step` at the end of each step; phases of a `fasttrain.train.clock.PhaseClock` are named in the trace. When the
    last of `steps` is over it writes ``trace.json`` (for https://ui.perfetto.dev or chrome://tracing), on a GPU
    ``memory.pickle`` (for https://docs.pytorch.org/memory_viz; torch's format), and keeps the table in `text`.

    Arguments:
        directory: where to write; it exists.
        after: steps that are not recorded, in which everything is allocated and compiled.
        steps: that are recorded.
        device: of the model.

    Attributes:
        text: where the recorded steps went; None until then.

    Example:
        >>> import tempfile
        >>> from fasttrain.train.clock import PhaseClock
        >>> directory = Path(tempfile.mkdtemp())
        >>> clock = PhaseClock(torch.device("cpu"))
        >>> with Profile(directory, after=1, steps=2) as profiled:
        ...     for _ in range(4):
        ...         with clock("forward_backward"):
        ...             _ = torch.ones(64, 64) @ torch.ones(64, 64)
        ...         profiled.step()
        >>> profiled.text.splitlines()[0]
        '2 steps, milliseconds of a step on the CPU:'
        >>> (directory / "trace.json").exists()
        True
    """

    def __init__(self, directory: Path, after: int = 10, steps: int = 3, device: torch.device | None = None):
        if after < 1 or steps < 1:
            raise ValueError(f"after={after}, steps={steps}: at least one step to warm up and one to record")
        self.directory, self.steps = directory, steps
        self.text: str | None = None
        self.on_gpu = device is not None and device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self._profiler = profile(activities=activities, profile_memory=True, record_shapes=False,
                                 schedule=schedule(wait=after - 1, warmup=1, active=steps, repeat=1),
                                 on_trace_ready=self._ready)

    def __enter__(self) -> Profile:
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)

    def step(self) -> None:
        """A step is over."""
        self._profiler.step()

    def _ready(self, profiler: Any) -> None:
        profiler.export_chrome_trace(str(self.directory / "trace.json"))
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.directory / "memory.pickle"))
        self.text = table(profiler.key_averages(), self.steps, self.on_gpu)


def table(averages: Sequence[Any], steps: int, on_gpu: bool) -> str:
    """Phases, and the operations that take most of a step, from `key_averages()` of torch's profiler."""
    def ms(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3

    phases = {event.key: event for event in averages if event.key in PHASES}
    rows = [(f"phase {name.replace('_', '-')} (host)", phases[name].cpu_time_total / 1e3 / steps, "")
            for name in PHASES if name in phases]
    operations = [event for event in averages if event.key not in PHASES and not event.key.startswith("ProfilerStep")]
    operations.sort(key=lambda event: -ms(event))
    rows += [(event.key, ms(event) / steps, f"{event.count / steps:,.0f} calls") for event in operations[:SHOWN]]
    width = max(len(name) for name, _, _ in rows)
    where = "the GPU" if on_gpu else "the CPU"
    return "\n".join([f"{steps} steps, milliseconds of a step on {where}:",
                      *(f"  {name.ljust(width)}  {value:9.3f}  {note}".rstrip() for name, value, note in rows)])
