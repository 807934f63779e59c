"""Add the chunks of several ranks in one pass, and codes of 8 bits that travel between them.

The order is that of the ranks, ((chunk 0 + chunk 1) + chunk 2) + ..., one number at a time: the result depends
neither on threads nor on when a chunk arrived, and is the same bits on every backend. The sum is made in float64 if the
chunks or the result are float64, else in float32; then scaled, and rounded once (as `fasttrain.kernels.pack` does).

The codes are the package's int8 blocks (`fasttrain.precision.codecs`): a float32 unit for each block of 256 elements,
and for each element a code c from -127 to 127 that stands for unit * c * abs(c), to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.kernels import dispatch, native, norm
from fasttrain.kernels.pack import backend_of, check_flat, span_of
from fasttrain.precision import codecs

INT8 = codecs.NUMBER["int8"]
BLOCK = codecs.codec(INT8).block
Measured = tuple[Tensor, Tensor] | None


def sum_chunks(chunks: Tensor | Sequence[Tensor], out: Tensor, scale: float = 1.0, squares: bool = False,
               backend: str | None = None) -> tuple[Tensor, Tensor] | None:
    """Write the sum of the chunks, times `scale`, into `out`.

    Arguments:
        chunks: one for each rank, in the order of ranks: a tensor of shape (ranks, elements), or flat tensors of one
            size; float32, float64, bfloat16 or float16, all the same.
        out: flat, of that size and any of these dtypes. It may be one of the chunks.
        scale: 1 / ranks for a mean, for example.
        squares: also measure what is stored, in the same walk.
        backend: "reference", "cpu", "cuda" or "triton"; None: the best for the device.

    Returns:
        With `squares`, the sum of squares of `out` (float64, shape ()) and whether any of its elements is infinite or
        NaN (bool, shape ()). From every backend but "triton" these are the bits of `norm.squares([out])` in
        `fasttrain.kernels`, whatever the threads: `out` counts as one tensor, whose blocks begin at its first element.
        The squares of a bucket are not the same bits as those of the tensors in it, added up, from which they differ by
        rounding in float64. "triton" adds the squares in another fixed order. Without `squares`, None.

    Raises:
        TypeError: a dtype that is not taken.
        ValueError: no chunk, different sizes, devices or dtypes, or memory shared otherwise. Nothing is written.

    Example:
        >>> import torch
        >>> out = torch.empty(3)
        >>> sum_chunks(torch.tensor([[1, 2, 3], [3, 4, 5]], dtype=torch.bfloat16), out, scale=0.5, squares=True)
        (tensor(29., dtype=torch.float64), tensor(False))
        >>> out.tolist()
        [2.0, 3.0, 4.0]
    """
    chunks = list(chunks)
    check_flat(out, "out")
    if not chunks:
        raise ValueError("there is no chunk: give one for each rank")
    place = span_of(out)
    for rank, chunk in enumerate(chunks):
        check_flat(chunk, f"chunk {rank}", len(out), out.device)
        if chunk.dtype != chunks[0].dtype:
            raise ValueError(f"chunk {rank} is {chunk.dtype} and chunk 0 {chunks[0].dtype}: give chunks of one dtype")
        same = chunk.data_ptr() == out.data_ptr() and chunk.element_size() == out.element_size()
        if not same and span_of(chunk).overlaps(place):
            raise ValueError(f"chunk {rank} shares a part of its memory with out: give out memory of its own")
    return _sum(chunks, None, out, scale, squares, backend_of(out.device, backend))


def encode_int8(bucket: Tensor, codes: Tensor, units: Tensor, scale: float = 1.0, residual: Tensor | None = None,
                backend: str | None = None) -> None:
    """Write flat numbers, times `scale`, as codes and units.

    Arguments:
        bucket: flat, float32, bfloat16 or float16.
        codes: int8, of its size.
        units: float32, of shape (ceil(elements / 256),).
        residual: flat, of its size, float32, bfloat16 or float16: added before the codes are chosen, and given what
            they lack (error feedback). A block in which something is not finite is read as NaN, and its residual
            becomes zero.

    Raises:
        TypeError, ValueError: as `sum_chunks`.

    Example:
        >>> import torch
        >>> codes, units, residual = torch.empty(4, dtype=torch.int8), torch.empty(1), torch.zeros(4)
        >>> encode_int8(torch.tensor([127.0, -32.0, 0.5, 0.0]) * 127, codes, units, residual=residual)
        >>> codes.tolist(), units.tolist(), residual.tolist()
        ([127, -64, 8, 0], [1.0], [0.0, 32.0, -0.5, 0.0])
    """
    _check_codes(bucket, "the bucket", codes, units, "")
    if residual is not None:
        check_flat(residual, "the residual", len(bucket), bucket.device)
        if residual.dtype == torch.float64:
            raise TypeError("the residual is float64: codes are made in float32, so give it that or fewer bits")
    backend = backend_of(bucket.device, backend)
    bucket, residual = bucket.detach(), None if residual is None else residual.detach()
    ENCODES[backend](bucket, codes, units, scale, residual)
    torch.autograd.graph.increment_version([codes, units] if residual is None else [codes, units, residual])


def sum_int8(codes: Tensor | Sequence[Tensor], units: Tensor | Sequence[Tensor], out: Tensor, scale: float = 1.0,
             squares: bool = False, backend: str | None = None) -> tuple[Tensor, Tensor] | None:
    """Write the sum of what codes and units of each rank stand for, times `scale`, into `out`.

    Arguments:
        codes, units: one of each for each rank, as `encode_int8` makes them; or tensors of two dimensions.
        out, scale, squares, backend: as of `sum_chunks`, which see for what is returned; `out` is not float64.

    Example:
        >>> import torch
        >>> codes, units = torch.tensor([[2, -2], [1, 3]], dtype=torch.int8), torch.tensor([[1.0], [0.5]])
        >>> out = torch.empty(2)
        >>> sum_int8(codes, units, out)
        >>> out.tolist()
        [4.5, 0.5]
    """
    codes, units = list(codes), list(units)
    if not codes or len(codes) != len(units):
        raise ValueError(f"{len(codes)} tensors of codes and {len(units)} of units: give one of each for each rank")
    for rank, (code, unit) in enumerate(zip(codes, units, strict=True)):
        _check_codes(out, "out", code, unit, f" of rank {rank}")
    return _sum(codes, units, out, scale, squares, backend_of(out.device, backend))


def traffic(elements: int, read: Sequence[torch.dtype], written: Sequence[torch.dtype], coded_read: int = 0,
            coded_written: int = 0) -> dict[str, int]:
    """Bytes that a call moves: each array is read once and written once.

    Arguments:
        read, written: the dtypes of the plain arrays (chunks, bucket, residual) that are read and written.
        coded_read, coded_written: how many chunks of codes are.

    Example:
        >>> import torch
        >>> traffic(1024, [torch.bfloat16] * 4, [torch.float32])  # the sum of four chunks
        {'bytes_read': 8192, 'bytes_written': 4096}
        >>> traffic(1024, [torch.float32] * 2, [torch.float32], coded_written=1)  # codes, with a residual
        {'bytes_read': 8192, 'bytes_written': 5136}
    """
    coded = elements + 4 * -(-elements // BLOCK)
    return {"bytes_read": elements * sum(dtype.itemsize for dtype in read) + coded_read * coded,
            "bytes_written": elements * sum(dtype.itemsize for dtype in written) + coded_written * coded}


def _check_codes(plain: Tensor, name: str, codes: Tensor, units: Tensor, whose: str) -> None:
    check_flat(plain, name)
    if plain.dtype == torch.float64:
        raise TypeError(f"{name} is float64, and codes of 8 bits are made and added in float32")
    wanted = -(-len(plain) // BLOCK)
    if codes.dtype != torch.int8 or codes.shape != plain.shape or not codes.is_contiguous():
        raise ValueError(f"the codes{whose} are {codes.dtype} of shape {tuple(codes.shape)}: give contiguous int8 of "
                         f"shape {tuple(plain.shape)}")
    if units.dtype != torch.float32 or units.shape != (wanted,) or not units.is_contiguous():
        raise ValueError(f"the units{whose} are {units.dtype} of shape {tuple(units.shape)}: give contiguous float32 "
                         f"of shape ({wanted},), one for each {BLOCK} elements")
    if codes.device != plain.device or units.device != plain.device:
        raise ValueError(f"the codes{whose} are on {codes.device}, their units on {units.device} and {name} on "
                         f"{plain.device}: all must be on one device")
    if any(span_of(a).overlaps(span_of(b)) for a, b in ((codes, plain), (units, plain), (codes, units))):
        raise ValueError(f"the codes{whose}, their units and {name} share memory: give each memory of its own")


def _sum(chunks: list[Tensor], units: list[Tensor] | None, out: Tensor, scale: float, squares: bool,
         backend: str) -> tuple[Tensor, Tensor] | None:
    out = out.detach()
    measured = SUMS[backend]([chunk.detach() for chunk in chunks], units, out, scale, squares)
    torch.autograd.graph.increment_version(out)
    return measured


def _native_sum(chunks: Sequence[Tensor], units: Sequence[Tensor] | None, out: Tensor, scale: float,
                squares: bool) -> Measured:
    found = native.module().sum_chunks(native.reader(), chunks, units, out, scale, squares, torch.get_num_threads())
    return (torch.tensor(found[0], dtype=torch.float64), torch.tensor(found[1])) if squares else None


def _native_encode(bucket: Tensor, codes: Tensor, units: Tensor, scale: float, residual: Tensor | None) -> None:
    native.module().encode_chunk(native.reader(), bucket, codes, units, scale, residual, torch.get_num_threads())


def _part(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when it is called."""
    return lambda *arguments: getattr(dispatch.part(module), name)(*arguments)


