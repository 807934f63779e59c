"""A copy of the state in the host's memory, made in one go: what is written is the state at the call."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint.parts import Part, is_plain_memory, resolved
from fasttrain.checkpoint.pieces import Piece
from fasttrain.checkpoint.saved import bytes_of

ALIGN = 64
POPULATE_WRITE = 23  # of madvise(2), since Linux 5.14
ENOUGH = 8 << 20  # bytes that are worth a thread
THREADS = 4


class Staged:
    """Parts of a checkpoint, and where their bytes lie that nobody changes any more."""

    def __init__(self, parts: Sequence[Part], held: Sequence[Tensor], events: Sequence[Any] = ()):
        self._parts, self._held, self._events = parts, held, events

    def pieces(self) -> list[Piece]:
        """The pieces, when all copies have arrived; not for the thread that trains."""
        for event in self._events:
            event.synchronize()
        return [_piece(part, held) for part, held in zip(self._parts, self._held, strict=True)]


def live(parts: Sequence[Part]) -> Staged:
    """The parts where they are; only what is strided or on a GPU is copied. Nobody may change them meanwhile."""
    return Staged(parts, [resolved(part.memory.to("cpu")).contiguous() for part in parts])


class Staging:
    """Memory of the host that is kept from one save to the next: anonymous, written once, so that no page is missing.

    Pinned where parts lie on a GPU. It grows with the state.

    Attributes:
        nbytes: of the memory.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False
        self._streams: dict[torch.device, Any] = {}
        self._threads = ThreadPoolExecutor(THREADS, "fasttrain staging")

    def reserve(self, nbytes: int, pinned: bool) -> bool:
        """Have so much memory; whether it was made anew."""
        if nbytes <= self.nbytes and (self._pinned or not pinned):
            return False
        self._memory, self._pinned, self.nbytes = torch.empty(0, dtype=torch.uint8), False, 0  # before there are two
        size = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        try:
            pages.madvise(POPULATE_WRITE)
        except OSError:  # an older kernel
            memory.zero_()
        if pinned:
            _pin(pages, memory)
        self._memory, self._pinned, self.nbytes = memory, pinned, size
        return True

    def take(self, parts: Sequence[Part]) -> Staged:
        """Copy parts here. What runs on a GPU after this call, on the current stream, may change them."""
        places, size = [], 0
        for part in parts:
            places.append(size)
            size += -(-part.nbytes // ALIGN) * ALIGN
        self.reserve(size, any(part.memory.is_cuda for part in parts))
        views = [self._memory[place : place + part.nbytes] for place, part in zip(places, parts, strict=True)]
        moves: list[tuple[int, int, int]] = []
        strided: list[tuple[Tensor, Tensor]] = []
        away: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for part, view in zip(parts, views, strict=True):
            if not part.nbytes:
                continue
            if is_plain_memory(part.memory):
                moves.append((view.data_ptr(), part.memory.data_ptr(), part.nbytes))
                continue
            into = view.view(part.memory.dtype).view(part.memory.shape)
            pairs = strided if part.memory.device.type == "cpu" else away.setdefault(part.memory.device, [])
            pairs.append((into, part.memory))
        events = [self._copy_from(device, pairs) for device, pairs in away.items()]
        self._move(moves)
        for into, memory in strided:
            into.copy_(memory)
        return Staged(parts, views, [event for event in events if event is not None])

    def close(self) -> None:
        """Let go of the memory."""
        self._threads.shutdown()
        self._memory, self.nbytes = torch.empty(0, dtype=torch.uint8), 0

    def _move(self, moves: list[tuple[int, int, int]]) -> None:
        """Copy memory to memory, in a few threads: one alone does not use all of its bandwidth."""
        total = sum(nbytes for _, _, nbytes in moves)
        count = max(1, min(THREADS, torch.get_num_threads(), total // ENOUGH))
        share = -(-total // count)
        work: list[list[tuple[int, int, int]]] = [[]]
        left = share
        for into, source, nbytes in moves:
            while nbytes:
                some = min(nbytes, left)
                work[-1].append((into, source, some))
                into, source, nbytes, left = into + some, source + some, nbytes - some, left - some
                if not left:
                    work.append([])
                    left = share
        others = [self._threads.submit(_moved, some) for some in work[1:] if some]
        _moved(work[0])
        for other in others:
            other.result()

    def _copy_from(self, device: torch.device, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        """Copies from a device on a stream beside the current one, which waits for them before it goes on."""
        if device.type != "cuda":
            for into, memory in pairs:
                into.copy_(memory)
            return None
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for into, memory in pairs:
                into.copy_(memory, non_blocking=True)
            event = stream.record_event()
        current.wait_event(event)
        return event


def _moved(moves: list[tuple[int, int, int]]) -> None:
    for into, source, nbytes in moves:
        ctypes.memmove(into, source, nbytes)  # frees the interpreter lock


def _piece(part: Part, held: Tensor) -> Piece:
    data: Any = bytes_of(held)
    return Piece(part.name, part.dtype, part.region.shape, memoryview(data), part.region.span, part.region.box)


def _pin(pages: mmap.mmap, memory: Tensor) -> None:
    cudart: Any = torch.cuda.cudart()
    failed = cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(failed):
        raise RuntimeError(f"{memory.numel():,} bytes of the host's memory cannot be pinned for a copy of the state "
                           f"({failed}): raise the limit of locked memory (ulimit -l), or save with staging='none'")
    place = memory.data_ptr()

    def unpin() -> None:
        with contextlib.suppress(Exception):  # at the end of the process the driver may be gone
            cudart.cudaHostUnregister(place)

    weakref.finalize(memory, unpin)
