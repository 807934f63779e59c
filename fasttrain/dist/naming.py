"""Process groups that meet by the names of their members, whatever other groups each of these has.

Under `use_local_synchronization` torch names a group after its ranks and the number of groups that a rank has made so
far. Where ranks are in different numbers of groups (the stages of a pipeline, the ends of a tie) the members of a new
one would wait under different names, until the timeout. Here it is the number of groups of these ranks.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

_made: list[tuple[Any, Counter[tuple[int, ...]]]] = []  # at most one: of the store that torch.distributed uses now
_torchs: list[Any] = []  # torch's own way of naming, for each thread that is within
_lock = threading.Lock()
_given = threading.local()


@contextmanager
def by_members(ranks: Sequence[int]) -> Iterator[None]:
    """Let the group of these ranks that torch makes within have a name that all of them come to.

    Other threads may make groups meanwhile, in this way or in torch's.
    """
    torchs: Any = dist.distributed_c10d
    store, members = torchs._get_default_store(), tuple(ranks)
    with _lock:
        if not _made or _made[0][0] is not store:
            _made[:] = [(store, Counter())]
        counted = _made[0][1]
        counted[members] += 1
        text = f"{members} {counted[members]}"
        _torchs.append(_torchs[0] if _torchs else torchs._process_group_name)
        torchs._process_group_name = _name
    _given.name = "fasttrain_" + hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    try:
        yield
    finally:
        _given.name = None
        with _lock:
            before = _torchs.pop()
            if not _torchs:
                torchs._process_group_name = before


def _name(*arguments: Any, **options: Any) -> str:
    return getattr(_given, "name", None) or _torchs[0](*arguments, **options)
