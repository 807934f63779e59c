"""The prologue of a captured step: rows of coefficients, computed on the device from its step counts.

A row is what a step on the host would make of the same numbers: the gradient's scale, the coefficients, and for items
that are not plain the tail (`fasttrain.kernels.item`). Every number of a row is described by three 64-bit words:

====  ==================================================================================================
word  meaning
====  ==================================================================================================
0     the address of a number on the device, or 0
1     its type, a place in `KINDS`
2     a double, to which that number is added: the hyperparameter itself, or 1 beside a step count
====  ==================================================================================================

so one block of words holds every hyperparameter, and one small copy refreshes it. The numbers of a row are those of
`FIXED`, the step count, and the hyperparameters in the order of `fasttrain.kernels.trace_scalars`. CUDA's kernel is
`csrc/cuda/prologue.cuh`, which runs a program for each row (`fasttrain.kernels.program`), all rows in one launch;
Triton's is printed by `fasttrain.kernels.emit_scalars`, and one launch makes all rows of a rule.
"""

from __future__ import annotations

import linecache
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import emit_scalars, triton_scalars
from fasttrain.kernels.trace_scalars import ScalarGraph, numbers

# The numbers before the inputs of the graph, in the order of `Fixed` in csrc/cuda/prologue.cuh.
FIXED = ("found", "scale", "grad_scale", "norm", "max_norm", "square", "max_each", "clip_value", "ema_decay")
KINDS = (torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)  # as `Kind` there
BLOCK = 32  # rows of one Triton program
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}

Number = float | Tensor


@dataclass(frozen=True)
class Row:
    """The numbers of one row; each is a float, or a tensor of one element, which is read on the device.

    Attributes:
        hyperparameters: what `coefficients` takes.
        counter: the step count, which the step has not yet incremented; None: `step` itself counts.
        step: of a row without a counter, the step to come.
        scale: what the host knows of the gradient's scale: -1 to ascend.
        grad_scale: the loss scale, which gradients are divided by.
        found: skip the step if it is not zero.
        norm, max_norm: of all gradients, and what they are clipped to; None: not clipped.
        square, max_each: the sum of squares of one parameter's gradient, and what its norm is clipped to.
        clip_value, ema_decay: as in `fasttrain.precision.storage`, for items that are not plain.
        seed, draws: of random draws: the seed, and the count on the device, int64, which steps increment; None: of
            items of which nothing is rounded at random. They are no numbers of the row.
    """

    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    counter: Tensor | None = None
    step: float = 1.0
    scale: Number = 1.0
    grad_scale: Number = 1.0
    found: Number = 0.0
    norm: Number = 0.0
    max_norm: Number | None = None
    square: Number = 0.0
    max_each: Number | None = None
    clip_value: Number | None = None
    ema_decay: Number | None = None
    seed: int = 0
    draws: Tensor | None = None

    def numbers(self) -> list[tuple[Number | None, float]]:
        """(what lies on the device, what is added to it) for each number, in order."""
        limits = [0.0 if limit is None else value for value, limit in
                  ((self.norm, self.max_norm), (self.square, self.max_each))]
        fixed = [self.found, self.scale, self.grad_scale, limits[0], _or(self.max_norm, math.inf), limits[1],
                 _or(self.max_each, math.inf), _or(self.clip_value, math.inf), _or(self.ema_decay, 1.0)]
        values = [(value, 0.0) if isinstance(value, Tensor) else (None, float(value))
                  for value in (*fixed, *numbers(self.hyperparameters))]
        step = (None, float(int(self.step))) if self.counter is None else (self.counter, 1.0)
        return [*values[: len(FIXED)], step, *values[len(FIXED) :]]


def _or(value: Number | None, default: float) -> Number:
    return default if value is None else value


