"""What Triton made of cross-entropy: every pass in every dtype, each once on every architecture."""

from __future__ import annotations

from benchmarks.proof.triton import SHORT, Ahead
from fasttrain.kernels import triton_cross_entropy as loss

ARCHITECTURES = (80, 90, 100)
PASSES = {"forward": ("measure_row", False), "forward, smoothed": ("measure_row", True),
          "backward": ("differentiate_row", False)}
STORAGES = (0, 2, 3)
ALL_CASES = [(name, storage, arch) for name in PASSES for storage in STORAGES for arch in ARCHITECTURES]
CASES = [(name, storage, arch) for name, storage, arch in ALL_CASES
         if (list(PASSES).index(name) + STORAGES.index(storage)) % 3 == ARCHITECTURES.index(arch)]


def ahead(name: str, storage: int, arch: int) -> Ahead:
    """One of them."""
    kernel, smooth = PASSES[name]
    bytes = (4 if storage == 0 else 2) * (2 if name == "backward" else 1)
    return Ahead(f"loss {name}: {SHORT[storage]}: sm_{arch}", arch, lambda: loss.compile_ahead(
        kernel, storage, arch, smooth), loss.BLOCK / (32 * loss.OPTIONS["num_warps"]), bytes, looped=True)


def listed() -> list[Ahead]:
    """Those of the table."""
    return [ahead(*case) for case in CASES]
