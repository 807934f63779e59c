"""Batches in the order of their samples' numbers, whatever ranks and workers there are; a position is one integer."""

from __future__ import annotations

import sys
import time
import weakref
from collections import deque
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.errors import DataError, TooSmall
from fasttrain.data.position import Position, numbers, reconcile, slice_of
from fasttrain.data.prefetch import start
from fasttrain.data.upload import Stay, Upload, upload_to
from fasttrain.data.windows import Source

WIDER = {np.dtype(np.uint16): np.int32, np.dtype(np.uint32): np.int64}  # torch hardly computes with unsigned ones


class Loader:
    """Gives batch after batch, without end unless `stop` says so.

    A step takes the next `batch_size` numbers that are not skipped; rank r gets the r-th of `world` equal slices. What
    a number stands for is the source's affair, and a function of (seed, number) alone: so the order does not depend on
    ranks, workers or prefetching, and going on anywhere is arithmetic.

    Args:
        source: `Windows`, `Mixture`, or your own `Source`.
        batch_size: samples in a step, over all ranks together.
        seed: of the order; None: the source's own.
        rank, world: of this process, and how many there are.
        workers: how many threads (or processes) fetch ahead; 0: the caller does, when a batch is asked for.
        processes: workers are processes: for sources whose `fetch` computes in Python. What only copies tokens is
            served better by one thread.
        prefetch: batches fetched ahead.
        device: where to; for a GPU through pinned memory on a stream of its own.
        stop: the number at which to end, ``len(source)`` for one pass; a last batch that would be smaller is not given.
        vocabulary: of the model; the source's must not be larger.

    A batch is a dict of tensors whose first dimension is ``batch_size // world``: ``tokens``, (b, length + 1), uint8,
    int32 or int64; what else the source gives; and ``indices``, int64 on the host, the samples' numbers.

    Attributes:
        index: the number of the next sample (read-only).
        replaced: samples of this rank, since construction, in whose place others were given because they are damaged.
        waited: seconds this rank has waited for batches.

    Raises:
        TooSmall: one pass has fewer samples than a batch.
        DataError: other arguments that cannot work.

    Example:
        >>> from fasttrain.data import Windows
        >>> source = Windows(np.frombuffer(b"some text of yours " * 20, np.uint8), length=16)
        >>> with Loader(source, batch_size=4, seed=0) as loader:
        ...     batches = [next(loader)["tokens"] for _ in range(3)]
        ...     state = loader.state_dict()
        ...     following = next(loader)["tokens"]
        >>> state["index"]
        12
        >>> with Loader(source, batch_size=4, seed=0) as again:
        ...     again.load_state_dict(state)
        ...     bool((next(again)["tokens"] == following).all())
        True
    """

    def __init__(self, source: Source, batch_size: int, seed: int | None = None, rank: int = 0, world: int = 1, *,
                 workers: int = 1, processes: bool = False, prefetch: int = 2, device: torch.device | str | None = None,
                 stop: int | None = None, vocabulary: int | None = None):
        _check(source, batch_size, rank, world, workers, processes, prefetch, stop, vocabulary)
        self.source = source if seed is None else source.reseeded(seed)
        self.batch_size, self.rank, self.world, self.stop = batch_size, rank, world, stop
        self.workers, self.processes, self.prefetch = workers, processes, prefetch if workers else 0
        self.device = torch.device("cpu" if device is None else device)
        self.replaced, self.waited = 0, 0.0
        self._upload = upload_to(self.device)
        self._fingerprint = self.source.fingerprint()
        self._now = Position()  # behind the last batch that was given
        self._asked: deque[tuple[Position, np.ndarray]] = deque()  # of what is fetched ahead, the oldest first
        self._ahead: Any = None
        self._close: Any = None

    @property
    def index(self) -> int:
        return self._now.index

    @property
    def passes(self) -> float:
        """How often the source has been read."""
        return self.index / self.source.per_pass

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next batch.

        Raises:
            StopIteration: at `stop`.
            BadShard: it is damaged; the position is still before it.
            WorkerDied: so is it then; the next call starts workers again.
        """
        begun = time.perf_counter()
        try:
            self._ask()  # before the position moves: if that fails, no batch is lost
            if not self._asked:
                raise StopIteration
            sent, event, replaced = self._ahead.take()
        except StopIteration:
            raise
        except BaseException:
            self._forget()
            raise
        self._now, indices = self._asked.popleft()
        batch = self._upload.receive(sent, event)
        batch["indices"] = torch.from_numpy(indices)
        self._count(replaced, indices)
        self.waited += time.perf_counter() - begun
        return batch

    def _ask(self) -> None:
        """Have one batch asked for, and `prefetch` behind it."""
        if self._ahead is None:
            self._ahead = start(self.source, partial(_finish, self._upload), self.workers, self.processes)
            self._close = weakref.finalize(self, self._ahead.close)
        while len(self._asked) < 1 + self.prefetch:
            position = (self._asked[-1][0] if self._asked else self._now).copy()
            runs = position.take(self.batch_size)
            if self.stop is not None and position.index > self.stop:
                return
            mine = slice_of(runs, self.rank, self.world)
            self._ahead.ask(mine)
            self._asked.append((position, numbers(mine)))

    def _count(self, replaced: int, indices: np.ndarray) -> None:
        if replaced and not self.replaced:
            print(f"fasttrain: {replaced} of the samples {indices[0]} to {indices[-1]} are damaged, and others stand "
                  f"in their place; all such are counted, TokenDataset.damage() names the places", file=sys.stderr)
        self.replaced += replaced

    def _forget(self) -> None:
        """Drop what is fetched ahead: it is no longer what comes next."""
        self._asked.clear()
        if self._ahead is not None:
            self._close()
            self._ahead = None

    def resize(self, batch_size: int) -> None:
        """Take so many samples in a step from the next batch on; every rank calls it. If it is another number, what is
        fetched ahead is dropped.

        Raises:
            TooSmall, DataError: as the constructor; nothing has changed.
        """
        if batch_size != self.batch_size:
            _check(self.source, batch_size, self.rank, self.world, self.workers, self.processes, max(self.prefetch, 1),
                   self.stop, None)
            self.batch_size = batch_size
            self._forget()

    def skip(self, first: int, count: int) -> None:
        """Never give these numbers again, whatever comes: those of batches after which the loss went up, say.

        Raises:
            DataError: negative numbers.
        """
        self._now.skip(first, count)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch given, as JSON values; equal on all ranks. What is fetched ahead is not
        counted."""
        return {"index": self._now.index, "skipped": [list(run) for run in self._now.skipped],
                "batch_size": self.batch_size, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any], remap: bool = False) -> None:
        """Go on from a position, of any world size and number of workers.

        Another batch size goes on at the same sample, and says so. Other data, another seed or length of windows is an
        error, or with `remap` goes on in the new order after as many tokens, and says so.

        Raises:
            WrongState: it does not fit, and nothing has changed.
        """
        position, said = reconcile(state, self._fingerprint, self.batch_size, remap)
        for text in said if self.rank == 0 else []:
            print(f"fasttrain: {text}", file=sys.stderr)
        self._now = position
        self._forget()

    def rewind(self, state: dict[str, Any], first: int | None = None, count: int = 0) -> None:
        """As `load_state_dict`, but what has been skipped since that state was taken stays skipped, and these numbers
        are now: going back before a spike of the loss, and past its batches.

        Raises:
            WrongState, DataError: as `load_state_dict` and `skip`; nothing has changed.
        """
        position, _ = reconcile(state, self._fingerprint, self.batch_size, remap=False)
        for run in [*self._now.skipped, *([] if first is None else [(first, count)])]:
            position.skip(*run)
        self._now = position
        self._forget()

    def close(self) -> None:
        """End threads and worker processes. The loader can be used again."""
        self._forget()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _finish(upload: Upload | Stay, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], Any, int]:
    """Fetched arrays as tensors on their way to the device, the event of that, and how many samples were replaced."""
    replaced = int(arrays.pop("replaced", np.zeros(0)).sum())
    batch = {name: torch.from_numpy(array.astype(WIDER[array.dtype]) if array.dtype in WIDER else array)
             for name, array in arrays.items()}
    return *upload.send(batch), replaced


