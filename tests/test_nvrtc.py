"""Kernels that are compiled at run time: what is compiled, what is kept on disk, and what NVRTC makes of it."""

from __future__ import annotations

import importlib
import importlib.machinery
import re
import stat
import struct
import sys
import types
from pathlib import Path

import kept
import nvrtc_library
import own_kernels
import pytest
import torch
from compiling import descent
from helpers import needs_native
from own_kernels import BF16, CODECS, DESCENT, F32, F64, PLAIN, RULE, Nothing, coded, plain
from own_kernels import nothing as nothing

from benchmarks.proof import disassembly
from fasttrain import doctor
from fasttrain.kernels import cache, cuda, dispatch, emit_cuda, jit, native, nvrtc
from fasttrain.precision.codecs import codec

ROOT = Path(__file__).parents[1]
NO_TOOL = None if disassembly.cuobjdump() else "no cuobjdump: neither the CUDA toolkit nor triton is installed"
needs_nvrtc = pytest.mark.skipif(bool(nvrtc_library.NONE or NO_TOOL), reason=str(nvrtc_library.NONE or NO_TOOL))
SIZES = {F32: 4, F64: 8, BF16: 2, torch.float16: 2}
GPU = torch.device("cuda", 0)


# --- What is asked for ------------------------------------------------------------------------------------------------

