"""NVRTC in CuPy's place (`fasttrain.kernels.nvrtc.Compiler`): the library itself, by ctypes. It needs no driver."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path


@cache
def find() -> str | None:
    """The library: of a wheel (the test extra's, or one that torch's CUDA builds bring), or of the toolkit."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for builtins in Path(folder).rglob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)  # NVRTC looks for it by name, where it is not
        for library in Path(folder).rglob("libnvrtc.so.*"):
            return str(library)
    return ctypes.util.find_library("nvrtc")


NONE = None if find() else "no NVRTC: neither the nvidia-cuda-nvrtc wheel's nor the CUDA toolkit's"


def strings(values: Sequence[str]) -> ctypes.Array:
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


class Library:
    """It counts what it compiles."""

    def __init__(self) -> None:
        self.nvrtc, self.compiled = ctypes.CDLL(str(find())), 0
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        assert self.nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0
        self.version = major.value, minor.value
        assert self.nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)) == 0
        known = (ctypes.c_int * count.value)()
        assert self.nvrtc.nvrtcGetSupportedArchs(known) == 0
        self.architectures: Sequence[int] = tuple(known)

    def compile(self, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        program, size = ctypes.c_void_p(), ctypes.c_size_t()

        def output(what: str) -> bytes:
            assert getattr(self.nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
            content = ctypes.create_string_buffer(size.value)
            assert getattr(self.nvrtc, f"nvrtcGet{what}")(program, content) == 0
            return content.raw

        self.compiled += 1
        assert self.nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"fasttrain.cu", len(headers),
                                             strings(list(headers.values())), strings(list(headers))) == 0
        try:
            if self.nvrtc.nvrtcCompileProgram(program, len(options), strings(options)):
                raise RuntimeError(output("ProgramLog").rstrip(b"\0").decode())
            return output("PTX").rstrip(b"\0") if "compute_" in options[-1] else output("CUBIN")
        finally:
            self.nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
