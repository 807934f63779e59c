"""Groups meet whatever other groups their members are in."""

import threading

import pytest
import torch
import torch.distributed as dist
from ranks import run

from fasttrain.dist.wire import Wire


def uneven(wire):
    """Rank 0 has been in more groups than rank 1; a thread makes another meanwhile."""
    if wire.rank == 0:
        for _ in range(2):
            Wire(wire.device, 10, [0]).close()
    here = torch.distributed.distributed_c10d._process_group_name
    found = []
    other = threading.Thread(target=lambda: found.append(Wire(wire.device, 10, [wire.rank])))
    other.start()
    both = [Wire(wire.device, 10) for _ in range(2)]
    other.join()
    assert torch.distributed.distributed_c10d._process_group_name is here
    names = {one.group.group_name for one in (*both, *found)}
    return [one.sum_(torch.ones(1)).item() for one in (*both, *found)], len(names), dist.new_group([0, 1]).size()


def test_the_number_of_other_groups_does_not_matter():
    assert run(uneven, 2) == [([2, 2, 1], 3, 2)] * 2


def fails(wire):
    """What torch names is as before when a group could not be made."""
    here = torch.distributed.distributed_c10d._process_group_name
    with pytest.raises(ValueError, match="out of range"):
        Wire(wire.device, 10, [wire.rank, 7])
    return torch.distributed.distributed_c10d._process_group_name is here


def test_a_failure_leaves_nothing_behind():
    assert run(fails, 2) == [True] * 2
