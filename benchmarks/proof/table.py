"""benchmarks/results/kernels.json: what compilers made of every kernel, to be compared where they are the same.

    {"cuda": {"nvcc ..., ptxas ...": {"<kernel> sm_90": {"registers": ..., ...}, ...}}, "triton": {...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "results/kernels.json"
AGAIN = "If that is meant, write it again: make proof"
Rows = Mapping[str, Mapping[str, Any]]


def load() -> dict[str, dict[str, Rows]]:
    """Rows by backend and compilers."""
    return json.loads(PATH.read_text()) if PATH.is_file() else {}


def newest(backend: str) -> tuple[str, Rows]:
    """The compilers of a backend, and the rows."""
    (found,) = load()[backend].items()
    return found


def save(backend: str, compiler: str, rows: Rows) -> None:
    """Keep the rows of a backend, of these compilers alone: others' would be of kernels as they were."""
    kept = {**load(), backend: {compiler: rows}}
    lines = ["{"]
    for backend in sorted(kept):
        ((compiler, found),) = kept[backend].items()
        lines += [f"{json.dumps(backend)}: {{{json.dumps(compiler)}: {{"]
        lines += [",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())]
        lines += ["}}" + ("," if backend != max(kept) else "")]
    PATH.write_text("\n".join([*lines, "}"]) + "\n")


def differences(backend: str, compiler: str, rows: Rows) -> list[str] | None:
    """What is not as it was kept, a line each; None if that is of other compilers.

    Rows that are kept and not given are not looked at: see `missing`.
    """
    kept = load().get(backend, {}).get(compiler)
    if kept is None:
        return None
    found = []
    for name, row in rows.items():
        before = kept.get(name)
        if before is None:
            found.append(f"{name}: not there before")
        else:
            found += [f"{name}: {key} was {before.get(key)}, is {row.get(key)}" for key in {**before, **row}
                      if before.get(key) != row.get(key)]
    return found


def missing(backend: str, names: set[str]) -> set[str]:
    """What is kept of kernels that there are no more, and there is but is not kept."""
    return names ^ set(newest(backend)[1])
