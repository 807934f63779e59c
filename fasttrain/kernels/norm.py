"""Pass A: sums of squares of gradients, and whether any of their elements is infinite or NaN.

The order of the sums is fixed (it is spelled out in `csrc/cpu/lanes.h`, and by `tree` and `squares_of_one` here): the
same bits for any instruction set, number of threads and division of the work. Everything is added in float64, so that
gradients under a loss scale do not overflow; the flag comes from the elements, never from a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import dispatch, native
from fasttrain.kernels.item import STORAGES, order

LANES = 16  # as kLanes and kSumBlock in csrc/cpu/lanes.h
BLOCK = 4096


def squares(tensors: Sequence[Tensor], backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The sum of squares of each tensor, and whether any element is infinite or NaN.

    Arguments:
        tensors: float64, float32, bfloat16 or float16, or complex, whose numbers count as two; any shape and layout,
            on one device. Dense ones are added in the order of memory, others in the order of their indices.
        backend: a name from `fasttrain.kernels.dispatch`, or None to choose.

    Returns:
        The sums, float64 of shape (len(tensors),), and a bool of shape (), both on the device of the tensors.

    Raises:
        TypeError: a tensor has another dtype.

    Example:
        >>> import torch
        >>> squares([torch.tensor([3.0, 4.0]), torch.ones(2, 3)])
        (tensor([25.,  6.], dtype=torch.float64), tensor(False))
    """
    tensors = list(tensors)
    if not tensors:
        return torch.zeros(0, dtype=torch.float64), torch.tensor(False)
    return _choose(SQUARES, tensors[0].device, backend)(tensors)


def total(sums: Tensor, backend: str | None = None) -> Tensor:
    """The sum of the sums of `squares`, by the tree, float64 of shape ().

    Example:
        >>> import torch
        >>> total(squares([torch.tensor([3.0]), torch.tensor([4.0])])[0]).sqrt()
        tensor(5., dtype=torch.float64)
    """
    return _choose(TOTALS, sums.device, backend)(sums)


def _choose(table: Mapping[str, Callable[..., Any]], device: torch.device, backend: str | None) -> Callable[..., Any]:
    if backend is None:  # in CPU memory nothing needs the others: they give the same bits
        on_cpu = "reference" if native.load()[0] is None else "cpu"
        backend = on_cpu if device.type == "cpu" else dispatch.choose(device)
    return dispatch.choose_from(table, backend, device)


def _native(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    sums, nonfinite, left = native.module().squares(native.reader(), tensors, torch.get_num_threads())
    if left:
        copies = [memory_order(tensors[index]).contiguous() for index in left]
        sums[left], more, _ = native.module().squares(native.reader(), copies, torch.get_num_threads())
        nonfinite = nonfinite or more
    return torch.from_numpy(sums), torch.tensor(nonfinite)


def _cuda(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return dispatch.part("cuda_sums").squares(tensors)


def _cuda_total(sums: Tensor) -> Tensor:
    return dispatch.part("cuda_sums").total(sums)


def _triton(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    from fasttrain.kernels import triton_sums

    return triton_sums.squares([memory_order(tensor).contiguous() for tensor in tensors])


def _triton_total(sums: Tensor) -> Tensor:
    from fasttrain.kernels import triton_sums

    return triton_sums.total(sums)


# --- The oracle: eager torch, in float64, by the same tree ------------------------------------------------------------

def reference(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same as `squares`, one operation of torch at a time, on any device."""
    flat = [memory_order(tensor) for tensor in tensors]
    sums = [sum_in_blocks(tensor.double().square()) for tensor in flat]
    bad = [~tensor.isfinite().all() for tensor in flat]
    return torch.stack(sums), torch.stack(bad).any()


def memory_order(tensor: Tensor) -> Tensor:
    """The elements as one flat, plain, real tensor: in the order of memory if they fill one stretch of it."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype not in STORAGES:
        raise TypeError(f"a norm is asked of a tensor of {tensor.dtype}; it takes "
                        f"{', '.join(str(dtype).removeprefix('torch.') for dtype in STORAGES)}, or complex numbers")
    tensor = tensor if type(tensor) in (Tensor, torch.nn.Parameter) else tensor.as_subclass(Tensor)
    if order(tensor) is None or tensor.numel() == 0:
        return tensor.reshape(-1)
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda dim: -strides[dim])).reshape(-1)


def sum_in_blocks(numbers: Tensor) -> Tensor:
    """The sum of flat float64 numbers: blocks of 4,096, in each of them 16 lanes, then the tree."""
    blocks = -(-numbers.numel() // BLOCK)
    padded = torch.nn.functional.pad(numbers, (0, blocks * BLOCK - numbers.numel()))
    lanes = torch.zeros(blocks, LANES, dtype=torch.float64, device=numbers.device)
    for row in padded.view(blocks, BLOCK // LANES, LANES).unbind(1):
        lanes = lanes + row
    return tree(tree(lanes.T))


def tree(numbers: Tensor) -> Tensor:
    """Sum over the first dimension: neighbours in pairs, level by level; the last of an odd number goes up as it is."""
    if len(numbers) == 0:
        return numbers.new_zeros(numbers.shape[1:])
    while len(numbers) > 1:
        pairs = len(numbers) // 2 * 2
        numbers = torch.cat([numbers[0:pairs:2] + numbers[1:pairs:2], numbers[pairs:]])
    return numbers[0]


# By backend; `dispatch.choose_from` says what stands in for one that is not here.
SQUARES: dict[str, Callable[..., Any]] = {"cuda": _cuda, "triton": _triton, "cpu": _native, "reference": reference}
TOTALS: dict[str, Callable[..., Any]] = {"cuda": _cuda_total, "triton": _triton_total, "cpu": tree, "reference": tree}
