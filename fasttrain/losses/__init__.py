"""Losses that read the logits once forward and once backward: see docs/losses.md."""

from fasttrain.losses.cross_entropy import CrossEntropyParts, cross_entropy, cross_entropy_parts
from fasttrain.losses.linear import linear_cross_entropy
from fasttrain.losses.vocab_parallel import vocab_parallel_cross_entropy

__all__ = ["CrossEntropyParts", "cross_entropy", "cross_entropy_parts", "linear_cross_entropy",
           "vocab_parallel_cross_entropy"]