def test_flags_are_those_of_nvcc():
    written = re.search(r"set\(nvcc_flags ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert written
    flags = written.group(1).split()
    assert set(nvrtc.FLAGS) == set(flags[: flags.index("-ccbin")]) - {"-O3"}


@needs_native
def test_every_listed_kernel_has_a_source():
    for name in cuda.compiled():
        made = emit_cuda.listed(name).splitlines()[-1]
        assert all(part in made for part in name.split("_")[-1:]), (name, made)
    with pytest.raises(KeyError, match="no source is known for the kernel other_F32"):
        emit_cuda.listed("other_F32")


def test_rules_of_one_name_have_different_kernels():
    names = {emit_cuda.own(*plain(rule, (F32,) * 3))[0] for rule in (DESCENT, descent(), descent(-1.0))}
    assert len(names) == 2


@pytest.mark.parametrize("rule, dtypes, codecs, reason", [
    (*coded("split16 bf16 int8 int8+P f32"), "an EMA is Triton's"),
    (*coded("kahan_bf16 bf16 f32 f32"), "what is kept as kahanbf16 is Triton's"),
    (*coded("f16 f32 f32 f32"), "what is kept as f16 is Triton's"),
    (*coded("f32 f16 f32 f32"), "what is kept as f16 is Triton's"),
    (*coded("f32 f32 int4 f32"), "what is kept as int4 is Triton's"),
    (*coded("f32 f32 int8+S f32"), "what is kept as int8s is Triton's"),
    (RULE, (F32, F32, F32, BF16), (), "states of several dtypes"),
    (RULE, (F32, torch.int8, F32, F32), (), "no kernel takes torch.float32, torch.int8"),
    (descent(name="Größe"), (F32, F32), (), "'Größe' is not an identifier of ASCII letters"),
    (descent(name="a b"), (F32, F32), (), "'a b' is not an identifier"),
])
def test_what_the_templates_do_not_take(rule, dtypes, codecs, reason):
    assert reason in emit_cuda.why_not(rule, dtypes, codecs)


@pytest.mark.parametrize("kernel", [*(plain(RULE, dtypes) for dtypes in PLAIN), *map(coded, CODECS)])
def test_what_the_templates_take(kernel):
    assert emit_cuda.why_not(*kernel) is None


def test_target():
    assert nvrtc.target((75, 80, 90, 100), (8, 0)) == "sm_80"
    assert nvrtc.target((75, 80, 90, 100), (12, 0)) == "compute_100"
    with pytest.raises(jit.Unavailable, match="this NVRTC compiles for 90, 100, and not for 80"):
        nvrtc.target((90, 100), (8, 0))


# --- What is kept -----------------------------------------------------------------------------------------------------

TEXT = emit_cuda.own(*plain(DESCENT, (F32,) * 3))[1]


def test_an_image_is_compiled_once(nothing: Nothing):
    assert nvrtc.image(TEXT, (9, 0)) == nvrtc.image(TEXT, (9, 0)) == b"image 1\0"
    (source, headers, options), = nothing.asked
    assert source == TEXT
    assert options == [*nvrtc.FLAGS, "--gpu-architecture=sm_90"]
    assert {"common.h", "cuda/step.cu", "cuda/kept.cuh", "cuda/walk.cuh"} <= set(headers)
    assert not [name for name in headers if name.startswith("cpu/")]
    (entry,) = cache.directory().iterdir()
    assert stat.S_IMODE(cache.directory().stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert re.fullmatch(r"cuda-[0-9a-f]{40}\.cubin", entry.name)


@pytest.mark.parametrize("damaged", [lambda whole: whole[: len(whole) // 2], lambda whole: b"",
                                     lambda whole: b"X" + whole[1:]])
def test_a_damaged_image_is_made_anew(nothing: Nothing, damaged):
    nvrtc.image(TEXT, (9, 0))
    (entry,) = cache.directory().iterdir()
    entry.write_bytes(damaged(entry.read_bytes()))
    assert nvrtc.image(TEXT, (9, 0)) == nvrtc.image(TEXT, (9, 0)) == b"image 2\0"
    assert len(list(cache.directory().iterdir())) == 1


def test_the_key_has_all_that_matters(nothing: Nothing, monkeypatch):
    read = nvrtc.sources(jit.folder())
    changes = [
        lambda: None,
        lambda: monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "-DOTHER")),
        lambda: monkeypatch.setattr(nothing, "version", (13, 1)),
        lambda: monkeypatch.setattr("fasttrain.__version__", "0.0.0"),
        lambda: monkeypatch.setattr(nvrtc, "sources", lambda folder: read | {"common.h": "// other\n"}),
    ]
    for made, change in enumerate(changes, start=1):
        change()
        for _ in range(2):
            nvrtc.image(TEXT, (9, 0))
        assert len(nothing.asked) == made
    nvrtc.image(TEXT, (8, 0))
    nvrtc.image(TEXT + " ", (9, 0))
    assert len(nothing.asked) == made + 2


def test_what_is_not_included_does_not_matter(nothing: Nothing, monkeypatch):
    nvrtc.image(TEXT, (9, 0))
    read = nvrtc.sources(jit.folder())
    monkeypatch.setattr(nvrtc, "sources", lambda folder: read | {"step.h": "// other\n"})
    nvrtc.image(TEXT, (9, 0))
    assert len(nothing.asked) == 1


def test_it_can_be_turned_off(nothing: Nothing, monkeypatch):
    monkeypatch.setenv("FASTTRAIN_JIT", "off")
    with pytest.raises(jit.Unavailable, match=r"^FASTTRAIN_JIT=off$"):
        nvrtc.image(TEXT, (9, 0))
    assert doctor.more_device_code() == "other CUDA kernels: in Triton (FASTTRAIN_JIT=off)"
    monkeypatch.setenv("FASTTRAIN_JIT", "no")
    with pytest.raises(ValueError, match="neither on nor off"):
        nvrtc.image(TEXT, (9, 0))
    assert "neither on nor off" in doctor.more_device_code()


def test_what_nvrtc_says_arrives(nothing: Nothing):
    nothing.refuses = "fasttrain.cu(3): error: that"
    with pytest.raises(nvrtc.Refused, match=r"^NVRTC 13.0 failed: fasttrain.cu\(3\): error: that$"):
        nvrtc.image(TEXT, (9, 0))
    assert list(cache.directory().iterdir()) == []


def test_it_is_said_once(nothing: Nothing, caplog):
    nvrtc.say_compiling.cache_clear()
    with caplog.at_level("INFO", logger="fasttrain"):
        nvrtc.image(TEXT, (9, 0))
        nvrtc.image(TEXT, (8, 0))
    (said,) = caplog.messages
    assert said == f"CUDA kernels are compiled by NVRTC at first use, and kept in {cache.directory()}"


def test_doctor(nothing: Nothing):
    nvrtc.image(TEXT, (9, 0))
    assert doctor.more_device_code() == ("other CUDA kernels: compiled at first use by NVRTC 13.0 (CuPy), and kept in "
                                         f"{cache.directory()} (1 now)")
    cache.directory().chmod(0o777)
    assert "can be written by others" in doctor.more_device_code()


# --- CuPy -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def forgotten():
    nvrtc.cupy.cache_clear()
    yield
    nvrtc.cupy.cache_clear()


def test_no_cupy(forgotten, monkeypatch):
    """The extra is named; doctor says so."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cupy" else found(name))
    assert nvrtc.cupy() == (None, nvrtc.NO_CUPY)
    extras = re.findall(r"fasttrain\[(\w+)\]", nvrtc.NO_CUPY)
    assert extras == ["cuda", "cuda12"]
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf'^{extra} = \["cupy-cuda1[23]x"', project, re.MULTILINE) for extra in extras)
    assert doctor.more_device_code() == f"other CUDA kernels: in Triton ({nvrtc.NO_CUPY})"
    monkeypatch.setattr(cuda, "why_not", lambda device: nvrtc.NO_CUPY)
    if importlib.util.find_spec("triton"):
        assert dispatch._best.__wrapped__(GPU) == "triton"


def put_cupy(monkeypatch, binding) -> None:
    """A CuPy whose module of NVRTC is another."""
    for name, content in (("cupy", {}), ("cupy.cuda", {"nvrtc": binding})):
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)


def test_a_cupy_without_nvrtc(forgotten, monkeypatch):
    def absent():
        raise RuntimeError("libnvrtc.so.13 was not found")
    put_cupy(monkeypatch, types.SimpleNamespace(getVersion=absent))
    found, reason = nvrtc.cupy()
    assert found is None
    assert "cannot reach NVRTC (RuntimeError: libnvrtc.so.13 was not found): install NVIDIA's nvidia-cuda-n" in reason


CUBIN = b"\x7fELF" + bytes(28) + struct.pack("<QQIHHHHHH", 64, 0, 0, 64, 56, 2, 64, 0, 0) + b"x" * 111 + b"\0"


class Binding:
    """As CuPy's `cupy.cuda.nvrtc`: headers are bytes, and a program is destroyed once."""

    class NVRTCError(RuntimeError):
        pass

    def __init__(self) -> None:
        self.programs: dict[int, tuple] = {}
        self.destroyed: list[int] = []

    def getVersion(self): return 13, 0
    def getSupportedArchs(self): return 80, 90

    def createProgram(self, source, name, headers, names):
        assert all(isinstance(one, bytes) for one in (*headers, *names))
        assert isinstance(source, str)
        self.programs[len(self.programs)] = source, dict(zip(names, headers, strict=True))
        return len(self.programs) - 1

    def compileProgram(self, program, options):
        if "wrong" in self.programs[program][0]:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)")

    def getCUBIN(self, program): return CUBIN[:-1]  # as CuPy 14 does
    def getPTX(self, program): return b"ptx"
    def getProgramLog(self, program): return "in it:\n  x.cu(1): error: one\n\n1 error detected\n"
    def destroyProgram(self, program): self.destroyed.append(program)


