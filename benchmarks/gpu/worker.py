"""The works, one after the other, in a process of their own: ``python -m benchmarks.gpu.worker --out FILE ...``.

Each writes a line when it begins, one for each row of figures, and one when it ends: so the command knows which one was
running if this process dies or has to be ended, and loses nothing that was measured. An error of a work ends that work;
one that leaves the device unusable ends the process.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import buckets, ceiling, ema, end_to_end, host, muon, offload, recipes, small, start
from benchmarks.gpu.bench import Bench


class Work(NamedTuple):
    """What is run, and for how long.

    Attributes:
        needs: seconds that must be left for it to begin.
        limit: seconds after which it is ended.
    """

    run: Callable[[Bench], Iterable[dict[str, Any]]]
    needs: float
    limit: float


WORKS: dict[str, Work] = {
    "ceiling": Work(ceiling.run, 5, 30),
    **{recipe.section: Work(recipes.large(recipe), 10, 50) for recipe in recipes.RECIPES},
    "small": Work(small.run, 10, 60),
    "host": Work(host.plain, 10, 40),
    "host of DTensors": Work(host.sharded, 20, 70),
    "host in buckets": Work(host.bucketed, 15, 60),
    **{name: Work(recipes.model(name), 10, 40) for name in recipes.MODELS},
    "ema": Work(ema.run, 10, 30),
    "muon": Work(muon.run, 10, 40),
    "offload": Work(offload.run, 25, 60),
    "end to end": Work(end_to_end.run, 25, 70),
    "start": Work(start.run, 20, 60),
    "around": Work(buckets.run, 8, 30),
}


def usable(device: torch.device) -> bool:
    """Whether the device still works after an error."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def run(names: list[str], bench: Bench, until: float, write: Callable[[dict[str, Any]], Any]) -> bool:
    """Run the works; whether the device still works.

    Arguments:
        until: the time (`time.time()`) by which all must have ended.
        write: given a dict when a work begins (`began`), for each `row`, and when it has ended (`seconds`, `error` or
            `cut`).
    """
    for name in names:
        left = until - time.time()
        if left < WORKS[name].needs and not bench.dry:
            write({"work": name, "cut": f"not run: out of time ({max(left, 0):.0f} s left)"})
            continue
        write({"work": name, "began": time.time()})
        begin = time.monotonic()
        try:
            for row in WORKS[name].run(bench):
                write({"work": name, "row": row, "ceiling": bench.ceiling})
        except Exception as error:  # reported with its traceback, and the command fails; the other works go on
            traceback.print_exc()
            write({"work": name, "error": f"{type(error).__name__}: {error}"})
            del error
            if not usable(bench.device):
                return False
        else:
            write({"work": name, "seconds": time.monotonic() - begin})
        gc.collect()
        usable(bench.device)
    return True


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.worker")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--ceiling", type=float)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("works", nargs="+", choices=list(WORKS))
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    if given.dry:
        torch.set_num_threads(1)  # many small operations, perhaps beside other work
    with given.out.open("a") as file:
        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        bench = Bench(torch.device(given.device), given.dry, given.ceiling)
        return 0 if run(given.works, bench, given.until, write) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
