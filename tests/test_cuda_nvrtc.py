"""NVRTC reads the CUDA sources as they are: only our own headers, nothing of the system's or of CUDA's."""

from __future__ import annotations

import re
from pathlib import Path

import nvrtc_library
import pytest
from test_cuda_pack import NAMES as BUCKETS
from test_cuda_sums import REDUCTIONS
from test_cuda_walk import PAIRS
from test_storage_cuda import COMBINATIONS as KEPT
from test_storage_cuda import name_of

from fasttrain.kernels import emit_cuda, nvrtc

SOURCES = Path(__file__).parents[1] / "csrc"
pytestmark = pytest.mark.skipif(bool(nvrtc_library.NONE), reason=str(nvrtc_library.NONE))


def compile_ptx(arch: int) -> str:
    text = (SOURCES / "cuda/step.cu").read_text()
    options = [*nvrtc.FLAGS, f"--gpu-architecture=compute_{arch}"]
    return nvrtc_library.Library().compile(text, emit_cuda.included(text, nvrtc.sources(SOURCES)), options).decode()


@pytest.mark.parametrize("arch", [80, 100])
def test_every_kernel_compiles(arch):
    ptx = compile_ptx(arch)
    kernels = set(re.findall(r"\.entry (\w+)\(", ptx))
    plain = {f"step_{rule.name}_{'_'.join(kinds)}" for rule, kinds in PAIRS}
    driven = {"prologue", "keyed", "chunks_left", "count"}  # around a step that the device drives
    assert kernels == plain | {name_of(combination) for combination in KEPT} | REDUCTIONS | set(BUCKETS) | driven
    fused = {entry.split("(")[0] for entry in ptx.split(".entry ")[1:]
             if re.search(r"\b(fma|mad)\.\w+\.f(32|64)", entry)}
    sums = {name for name in kernels if name.startswith(("squares_", "sum_")) and not name.endswith("_F64")}
    assert fused == sums, "contracted"  # where the product is exact
    assert {"div.rn.f32", "sqrt.rn.f32"} <= set(re.findall(r"\b(?:div|sqrt)\.[\w.]+", ptx))
