"""Whether torchrun has started this process as one of several, and as which."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fasttrain.train.config import BadInput

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """One process's place in a job.

    Attributes:
        rank, world: among all processes.
        local_rank, here: among those of its host.
        most_restarts: how often torchrun may start all processes again.
    """

    rank: int
    world: int
    local_rank: int
    here: int
    most_restarts: int = 0


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that the environment names; None where this process was not started as a rank.

    Raises:
        BadInput: it names half of one.

    Example:
        >>> place({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        ...        "MASTER_ADDR": "node0", "MASTER_PORT": "29500"})
        Place(rank=3, world=4, local_rank=1, here=2, most_restarts=0)
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    if missing := [name for name in NEEDED if name not in environment]:
        found = " and ".join(name for name in NEEDED if name in environment)
        raise BadInput(f"the environment has {found} but not {', '.join(missing)}: start this command with torchrun, "
                       "which sets all of them, or unset RANK and WORLD_SIZE")
    names = (*NEEDED[:4], "TORCHELASTIC_MAX_RESTARTS")
    try:
        return Place(*(int(environment.get(name, 0)) for name in names))
    except ValueError as error:
        raise BadInput(f"one of {', '.join(names)} in the environment is no number ({error}): start this command with "
                       "torchrun, or unset RANK and WORLD_SIZE") from error
