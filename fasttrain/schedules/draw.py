"""A schedule as a picture: in characters, or as a PNG."""

from __future__ import annotations

from pathlib import Path

from fasttrain.schedules.schedule import Schedule

DEFAULT_STEPS = 1000  # of a schedule without an end


def steps_of(schedule: Schedule, steps: int | None = None) -> int:
    """How many steps to draw: those given, else its length, else 1000."""
    return steps or schedule.length or DEFAULT_STEPS


def as_text(schedule: Schedule, steps: int | None = None, width: int = 72, height: int = 12) -> str:
    """The curve in characters; each column is the step that its place is nearest to.

    Example:
        >>> from fasttrain.schedules import linear
        >>> print(as_text(linear(10), width=11, height=3))
               1 |***
                 |   *****
               0 |        ***
                 0        10
    """
    last = steps_of(schedule, steps)
    values = [schedule(round(column * last / (width - 1))) for column in range(width)]
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1.0
    rows = [round((value - low) / (high - low) * (height - 1)) for value in values]
    lines = []
    for row in range(height - 1, -1, -1):
        told = f"{high:.4g}" if row == height - 1 else f"{low:.4g}" if row == 0 else ""
        lines.append(f"{told:>8} |" + "".join("*" if one == row else " " for one in rows).rstrip())
    return "\n".join([*lines, f"{'':>8} 0{last:>{width - 1}}"])


def as_png(schedule: Schedule, path: Path, steps: int | None = None) -> None:
    """The curve as a PNG.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    last = steps_of(schedule, steps)
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="value")
    places = sorted({round(i * last / min(last, 2000)) for i in range(min(last, 2000) + 1)})
    axes.plot(places, [schedule(step) for step in places], linewidth=1.5)
    axes.set_title(repr(schedule), fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
