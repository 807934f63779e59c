"""The CUDA backend without a GPU: host memory in the place of a device's, and launches that do nothing.

What is left of a step is what it costs the host, but for the driver's own calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fasttrain.kernels import cuda, dispatch, emit_cuda, place, resident, ring


class Code:
    """Device code whose kernels are never run; it has one for everything that CUDA's emitter can write."""

    launched = 0

    def find(self, name: str | None, rule: Any, dtypes: Any, codecs: Any) -> tuple[str | None, str]:
        return (name, "") if name is not None else (emit_cuda.own(rule, dtypes, codecs)[0], "")

    def usage(self, kernel: str, threads: int) -> dict[str, int]:
        return {}

    def launch(self, **arguments: Any) -> None:
        self.launched += 1


@contextmanager
def device() -> Iterator[Code]:
    """Within it, `backend="cuda"` steps tensors in CPU memory, to no effect."""
    code = Code()
    driver = SimpleNamespace(multiprocessors=lambda ordinal: 132)
    cached = (cuda.kernel_of, dispatch._best)
    for one in cached:
        one.cache_clear()
    with mock.patch.multiple(cuda, place_of=place.Near, code=lambda ordinal: (code, ""), driver=lambda: (driver, ""),
                             why_not=lambda device: None, tables=resident.Tables()), \
            mock.patch.object(ring, "rings", {}):
        yield code
    for one in cached:
        one.cache_clear()