def words(graph: ScalarGraph, rows: Sequence[Row], device: torch.device) -> np.ndarray:
    """The block of words of rows of one rule.

    Arguments:
        device: of the tensors among the numbers; it must hold all of them as long as the words are used.

    Returns:
        int64 of shape (len(rows), 3 * numbers of a row).

    Raises:
        TypeError, ValueError: a tensor is of another type, device or size, or there are not the numbers that the graph
            was traced for.

    Example:
        >>> from fasttrain.optim import SGD
        >>> from fasttrain.kernels.trace_scalars import trace_scalars
        >>> group = dict(lr=0.5, momentum=0.0, dampening=0.0, weight_decay=0.0)
        >>> graph = trace_scalars(SGD.rules[0], group)
        >>> words(graph, [Row(group)], torch.device("cpu")).view(np.float64)[0, 2::3].tolist()  # lr is the tenth
        [0.0, 1.0, 1.0, 0.0, inf, 0.0, inf, inf, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    """
    count = len(FIXED) + len(graph.inputs)
    block = np.zeros((len(rows), count, 3), np.int64)
    for index, row in enumerate(rows):
        found = row.numbers()
        if len(found) != count:
            raise ValueError(f"{graph.name} was traced for the numbers {', '.join(graph.names)}; row {index} has "
                             f"{len(found) - len(FIXED)}: trace it again for these hyperparameters")
        for place, (tensor, value) in enumerate(found):
            if isinstance(tensor, Tensor):
                _check(tensor, device, (*FIXED, *graph.names)[place])
                block[index, place, :2] = tensor.data_ptr(), KINDS.index(tensor.dtype)
            block[index, place, 2] = np.float64(value).view(np.int64)
    return block.reshape(len(rows), -1)


def _check(tensor: Tensor, device: torch.device, name: str) -> None:
    if tensor.dtype not in KINDS:
        raise TypeError(f"{name} is a tensor of {tensor.dtype}: a captured step reads numbers of "
                        f"{', '.join(str(dtype).removeprefix('torch.') for dtype in KINDS)} only; convert it")
    if tensor.numel() != 1 or tensor.device.type != device.type or (tensor.device.index or 0) != (device.index or 0):
        raise ValueError(f"{name} is a tensor of shape {tuple(tensor.shape)} on {tensor.device}: a captured step reads "
                         f"one number in the memory of {device}")


def width(graph: ScalarGraph, kept: bool) -> int:
    """Numbers of a row that is made; `kept`: of items that are not plain."""
    return 1 + len(graph.outputs) + (3 if kept else 0)


# --- Triton -----------------------------------------------------------------------------------------------------------

@cache
def kernel(graph: ScalarGraph, interpreted: bool) -> Any:
    """The kernel of a graph, for the compiler or for the interpreter."""
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    jit = InterpretedFunction if interpreted else triton.jit
    name = emit_scalars.name_of(graph)
    space: dict[str, Any] = {"tl": tl, "jit": jit, "__name__": f"fasttrain.generated.{name}"}
    for function in triton_scalars.FUNCTIONS:
        copy = FunctionType(function.__code__, space, function.__name__)
        copy.__annotations__ = function.__annotations__
        space[function.__name__] = jit(copy)
    source = emit_scalars.triton_kernel(graph, FIXED)
    file = f"<fasttrain coefficients {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), space)
    return space["prologue"]


def run(graph: ScalarGraph, words: Tensor, out: Tensor, skip: Tensor, kept: bool) -> None:
    """Make rows by Triton: on a GPU, or in its interpreter in CPU memory. One launch, without waiting.

    Arguments:
        words: int64, as `words` makes them, on the device.
        out: float32 or float64 of shape (rows, `width`): the rows.
        skip: int32 of shape (rows,): 1 where the step is to be skipped.
        kept: the rows are of items that are not plain.
    """
    rows = len(words)
    if rows == 0:
        return
    interpreted = words.device.type == "cpu"
    block = 1 << max(rows - 1, 1).bit_length() if interpreted else BLOCK
    with torch.cuda.device(words.device) if words.device.type == "cuda" else np.errstate(all="ignore"):
        kernel(graph, interpreted)[(-(-rows // block),)](words, rows, out, skip, kept=kept, block=block,
                                                         **({} if interpreted else OPTIONS))


def compile_ahead(graph: ScalarGraph, kept: bool, wide: bool, arch: int) -> Any:
    """Compile for a GPU that need not be here; `asm["cubin"]` and `asm["ptx"]` of the result are the code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel(graph, False)
    places = {name: (place,) for place, name in enumerate(function.arg_names)}
    signature = {"words": "*i64", "rows": "i32", "out": "*fp64" if wide else "*fp32", "skip": "*i32",
                 "kept": "constexpr", "block": "constexpr"}
    aligned: Any = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, {places["kept"]: kept, places["block"]: BLOCK},
                       {places[name]: aligned for name in ("words", "out", "skip")})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=OPTIONS)
