"""Whether all ranks that hold the same part of a parameter still hold the same bits."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from fasttrain.dist.mesh import Mesh
from fasttrain.optim.local import local
from fasttrain.parallel import held
from fasttrain.parallel.ties import WHOLE

MOST = 5  # names in an error


class DriftError(RuntimeError):
    """Copies differ. Every rank raises it with the same text."""


def check_copies(model: nn.Module, mesh: Mesh) -> None:
    """Raise if copies of a parameter differ in any bit; a collective of all ranks of the mesh.

    Copies are what ranks along data, context and other axes have of a parameter that is not cut along them, and what
    several stages of a pipeline have of one that is tied. They begin equal and are stepped alike, so they stay equal
    for ever; where they do not, a step was made on some ranks only, or memory has failed. Each rank reads its
    parameters once; some dozen bytes of each travel.

    Arguments:
        model: what this rank has: parameters may be cut (DTensor), sharded by `fasttrain.parallel.shard`, or of some
            stages. Also a `DataParallel` of it.
        mesh: over which it is divided.

    Raises:
        DriftError: with the names, and the ranks that differ from the first that holds the same.

    Example:
        >>> check_copies(nn.Linear(2, 2), mesh)                                           # doctest: +SKIP
    """
    model = getattr(model, "module", model)
    ties: dict[str, Any] = vars(model).get(WHOLE, {})
    mine = {}
    for name, p in model.named_parameters():
        apart = held.cut(name, p)
        place = "".join(f" {axis} {mesh.coordinates[axis]}" for axis in apart)
        mine[ties.get(name, (name,))[0] + place] = digest(local(p.detach()))
    told = [json.loads(text) for text in mesh.wire().gather_objects_json(json.dumps(mine))]
    first: dict[str, tuple[int, str]] = {}
    differ: dict[str, list[int]] = {}
    for rank, parts in enumerate(told):
        for part, found in parts.items():
            if first.setdefault(part, (rank, found))[1] != found:
                differ.setdefault(part, []).append(rank)
    if differ:
        lines = [f"{part}: on ranks {', '.join(map(str, ranks))} it is not that of rank {first[part][0]}"
                 for part, ranks in list(differ.items())[:MOST]]
        more = f"\nand {len(differ) - MOST} more" if len(differ) > MOST else ""
        raise DriftError("ranks that should hold the same parameters do not: load a checkpoint, which has one copy of "
                         "each\n" + "\n".join(lines) + more)


def digest(tensor: torch.Tensor) -> str:
    """Of its bits, whatever they stand for."""
    data = tensor.contiguous().flatten().view(torch.uint8).cpu()
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=8).hexdigest()
