"""What GPU, driver and packages are here, or why no GPU can be used: ``python -m benchmarks.gpu.machine``.

A process of its own asks, so that the command holds no device and outlives a driver that does not.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import execute

OLDEST = (8, 0)
PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "cupy-cuda12x", "apex", "transformer-engine", "deepspeed",
            "bitsandbytes", "torchao", "flashoptim", "torch-optimi")


def refusal(capability: tuple[int, int], name: str) -> str:
    """Why a GPU is too old, or nothing.

    >>> refusal((9, 0), "NVIDIA H200")
    ''
    >>> refusal((7, 5), "Tesla T4")
    'Tesla T4 has compute capability 7.5; the kernels need 8.0 (A100) or newer'
    """
    if capability >= OLDEST:
        return ""
    return (f"{name} has compute capability {capability[0]}.{capability[1]}; the kernels need {OLDEST[0]}.{OLDEST[1]} "
            "(A100) or newer")


def gpu() -> dict[str, Any]:
    """The GPU that torch would use, or `why_not`."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of, it then raises
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, one too old, no GPU, a build for CPUs
        said = str(error).strip().splitlines()[0]
        return {"why_not": f"torch {torch.__version__} can use no GPU here: {said}"}
    found = torch.cuda.get_device_properties(0)
    capability = (found.major, found.minor)
    if reason := refusal(capability, found.name):
        return {"why_not": reason}
    return {"gpu": found.name, "capability": f"{found.major}.{found.minor}", "memory": found.total_memory,
            "l2": found.L2_cache_size, "multiprocessors": found.multi_processor_count,
            "cuda": torch.version.cuda, "driver": driver()}


def driver() -> str:
    """The driver's version, as its own tool or the kernel says it."""
    if tool := shutil.which("nvidia-smi"):
        done = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                              text=True)
        if done.returncode == 0:
            return done.stdout.strip().splitlines()[0]
    said = Path("/proc/driver/nvidia/version")
    return said.read_text().splitlines()[0] if said.is_file() else "unknown"


def versions() -> dict[str, str]:
    """Those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The CPU's name."""
    said = Path("/proc/cpuinfo")
    lines = said.read_text().splitlines() if said.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.processor())


def commit() -> str:
    """The checkout's commit, marked if it was changed; nothing where this is no checkout."""
    from benchmarks import harness

    return harness.commit()


def ask(limit: float = 60.0) -> dict[str, Any]:
    """What `python -m benchmarks.gpu.machine` says, or `why_not`."""
    done = execute([sys.executable, "-m", "benchmarks.gpu.machine"], limit)
    if done.status is None:
        return {"why_not": f"the driver did not answer within {limit:.0f} s"}
    if done.status != 0:
        return {"why_not": f"asking for the GPU failed with status {done.status}: {done.tail(1)}"}
    return json.loads(next(line for line in done.said.splitlines() if line.startswith("{")))  # beside warnings


def main() -> None:
    print(json.dumps({"date": datetime.now().isoformat(timespec="seconds"), "commit": commit(),
                      "processor": processor(), "packages": versions(), **gpu()}))


if __name__ == "__main__":
    main()