def test_cupy_is_asked_as_it_wants(forgotten, monkeypatch):
    binding = Binding()
    put_cupy(monkeypatch, binding)
    found, reason = nvrtc.cupy()
    assert reason == ""
    assert (found.version, found.architectures) == ((13, 0), (80, 90))
    assert found.compile("text", {"a.h": "b"}, ["--gpu-architecture=sm_90"]) == CUBIN
    assert nvrtc.whole(CUBIN) == CUBIN
    assert found.compile("text", {}, ["--gpu-architecture=compute_90"]) == b"ptx"
    with pytest.raises(RuntimeError, match=r"^x.cu\(1\): error: one / 1 error detected$"):
        found.compile("wrong", {}, ["--gpu-architecture=sm_90"])
    assert binding.programs[0] == ("text", {b"a.h": b"b"})
    assert binding.destroyed == [0, 1, 2]


@needs_nvrtc
def test_the_real_cupy(forgotten, tmp_path, monkeypatch):
    """It needs no driver to compile."""
    pytest.importorskip("cupy", reason="CuPy is not installed (pip install 'fasttrain[cuda]')")
    found, reason = nvrtc.cupy()
    if found is None:
        pytest.skip(reason)
    monkeypatch.setenv("FASTTRAIN_CACHE_DIR", str(tmp_path))
    headers = emit_cuda.included(TEXT, nvrtc.sources(jit.folder()))
    for target in ("sm_80", "compute_90"):
        options = [*nvrtc.FLAGS, f"--gpu-architecture={target}"]
        assert found.compile(TEXT, headers, options) == nvrtc_library.Library().compile(TEXT, headers, options)
    (made,) = disassembly.read(nvrtc.image(TEXT, (9, 0)))
    assert made.name == emit_cuda.own(*plain(DESCENT, (F32,) * 3))[0]
    with pytest.raises(nvrtc.Refused, match=r"fasttrain.cu\(1\): .*error"):
        nvrtc.image("wrong", (9, 0))


# --- What NVRTC makes of it -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def library():
    return nvrtc_library.Library()


@pytest.fixture
def real(library, nothing: Nothing, monkeypatch):
    """NVRTC in CuPy's place."""
    monkeypatch.setattr(nvrtc, "cupy", lambda: (library, ""))
    return library


