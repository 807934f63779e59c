"""Sequences cut over ranks: each has some positions of every sequence, and only attention sees the others'.

Everything else in a transformer treats positions alike. For attention a rank has the queries of its positions and gets
the keys and values of all before them, of the few key-value heads that there are where queries share them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fasttrain.dist.mesh import Mesh
from fasttrain.dist.wire import Wire
from fasttrain.parallel import context_ring


class ContextParallel:
    """The cut of sequences over the "context" axis of a mesh, and attention over it.

    Every rank of the axis gets the same samples. Loss and gradients are means over these ranks too, as they are over
    those that read different samples: `Mesh.terms` counts both, and `DataParallel(model, mesh=mesh)` does that.

    Arguments:
        mesh: a `Mesh`; or a `Wire` over the ranks that share sequences, which nobody else uses meanwhile.
        balanced: cut each sequence into 2c chunks of which rank r has chunk r and chunk 2c - 1 - r: with causal
            attention all ranks then have the same work. False: into c, of which rank r has chunk r; the last rank then
            works about twice the mean.
        method: "gather": each rank gathers all keys and values before it attends, on any device. "ring": torch's
            context-parallel attention, in which they come one rank's at a time while others are at work; on GPUs, and
            balanced.

    Attributes:
        size, rank: along the axis.
        wire: whose `bytes` count what attention sends; None for a single rank, and for "ring".

    Raises:
        ValueError: a method that there is not, or that this device or this torch does not have.

    Example:
        >>> context = ContextParallel(mesh)                                                       # doctest: +SKIP
        >>> x = context.cut(embedding(tokens), dim=1)           # (B, T, C) -> (B, T / c, C)        # doctest: +SKIP
        >>> y = context.attention(q, k, v)                      # for F.scaled_dot_product_attention  # doctest: +SKIP
        >>> loss = cross_entropy(head(y), context.cut(targets, dim=1))                            # doctest: +SKIP

    Sources: Liu et al., Ring Attention, arXiv 2310.01889; Llama team, The Llama 3 Herd of Models, arXiv 2407.21783,
    section 3.3.2 (all-gather of keys and values, chunks in pairs).
    """

    def __init__(self, mesh: Mesh | Wire, *, balanced: bool = True, method: Literal["gather", "ring"] = "gather"):
        if method not in ("gather", "ring"):
            raise ValueError(f"method={method!r}: it is 'gather' or 'ring'")
        self.balanced, self.method = balanced, method
        self.mesh = mesh["context"] if isinstance(mesh, Mesh) else None
        self.wire: Wire | None = None
        if isinstance(mesh, Mesh):
            self.size, self.rank = mesh.sizes["context"], mesh.coordinates["context"]
        else:
            self.size, self.rank = mesh.size, mesh.rank
        if method == "ring":
            context_ring.check(mesh.device, balanced, self.mesh)
        elif self.size > 1:
            # A wire of its own: in backward other collectives of the same ranks are under way.
            self.wire = mesh if isinstance(mesh, Wire) else Wire(
                mesh.device, mesh.timeout_s, mesh.ranks("context"), mesh.wire().watch)

    def __deepcopy__(self, memo: object) -> ContextParallel:
        """Copies of a model share it: its wire is one of all ranks."""
        return self

    # --- The cut ------------------------------------------------------------------------------------------------------

    @property
    def chunks(self) -> list[int]:
        """Which of the equal chunks of a sequence this rank has, in the order in which it keeps them.

        There are twice as many as ranks if they are balanced, else as many.
        """
        return [self.rank, 2 * self.size - 1 - self.rank] if self._pairs else [self.rank]

    @property
    def _pairs(self) -> bool:
        return self.balanced and self.size > 1

    @property
    def _count(self) -> int:
        return self.size * len(self.chunks)

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """The places in a whole sequence of so many positions that this rank has, as it keeps them: (length / c,).

        Raises:
            ValueError: the sequence cannot be cut.
        """
        return self.cut(torch.arange(length, device=device))

    def cut(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """This rank's positions of a tensor that has all of them along a dimension.

        For embedded tokens, targets, and tables of rotary angles. The gradient of the whole is zero where others are.

        Arguments:
            tensor: the same on all ranks of the axis.
            dim: that of positions.

        Raises:
            ValueError: their number is no multiple of that of the chunks; on every rank.
        """
        length = tensor.shape[dim]
        if length % self._count or not length:
            raise ValueError(f"a sequence of {length} positions over {self.size} ranks of the context axis is cut into "
                             f"{self._count} equal chunks{' (two for each)' if self._pairs else ''}: use a length "
                             f"that is a multiple of {self._count}{self._remedy(length)}")
        size = length // self._count
        parts = [tensor.narrow(dim, chunk * size, size) for chunk in self.chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def _remedy(self, length: int) -> str:
        return ", or balanced=False" if self._pairs and length and length % self.size == 0 else ""

    def whole(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """All positions, in their order, of a tensor that has this rank's along a dimension: the inverse of `cut`.

        Gradients come back as the sum of what all ranks make of the whole.
        """
        if self.size == 1:
            return tensor
        return Whole.apply(tensor.movedim(dim, 0)[None], self._gathering(), self._order()).squeeze(0).movedim(0, dim)

    # --- Attention ----------------------------------------------------------------------------------------------------

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
        """`torch.nn.functional.scaled_dot_product_attention` of this rank's positions over those of all ranks.

        Arguments:
            q: (B, H, T / c, D): of this rank's positions, as `cut` orders them.
            k, v: (B, H_kv, T / c, D); H is a multiple of H_kv, and each H / H_kv query heads in a row share one.
            causal: a position attends to itself and to those before it, in the whole sequence.
            scale: of the products; None: 1 / sqrt(D).

        Returns:
            (B, H, T / c, D).

        Raises:
            ValueError: shapes that do not fit together.
            RuntimeError: a ring outside of `step`.
        """
        check_shapes(q, k, v, len(self.chunks))
        if torch.is_autocast_enabled(q.device.type):  # as attention itself would, but before they travel
            short = torch.get_autocast_dtype(q.device.type)
            q, k, v = (part if part.dtype == torch.float64 else part.to(short) for part in (q, k, v))
        shared = q.shape[1] != k.shape[1]
        if self.size == 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared)
        if self.method == "ring":
            return context_ring.attention(q, k, v, causal, scale)
        keys, values = Whole.apply(torch.stack((k, v)).movedim(3, 1), self._gathering(), self._order()).movedim(1, 3)
        if not causal:
            return F.scaled_dot_product_attention(q, keys, values, scale=scale, enable_gqa=shared)
        size = q.shape[2] // len(self.chunks)
        parts = []
        for number, chunk in enumerate(self.chunks):
            mine, end = q.narrow(2, number * size, size), (chunk + 1) * size
            parts.append(_prefixed(mine, keys[:, :, :end], values[:, :, :end], scale, shared))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    @contextmanager
    def step(self, length: int) -> Iterator[None]:
        """Where forward and backward passes over sequences of `length` positions run. Only a ring needs it."""
        if self.method == "ring" and self.size > 1:
            self.positions(length)
            assert self.mesh is not None
            with context_ring.entered(self.mesh, length):
                yield
        else:
            yield

    def _gathering(self) -> Wire:
        if self.wire is None:
            raise RuntimeError("a ring has no wire of its own to gather whole tensors with: use "
                               "ContextParallel(mesh, method='gather') for that")
        return self.wire

    def _order(self) -> list[int] | None:
        """Where each chunk of the sequence is among those of rank 0, then of rank 1, ...; None: in place."""
        if not self._pairs:
            return None
        held = itertools.chain.from_iterable((rank, self._count - 1 - rank) for rank in range(self.size))
        places = {chunk: place for place, chunk in enumerate(held)}
        return [places[chunk] for chunk in range(self._count)]


class Whole(torch.autograd.Function):
    """Of tensors (n, T / c, ...) of all ranks (n, T, ...), chunks in order; backward adds up and gives each its own.

    One collective each way, in which every rank sends (c - 1) / c of the whole.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, wire: Wire, order: list[int] | None) -> Tensor:
        ctx.wire, ctx.order = wire, order
        local = local.contiguous()
        found = local.new_empty(wire.size, *local.shape)
        wire.all_gather_into(found.view(-1), local.view(-1)).wait()
        return in_order(found, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        wire, order = ctx.wire, ctx.order
        parts = by_rank(gradients[0], wire.size, order)
        mine = torch.empty_like(parts[0])
        wire.reduce_scatter(mine.view(-1), parts.view(-1)).wait()
        return mine, None, None


def in_order(found: Tensor, order: list[int] | None) -> Tensor:
    """(ranks, n, T / c, ...) as (n, T, ...), whose chunks are taken in the order given.

    Example:
        >>> in_order(torch.tensor([[[0, 3]], [[1, 2]]]), [0, 2, 3, 1])
        tensor([[0, 1, 2, 3]])
    """
    whole = found.movedim(0, 1).flatten(1, 2)
    if order is None:
        return whole
    chunks = whole.unflatten(1, (len(order), -1))
    return chunks.index_select(1, torch.tensor(order, device=whole.device)).flatten(1, 2)


def by_rank(whole: Tensor, size: int, order: list[int] | None) -> Tensor:
    """The inverse of `in_order`; contiguous.

    Example:
        >>> by_rank(torch.tensor([[0, 1, 2, 3]]), 2, [0, 2, 3, 1]).tolist()
        [[[0, 3]], [[1, 2]]]
    """
    if order is not None:
        places = torch.tensor(order, device=whole.device).argsort()
        whole = whole.unflatten(1, (len(order), -1)).index_select(1, places).flatten(1, 2)
    return whole.unflatten(1, (size, -1)).movedim(1, 0).contiguous()


def _prefixed(q: Tensor, k: Tensor, v: Tensor, scale: float | None, shared: bool) -> Tensor:
    """Causal attention of queries that are the last positions of those of the keys."""
    lacks = k.shape[2] - q.shape[2]
    if lacks == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)
    if q.is_cuda and not is_in_torch_dispatch_mode():  # within one this kind of tensor cannot be made
        mask: Tensor = causal_lower_right(q.shape[2], k.shape[2])  # kernels know it without a mask in memory
    else:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(lacks)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=shared)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, chunks: int) -> None:
    """Raise ValueError unless they are queries, keys and values of the same positions."""
    told = f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"{told}: give (batch, heads, positions, features) of the same positions of this rank")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{told}: {q.shape[1]} query heads cannot share {k.shape[1]} key-value heads; use a multiple")
    if q.shape[2] % chunks:
        raise ValueError(f"{told}: {q.shape[2]} positions of this rank are no {chunks} equal chunks: cut the sequence "
                         "with cut(), or use balanced=False")
