"""Buckets of the CUDA backend: moves between storages, 8-bit codes and sums of chunks (csrc/cuda/pack.cuh, encode.cuh,
sum.cuh); `fasttrain.kernels.pack` and `chunks` define the bits, those of squares too.

On torch's current stream, and nothing waits for the device: one launch for each combination of storages, or one for a
sum and one more that adds its squares. Tables stay on the device from one call to the next with the same addresses;
that of a single move has the target's only, so that a slot is packed without a copy wherever the tensor lies, and of
that of several only the addresses of tensors that moved are sent.

`FASTTRAIN_MOVES`, `FASTTRAIN_FEEDBACKS`, `FASTTRAIN_ENCODES` and `FASTTRAIN_SUMS` there are compiled ahead of time;
docs/buckets.md lists them. The rest runs in Triton, to the same bits but for squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels import chunks as sums
from fasttrain.kernels import cuda, cuda_sums, dispatch, norm, pack
from fasttrain.kernels.resident import Resident, making
from fasttrain.kernels.ring import ring_of

SLOTS = 4096  # tables of single moves that are kept on a device
WINDOW = 512  # elements that a warp of sum.cuh takes at once, at most, where nothing is measured
HEADERS = 2  # rows of the table of a sum before those of the chunks

Move = tuple[Tensor, Tensor, Tensor | None]  # flat source, target and residual
kept: cuda.Tables[cuda_sums.Prepared] = cuda.Tables()
slots: cuda.Tables[cuda_sums.Prepared] = cuda.Tables(SLOTS)


def compiled(name: str, *arrays: Tensor | None) -> str | None:
    """The kernel for arrays of these dtypes, or None if it is not compiled ahead of time."""
    kinds = ["INT8" if array.dtype == torch.int8 else cuda.NAMES[array.dtype] for array in arrays if array is not None]
    whole = "_".join((name, *kinds))
    return whole if whole in cuda.compiled() else None


def elsewhere(table: Mapping[str, Callable[..., Any]], device: torch.device) -> Callable[..., Any]:
    """What runs that has no kernel here."""
    return dispatch.choose_from(table, "none of these", device)


# --- Moves ------------------------------------------------------------------------------------------------------------

def move(moves: Sequence[Move], scale: float) -> None:
    """Move flat tensors on one GPU."""
    groups: dict[str | None, list[Move]] = {}
    for one in moves:
        groups.setdefault(compiled("move", *one), []).append(one)
    for name, group in groups.items():
        if name is None:
            elsewhere(pack.MOVES, group[0][0].device)(group, scale)
        else:
            launch_moves(name, [one for one in group if len(one[0])], scale)


def launch_moves(name: str, group: Sequence[Move], scale: float) -> None:
    if not group:
        return
    device, single = group[0][0].device, len(group) == 1
    bits = pack.scale_bits(scale, torch.float64 in (group[0][0].dtype, group[0][1].dtype))
    described = np.array([[0 if single else source.data_ptr(), target.data_ptr(), *(() if lost is None else
                          (lost.data_ptr(),)), len(source)] for source, target, lost in group], np.int64)
    sizes = [array.element_size() for array in group[0] if array is not None]

    def rows(chunk: int) -> np.ndarray:
        addresses, elements = cut(described, sizes, chunk)
        return np.column_stack([addresses, elements, np.full(len(elements), bits), np.full(len(elements), single)])

    elements = int(described[:, -1].sum())
    if single:
        start(slots, device, name, (bits, described.tobytes()), elements, rows, group[0][0].data_ptr())
    else:
        start(kept, device, name, (described[:, 1:].tobytes(),), elements, rows, moving=True)


def encode(bucket: Tensor, codes: Tensor, units: Tensor, scale: float, residual: Tensor | None) -> None:
    """Write flat numbers as codes and units."""
    name = compiled("encode", bucket, residual)
    if name is None:
        elsewhere(sums.ENCODES, bucket.device)(bucket, codes, units, scale, residual)
    elif len(bucket):
        bits = pack.scale_bits(scale, False)
        owed = 0 if residual is None else residual.data_ptr()
        described = np.array([[bucket.data_ptr(), codes.data_ptr(), owed, len(bucket)]], np.int64)

        def rows(chunk: int) -> np.ndarray:
            own, elements = cut(described, [bucket.element_size(), 1, 0 if residual is None else 4], chunk)
            each = units.data_ptr() + np.arange(len(own)) * (chunk // sums.BLOCK * 4)
            return np.column_stack([own[:, :2], each, own[:, 2], elements, np.full(len(own), bits)])

        start(kept, bucket.device, name, (bits, units.data_ptr(), described.tobytes()), len(bucket), rows)


def cut(described: np.ndarray, sizes: Sequence[int], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and elements of every chunk of arrays; those of a row of `described`, then its elements, are cut alike.

    Arguments:
        sizes: bytes of an element of each array, or 0 if there is none.
    """
    elements = described[:, -1]
    chunks = -(-elements // chunk)
    item = np.repeat(np.arange(len(chunks)), chunks)
    begin = (np.arange(len(item)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * chunk
    return described[item, :-1] + begin[:, None] * np.array(sizes), np.minimum(elements[item] - begin, chunk)


def start(tables: cuda.Tables[cuda_sums.Prepared], device: torch.device, name: str, about: tuple[Any, ...],
          elements: int, rows: Callable[[int], np.ndarray], base: int = 0, moving: bool = False) -> None:
    """Launch a kernel over a table, which is made of chunks of so many elements if it is not kept.

    Arguments:
        about: what the table is of. If it is `moving`, all but the addresses of sources and the scale: of a table that
            is kept only what is not as before is sent. A capture has a table of its own.
    """
    place, loaded, processors = cuda.opened(device)
    with place.guard():
        stream, captured = place.stream(), moving and place.capturing()
        key = (name, device, stream, *about)
        with making("the table of a bucket", device):
            ready = None if captured else tables.get(key)
            if ready is None or moving:
                table = rows(cuda.chunk_size(elements, processors)).astype(np.int64)
                if ready is None:
                    live, fixed = ([table], []) if moving else ([], [table])
                    ready = cuda_sums.Prepared(Resident(place, live, fixed, moving), (len(table),), place.empty(0))
                else:
                    ready.on_device.update(place, [table])
            if moving and not captured:
                ring_of(place).spare(ready.on_device.memory.nbytes)
        if not captured:
            tables.keep(key, ready, ready.on_device.memory.nbytes)
        cuda_sums.start(loaded, name, stream, ready, 0, base)


# --- Sums -------------------------------------------------------------------------------------------------------------

def sum_chunks(chunks: Sequence[Tensor], units: Sequence[Tensor] | None, out: Tensor, scale: float,
               squares: bool) -> tuple[Tensor, Tensor] | None:
    """Add chunks in order; with `squares`, those of the result, and whether any of it is infinite or NaN."""
    name = compiled("sum", chunks[0], out)
    if name is None:
        found: tuple[Tensor, Tensor] | None = elsewhere(sums.SUMS, out.device)(chunks, units, out, scale, squares)
        return found
    place, loaded, processors = cuda.opened(out.device)
    bits = pack.scale_bits(scale, torch.float64 in (chunks[0].dtype, out.dtype))
    described = np.zeros((HEADERS + len(chunks), 2), np.int64)
    described[0], described[1] = (out.data_ptr(), len(out)), (bits, squares)
    described[HEADERS:, 0] = [chunk.data_ptr() for chunk in chunks]
    if units is not None:
        described[HEADERS:, 1] = [unit.data_ptr() for unit in units]
    with place.guard():
        stream = place.stream()
        key = (name, out.device, stream, described.tobytes())
        with making("the workspace of a sum", out.device):
            ready = kept.get(key) or prepare_sum(place, described, squares)
            measured = place.empty(2 * cuda_sums.SUMS if squares else 0)
        kept.keep(key, ready, ready.on_device.memory.nbytes + ready.workspace.nbytes)
        if len(out):
            each = cuda_sums.WARPS * (norm.BLOCK if squares else WINDOW)
            blocks = min(-(-len(out) // each), processors * resident(loaded, name))
            loaded.launch(kernel=name, blocks=blocks, threads=cuda.THREADS, stream=stream, rows=0, gradients=0,
                          table=ready.on_device.fixed[0], chunks=ready.rows[0])
        if not squares:
            return None
        cuda_sums.start(loaded, "tree", stream, ready, 1, measured.data_ptr())
    return measured[:8].view(torch.float64)[0], measured[cuda_sums.SUMS :].view(torch.bool)[0]


@cache
def resident(loaded: Any, name: str) -> int:
    """Blocks of a kernel that run on a multiprocessor at a time."""
    return max(loaded.usage(name, cuda.THREADS)["blocks"], 1)


def prepare_sum(place: cuda.Place, described: np.ndarray, squares: bool) -> cuda_sums.Prepared:
    """The table of a sum, and that of the tree over the sums of its blocks."""
    table, count = described.copy(), -(-int(described[0, 1]) // norm.BLOCK)
    table[1, 1] = 0
    if not squares:
        return cuda_sums.upload(place, [table], place.empty(0))
    lists, size = cuda_sums.tree_rows(np.zeros(1, np.int64), np.array([count]))
    workspace = place.empty(max(size, cuda_sums.SUMS))
    table[1, 1] = workspace.data_ptr()
    lists[:, [0, 2]] += workspace.data_ptr()
    lists[:, 4] = cuda_sums.SUMS
    return cuda_sums.upload(place, [table, lists], workspace)
