"""Draw the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def steps(figures: list[dict[str, Any]], path: Path = RESULTS / "step.svg") -> Path:
    """Bars of the ratio to torch's fused step, with quartiles and the aim of each row."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = [row["work"].removeprefix("AdamW fp32, ") for row in figures]
    middle = [row["ratio"]["median"] for row in figures]
    spread = [[m - row["ratio"]["low"] for m, row in zip(middle, figures, strict=True)],
              [row["ratio"]["high"] - m for m, row in zip(middle, figures, strict=True)]]
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(figures) + 1.2))
    axes.barh(names, middle, xerr=spread, color="#4477aa", ecolor="#333333", height=0.6)
    axes.plot([row["aim"] for row in figures], names, "k|", markersize=16, label="aim")
    axes.axvline(1.0, color="#999999", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as torch.optim.AdamW(fused=True)")
    axes.set_title("AdamW step in fp32 on the CPU: tensors x elements")
    axes.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def convergence(figures: dict[str, Any], path: Path = RESULTS / "convergence.svg") -> Path:
    """What each storage ends above its baseline, seed by seed; the band is how far the baseline's seeds lie apart."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = figures["rows"]
    spread = {row["row"]: row["spread"] for row in rows}
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1.4))
    for place, row in enumerate(rows):
        axes.barh(place, spread[row["baseline"]], color="#dddddd", height=0.9)
        colour = "#cc3311" if row["worse"] else "#4477aa"
        axes.plot(row["over"], [place] * len(row["over"]), "o", color=colour, alpha=0.6)
        axes.plot(sum(row["over"]) / len(row["over"]), place, "|", color=colour, markersize=18, markeredgewidth=2)
    axes.axvline(0.0, color="#999999", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["row"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("bits per byte above fp32 of the same seed; grey: largest less smallest of fp32's seeds")
    axes.set_title("Storages of AdamW on the main job; bars: means")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def gpu(rows: list[dict[str, Any]], path: Path = RESULTS / "gpu.svg") -> Path:
    """Bars of the speed of each work that memory decides, as a share of a copy's."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "of_copy" in row]
    figure, axes = pyplot.subplots(figsize=(10, 0.35 * len(rows) + 1.2))
    axes.barh(range(len(rows)), [row["of_copy"] for row in rows], color="#4477aa", height=0.7)
    axes.axvline(1.0, color="#999999", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["work"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("bytes that the work must move, per second, as a share of a copy on the device")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