def _check(source: Source, batch_size: int, rank: int, world: int, workers: int, processes: bool, prefetch: int,
           stop: int | None, vocabulary: int | None) -> None:
    if not callable(getattr(source, "fetch", None)):
        raise DataError(f"an object of {type(source).__name__} is not a source of samples: give Windows, as of "
                        f"TokenDataset.windows(length), a Mixture, or an object with fetch, reseeded and fingerprint")
    if batch_size < 1 or world < 1 or batch_size % world:
        raise DataError(f"batch_size={batch_size} over world={world}: every rank must get the same number of samples, "
                        f"at least one; use a batch that is a multiple of {max(world, 1)}")
    if not 0 <= rank < world:
        raise DataError(f"rank={rank} of world={world}: ranks go from 0 to {world - 1}")
    if workers < 0 or prefetch < 1:
        raise DataError(f"workers={workers}, prefetch={prefetch}: there are at least 0 workers and 1 batch ahead")
    if processes and not workers:
        raise DataError("processes=True with workers=0: give the number of processes as workers")
    if source.per_pass < batch_size:
        raise TooSmall(f"one pass over the data has {source.per_pass} samples and a batch {batch_size}: use a smaller "
                       f"batch, shorter windows or more data")
    if stop is not None and stop < batch_size:
        raise DataError(f"stop={stop} with batch_size={batch_size}: not one batch would be given")
    if vocabulary is not None and vocabulary < source.vocabulary:
        raise DataError(f"a model with a vocabulary of {vocabulary} cannot read tokens up to {source.vocabulary - 1}: "
                        f"give it at least {source.vocabulary}")
