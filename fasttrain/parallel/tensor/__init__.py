"""Tensor and sequence parallelism: plans that cut the layers of a model over the tensor axis of a mesh."""
