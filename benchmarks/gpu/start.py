"""From `import torch` to the end of the first step, in fresh processes: what compiling costs, and what caches save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import OURS, Bench
from fasttrain.kernels import dispatch, nvrtc

CODE = """
import json, sys, time
begin = time.perf_counter()
import torch
imported = time.perf_counter()
device = torch.device(sys.argv[1])
p = torch.nn.Parameter(torch.randn(100_000, device=device))
p.grad = torch.randn(100_000, device=device)
if device.type == "cuda":
    torch.cuda.synchronize()
ready = time.perf_counter()
if sys.argv[2] == "torch":
    optimizer = torch.optim.AdamW([p], fused=True)
else:
    from fasttrain.optim import AdamW
    backend = sys.argv[2]
    if backend == "nvrtc":  # as where the build had no nvcc
        from pathlib import Path
        from fasttrain.kernels import cuda
        cuda.IMAGE, backend = Path("no device code"), "cuda"
    optimizer = AdamW([p], backend=backend)
optimizer.step()
if device.type == "cuda":
    torch.cuda.synchronize()
print(json.dumps({"torch": imported - begin, "device": ready - imported, "step": time.perf_counter() - ready}))
"""
SECONDS = 60  # that a process may take
ON_GPU = {"torch fused": "torch", "compiled ahead of time": "cuda", "NVRTC, cold": "nvrtc", "NVRTC, cached": "nvrtc",
          "Triton, cold": "triton", "Triton, cached": "triton"}


def timed(bench: Bench, backend: str, cache: Path) -> dict[str, float]:
    """Seconds of `import torch`, of the device's start, and of importing this package and its first step."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "FASTTRAIN_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", CODE, str(bench.device), backend], capture_output=True, text=True,
                          env=environment, timeout=SECONDS, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise RuntimeError(f"the first step with {backend} failed: {done.stderr.strip().splitlines()[-1:]}")
    if backend == "nvrtc" and not any(cache.rglob("cuda-*.cubin")):
        raise RuntimeError("the first step with NVRTC left no kernel on the disk: it was another backend's")
    return json.loads(done.stdout.splitlines()[-1])


def why_not(bench: Bench, backend: str) -> str | None:
    """Why a backend cannot step here."""
    if backend == "torch":
        return None
    if backend == "nvrtc":
        return nvrtc.compiler()[1] or dispatch.load("cuda").why_not(bench.device)
    return dispatch.load(backend).why_not(bench.device)


def run(bench: Bench) -> list[dict[str, Any]]:
    """Each backend that steps here, with nothing cached and with everything."""
    wanted = {"compiled ahead of time": "cpu"} if bench.device.type == "cpu" else ON_GPU
    rows, absent = [], dict.fromkeys(set(ON_GPU) - set(wanted) - {"torch fused"}, "needs a GPU")
    with tempfile.TemporaryDirectory() as cache:
        for name, backend in wanted.items():
            reason = why_not(bench, backend)
            if reason is not None:
                absent[name] = reason
                continue
            taken = timed(bench, backend, Path(cache))
            rows.append({"work": f"import to first step: {name}", "section": "start", "unit": "s", "rounds": 1,
                         "value": {OURS if backend != "torch" else "torch fused": taken["step"]}, "parts": taken,
                         "note": f"after {taken['torch']:.1f} s of import torch and {taken['device']:.1f} s of the "
                                 "device's start"})
    rows[0]["absent"] = absent
    return rows