def wide_accesses(kernel: own_kernels.Kernel) -> tuple[dict[int, int], dict[int, int]]:
    """Loads and stores of 16 bytes, and of 8 in kernels with codes, that one round needs: every operand in whole
    accesses (csrc/cuda/step.cu, csrc/cuda/kept.cuh).
    """
    _, dtypes, codecs = kernel
    loads, stores = {16: 0, 8: 0}, {16: 0, 8: 0}
    if not codecs:
        elements = 2 * 16 // min(SIZES[dtype] for dtype in dtypes)
        counts = [SIZES[dtype] * elements // 16 for dtype in dtypes]
        return {16: sum(counts)}, {16: sum(counts) - counts[1]}
    for number in codecs:
        one = codec(number)
        first = 1 if one.block else kept.code_dtype(number).itemsize
        second = one.extra.itemsize if one.extra and not one.block else 0
        for size, read in ((first, not one.name.startswith("master")), (second, True)):
            width, count = (8, 2) if size == 1 else (16, 2 * 8 * size // 16)
            loads[width] += count * read
            stores[width] += count  # of the gradient: its zeros
    return loads, stores


def check(kernel: own_kernels.Kernel, capability: tuple[int, int]) -> None:
    name, text = emit_cuda.own(*kernel)
    (made,) = disassembly.read(nvrtc.image(text, capability))
    assert (made.name, made.stack, made.local) == (name, 0, 0)
    assert made.registers <= 128
    loads, stores = wide_accesses(kernel)
    assert made.loads[16] == loads[16]
    assert made.stores[16] == stores[16]
    assert made.loads.get(8, 0) >= loads.get(8, 0)  # coefficients and addresses are of 8 bytes too


PAIRS = [*((plain(RULE, dtypes), arch) for dtypes, arch in zip(PLAIN, [(9, 0), (8, 0), (10, 0)] * 3, strict=False)),
         *((coded(codecs), arch) for codecs, arch in zip(CODECS, [(10, 0), (8, 0), (9, 0)] * 2, strict=True))]


@needs_nvrtc
@pytest.mark.parametrize("kernel, capability", PAIRS)
def test_your_own_rule(real, kernel, capability):
    """No spills, two blocks to a multiprocessor at least, and 16-byte accesses, as in kernels compiled ahead."""
    check(kernel, capability)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("kernel", [*(plain(rule, dtypes) for rule in (RULE, DESCENT) for dtypes in PLAIN),
                                    *map(coded, CODECS)])
def test_your_own_rule_everywhere(real, kernel, capability):
    check(kernel, capability)


LISTED = ("tree", "squares_BF16", "factored_rows_F32", "stage_LAMBApply_BF16_F32_F32", "step_AdamW_BF16_BF16_F32",
          "move_BF16_F32", "move_F32_BF16_F32", "encode_F32", "encode_BF16_F32", "sum_INT8_BF16",
          "kept_AdamW_SPLIT16_BF16_INT8_INT8P")


def check_listed(name: str, capability: tuple[int, int]) -> None:
    found = {kernel.name: kernel for kernel in disassembly.read(nvrtc.image(emit_cuda.listed(name), capability))}
    assert name in found
    assert [kernel for kernel in found.values() if kernel.stack or kernel.local or kernel.registers > 128] == []


@needs_nvrtc
@pytest.mark.parametrize("name", LISTED)
def test_a_kernel_of_the_list(real, name):
    check_listed(name, (9, 0))


@needs_nvrtc
@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(cuda.compiled()) if native.load()[0] else [])
def test_every_kernel_of_the_list(real, name):
    if name.startswith("step_Adan_F64"):
        pytest.skip("its six streams alone fill 48 registers")
    check_listed(name, (9, 0))


@needs_nvrtc
def test_a_gpu_that_is_newer_than_nvrtc(real, monkeypatch):
    """PTX, with every operation rounded by itself."""
    monkeypatch.setattr(real, "architectures", (80, 90))
    ptx = nvrtc.image(emit_cuda.own(*plain(RULE, (F32,) * 3))[1], (12, 0)).decode()
    assert ".target sm_90" in ptx
    assert {"div.rn.f32", "sqrt.rn.f32", "mul.rn.f32"} <= set(re.findall(r"\b(?:div|sqrt|mul)\.rn\.f32", ptx))
    assert not re.search(r"\b(fma|mad)\.\w+\.f(32|64)|\.ftz|\.local\b", ptx)


@needs_nvrtc
def test_a_real_image_is_found_again(real):
    before = real.compiled
    first = nvrtc.image(TEXT, (9, 0))
    assert nvrtc.image(TEXT, (9, 0)) == first
    assert real.compiled == before + 1
    with pytest.raises(nvrtc.Refused, match="error"):
        nvrtc.image("wrong", (9, 0))
