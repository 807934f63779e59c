"""How much of the machine a run uses: arithmetic against the device's peak, and memory."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

GB = 1 << 30

# Dense bfloat16 and float16 operations per second with float32 accumulation, from NVIDIA's data sheets ("with sparsity"
# figures halved). The first name that a device's name contains counts.
PEAKS = {
    "A100": 312e12,
    "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12, "L4": 121e12,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that the device can do at most in products of this dtype, or None where that is not known.

    Known are NVIDIA's data centre GPUs in 16 bits.

    Example:
        >>> peak_flops(torch.device("cpu"), torch.float32) is None
        True
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def count_flops(forward: Callable[[], Any]) -> tuple[Any, int]:
    """What `forward()` returns, and how many floating-point operations its matrix products and attention took.

    A step takes three times as many (two more in backward). Attention counts in full, masked or not; what is
    recomputed in backward is not counted as work. Blocks that are compiled are not seen: count before they are.

    Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B (model FLOPs utilisation).

    Example:
        >>> layer, x = nn.Linear(8, 4, bias=False), torch.ones(2, 8)
        >>> count_flops(lambda: layer(x))[1]    # 2 operations for each of 2 x 8 x 4 products
        128
    """
    def attention(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
        return sdpa_flop_count(query, key, value)

    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # torch counts those of GPUs
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        result = forward()
    return result, counter.get_total_flops()


class Memory:
    """Bytes in use, and the most since the run began.

    On a GPU those that torch has allocated there; on a CPU the resident memory of the process, as the system says it.

    Example:
        >>> used = Memory(torch.device("cpu")).now()
        >>> 0 < used["memory_gb"] <= used["peak_gb"] + 0.1
        True
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def now(self) -> dict[str, float]:
        """``memory_gb`` and ``peak_gb``, in units of 2**30 bytes."""
        if self.device.type == "cuda":
            used, most = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        else:
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            used = _resident() or most
        return {"memory_gb": used / GB, "peak_gb": most / GB}


class Tidy:
    """Has the C library give memory back that it keeps free, where a process on a CPU has grown by a quarter.

    Gradients that are made and packed in every step, among small objects that live longer, leave gaps that the next
    ones do not fit: what glibc keeps for the process then grows for hours, though no more is in use. To give it back
    costs some milliseconds, and is done seldom: what was found before the growth is the measure.

    Example:
        >>> tidy = Tidy()
        >>> tidy.look()         # nothing has grown since
        False
    """

    GROWTH, LEAST = 1.25, 64 << 20

    def __init__(self) -> None:
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._trim = getattr(libc, "malloc_trim", None)  # glibc has it, others do not need it
        self._before = _resident()

    def look(self) -> bool:
        """Look, and return whether memory was given back. Some microseconds if not."""
        now = _resident()
        if self._trim is None or now < max(self.GROWTH * self._before, self._before + self.LEAST):
            return False
        self._trim(0)
        self._before = _resident()
        return True


def _resident() -> int:
    """Bytes of this process that lie in memory; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:  # not Linux
        return 0


def weights_table(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's parameters, of their gradients and of its buffers, on this rank.

    Example:
        >>> weights_table(nn.BatchNorm1d(4))
        {'parameters': 32, 'gradients': 32, 'buffers': 40}
    """
    def size(tensors: Any) -> int:
        return sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors)

    trained = [p for p in model.parameters() if p.requires_grad]
    return {"parameters": size(model.parameters()), "gradients": size(trained), "buffers": size(model.buffers())}
