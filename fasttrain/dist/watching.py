"""The wire of a reducer, watched by the one watcher of this process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fasttrain.dist.watcher import Watcher
from fasttrain.dist.wire import Wire

_watchers: list[tuple[Any, Watcher]] = []  # at most one: of the store that torch.distributed uses now


def wire_over(mesh: Any, device: torch.device, timeout_s: float, watch: Watcher | bool) -> Wire:
    """The wire that a caller gave, or one of our own over a mesh.

    Arguments:
        mesh: as `Wire` takes a group; or a Wire, which is returned as it is, with the watcher that it has.
        watch: True: the watcher of this process, which is made when first needed, on every rank; False: none.
    """
    if isinstance(mesh, Wire):
        return mesh
    wire = Wire(device, timeout_s, mesh)
    if watch is True:
        wire.watch = watcher_of_process()
    elif watch:
        wire.watch = watch
    return wire


def watcher_of_process() -> Watcher:
    """The one watcher of this process, made when first needed; every rank makes one at the same time."""
    store = dist.distributed_c10d._get_default_store()
    if not _watchers or _watchers[0][0] is not store:
        for _, old in _watchers:
            old.close()
        _watchers[:] = [(store, Watcher())]
    return _watchers[0][1]
