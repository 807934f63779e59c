"""NVRTC reads the CUDA sources as they are: only our own headers, nothing of the system's or of CUDA's."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import re
from pathlib import Path

import pytest
from test_cuda_pack import NAMES as BUCKETS
from test_cuda_sums import REDUCTIONS
from test_cuda_walk import PAIRS
from test_storage_cuda import COMBINATIONS as KEPT
from test_storage_cuda import name_of

SOURCES = Path(__file__).parents[1] / "csrc"
HEADERS = ("common.h", "codecs.h", "rules.h", "stage_rules.h", "draws.h", "operand.h",
           *(f"cuda/{path.name}" for path in sorted((SOURCES / "cuda").glob("*.cuh"))))
OPTIONS = ("--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")


def find_library() -> str | None:
    """NVRTC: of the toolkit, or of the wheels that CUDA builds of torch bring."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for builtins in Path(folder).rglob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)  # NVRTC looks for it by name, where it is not
        for library in Path(folder).rglob("libnvrtc.so.*"):
            return str(library)
    return ctypes.util.find_library("nvrtc")


LIBRARY = find_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no NVRTC: neither the CUDA toolkit's nor a wheel's")


def strings(values) -> ctypes.Array:
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


def compile_ptx(arch: int) -> str:
    nvrtc = ctypes.CDLL(str(LIBRARY))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()

    def output(what: str) -> str:
        assert getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
        text = ctypes.create_string_buffer(size.value)
        assert getattr(nvrtc, f"nvrtcGet{what}")(program, text) == 0
        return text.value.decode()

    headers = strings([(SOURCES / header).read_text() for header in HEADERS])
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), (SOURCES / "cuda/step.cu").read_bytes(), b"step.cu",
                                    len(HEADERS), headers, strings(HEADERS)) == 0
    options = [*OPTIONS, f"--gpu-architecture=compute_{arch}"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), strings(options))
    assert status == 0, output("ProgramLog")
    ptx = output("PTX")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx


@pytest.mark.parametrize("arch", [80, 100])
def test_every_kernel_compiles(arch):
    ptx = compile_ptx(arch)
    kernels = set(re.findall(r"\.entry (\w+)\(", ptx))
    plain = {f"step_{rule.name}_{'_'.join(kinds)}" for rule, kinds in PAIRS}
    assert kernels == plain | {name_of(combination) for combination in KEPT} | REDUCTIONS | set(BUCKETS)
    fused = {entry.split("(")[0] for entry in ptx.split(".entry ")[1:]
             if re.search(r"\b(fma|mad)\.\w+\.f(32|64)", entry)}
    sums = {name for name in kernels if name.startswith(("squares_", "sum_")) and not name.endswith("_F64")}
    assert fused == sums, "contracted"  # where the product is exact
    assert {"div.rn.f32", "sqrt.rn.f32"} <= set(re.findall(r"\b(?:div|sqrt)\.[\w.]+", ptx))
