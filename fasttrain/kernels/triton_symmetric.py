"""Symmetric matrix products in Triton: the tiles on and above the diagonal are computed, and each is written twice.

One launch for a batch. A side of n tiles takes n (n + 1) / 2 programs, of the n^2 of a whole product: half the work,
and half a tile's width more. Accumulated in float32, rounded once; the result is symmetric to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import triton_codecs, triton_products
from fasttrain.kernels.triton import compile_for, guard, wrapped

GROUP = 8  # columns of tiles that are computed together: what they read stays in the L2 cache
LONGEST = 1 << 24  # of a row: 128 of them are counted in 32 bits
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
INTERPRETED = 132  # processors: no more than a number where there are none


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: tiles of tile * tile, made from pieces of `depth` of a row.

    Attributes:
        tile, depth: elements.
        warps, stages: of a program; `stages` pieces are in flight.
    """

    tile: int
    depth: int
    warps: int
    stages: int

    def programs(self, batch: int, side: int) -> int:
        """How many run.

        >>> Tiling(128, 64, 4, 3).programs(2, 300)
        12
        """
        tiles = -(-side // self.tile)
        return batch * (tiles * (tiles + 1) // 2)


# A warp group of sm_90 multiplies 64 * 128 * 16 at once; three stages of 128 * 64 leave room for a second program,
# which computes while the first one stores. sm_80 and its kin have 99 KiB or more of shared memory, smaller products.
LARGE = {9: Tiling(128, 64, 4, 3), 10: Tiling(128, 64, 8, 3)}  # ptxas spills at 4 warps on sm_100
LARGE_ELSEWHERE = Tiling(128, 32, 8, 4)
SMALL = Tiling(64, 64, 4, 4)
SINGLE = Tiling(64, 16, 4, 3)  # float32, without tensor cores
NARROW = Tiling(64, 32, 8, 2)  # rows that are no multiple of 16: every element is an access, with an address of its own
SINGLE_NARROW = Tiling(32, 16, 4, 2)
SLOWER = 1.7  # an element of a small tile takes longer by so much: it is read twice as often. A guess, not yet measured


@cache
def tiling(dtype: torch.dtype, batch: int, side: int, length: int, major: int, processors: int) -> Tiling:
    """The tiling that ends first, if the programs run in waves of one for each processor.

    Arguments:
        side, length: the shorter and the longer side of a matrix.
        major: of the compute capability.
        processors: of the GPU.

    >>> tiling(torch.bfloat16, 12, 768, 3072, 9, 132).tile, tiling(torch.bfloat16, 1, 768, 3072, 9, 132).tile
    (128, 64)
    """
    aligned = side % 16 == length % 16 == 0
    if dtype == torch.float32:
        return SINGLE if aligned else SINGLE_NARROW
    if not aligned:
        return NARROW

    def time(one: Tiling) -> float:
        waves = -(-one.programs(batch, side) // processors)
        return waves * one.tile**2 * (SLOWER if one is SMALL else 1.0)

    return min(LARGE.get(major, LARGE_ELSEWHERE), SMALL, key=time)


def serves(x: Tensor) -> bool:
    """Whether the kernels are the way to multiply these matrices: 16 bits, more than a tile, rows of whole 32 bytes.

    They take others too, and would be slower than torch's: narrow accesses, no half to leave out, no tensor cores.
    """
    rows, columns = x.shape[-2:]
    return (x.dtype in (torch.bfloat16, torch.float16) and rows % 16 == columns % 16 == 0
            and min(rows, columns) > SMALL.tile and max(rows, columns) < LONGEST
            and (x.device.type == "cpu" or torch.cuda.get_device_capability(x.device)[0] >= 8))


def gram(x: Tensor, out: Tensor, cut: Tiling | None = None) -> None:
    """out = X X^T for each matrix of a batch; X^T X for tall ones.

    Arguments:
        x: contiguous, shape (batch, rows, columns), float32 (never as TF32), bfloat16 or float16.
        out: contiguous, shape (batch, side, side) where `side` is the shorter one, x's dtype and device; not x's.
        cut: a tiling, or None for the best.

    Raises:
        ValueError: a shape, dtype, device or layout is another.

    Example:
        >>> import torch
        >>> x, out = torch.ones(2, 3, 5), torch.empty(2, 3, 3)
        >>> gram(x, out)
        >>> out[1, 2].tolist()
        [5.0, 5.0, 5.0]
    """
    _launch(x, out, x.shape[-2] > x.shape[-1], None, cut)


def polynomial(a: Tensor, b: float, c: float, out: Tensor, cut: Tiling | None = None) -> None:
    """out = b A + c A A for each matrix of a batch; A is symmetric to the bit, as `gram` leaves it.

    Arguments, errors: as `gram`.

    Example:
        >>> import torch
        >>> a, out = torch.ones(1, 2, 2), torch.empty(1, 2, 2)
        >>> polynomial(a, 0.5, 3.0, out)
        >>> out.tolist()
        [[[6.5, 6.5], [6.5, 6.5]]]
    """
    _launch(a, out, False, (float(b), float(c)), cut)


def _launch(x: Tensor, out: Tensor, tall: bool, factors: tuple[float, float] | None, cut: Tiling | None) -> None:
    check(x, out, factors is not None)
    batch, side, length = x.shape[0], min(x.shape[1:]), max(x.shape[1:])
    if not out.numel():
        return
    interpreted = x.device.type == "cpu"
    if cut is None:
        cut = tiling(x.dtype, batch, side, length, *((0, INTERPRETED) if interpreted else about(x.device)))
    options = {} if interpreted else options_of(cut)
    with guard(x.device):
        kernel(interpreted)[(cut.programs(batch, side),)](
            x, out, *(factors or (0.0, 1.0)), side, length, -(-side // cut.tile), tall=tall,
            polynomial=factors is not None, tile=cut.tile, depth=cut.depth, group=GROUP, interpreted=interpreted,
            **options)
    torch.autograd.graph.increment_version(out)


def check(x: Tensor, out: Tensor, symmetric: bool) -> None:
    """Refuse what the kernels would compute something else from."""
    if x.dim() != 3 or x.dtype not in TYPES or not x.is_contiguous():
        raise ValueError(f"a symmetric product takes contiguous batches of matrices in float32, bfloat16 or float16, "
                         f"and got {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}")
    if symmetric and x.shape[1] != x.shape[2]:
        raise ValueError(f"a polynomial takes square matrices, and got {tuple(x.shape)}")
    side = min(x.shape[1:])
    if max(x.shape[1:]) >= LONGEST:
        raise ValueError(f"a symmetric product takes rows and columns of fewer than {LONGEST}, and got "
                         f"{tuple(x.shape)}: use torch.bmm")
    if (tuple(out.shape), out.dtype, out.device) != ((x.shape[0], side, side), x.dtype, x.device) \
            or not out.is_contiguous():
        raise ValueError(f"the result of {tuple(x.shape)} is contiguous {x.dtype} of shape {(x.shape[0], side, side)} "
                         f"on {x.device}, and got {out.dtype} of shape {tuple(out.shape)} and strides {out.stride()} "
                         f"on {out.device}")
    if x.data_ptr() < out.data_ptr() + out.nbytes and out.data_ptr() < x.data_ptr() + x.nbytes:
        raise ValueError("the result of a symmetric product is not in the memory of its operand: give it its own")


@cache
def about(device: torch.device) -> tuple[int, int]:
    """The major compute capability and the number of processors."""
    found = torch.cuda.get_device_properties(device)
    return found.major, found.multi_processor_count


@cache
def kernel(interpreted: bool) -> Any:
    """For the compiler or for the interpreter."""
    return wrapped([triton_codecs.bfloat16_bits, *triton_products.FUNCTIONS], interpreted)["product"]


def options_of(cut: Tiling) -> dict[str, Any]:
    """A contracted multiply-add rounds once less, and no bits are promised here. Left alone, ptxas spills a register or
    two of some to reach 80 or 96."""
    return {"num_warps": cut.warps, "num_stages": cut.stages, "maxnreg": 255, "enable_fp_fusion": True}


def compile_ahead(dtype: torch.dtype, cut: Tiling, tall: bool, polynomial: bool, arch: int,
                  aligned: bool = True) -> Any:
    """Compile for a GPU that need not be here.

    Arguments:
        aligned: rows and columns are multiples of 16.
    """
    pointer = TYPES[dtype]
    types = {"x": pointer, "out": pointer, "keep": "fp32", "scale": "fp32", "side": "i32", "length": "i32",
             "tiles": "i32"}
    values = {"tall": tall, "polynomial": polynomial, "tile": cut.tile, "depth": cut.depth, "group": GROUP,
              "interpreted": False}
    return compile_for(kernel(False), arch, options_of(cut), types, values, ("side", "length") if aligned else ())
