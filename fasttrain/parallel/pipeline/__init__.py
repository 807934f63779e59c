"""Pipelines: a model cut into stages, one after the other on ranks, run by the schedules of torch.

Nothing here loads `torch.distributed.pipelining` before a `Pipeline` makes its first step.
"""

from fasttrain.parallel.pipeline.held import ties
from fasttrain.parallel.pipeline.pipeline import Pipeline
from fasttrain.parallel.pipeline.splitting import split

__all__ = ["Pipeline", "split", "ties"]