# --- The oracle: eager torch ------------------------------------------------------------------------------------------

def reference(chunks: Sequence[Tensor], units: Sequence[Tensor] | None, out: Tensor, scale: float,
              squares: bool) -> Measured:
    """The sum, one operation of torch at a time, on any device."""
    dtype = torch.float64 if torch.float64 in (chunks[0].dtype, out.dtype) else torch.float32
    total, *others = [chunk.to(dtype) for chunk in chunks] if units is None else \
        [codecs.decode(INT8, *pair, len(out)) for pair in zip(chunks, units, strict=True)]
    for chunk in others:
        total = total + chunk
    out.copy_(total * torch.tensor(scale, dtype=dtype, device=out.device))
    if not squares:
        return None
    sums, nonfinite = norm.reference([out])
    return sums[0], nonfinite


def _encode(bucket: Tensor, codes: Tensor, units: Tensor, scale: float, residual: Tensor | None) -> None:
    values = bucket.float() * torch.tensor(scale, dtype=torch.float32, device=bucket.device)
    if residual is not None:
        values = values + residual.float()
    codecs.encode(INT8, values, codes, units, None)
    if residual is not None:
        sent = codecs.decode(INT8, codes, units, len(values))
        lost = values - sent
        residual.copy_(torch.where(sent.isfinite(), lost, torch.zeros_like(lost)))


# By backend.
SUMS: dict[str, Callable[..., Measured]] = {"cuda": _part("cuda_pack", "sum_chunks"),
                                            "triton": _part("triton_pack", "sum_chunks"), "cpu": _native_sum,
                                            "reference": reference}
ENCODES: dict[str, Callable[..., None]] = {"cuda": _part("cuda_pack", "encode"),
                                           "triton": _part("triton_pack", "encode"), "cpu": _native_encode,
                                           "reference": _encode}
