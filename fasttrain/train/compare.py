"""``fasttrain compare``: runs side by side."""

from __future__ import annotations

from pathlib import Path

from fasttrain.train import report
from fasttrain.train.config import BadInput
from fasttrain.train.console import SHORT

NOT_COMPARED = {"out"}


def compare(first: Path, second: Path) -> str:
    """A table of two runs, what differs in their options, and how far their loss curves lie apart.

    Raises:
        BadInput: one of them is not a run, or they have no step in common.
    """
    runs = [report.read(d) for d in (first, second)]
    a, b = runs
    rows = [("", *(r.directory.name for r in runs))]
    differing = [k for k in a.config if a.config[k] != b.config.get(k) and k not in NOT_COMPARED]
    rows += [(k.replace("_", "-"), *(str(r.config.get(k)) for r in runs)) for k in differing]
    rows.append(("validation bits/byte", *(f"{r.final['bits_per_byte']:.4f}" if r.final else "unfinished"
                                           for r in runs)))
    rows.append(("last training loss", *(f"{r.train[-1]['loss']:.4f}" for r in runs)))
    speeds = [report.median_speed(r) for r in runs]
    rows.append(("tokens/s", *(f"{s:,.0f}" for s in speeds)))
    shares = [report.mean_shares(r) for r in runs]
    step_ms = [1000 * r.config["batch"] * r.config["sequence"] / s for r, s in zip(runs, speeds, strict=True)]
    for phase, short in SHORT.items():
        if not any(phase in s for s in shares):
            continue
        cells = [f"{ms * share.get(phase, 0.0):.2f}" for ms, share in zip(step_ms, shares, strict=True)]
        rows.append((f"ms per step, {short}", *cells))
    rows.append(("seconds of training", *(f"{r.train[-1]['seconds']:.1f}" for r in runs)))
    return "\n".join([table(rows), difference(a, b), *warnings(a, b)])


def difference(a: report.Run, b: report.Run) -> str:
    """Where the loss curves lie furthest apart."""
    losses = {r["step"]: r["loss"] for r in b.train}
    apart = [(abs(r["loss"] - losses[r["step"]]), r["step"]) for r in a.train if r["step"] in losses]
    if not apart:
        raise BadInput(f"{a.directory} and {b.directory} have no logged step in common; use the same --log-every")
    largest, step = max(apart)
    if largest == 0:
        return f"training losses are equal at all {len(apart)} common steps"
    return f"training losses differ by at most {largest:.2e} (at step {step}, of {len(apart)} common steps)"


def warnings(a: report.Run, b: report.Run) -> list[str]:
    """What makes the comparison unfair."""
    if a.header["text"]["sha256"] != b.header["text"]["sha256"]:
        return ["note: the two runs read different texts; their losses cannot be compared"]
    return []


def table(rows: list[tuple[str, ...]]) -> str:
    """Left-aligned names, right-aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))])
        for name, *cells in rows
    )
