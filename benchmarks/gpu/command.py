"""``python -m benchmarks gpu [--dry] [--only PART ...] [--skip PART ...] [--works NAME ...] [--seconds S]``.

Builds in place, runs the tests that need a GPU, compute-sanitizer, then the benchmarks, all within a time; prints a
short table and writes a JSON file. Uses the Python that runs it, and neither makes an environment nor downloads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import machine
from benchmarks.gpu.processes import ROOT, Done, execute

# Seconds that are kept for each part; what one leaves is the next ones'.
PARTS = {"build": 170, "tests": 120, "sanitizer": 60, "benchmarks": 165}
SECONDS, SECONDS_DRY = 525.0, 1800.0
PATIENCE_DRY = 10.0  # how many times as long a work may take on a CPU, which others may be using
NO_GPU = """no GPU to measure: {why}.
`make gpu ARGS=--dry` (or `python -m benchmarks gpu --dry`) needs none: it builds, and runs every benchmark's code on
the CPU at tiny sizes, which shows that it works and measures nothing."""
TOOLS = ("compute-sanitizer", "cuobjdump", "nvcc")


@dataclass
class Report:
    """What became of each part and of each work."""

    parts: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    cut: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    ceiling: float | None = None

    def say(self, part: str, text: str, done: Done | None = None, broken: bool = False) -> None:
        """Keep and print what became of a part; with the end of what it printed if it broke."""
        if broken and done is not None:
            print(done.tail())
        self.parts[part] = text
        if done is not None:
            self.seconds[part] = round(done.seconds, 1)
        if broken:
            self.broken.append(part)
        print(f"{part}: {text}" + (f" ({done.seconds:.0f} s)" if done is not None else ""), flush=True)


class Clock:
    """The time that is left, and what of it a part may take."""

    def __init__(self, seconds: float, parts: Sequence[str]):
        self.end, self.parts = time.monotonic() + seconds, list(parts)

    def left(self) -> float:
        return self.end - time.monotonic()

    def limit(self, part: str) -> float:
        """What is left but for what is kept for later parts."""
        later = self.parts[self.parts.index(part) + 1 :]
        return max(self.left() - sum(PARTS[name] for name in later), min(20.0, max(self.left(), 0.0)))


def tool(name: str) -> str | None:
    """Where a tool of the CUDA toolkit is: on PATH, beside nvcc, or where toolkits are."""
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    beside = [str(Path(found).resolve().parent)] if (found := shutil.which("nvcc")) else []
    places = [os.environ.get("PATH", ""), *beside, *(f"{home}/bin" for home in (*homes, "/usr/local/cuda"))]
    return shutil.which(name, path=os.pathsep.join(places))


# --- The parts --------------------------------------------------------------------------------------------------------

def build(report: Report, limit: float, dry: bool) -> None:
    """Build in place, with device code where nvcc is found; without it if that fails, so that Triton is measured."""
    wanted = os.environ.get("FASTTRAIN_CUDA") or ("on" if tool("nvcc") and not dry else "auto")
    done = cmake(limit, wanted)
    if done.status == 0:
        info = json.loads((ROOT / "fasttrain/_build_info.json").read_text())
        reason = f"no device code: {info['cuda_reason']}"
        return report.say("build", f"device code for {', '.join(info['cuda'])}" if info["cuda"] else reason, done)
    why = "out of time" if done.status is None else f"status {done.status}"
    report.say("build", f"FAILED with FASTTRAIN_CUDA={wanted}: {why}", done, broken=True)
    if wanted != "off":
        again = cmake(max(limit - done.seconds, 60.0), "off")
        print(f"build without device code: {'done' if again.status == 0 else 'FAILED'} ({again.seconds:.0f} s)")
    return None


def cmake(limit: float, cuda: str) -> Done:
    """What setup.py runs, without setuptools: a bare machine's may be too old for our pyproject.toml."""
    path = os.pathsep.join([str(Path(sys.executable).parent), f"{sys.prefix}/bin", os.environ.get("PATH", "")])
    environment, work = {"PATH": path, "FASTTRAIN_CUDA": cuda}, str(ROOT / "build/gpu")
    if missing := [name for name in ("cmake", "ninja") if shutil.which(name, path=path) is None]:
        return Done(1, f"{' and '.join(missing)} not found on PATH; install with: {sys.executable} -m pip install "
                       f"{' '.join(missing)}", 0.0)
    begin, said = time.monotonic(), ""
    for arguments in (["-S", str(ROOT), "-B", work, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"],
                      ["--build", work], ["--install", work, "--prefix", str(ROOT / "fasttrain")]):
        if arguments[0] == "--install":  # nothing of an earlier build may stay beside this one
            (ROOT / "fasttrain/step.fatbin").unlink(missing_ok=True)
        done = execute([str(shutil.which("cmake", path=path)), *arguments],
                       limit - (time.monotonic() - begin), environment)
        said += done.said
        if done.status != 0:
            return Done(done.status, said, time.monotonic() - begin)
    return Done(0, said, time.monotonic() - begin)


def test_files() -> list[str]:
    """The test files with tests for a GPU: others may import what a bare machine lacks."""
    mark = "mark" + ".gpu"
    files = (ROOT / "tests").glob("test_*.py")
    return sorted(str(path.relative_to(ROOT)) for path in files if mark in path.read_text())


def tests(report: Report, limit: float) -> None:
    """The tests marked `gpu`, but for the exhaustive ones (`make test-gpu` runs those too)."""
    several = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not slow", "-v", "--color=no", "-p", "no:cacheprovider",
               *several, *test_files()]
    done = execute(command, limit)
    counts = outcomes(done.said)
    said = ", ".join(f"{count} {name.lower()}" for name, count in counts.items() if count) or "none ran"
    if done.status is None:
        return report.say("tests", f"{said}; the rest not run: out of time", done, broken=bool(counts["FAILED"]))
    return report.say("tests", said, done, broken=done.status != 0)


