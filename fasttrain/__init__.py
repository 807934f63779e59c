"""Fused optimizer steps and gradient buckets for training large neural networks.

The package is imported lazily: ``import fasttrain`` loads nothing but this file.
"""

__version__ = "0.1.0"
