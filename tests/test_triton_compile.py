"""Every Triton kernel, compiled ahead of time for GPUs that are not here, and what the disassembly shows."""

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import disassembly  # noqa: E402
from fasttrain.kernels.triton import BLOCK, OPTIONS, compile_ahead  # noqa: E402
from fasttrain.optim import RULES  # noqa: E402

ARCHITECTURES = (80, 90, 100)
# Storages of p, g and the states: fp32, bf16, fp16, fp64, fp32 gradients, and fp32 states of bf16 parameters.
KEPT = {"fp32": (0, 0, 0), "bf16": (2, 2, 2), "fp16": (3, 3, 3), "fp64": (1, 1, 1), "bf16, fp32 g": (2, 0, 2),
        "bf16, fp32 states": (2, 2, 0)}
BYTES = {0: 4, 1: 8, 2: 2, 3: 2}

# Each rule with each storage once, the architectures in turn: every pair of (rule, architecture) and of (storage,
# architecture) occurs.
CASES = [pytest.param(rule, name, ARCHITECTURES[(i + j) % 3], id=f"{rule.name}-{name}-sm_{ARCHITECTURES[(i + j) % 3]}")
         for i, rule in enumerate(RULES) for j, name in enumerate(KEPT)]


@pytest.mark.skipif(disassembly.cuobjdump() is None, reason="no cuobjdump")
@pytest.mark.parametrize(("rule", "name", "arch"), CASES)
def test_accesses_are_16_bytes_and_nothing_spills(rule, name, arch):
    p, g, state = KEPT[name]
    kept = (p, g, *(state,) * len(rule.state))
    wide = name == "fp64"
    (kernel,) = disassembly.read(compile_ahead(rule, kept, wide, arch).asm["cubin"])
    assert (kernel.local, kernel.stack) == (0, 0)
    per_thread = BLOCK[wide] // (32 * OPTIONS["num_warps"])
    expected_loads = sum(per_thread * BYTES[storage] // 16 for storage in kept)
    expected_stores = sum(per_thread * BYTES[storage] // 16 for index, storage in enumerate(kept) if index != 1)
    assert kernel.loads[16] == expected_loads
    assert kernel.stores[16] == expected_stores


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.name.startswith("SGD")], ids=lambda rule: rule.name)
def test_nothing_is_contracted(rule):
    """Rules without division or root have no fused multiply-add at all: contraction would change bits."""
    kept = (0,) * (2 + len(rule.state))
    assert "fma" not in compile_ahead(rule, kept, False, 90).asm["ptx"]
