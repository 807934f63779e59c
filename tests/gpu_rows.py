"""Figures of a GPU benchmark, made up."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.bench import OURS

ROW = {"work": "AdamW, fp32: 1e9 in 300 tensors", "section": "adamw", "unit": "ms", "value": {OURS: 6.543, "peer": 7.0},
       "ratio": {"peer": {"median": 1.07}}, "of_copy": 0.9512, "spread": 0.004, "rounds": 30,
       "absent": {"apex": "not there"}}


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A file of results; its numbers are made up."""
    on = {"gpu": "Test", "driver": "1.2", "commit": "abc", "date": "2000-01-01T00:00:00", "packages": {"torch": "9"}}
    return {"machine": on, "figures": {"rows": rows}}
