"""Where the processes meet that torchrun starts, and starts again: a store in which nothing of an earlier attempt lies.

torchrun's agent keeps one store for the whole job (torch 2.5 and newer; TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 undoes it).
It outlives every process, which is good: a rank that ends can still tell why. But after a restart gloo finds the addresses
of dead processes in it, and cannot connect. TORCHELASTIC_RESTART_COUNT is no remedy, because each host's agent counts by
itself, and not if hosts come or go. So the first rank numbers the attempts, and the others ask it: with a word that
they have just made up, since an answer to the old one may still be there.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fasttrain.dist.work import WireError

POLL_S = 0.01
_attempt: int | None = None  # of torch.distributed in this process, as that itself is


def current() -> int:
    """Which attempt of its job this process belongs to, counted from 1, the same on every rank.

    Where it did not meet the others in torchrun's store: one more than torchrun says it has restarted.
    """
    return _attempt or 1 + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def options(given: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Arguments of ``torch.distributed.init_process_group``: those given; under torchrun with a store of this attempt.

    Raises:
        WireError: another rank did not come in time.
        RuntimeError: the store does not answer.
    """
    global _attempt
    if "store" in given or "init_method" in given or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _attempt = None
        return given
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                          wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    _attempt = agree(store, rank, size, timeout_s)
    return {**given, "store": dist.PrefixStore(f"fasttrain attempt {_attempt}", store), "rank": rank, "world_size": size}


def agree(store: Any, rank: int, size: int, timeout_s: float) -> int:
    """The number of this attempt, by what all ranks write to a store that may hold what earlier ones have written.

    Every process of the earlier attempts has ended.

    Raises:
        WireError: another rank did not come in time.
    """
    store = dist.PrefixStore("fasttrain meeting", store)
    end = time.monotonic() + timeout_s
    if rank:
        word = uuid.uuid4().hex
        store.set(f"hello {rank}", word)
        _wait(lambda: store.check([f"answer {rank} {word}"]), end, lambda: f"rank 0 did not come in {timeout_s:.0f} s")
        number = int(store.get(f"answer {rank} {word}"))
        store.set(f"here {number} {rank}", "")
        return number
    number = int(store.add("attempts", 1))
    missing, words = set(range(1, size)), dict[int, bytes]()

    def all_here() -> bool:
        for other in sorted(missing):
            if store.check([f"hello {other}"]) and (word := store.get(f"hello {other}")) != words.get(other):
                words[other] = word
                store.set(f"answer {other} {word.decode()}", str(number))
            if store.check([f"here {number} {other}"]):
                missing.remove(other)
        return not missing

    _wait(all_here, end, lambda: f"rank {', '.join(map(str, sorted(missing)[:8]))} did not come in {timeout_s:.0f} s")
    return number


def _wait(there: Callable[[], bool], end: float, words: Callable[[], str]) -> None:
    while not there():
        if time.monotonic() > end:
            raise WireError(f"{words()}: it has not started, or cannot reach the store of torchrun")
        time.sleep(POLL_S)
