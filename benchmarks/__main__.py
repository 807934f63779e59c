"""Run the benchmarks, all or some, ``python -m benchmarks [step pass ...]``: tables, JSON files and plots.

Three run only if they are named: ``codes``, ``wire`` (a minute each) and ``convergence`` (half an hour): they measure
quality, not time. ``gpu`` is a command of its own, with its own options (docs/gpu.md).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

SUITES = ("step", "pass", "optimizers", "loop", "loader", "pack", "exchange", "failures", "parallel", "zero",
          "pipeline", "checkpoint", "saving", "cross_entropy", "vocabulary", "guards", "host", "stubbed", "threads",
          "import")
QUALITY = ("codes", "wire", "convergence")
PLOTS = {"step": "steps", "convergence": "convergence"}


def load(name: str) -> ModuleType:
    """A suite, imported when it is wanted: `gpu` runs where not all of them can be, and before anything is built."""
    return import_module(f"benchmarks.bench_{name}")


def main(names: list[str]) -> int:
    if names[:1] == ["gpu"]:
        from benchmarks.gpu import command

        return command.main(names[1:])
    if unknown := set(names) - {*SUITES, *QUALITY}:
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join((*SUITES, *QUALITY, 'gpu'))}",
              file=sys.stderr)
        return 2
    from benchmarks import harness, plot

    print(", ".join(f"{key} {value}" for key, value in harness.machine().items()))
    for name in names or SUITES:
        suite = load(name)
        figures = suite.run()
        print(f"\n{suite.__doc__}\n{suite.report(figures)}\nwritten: {harness.save(name, figures)}")
        if name in PLOTS:
            print(f"drawn: {getattr(plot, PLOTS[name])(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
