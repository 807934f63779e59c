"""CUDA kernels compiled at run time by NVRTC, which CuPy (an extra) brings to Python, and kept on disk.

NVRTC reads the very sources of the kernels that are compiled ahead of time, with the same flags. It needs no compiler
on the machine, and no driver. What is kept on disk is found by a hash of all that could change it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import struct
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import fasttrain
from fasttrain.kernels import cache as files
from fasttrain.kernels import emit_cuda, jit

# As nvcc's in CMakeLists.txt (it optimises anyway): the bits are the contract.
FLAGS = ("-std=c++17", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false")
NO_CUPY = ("CuPy, which compiles CUDA kernels at run time, is not installed (pip install 'fasttrain[cuda]' for CUDA "
           "13, 'fasttrain[cuda12]' for CUDA 12)")


class Compiler(Protocol):
    """NVRTC, however it is reached."""

    version: tuple[int, int]
    architectures: Sequence[int]  # 80, 90, 100, ...

    def compile(self, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        """A cubin, or, for a virtual architecture (`compute_`), PTX.

        Raises:
            RuntimeError: the source was refused; the message has the first errors.
        """
        ...


class CuPy:
    """NVRTC by CuPy's binding."""

    def __init__(self) -> None:
        self.nvrtc = importlib.import_module("cupy.cuda").nvrtc
        major, minor = self.nvrtc.getVersion()
        self.version: tuple[int, int] = (major, minor)
        self.architectures: Sequence[int] = tuple(self.nvrtc.getSupportedArchs())

    def compile(self, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        program = self.nvrtc.createProgram(source, "fasttrain.cu", [text.encode() for text in headers.values()],
                                           [name.encode() for name in headers])
        try:
            self.nvrtc.compileProgram(program, tuple(options))
            virtual = any("compute_" in option for option in options)
            return self.nvrtc.getPTX(program) if virtual else whole(self.nvrtc.getCUBIN(program))
        except self.nvrtc.NVRTCError as error:
            raise RuntimeError(first_errors(self.nvrtc.getProgramLog(program)) or str(error)) from None
        finally:
            self.nvrtc.destroyProgram(program)


def whole(cubin: bytes) -> bytes:
    """A cubin with its last byte, which CuPy (14.2, say) drops as if it ended a string.

    A cubin is a 64-bit ELF file, and ends with one of its two tables of headers, whose last number is an alignment or a
    size of eight bytes: what is dropped is a zero.
    """
    tables = struct.unpack_from("<QQ", cubin, 32)
    sizes = struct.unpack_from("<HHHH", cubin, 54)  # of an entry, and how many: of either table
    end = max(tables[0] + sizes[0] * sizes[1], tables[1] + sizes[2] * sizes[3])
    return cubin + b"\0" if len(cubin) == end - 1 else cubin


def first_errors(log: str) -> str:
    """The first lines of a compiler's log that say what is wrong."""
    lines = [line.strip() for line in log.splitlines() if "error" in line]
    return " / ".join(lines[:3])


@cache
def cupy() -> tuple[Compiler | None, str]:
    """NVRTC through CuPy, or None and why it cannot be reached."""
    if importlib.util.find_spec("cupy") is None:
        return None, NO_CUPY
    try:
        return CuPy(), ""
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # of a library that is absent or of another
        return None, (f"CuPy is installed and cannot reach NVRTC ({type(error).__name__}: {error}): install NVIDIA's "
                      "nvidia-cuda-nvrtc beside it, or another CuPy")


def compiler() -> tuple[Compiler | None, str]:
    """What compiles kernels here, or None and why nothing does.

    Raises:
        ValueError: FASTTRAIN_JIT is neither on nor off.
    """
    return cupy() if jit.wanted() else (None, "FASTTRAIN_JIT=off")


def target(architectures: Sequence[int], capability: tuple[int, int]) -> str:
    """What to compile for a GPU: its own code, or PTX of the newest GPU that NVRTC knows and that is older.

    Raises:
        jit.Unavailable: NVRTC knows none that is old enough.

    Example:
        >>> target((75, 80, 90), (9, 0)), target((75, 80, 90), (10, 3))
        ('sm_90', 'compute_90')
    """
    number = 10 * capability[0] + capability[1]
    if number in architectures:
        return f"sm_{number}"
    older = [known for known in architectures if known < number]
    if not older:
        raise jit.Unavailable(f"this NVRTC compiles for {', '.join(map(str, architectures))}, and not for {number}")
    return f"compute_{max(older)}"


@cache
def sources(folder: Path) -> dict[str, str]:
    """Every text that a kernel may include, by its name there."""
    kinds = ("*.h", "cuda/*.h", "cuda/*.cuh", "cuda/*.cu")
    return {path.relative_to(folder).as_posix(): path.read_text() for kind in kinds for path in folder.glob(kind)}


def entry(text: str, capability: tuple[int, int], nvrtc: Compiler) -> tuple[str, dict[str, str], list[str]]:
    """The name under which an image is kept, and what it is made of: headers and options."""
    headers = emit_cuda.included(text, sources(jit.folder()))
    options = [*FLAGS, f"--gpu-architecture={target(nvrtc.architectures, capability)}"]
    key = json.dumps([fasttrain.__version__, text, headers, options, nvrtc.version])
    return f"cuda-{hashlib.sha256(key.encode()).hexdigest()[:40]}.cubin", headers, options


def image(text: str, capability: tuple[int, int], anew: bool = False) -> bytes:
    """The code of a source for a GPU, from disk or compiled now.

    Arguments:
        capability: of the GPU.
        anew: compile it even if it is on disk.

    Raises:
        jit.Unavailable: it cannot be compiled; the message says why.
        OSError: the cache directory cannot be used.
    """
    nvrtc, reason = compiler()
    if nvrtc is None:
        raise jit.Unavailable(reason)
    name, headers, options = entry(text, capability, nvrtc)
    kept = None if anew else files.read(name)
    if kept is not None:
        return kept
    say_compiling(str(files.directory()))
    try:
        made = nvrtc.compile(text, headers, options)
    except RuntimeError as error:
        raise Refused(f"NVRTC {'.'.join(map(str, nvrtc.version))} failed: {error}") from None
    files.put(name, made)
    return made


class Refused(jit.Unavailable):
    """NVRTC is there and did not compile a source, which the user should know."""


@cache
def say_compiling(where: str) -> None:
    """Say once in a process why a step takes seconds."""
    logging.getLogger("fasttrain").info("CUDA kernels are compiled by NVRTC at first use, and kept in %s", where)
