"""What one rank puts into a checkpoint: pieces of tensors, each with its address in the whole, unsplit model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fasttrain.checkpoint.regions import Box, Region

SIZES = {  # bytes of an element, by safetensors' names
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Some elements of one tensor, and where they lie in it.

    Arguments:
        name: the tensor's address, ``"model/blocks.0.weight"``: it knows no rank, bucket or shard.
        dtype: safetensors' name of the element's type, ``"F32"``.
        shape: of the whole tensor, in the unwrapped, unsplit model.
        data: this piece's bytes, contiguous and row-major.
        span: first element and number of elements, of the row-major whole; or
        box: lower corner and extent. Neither: the whole tensor.

    Raises:
        ValueError: dtype, shape, span or box make no sense, or the data has another size.

    Example:
        >>> from array import array
        >>> from fasttrain.checkpoint import Piece
        >>> piece = Piece("model/bias", "F32", (4,), memoryview(array("f", [1.0, 2.0])), span=(2, 2))
        >>> piece.key, piece.nbytes
        ('model/bias@2+2', 8)
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    span: tuple[int, int] | None = None
    box: Box | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.name == "__metadata__":
            raise ValueError(f"a tensor cannot be named {self.name!r}")
        if self.dtype not in SIZES:
            raise ValueError(f"tensor {self.name!r}: dtype {self.dtype!r} is none of {', '.join(SIZES)}")
        try:
            wanted = self.region.elements * SIZES[self.dtype]
        except ValueError as error:
            raise ValueError(f"tensor {self.name!r}: {error}") from error
        if not self.data.c_contiguous:
            raise ValueError(f"tensor {self.name!r}: the data is not contiguous and row-major")
        if self.data.nbytes != wanted:
            raise ValueError(f"tensor {self.name!r}: {self.data.nbytes} bytes of data, but {self.region.elements} "
                             f"elements of {self.dtype} have {wanted}")

    @cached_property
    def region(self) -> Region:
        """Which elements they are."""
        return Region(self.shape, self.span, self.box)

    @cached_property
    def key(self) -> str:
        """Its name in the safetensors file."""
        return self.name + self.region.suffix

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.data.nbytes

    @cached_property
    def bytes(self) -> memoryview:
        """The data as a flat array of bytes."""
        return np.frombuffer(self.data, np.uint8).data if self.data.nbytes else memoryview(b"")
