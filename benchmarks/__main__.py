"""Run the benchmarks, all or some, ``python -m benchmarks [step pass ...]``: tables, JSON files and a plot."""

from __future__ import annotations

import sys

from benchmarks import (
    bench_host,
    bench_import,
    bench_loop,
    bench_optimizers,
    bench_pass,
    bench_step,
    bench_threads,
    harness,
    plot,
)

SUITES = {"step": bench_step, "pass": bench_pass, "optimizers": bench_optimizers, "loop": bench_loop,
          "host": bench_host, "threads": bench_threads, "import": bench_import}


def main(names: list[str]) -> int:
    if unknown := set(names) - set(SUITES):
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}", file=sys.stderr)
        return 2
    print(", ".join(f"{key} {value}" for key, value in harness.machine().items()))
    for name in names or SUITES:
        figures = SUITES[name].run()
        print(f"\n{SUITES[name].__doc__}\n{SUITES[name].report(figures)}\nwritten: {harness.save(name, figures)}")
        if name == "step":
            print(f"drawn: {plot.steps(figures)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
