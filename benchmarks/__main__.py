"""Run the benchmarks, all or some, ``python -m benchmarks [step pass ...]``: tables, JSON files and plots.

Three run only if they are named: ``codes``, ``wire`` (a minute each) and ``convergence`` (half an hour): they measure
quality, not time.
"""

from __future__ import annotations

import sys

from benchmarks import (
    bench_codes,
    bench_convergence,
    bench_host,
    bench_import,
    bench_loop,
    bench_optimizers,
    bench_pack,
    bench_pass,
    bench_step,
    bench_threads,
    bench_wire,
    harness,
    plot,
)

SUITES = {"step": bench_step, "pass": bench_pass, "optimizers": bench_optimizers, "loop": bench_loop,
          "pack": bench_pack, "host": bench_host, "threads": bench_threads, "import": bench_import}
QUALITY = {"codes": bench_codes, "wire": bench_wire, "convergence": bench_convergence}
PLOTS = {"step": plot.steps, "convergence": plot.convergence}


def main(names: list[str]) -> int:
    if unknown := set(names) - set(SUITES | QUALITY):
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SUITES | QUALITY)}", file=sys.stderr)
        return 2
    print(", ".join(f"{key} {value}" for key, value in harness.machine().items()))
    for name in names or SUITES:
        suite = (SUITES | QUALITY)[name]
        figures = suite.run()
        print(f"\n{suite.__doc__}\n{suite.report(figures)}\nwritten: {harness.save(name, figures)}")
        if name in PLOTS:
            print(f"drawn: {PLOTS[name](figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
