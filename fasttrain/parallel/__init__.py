"""The parallel floor: how one training step is divided over processes."""

from fasttrain.dist.control import Disagreement
from fasttrain.dist.mesh import Mesh
from fasttrain.parallel.context import ContextParallel
from fasttrain.parallel.data import DataParallel
from fasttrain.parallel.drift import DriftError, check_copies
from fasttrain.parallel.dropout import Cut, Dropout, seed_dropout
from fasttrain.parallel.reducer import Reducer
from fasttrain.parallel.sharded import shard
from fasttrain.parallel.tensor.parallelize import tensor_parallel
from fasttrain.parallel.zero import Zero

__all__ = ["ContextParallel", "Cut", "DataParallel", "Disagreement", "DriftError", "Dropout", "Mesh", "Reducer", "Zero",
           "check_copies", "seed_dropout", "shard", "tensor_parallel"]
