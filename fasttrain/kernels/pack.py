"""Pack many tensors into one flat bucket, and back: cast and scaled on the way, in one pass over memory.

This runs under an all-reduce of gradients, and knows nothing of one. A slot of a bucket holds the elements of a tensor
in the order of that tensor's memory, if they fill one stretch of it, else in row-major order; so the view of a slot has
the tensor's own strides, as the gradient views of torch's DistributedDataParallel have. A tensor that is packed into a
slot made for another layout (a gradient that is not laid out as its parameter) is brought into order first.

A number is computed in float64 if the tensor or the bucket is float64, else in float32: scaled, with the residual
added, then rounded once, to nearest, ties to even (from float64 to 16 bits by way of float32, as `Tensor.to` does).
What is too large becomes infinite, NaN stays NaN, and denormal numbers are kept. Every backend gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fasttrain.kernels import dispatch, native
from fasttrain.kernels.item import STORAGES, order, overlaps

Move = tuple[Tensor, Tensor, Tensor | None]  # flat source, target and residual


def pack(tensors: Sequence[Tensor], bucket: Tensor, offsets: Sequence[int], scale: float = 1.0,
         residual: Tensor | None = None, backend: str | None = None) -> None:
    """Write each tensor, times `scale`, into the bucket at its offset. The rest of the bucket is left as it is.

    Arguments:
        tensors: float32, float64, bfloat16 or float16, of any shapes and layouts, on the bucket's device.
        bucket: contiguous, of one dimension and of one of these dtypes.
        offsets: of each tensor's first element in the bucket, in elements.
        scale: rounded to the type of the computation (see above).
        residual: laid out as the bucket, of any of these dtypes: added before the rounding, and given what the rounding
            lost, so that nothing is lost for good (error feedback). Where what is stored is not finite it becomes zero.
        backend: "reference", "cpu", "cuda" or "triton"; None: the best for the device.

    Raises:
        TypeError: a dtype that is not taken, a sparse tensor, or a subclass of Tensor.
        ValueError: slots that overlap, a bucket that is too small, another device, shared memory. Nothing is written.

    Example:
        >>> import torch
        >>> bucket = torch.zeros(8, dtype=torch.bfloat16)
        >>> pack([torch.ones(3), torch.full((2, 2), 4.0)], bucket, [0, 4], scale=0.5)
        >>> bucket.tolist()
        [0.5, 0.5, 0.5, 0.0, 2.0, 2.0, 2.0, 2.0]
    """
    Slots(bucket, tensors, offsets, residual, backend).pack_all(tensors, scale)


def unpack(bucket: Tensor, tensors: Sequence[Tensor], offsets: Sequence[int], scale: float = 1.0,
           backend: str | None = None) -> None:
    """Write each tensor's slot, times `scale`, into the tensor: the inverse of `pack`, with its arguments and errors.

    Example:
        >>> import torch
        >>> made = [torch.empty(3), torch.empty(2, 2, dtype=torch.float64)]
        >>> unpack(torch.arange(8.0), made, [0, 4], scale=2)
        >>> [tensor.tolist() for tensor in made]
        [[0.0, 2.0, 4.0], [[8.0, 10.0], [12.0, 14.0]]]
    """
    Slots(bucket, tensors, offsets, backend=backend).unpack_all(tensors, scale)


class Slots:
    """Where tensors lie in a bucket: checked once, so that a tensor is packed in a few microseconds when it arrives.

    Arguments:
        bucket, offsets, residual, backend: as `pack` takes them. The bucket is written in place; its memory must stay.
        like: one tensor for each slot, with the shape and the strides of what will lie there (parameters); their dtypes
            do not matter.

    Attributes:
        views: the slots as tensors of these shapes and strides, in the bucket's memory and dtype.
        moved: what was packed and unpacked so far: launches, elements, bytes_read and bytes_written.

    Raises:
        TypeError, ValueError: as `pack`.

    Example:
        >>> import torch
        >>> weight, bias = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))
        >>> slots = Slots(torch.zeros(9), [weight, bias], [0, 6])
        >>> (weight.sum() * 3 + bias.sum()).backward()
        >>> weight.grad = slots.pack(0, weight.grad, scale=0.5)  # a view of the bucket from now on
        >>> slots.bucket.tolist()
        [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 0.0, 0.0, 0.0]
        >>> slots.moved
        {'launches': 1, 'elements': 6, 'bytes_read': 24, 'bytes_written': 24}
    """

    def __init__(self, bucket: Tensor, like: Sequence[Tensor], offsets: Sequence[int], residual: Tensor | None = None,
                 backend: str | None = None):
        check_flat(bucket, "the bucket")
        if residual is not None:
            check_flat(residual, "the residual", len(bucket), bucket.device)
            if span_of(residual).overlaps(span_of(bucket)):
                raise ValueError("the residual shares memory with the bucket: give it memory of its own")
        if len(like) != len(offsets):
            raise ValueError(f"{len(like)} tensors and {len(offsets)} offsets: give one offset for each tensor")
        for index, tensor in enumerate(like):
            check_real(tensor, f"tensor {index}", bucket.device)
        check_slots([tensor.numel() for tensor in like], offsets, len(bucket))
        self.bucket, self.residual, self.offsets = bucket.detach(), residual, list(offsets)
        self.views = [view_of(self.bucket, tensor, offset) for tensor, offset in zip(like, offsets, strict=True)]
        self.backend = backend_of(bucket.device, backend)
        self._written = [self.bucket] if residual is None else [self.bucket, residual.detach()]
        self._native = None
        if self.backend == "cpu":
            self._native = native.module().Bucket(native.reader(), self.bucket, self.views, self.offsets,
                                                  None if residual is None else residual.detach())
        self._moved = [0, 0, 0, 0]

    def pack(self, index: int, tensor: Tensor, scale: float = 1.0) -> Tensor:
        """Write one tensor, times `scale`, into its slot; returns the slot's view.

        Raises:
            TypeError, ValueError: as `pack`; IndexError: there is no such slot. Nothing is written.
        """
        if self._native is None or not self._native.pack(index, tensor, scale, torch.get_num_threads()):
            if not 0 <= index < len(self.views):
                raise IndexError(f"there is no slot {index}: the bucket has {len(self.views)}")
            self._move([index], [self._in_order(index, tensor)], scale, True)
        torch.autograd.graph.increment_version(self._written)
        return self.views[index]

    def pack_all(self, tensors: Sequence[Tensor], scale: float = 1.0) -> None:
        """Write every tensor, times `scale`, into its slot: one launch."""
        if self._native is None or self._native.pack_all(self._all(tensors), scale, torch.get_num_threads()):
            ready = [self._in_order(index, tensor) for index, tensor in enumerate(self._all(tensors))]
            self._move(range(len(ready)), ready, scale, True)
        torch.autograd.graph.increment_version(self._written)

    def unpack_all(self, tensors: Sequence[Tensor], scale: float = 1.0) -> None:
        """Write every slot, times `scale`, into its tensor; these may not share memory. One launch."""
        tensors = self._all(tensors)
        with torch.no_grad():
            if self._native is None or self._native.unpack_all(tensors, scale, torch.get_num_threads()):
                ready = [self._target(index, tensor) for index, tensor in enumerate(tensors)]
                self._move(range(len(ready)), ready, scale, False)
                for tensor, copy in zip(tensors, ready, strict=True):
                    if copy.data_ptr() != tensor.data_ptr():
                        tensor.copy_(copy)
            torch.autograd.graph.increment_version(tensors)

    @property
    def moved(self) -> dict[str, int]:
        counts = self._moved if self._native is None else self._native.moved
        return dict(zip(("launches", "elements", "bytes_read", "bytes_written"), counts, strict=True))

    # --- What is not as its slot wants it ----------------------------------------------------------------------------

    def _all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if len(tensors) != len(self.views):
            raise ValueError(f"{len(tensors)} tensors for {len(self.views)} slots: give one for each")
        return list(tensors)

    def _check(self, index: int, tensor: Tensor) -> None:
        name = f"tensor {index}"
        check_real(tensor, name, self.bucket.device)
        view = self.views[index]
        if tensor.shape != view.shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, and its slot {tuple(view.shape)}")
        if tensor.numel() and span_of(tensor).overlaps(span_of(self.bucket)) and not same_memory(tensor, view):
            raise ValueError(f"{name} shares memory with the bucket, and is not its own slot: clone it first")

    def _in_order(self, index: int, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it, in the order of its slot."""
        self._check(index, tensor)
        plain, view = tensor.detach().resolve_neg(), self.views[index]
        return plain if order(plain) == order(view) else torch.empty_like(view, dtype=plain.dtype).copy_(plain)

    def _target(self, index: int, tensor: Tensor) -> Tensor:
        """The tensor, or an empty one to be copied into it, in the order of its slot."""
        self._check(index, tensor)
        if overlaps(tensor):
            raise ValueError(f"tensor {index} has elements that share memory (an expanded view?): give a dense one")
        view = self.views[index]
        kept = order(tensor) == order(view) and not tensor.is_neg()
        return tensor.detach() if kept else torch.empty_like(view, dtype=tensor.dtype)

    def _move(self, indices: Sequence[int], ready: list[Tensor], scale: float, into: bool) -> None:
        if self._native is not None:
            threads = torch.get_num_threads()
            if len(indices) == len(self.views):
                left = (self._native.pack_all if into else self._native.unpack_all)(ready, scale, threads)
            else:
                left = [index for index, tensor in zip(indices, ready, strict=True)
                        if not self._native.pack(index, tensor, scale, threads)]
            assert not left, f"tensors {left} were checked, and the compiled module cannot take them"
            return
        moves = []
        for index, tensor in zip(indices, ready, strict=True):
            lost = None
            if into and self.residual is not None:
                lost = self.residual.detach()[self.offsets[index] : self.offsets[index] + tensor.numel()]
            slot, given = in_memory(self.views[index]), in_memory(tensor)
            moves.append((given, slot, lost) if into else (slot, given, lost))
        MOVES[self.backend](moves, scale)
        feedback = sum(lost.nbytes for _, _, lost in moves if lost is not None)
        counts = (1, sum(len(source) for source, _, _ in moves),
                  feedback + sum(source.nbytes for source, _, _ in moves),
                  feedback + sum(target.nbytes for _, target, _ in moves))
        self._moved = [have + more for have, more in zip(self._moved, counts, strict=True)]


