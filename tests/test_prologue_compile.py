"""The prologue's kernels, compiled for GPUs that are not here, and what the disassembly shows."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT
from structures import choices
from test_coefficients import ALL

from benchmarks.proof import disassembly
from fasttrain.kernels import emit_cuda, prologue
from fasttrain.kernels.trace_scalars import trace_scalars

FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false")  # as in CMakeLists.txt
ARCHS = (80, 90, 100)
QUICK = (("AdamW", 80), ("NAdam", 100), ("LAMBApply", 90))
pytestmark = pytest.mark.skipif(disassembly.cuobjdump() is None, reason="no cuobjdump")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("name, arch", [("prologue", 80), ("prologue", 100), ("keyed", 90), ("chunks_left", 90),
                                        ("count", 90)])
def test_cuda_kernels_neither_spill_nor_index_local_memory(name: str, arch: int, tmp_path: Path) -> None:
    source, cubin = tmp_path / "own.cu", tmp_path / "own.cubin"
    source.write_text(emit_cuda.listed(name))
    done = subprocess.run(["nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", "-cubin", f"-arch=sm_{arch}", "-o", str(cubin),
                           str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernel, = disassembly.read(cubin.read_bytes())
    assert (kernel.name, kernel.local, kernel.stack) == (name, 0, 0)
    assert kernel.registers <= 80


GRAPHS = [(trace_scalars(rule, list(choices(rule))[-1]), rule.name) for rule in ALL]


@pytest.mark.parametrize("graph, arch", [
    pytest.param(graph, arch, id=f"{name}-sm_{arch}", marks=[] if (name, arch) in QUICK else [pytest.mark.slow])
    for graph, name in GRAPHS for arch in ARCHS])
def test_triton_kernels_neither_spill_nor_contract(graph, arch: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    compiled = prologue.compile_ahead(graph, True, False, arch)
    assert "fma.rn.f64" not in compiled.asm["ptx"]
    kernel, = disassembly.read(compiled.asm["cubin"])
    assert (kernel.local, kernel.stack) == (0, 0)
