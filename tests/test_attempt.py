"""Attempts of a job that meet in one store, in which those before them have left their words."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from fasttrain.dist import attempt
from fasttrain.dist.work import WireError


def meet(store: Any, size: int, late: tuple[int, ...] = (), timeout_s: float = 10) -> list[int]:
    """What each rank is told, the late ones after all others have begun to wait."""
    begun = threading.Barrier(size)

    def rank(number: int) -> int:
        if number in late:
            begun.wait()
            time.sleep(0.1)
        else:
            threading.Timer(0, begun.wait).start()
        return attempt.agree(store, number, size, timeout_s)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


@pytest.mark.parametrize("late", [(), (0,), (2,), (1, 2)])
def test_every_attempt_has_its_number(late: tuple[int, ...]) -> None:
    """Also where a rank comes after the others, which see its word of the attempt before."""
    store = dist.HashStore()
    assert [meet(store, 3, late) for _ in range(3)] == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]


def test_the_number_of_ranks_may_change() -> None:
    store = dist.HashStore()
    assert [set(meet(store, size)) for size in (3, 1, 2, 4)] == [{1}, {2}, {3}, {4}]


def test_an_attempt_that_never_met_leaves_no_trace() -> None:
    """Rank 1 of it wrote its word and died; or rank 0 did, after it had counted."""
    store = dist.HashStore()
    with pytest.raises(WireError, match="rank 0 did not come in 0 s: it has not started"):
        attempt.agree(store, 1, 2, 0.2)
    assert meet(store, 2, late=(1,)) == [1, 1]
    with pytest.raises(WireError, match="rank 1, 2 did not come"):
        attempt.agree(store, 0, 3, 0.2)
    assert meet(store, 2, late=(0,)) == [3, 3]


def test_only_torchruns_own_store_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"rank": 0}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert attempt.options(given, 1) == given
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    given["store"] = None
    assert attempt.options(given, 1) == given
    assert attempt.current() == 3
