"""Write the newest figures into docs/storage.md, between its marks: ``python -m benchmarks.storage_page``."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.bench_convergence import label
from benchmarks.readme import newest, rewritten

PAGE = Path(__file__).parents[1] / "docs/storage.md"
BITS = {"bf16": 16, "int8": 8, "e4m3": 8, "e5m2": 8, "int4": 4}


def codes(figures: dict[str, Any]) -> str:
    """The errors of the codes, the package's first, of one state after the other."""
    lines = ["| state | code | update, matrices | update, embeddings | value, matrices | value, embeddings |",
             "|---|---|---|---|---|---|"]
    for state in ("exp_avg", "exp_avg_sq", "both"):
        rows = [row for row in figures["rows"] if row["state"] == state]
        for row in sorted(rows, key=lambda row: -bits(row["code"])):
            said = [f"{found[kind]:.2%}" if found else "" for found in (row["update"], row["value"])
                    for kind in ("matrices", "embeddings")]
            name = f"**{row['code']}**" if row["ours"] else row["code"]
            lines.append(f"| {'both' if state == 'both' else f'`{state}`'} | {name} | {' | '.join(said)} |")
    return "\n".join(lines)


def bits(code: str) -> int:
    """How many of them an element takes."""
    return BITS.get(code, 4 if "4 bits" in code or code in ("E2M1", "E3M1") else 8)


def convergence(figures: dict[str, Any]) -> str:
    """What the storages ended at."""
    lines = [f"| storage | bits per byte, seeds {', '.join(map(str, figures['seeds']))} | mean | largest - smallest "
             "| mean less fp32's | seed by seed | |",
             "|---|---|---|---|---|---|---|"]
    for row in figures["rows"]:
        over = row["over"]
        apart = ["", ""] if row["row"] == row["baseline"] else [f"{statistics.mean(over):+.3f}",
                                                              f"{min(over):+.3f} to {max(over):+.3f}"]
        lines.append(f"| {row['row']} | {', '.join(f'{bits:.3f}' for bits in row['bits'])} | {row['mean']:.3f} "
                     f"| {row['spread']:.3f} | {' | '.join(apart)} | {label(row)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the newest figures in it."""
    text = rewritten(text, "codes", codes(newest("codes")["figures"]))
    return rewritten(text, "convergence", convergence(newest("convergence")["figures"]))


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
