"""Tensor and sequence parallelism: plans that cut the layers of a model over the tensor axis of a mesh."""

from fasttrain.parallel.tensor.parallelize import tensor_parallel

__all__ = ["tensor_parallel"]
