"""``fasttrain report``: one HTML page, which needs no other file, with the curves of runs laid over one another."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.train.report import Record, Run, bits_per, mean_shares, median_speed

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5em 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
.note { color: #a40; }
"""

# Each plot: title, unit of the y axis, and how it is read from a training record (None: the record does not have it).
PLOTS: list[tuple[str, str, Callable[[Record], float | None]]] = [
    ("Learning rate", "learning rate", lambda r: r["lr"]),
    ("Norm of the gradient", "norm before clipping", lambda r: r.get("grad_norm")),
    ("Speed", "tokens/s", lambda r: r["tokens_per_s"]),
    ("Waiting for data", "% of the time in steps", lambda r: 100 * r["share"].get("data", 0.0)),
    ("Communication that backward did not hide", "% of the time in steps",
     lambda r: 100 * r["share"].get("communication", 0.0)),
    ("Optimizer", "% of the time in steps", lambda r: 100 * r["share"].get("optimizer", 0.0)),
    ("Memory of the first process", "GiB at most", lambda r: r.get("peak_gb")),
    ("Model FLOPs utilisation", "% of the device's peak", lambda r: 100 * r["mfu"] if "mfu" in r else None),
]


def page(runs: Sequence[Run]) -> str:
    """The page as text: a table of the runs, the options in which they differ, and their curves.

    Arguments:
        runs: as `fasttrain.train.report.read` returns them; unfinished ones too.
    """
    names = _names(runs)
    title = "fasttrain: " + ", ".join(names)
    parts = [f"<h1>{html.escape(title)}</h1>", _summary(runs, names), _options(runs, names)]
    if len({run.header["text"]["sha256"] for run in runs}) > 1:
        parts.append('<p class="note">These runs read different texts: their losses cannot be compared.</p>')
    parts.append(_figure(f"Loss in {bits_per(runs)} (thin: training; dots: held-out text)", _losses(runs, names)))
    for heading, unit, value in PLOTS:
        curves = [[(r["step"], y) for r in run.train if (y := value(r)) is not None] for run in runs]
        if any(curves):
            parts.append(_figure(heading, _plot(curves, names, unit)))
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    body = "\n".join([*parts, f"<p>Written {written}.</p>"])
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n")


def write(runs: Sequence[Run], path: Path) -> None:
    """Write the page of `runs` to `path`."""
    path.write_text(page(runs), encoding="utf-8")


def _names(runs: Sequence[Run]) -> list[str]:
    """The directories' names; their whole paths where two are called alike."""
    short = [run.directory.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.directory) for run in runs]


def _summary(runs: Sequence[Run], names: Sequence[str]) -> str:
    per = bits_per(runs)
    rows: list[tuple[str, list[str]]] = [
        ("steps", [f"{run.train[-1]['step']:,} of {run.config['steps']:,}" for run in runs]),
        (f"held-out text, {per}", [f"{run.bits(run.final):.4f}" if run.final else "unfinished" for run in runs]),
        ("best quick validation", [_best(run) for run in runs]),
        (f"last training loss, {per.replace('bits', 'nats')}", [f"{run.train[-1]['loss']:.4f}" for run in runs]),
        ("tokens/s (median)", [f"{median_speed(run):,.0f}" for run in runs]),
        ("skipped steps", [f"{run.train[-1].get('skipped', 0):,}" for run in runs]),
        ("seconds of training", [f"{run.train[-1]['seconds']:,.1f}" for run in runs]),
    ]
    shares = [mean_shares(run) for run in runs]
    for phase in dict.fromkeys(phase for share in shares for phase in share):
        rows.append((f"% of the time: {phase.replace('_', '-')}", [f"{100 * s.get(phase, 0):.1f}" for s in shares]))
    return _table(["", *names], [[name, *cells] for name, cells in rows])


def _best(run: Run) -> str:
    quick = [r for r in run.validation if r is not run.final]
    if not quick:
        return "none"
    best = min(quick, key=run.bits)
    return f"{run.bits(best):.4f} at step {best['step']:,}"


def _options(runs: Sequence[Run], names: Sequence[str]) -> str:
    options = list(dict.fromkeys(name for run in runs for name in run.config))
    values = {name: [str(run.config.get(name, "")) for run in runs] for name in options}
    if len(runs) > 1:
        values = {name: row for name, row in values.items() if len(set(row)) > 1}
        heading = "Options that differ" if values else "All options are the same."
    else:
        heading = "Options"
    rows = [["--" + name.replace("_", "-"), *row] for name, row in values.items()]
    versions = dict.fromkeys(name for run in runs for name in run.header.get("versions", {}))
    rows += [[f"version of {name}", *(run.header.get("versions", {}).get(name, "") for run in runs)]
             for name in versions]
    return f"<h2>{heading}</h2>" + _table(["", *names], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>\n" + "\n".join([line(head, "th"), *(line(row, "td") for row in rows)]) + "\n</table>"


def _figure(heading: str, svg: str) -> str:
    return f"<figure>\n<figcaption>{html.escape(heading)}</figcaption>\n{svg}\n</figure>"


def _losses(runs: Sequence[Run], names: Sequence[str]) -> str:
    figure, axes = _axes(bits_per(runs))
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        axes.plot([r["step"] for r in run.train], [r["loss"] / np.log(2) for r in run.train], color=f"C{i}",
                  linewidth=0.8, alpha=0.7)
        axes.plot([r["step"] for r in run.validation], [run.bits(r) for r in run.validation], "o-",
                  color=f"C{i}", markersize=4, label=name)
    return _svg(figure, axes)


def _plot(curves: Sequence[Sequence[tuple[float, float]]], names: Sequence[str], unit: str) -> str:
    figure, axes = _axes(unit)
    for i, (curve, name) in enumerate(zip(curves, names, strict=True)):
        if curve:
            axes.plot(*zip(*curve, strict=True), color=f"C{i}", linewidth=1, label=name)
    return _svg(figure, axes)


def _axes(unit: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Any, axes: Any) -> str:
    """The drawing as an element of the page. Letters are drawn as outlines, so that no font is needed."""
    axes.legend()
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
