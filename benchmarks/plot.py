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
