"""What the user sees while the run goes on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

SHORT = {"data": "data", "forward_backward": "fwd+bwd", "communication": "comm", "optimizer": "opt",
         "checkpoint": "save"}


def line(record: dict[str, Any], steps: int) -> str:
    """One record of the loop as one line of a log."""
    head = f"step {record['step']:>{len(str(steps))}}/{steps}"
    match record["event"]:
        case "train":
            return f"{head}  {'  '.join(status(record))}"
        case "validation":
            return f"{head}  {'  '.join(validation(record))}"
        case "wire":
            return f"{head}  communication: {sent(record)}"
        case "dry-run":
            return f"{head}  made"
        case _:
            return f"{head}  {record['text']}"


def status(record: dict[str, Any]) -> Iterator[str]:
    """The parts of a line of training. What is zero, or not known, is left out."""
    yield f"loss {record['loss']:.4f}"
    yield f"lr {record['lr']:.2e}"
    yield f"{record['tokens_per_s']:,.0f} tokens/s"
    if "mfu" in record:
        yield f"mfu {record['mfu']:.1%}"
    for phase, share in record["share"].items():
        yield f"{SHORT[phase]} {share:.1%}"
    if "memory_gb" in record:
        yield f"{record['memory_gb']:.2f} GiB"
    if record.get("skipped"):
        yield f"skipped {record['skipped']}"


def validation(record: dict[str, Any]) -> Iterator[str]:
    """The parts of a line of validation: what was measured, over how much, and what a guard makes of it."""
    unit = next((unit for unit in ("byte", "token") if f"bits_per_{unit}" in record), None)
    if unit is not None:
        yield f"validation {record[f'bits_per_{unit}']:.4f} bits/{unit} over {record[f'{unit}s']:,} {unit}s"
    else:
        yield "validation " + "  ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
    if "gap" in record:
        yield f"gap {record['gap']:+.4f}"
    if "patience_left" in record:
        yield f"patience {record['patience_left']}"


def sent(wire: dict[str, Any]) -> str:
    """What a process sends in a step, from the record of that."""
    by_formula = f"{wire['formula']:,.0f}"
    counted = (f"{by_formula} bytes a step by the formula, not counted" if wire["bytes"] is None else
               f"{wire['bytes']:,.0f} bytes a step, {by_formula} by the formula")
    exposed = "not measured" if wire["exposed_s"] is None else f"{1000 * wire['exposed_s']:.1f} ms"
    return f"{counted}; exposed: {exposed}"


class Console:
    """Shows records as they come. A context manager; `show` is called with each record.

    On a terminal the bar carries the last training record, and validations stay above it. The bar is drawn only when
    a record comes, with no thread of its own beside the training threads.

    Args:
        steps: of the whole run.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("ETA"),
                                TimeRemainingColumn(), auto_refresh=False, expand=True)
            self.task = self.bar.add_task("starting", total=steps)

    def __enter__(self) -> Console:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, record: dict[str, Any]) -> None:
        """Show one record."""
        text = line(record, self.steps)
        if not self.bar:
            print(text, flush=True)
        elif record["event"] != "train":
            self.bar.console.print(text, highlight=False)
            self.bar.refresh()
        else:
            self.bar.update(self.task, description=text, completed=record["step"], refresh=True)
