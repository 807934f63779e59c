"""Fused optimizer steps and gradient buckets for training large neural networks.

The package is imported lazily: ``import fasttrain`` loads nothing but this file.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "LossScaler":
        from fasttrain.precision.loss_scale import LossScaler

        return LossScaler
    if name == "Precision":
        from fasttrain.precision.mixed import Precision

        return Precision
    if name == "StepGraph":
        from fasttrain.optim.graph import StepGraph

        return StepGraph
    raise AttributeError(f"module 'fasttrain' has no attribute {name!r}")