def backend_of(device: torch.device, wanted: str | None = None) -> str:
    """Who moves tensors on `device`: "cpu", "cuda", "triton" or "reference".

    Raises:
        RuntimeError: the wanted backend cannot run there; the message says why.
    """
    return dispatch.choose(device, wanted)


def _cuda(moves: Sequence[Move], scale: float) -> None:
    dispatch.part("cuda_pack").move(moves, scale)


def _triton(moves: Sequence[Move], scale: float) -> None:
    dispatch.part("triton_pack").move(moves, scale)


def scale_bits(scale: float, wide: bool) -> int:
    """Of a float64 that is the scale in the type of the computation."""
    exact = torch.tensor(scale, dtype=torch.float64 if wide else torch.float32).double()
    return int(exact.view(torch.int64).item())


# --- The oracle: eager torch ------------------------------------------------------------------------------------------

def reference(moves: Sequence[Move], scale: float) -> None:
    """The same one after the other, on any device."""
    for source, target, residual in moves:
        move(source, target, scale, residual)


def move(source: Tensor, target: Tensor, scale: float, residual: Tensor | None = None) -> None:
    """Flat `source`, scaled, into flat `target`; with the residual if there is one. On any device."""
    dtype = torch.float64 if torch.float64 in (source.dtype, target.dtype) else torch.float32
    values = source.to(dtype) * torch.tensor(scale, dtype=dtype, device=source.device)
    if residual is not None:
        values = values + residual.to(dtype)
    target.copy_(values)
    if residual is not None:
        lost = values - target.to(dtype)
        residual.copy_(torch.where(target.isfinite(), lost, torch.zeros_like(lost)))


