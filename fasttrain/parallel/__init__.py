"""The parallel floor: how one training step is divided over processes."""

from fasttrain.dist.control import Disagreement
from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.context import ContextParallel
from fasttrain.parallel.data import DataParallel
from fasttrain.parallel.dropout import Cut, Dropout, seed_dropout
from fasttrain.parallel.reducer import Reducer
from fasttrain.parallel.sharded import shard
from fasttrain.parallel.tensor.parallelize import tensor_parallel
from fasttrain.parallel.zero import Zero

__all__ = ["ContextParallel", "Cut", "DataParallel", "Disagreement", "Dropout", "Mesh", "Reducer", "Zero",
           "seed_dropout", "shard", "tensor_parallel"]
