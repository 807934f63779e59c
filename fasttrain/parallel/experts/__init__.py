"""Mixtures of experts: feed-forward layers of which each token passes through a few, divided over ranks."""

from fasttrain.parallel.experts.balance import rebalance
from fasttrain.parallel.experts.collected import auxiliary, carry
from fasttrain.parallel.experts.layer import Metrics, MoE, metrics
from fasttrain.parallel.experts.router import Router

__all__ = ["Metrics", "MoE", "Router", "auxiliary", "carry", "metrics", "rebalance"]