# By backend; what moves on the CPU is `Bucket` of the compiled module.
MOVES: dict[str, Callable[[Sequence[Move], float], None]] = {"cuda": _cuda, "triton": _triton, "reference": reference}


# --- Checks -----------------------------------------------------------------------------------------------------------

class Span(tuple[int, int]):
    """The addresses from the first byte of a tensor to the one after its last."""

    __slots__ = ()

    def overlaps(self, other: Span) -> bool:
        return self[0] < other[1] and other[0] < self[1]


def span_of(tensor: Tensor) -> Span:
    """Where a tensor lies; nowhere if it is empty."""
    if tensor.numel() == 0:
        return Span((0, 0))
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return Span((begin, begin + tensor.nbytes))
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Span((begin, begin + reach * tensor.element_size()))


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same elements."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and order(a) == order(b) is not None


def check_real(tensor: Tensor, name: str, device: torch.device) -> None:
    """Raise if a tensor is not one that is packed."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"{name} is a {type(tensor).__name__}: give a plain tensor (of a DTensor, its local part)")
    if tensor.layout != torch.strided or tensor.dtype not in STORAGES:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout)
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORAGES)
        raise TypeError(f"{name} is {kind.removeprefix('torch.')}; buckets are packed from and into dense {kinds}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and the bucket on {device}: move it there first")


def check_flat(tensor: Tensor, name: str, elements: int | None = None, device: torch.device | None = None) -> None:
    """Raise if a tensor is no contiguous one of one dimension, a real dtype, and this size and place."""
    check_real(tensor, name, device or tensor.device)
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.is_neg():
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)} and the strides {tensor.stride()}: give a "
                         "contiguous tensor of one dimension")
    if elements is not None and len(tensor) != elements:
        raise ValueError(f"{name} has {len(tensor)} elements: it must have {elements}")


def check_slots(sizes: Sequence[int], offsets: Sequence[int], room: int) -> None:
    """Raise if slots overlap or do not fit."""
    for index, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        if offset < 0 or offset + size > room:
            raise ValueError(f"slot {index} is elements {offset} to {offset + size} of a bucket of {room}: make the "
                             "bucket larger, or correct the offset")
    slots = sorted((offset, offset + size, index)
                   for index, (size, offset) in enumerate(zip(sizes, offsets, strict=True)) if size)
    for (_, end, one), (begin, _, other) in pairwise(slots):
        if begin < end:
            raise ValueError(f"slots {one} and {other} overlap: slot {one} ends at element {end}, and slot {other} "
                             f"begins at {begin}")


def view_of(bucket: Tensor, like: Tensor, offset: int) -> Tensor:
    """The slot of a tensor: with its strides if they fill one stretch of memory, else row-major."""
    strides = like.stride() if order(like) is not None else torch.empty(like.shape, device="meta").stride()
    return torch.as_strided(bucket, like.shape, strides, bucket.storage_offset() + offset)


def in_memory(tensor: Tensor) -> Tensor:
    """The elements of a tensor that fill one stretch of memory, in its order."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,))