def outcomes(said: str) -> dict[str, int]:
    """How many tests passed, failed or were skipped, from pytest's lines, also of a run that was ended."""
    single = re.findall(r"^tests/\S+::.* (PASSED|FAILED|ERROR|SKIPPED)", said, re.M)
    several = re.findall(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED) ", said, re.M)
    found = single + several
    return {name: found.count(name) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}


def sanitizer(report: Report, limit: float, dry: bool) -> None:
    """Small steps, norms and packs under memcheck and racecheck; in a dry run as they are."""
    small = [sys.executable, "-m", "benchmarks.gpu.sanitize"]
    if dry:
        done = execute([*small, "--device", "cpu"], limit)
        return report.say("sanitizer", f"not run: a dry run. Its cases, on the CPU: {done.tail(1)}", done,
                          broken=done.status != 0)
    found = tool("compute-sanitizer")
    if found is None:
        return report.say("sanitizer", "not run: compute-sanitizer was not found on PATH or beside nvcc")
    said, broken, seconds = [], False, 0.0
    for kind in ("memcheck", "racecheck"):
        # Without torch's cache every tensor is an allocation of its own, and reading past one is seen.
        done = execute([found, "--tool", kind, "--error-exitcode", "9", *small], limit / 2,
                       {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        seconds += done.seconds
        verdict, bad = verdict_of(done)
        said.append(f"{kind} {verdict}")
        if bad:
            print(done.tail())
        broken |= bad
    return report.say("sanitizer", ", ".join(said), Done(0, "", seconds), broken=broken)


def verdict_of(done: Done) -> tuple[str, bool]:
    """What a run of compute-sanitizer found, and whether that is a failure."""
    if done.status is None:
        return "not finished: out of time", False
    if "Device not supported" in done.said:
        return "not run: the tool does not support this device", False
    if done.status == 0:
        return "clean", False
    return ("found errors" if done.status == 9 else f"failed with status {done.status}"), True


def benchmarks(report: Report, limit: float, names: Sequence[str] | None, dry: bool) -> None:
    """The works, in a process that is started again after one that brought it down or took too long."""
    from benchmarks.gpu.worker import WORKS  # after the build: it imports the package

    begin, until = time.monotonic(), time.time() + limit
    names = names or list(WORKS)
    pending, restarts = list(names), 0
    with tempfile.TemporaryDirectory() as folder:
        while pending and time.time() < until:
            out = Path(folder, f"{restarts}.jsonl")
            command = [sys.executable, "-m", "benchmarks.gpu.worker", "--out", str(out), "--until", str(until),
                       *(["--dry", "--device", "cpu"] if dry else []),
                       *(["--ceiling", str(report.ceiling)] if report.ceiling else []), *pending]

            def late(out: Path = out) -> bool:
                running = current(lines_of(out))
                patience = PATIENCE_DRY if dry else 1.0
                return running is not None and time.time() - running[1] > WORKS[running[0]].limit * patience

            done = execute(command, until - time.time(), late=late)
            lines = lines_of(out)
            running = current(lines)
            ended = take(report, lines)
            if running is not None:  # it brought the process down, or was ended with it
                name, began = running
                slow = done.status is None
                (report.cut if slow else report.failed)[name] = (
                    f"not finished: ended after {time.time() - began:.0f} s" if slow
                    else f"the process died with status {done.status}: {done.tail(1)}")
                ended.append(name)
            elif not ended:  # it died before any work began
                report.failed[pending[0]] = f"the process died with status {done.status}: {done.tail(3)}"
                ended.append(pending[0])
            if done.status != 0:
                print(done.tail(20))
            pending = [name for name in pending if name not in ended]
            restarts += 1
    report.cut |= dict.fromkeys(pending, "not run: out of time")
    said = f"{len(names) - len(report.cut) - len(report.failed)} of {len(names)} works"
    if report.failed:
        report.broken.append("benchmarks")
    report.say("benchmarks", said, Done(0, "", time.monotonic() - begin))


def lines_of(out: Path) -> list[dict[str, Any]]:
    """What the worker wrote so far; the last line may still be incomplete."""
    text = out.read_text() if out.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def current(lines: list[dict[str, Any]]) -> tuple[str, float] | None:
    """The work that has begun and not ended, and since when."""
    running = None
    for line in lines:
        if "began" in line:
            running = line["work"], line["began"]
        elif "row" not in line:
            running = None
    return running


def take(report: Report, lines: list[dict[str, Any]]) -> list[str]:
    """Add what the worker wrote; the names of the works that ended."""
    ended = []
    for line in lines:
        if "row" in line:
            report.rows.append(line["row"])
            report.ceiling = line["ceiling"] or report.ceiling
        elif "began" not in line:
            ended.append(line["work"])
        if "error" in line:
            report.failed[line["work"]] = line["error"]
        elif "cut" in line:
            report.cut[line["work"]] = line["cut"]
    return ended


# --- All of them ------------------------------------------------------------------------------------------------------

def arguments_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="all that needs no GPU, on the CPU at tiny sizes")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts alone")
    parser.add_argument("--skip", nargs="+", choices=list(PARTS), default=[], help="not these parts")
    parser.add_argument("--works", nargs="+", metavar="NAME", help="these benchmarks alone; a wrong name lists all")
    parser.add_argument("--seconds", type=float, help=f"for everything (default {SECONDS:.0f})")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the command; 0 if nothing failed, 1 if something did, 2 if the input or the machine cannot work."""
    given = arguments_of(arguments)
    parts = [name for name in PARTS if name in (given.only or PARTS) and name not in given.skip]
    clock = Clock(given.seconds or (SECONDS_DRY if given.dry else SECONDS), parts)
    if given.works:
        from benchmarks.gpu.worker import WORKS

        if unknown := set(given.works) - set(WORKS):
            print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}", file=sys.stderr)
            return 2
    on = machine.ask()
    if "why_not" in on and not given.dry and parts != ["build"]:
        print(NO_GPU.format(why=on["why_not"]), file=sys.stderr)
        return 2
    if given.dry:
        on |= {"gpu": "none: a dry run", "driver": "none"}
    print(", ".join(f"{key} {value}" for key, value in on.items() if key != "packages"))
    print(", ".join(f"{name} {version}" for name, version in on.get("packages", {}).items()))
    print("tools: " + ", ".join(f"{name} {'found' if tool(name) else 'not found'}" for name in TOOLS), flush=True)

    report = Report()
    if "build" in parts:
        build(report, clock.limit("build"), given.dry)
    if "tests" in parts:
        if given.dry:
            report.say("tests", "not run: a dry run")
        else:
            tests(report, clock.limit("tests"))
    if "sanitizer" in parts:
        sanitizer(report, clock.limit("sanitizer"), given.dry)
    if "benchmarks" in parts:
        benchmarks(report, clock.limit("benchmarks"), given.works, given.dry)
    if parts != ["build"]:
        finish(report, on, given.dry)
    return 1 if report.broken else 0


def finish(report: Report, on: dict[str, Any], dry: bool) -> Path:
    """Write the file, and print the table and after it where the file is."""
    from benchmarks import harness
    from benchmarks.gpu import table

    folder = Path(tempfile.mkdtemp(prefix="fasttrain-gpu-")) if dry else harness.RESULTS
    path = harness.save("gpu", asdict(report), on, folder)
    absent = table.absences(report.rows)
    print()
    for name, why in absent.items():
        print(f"not compared: {name} ({why})")
    if report.rows or report.cut or report.failed:
        print("\n" + table.short(report.rows, report.cut, report.failed))
    print("\n" + ("DRY RUN: the numbers above are of no GPU and mean nothing. " if dry else "")
          + "; ".join(f"{part}: {said}" for part, said in report.parts.items()))
    print(f"written: {path}")
    return path
