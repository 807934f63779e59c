"""What tests of CUDA kernels compiled at run time share: cases, a compiler that compiles nothing, and the text of a
kernel compiled for the host, where a launch walks it.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import kept
import pytest
import torch
from compiling import GXX, Own, descent

from fasttrain.kernels import emit_cuda, jit
from fasttrain.rule import Rule

RULE, DESCENT = Own.rules[0], descent()
OPTIONS = dict(lr=0.1, beta=0.9, eps=1e-8)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PLAIN = [(F32, F32, F32), (F64, F64, F64), (BF16, BF16, BF16), (F16, F16, F16), (F32, BF16, F32), (BF16, F32, F32),
         (BF16, BF16, F32), (F32, F32, BF16)]  # of p, g and the states
CODECS = ["split16 bf16 int8 int8+P", "bf16+S bf16 bf16+S f32", "f32 f32 f32 f32", "split8 f32 int8 int8+P",
          "master_bf16 bf16 f32 bf16", "bf16 bf16 bf16 bf16"]
Kernel = tuple[Rule, tuple[torch.dtype, ...], tuple[int, ...]]  # as `emit_cuda.own` takes it


def plain(rule: Rule, dtypes: Sequence[torch.dtype]) -> Kernel:
    p, g, s = dtypes
    return rule, (p, g, *[s] * len(rule.state)), ()


def coded(codecs: str, rule: Rule = RULE) -> Kernel:
    numbers = kept.numbers_of(codecs)
    return rule, tuple(kept.code_dtype(number) for number in numbers), numbers


class Nothing:
    """A compiler whose images are the hash of all that it was given; it counts and remembers them."""

    def __init__(self) -> None:
        self.version, self.architectures = (13, 0), (80, 90, 100)
        self.asked: list[tuple[str, Mapping[str, str], Sequence[str]]] = []
        self.refuses = ""

    def compile(self, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        self.asked.append((source, headers, options))
        if self.refuses:
            raise RuntimeError(self.refuses)
        return f"image {len(self.asked)}\0".encode()


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nothing:
    """That compiler in CuPy's place, with an empty cache."""
    made = Nothing()
    monkeypatch.setenv("FASTTRAIN_CACHE_DIR", str(tmp_path / "images"))
    monkeypatch.delenv("FASTTRAIN_JIT", raising=False)
    monkeypatch.setattr("fasttrain.kernels.nvrtc.cupy", lambda: (made, ""))
    return made


HOST = """
#include "cuda/walk.cuh"
#include <stdexcept>
namespace fasttrain {{
thread_local Accesses accesses;
void check_address(const void* at, int bytes) {{
  if (reinterpret_cast<u64>(at) % static_cast<u64>(bytes) != 0) throw std::runtime_error("not aligned");
}}
template <class Kernel, class T>
void walk(const void* table, i64 chunks, const void* rows, const void* gradients, u32 blocks, u32 threads) {{
  for (u32 block = 0; block < blocks; ++block)
    for (u32 thread = 0; thread < threads; ++thread)
      Kernel::walk(static_cast<const i64*>(table), chunks, static_cast<const T*>(rows),
                   static_cast<const i64*>(gradients), Place{{thread, threads, block, blocks}});
}}
}}  // namespace fasttrain
#define FT_WALK(Name, T, ...) \\
  extern "C" void Name(const void* table, long long chunks, const void* rows, const void* gradients, unsigned blocks, \\
                       unsigned threads) {{ \\
    using namespace fasttrain; \\
    using namespace fasttrain::codes; \\
    walk<__VA_ARGS__, T>(table, chunks, rows, gradients, blocks, threads); \\
  }}
#define FT_STEP_KERNEL(Name, Blocks, Rule, T, P, G, S) FT_WALK(Name, T, Step<Rule<T>, T, k##P, k##G, k##S>)
#define FT_KEPT_KERNEL(Name, Rule, ...) FT_WALK(Name, float, KeptStep<Rule<float>, __VA_ARGS__>)
{text}
"""


def on_host(kernel: Kernel, folder: Path) -> tuple[str, Callable[..., None]]:
    """The name of a kernel, and its text for the host: of (table, chunks, rows, gradients, blocks, threads)."""
    name, text = emit_cuda.own(*kernel)
    source, made = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(HOST.format(text=text))
    subprocess.run([str(GXX), "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", f"-I{jit.folder()}",
                    "-o", str(made), str(source)], check=True)
    walk = ctypes.CDLL(str(made))[name]
    walk.argtypes = [ctypes.c_ulonglong, ctypes.c_longlong, *[ctypes.c_ulonglong] * 2, ctypes.c_uint, ctypes.c_uint]
    walk.restype = None
    return name, walk
