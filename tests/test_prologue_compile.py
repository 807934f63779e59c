"""The prologue's kernels, compiled for GPUs that are not here, and what the disassembly shows."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT
from test_coefficients import ALL

from benchmarks.proof import disassembly
from fasttrain.kernels import emit_scalars, prologue
from fasttrain.optim.structures import coefficient_graphs

FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false")  # as in CMakeLists.txt
ARCHS = (80, 90, 100)
MOST_REGISTERS = 96
QUICK = (("AdamW", 80), ("NAdam", 100), ("LAMBApply", 90))
pytestmark = pytest.mark.skipif(disassembly.cuobjdump() is None, reason="no cuobjdump")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", [pytest.param(arch, marks=[] if arch == 90 else [pytest.mark.slow])
                                  for arch in ARCHS])
def test_cuda_kernels_neither_spill_nor_index_local_memory(arch: int, tmp_path: Path) -> None:
    cubin = tmp_path / "prologue.cubin"
    done = subprocess.run(["nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", "-cubin", f"-arch=sm_{arch}", "-o", str(cubin),
                           str(ROOT / "csrc/cuda/prologue.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = disassembly.read(cubin.read_bytes())
    names = map(emit_scalars.name_of, coefficient_graphs(ALL))
    assert {kernel.name for kernel in kernels} == {f"prologue_{name}_{kind}" for name in names
                                                   for kind in ("F32", "F64")}
    assert not [kernel for kernel in kernels if kernel.local or kernel.stack or kernel.registers > MOST_REGISTERS]


GRAPHS = [(graph, rule.name) for rule in ALL for graph in coefficient_graphs([rule])[-1:]]


@pytest.mark.parametrize("graph, arch", [
    pytest.param(graph, arch, id=f"{name}-sm_{arch}", marks=[] if (name, arch) in QUICK else [pytest.mark.slow])
    for graph, name in GRAPHS for arch in ARCHS])
def test_triton_kernels_neither_spill_nor_contract(graph, arch: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    compiled = prologue.compile_ahead(graph, True, False, arch)
    assert "fma.rn.f64" not in compiled.asm["ptx"]
    kernel, = disassembly.read(compiled.asm["cubin"])
    assert (kernel.local, kernel.stack) == (0, 0)
