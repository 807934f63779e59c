"""torch's own tests of DistributedDataParallel, from its wheel, with `DataParallel` in its place.

Of the eight that need no GPU. Two ask for what is no part of the surface: `test_ddp_logging_data_cpu` and
`test_static_graph_api_cpu` read torch's internal logger. `test_dump_DDP_relevant_env_vars` makes no module.
"""

import os
import unittest

import pytest
import ranks
import torch
import torch.distributed as dist

from fasttrain.parallel import DataParallel

RUN = ("test_DistributedDataParallelCPU", "test_DistributedDataParallelCPU_grad_is_view",
       "test_DistributedDataParallel_requires_grad", "test_grads_same_across_ranks_with_no_sync")
REFUSED = "test_ddp_create_graph"  # torch loses the graph of the gradient and warns


def suite(wire, folder):
    os.environ.update(BACKEND="gloo", WORLD_SIZE=str(wire.size), RANK=str(wire.rank), TEMP_DIR=folder)
    from torch.testing._internal.distributed import distributed_test

    class Torchs(distributed_test.DistributedTest._DistTestBase, unittest.TestCase):
        rank = wire.rank
        world_size = wire.size
        runTest = None

        def assertEqual(self, first, second, msg=None, **tolerances):
            torch.testing.assert_close(first, second, **{"rtol": 1e-5, "atol": 1e-6, **tolerances})

    torch.nn.parallel.DistributedDataParallel = torch.nn.parallel.distributed.DistributedDataParallel = DataParallel
    for name in RUN:
        getattr(Torchs(), name)()
        dist.barrier()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        getattr(Torchs(), REFUSED)()


def test_torchs_tests(tmp_path):
    (tmp_path / "barrier").mkdir()
    ranks.run(suite, 2, str(tmp_path))
