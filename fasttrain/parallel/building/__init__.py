"""Models built on meta, of which each process makes or reads its own part only: see docs/building.md."""

from fasttrain.parallel.building.materialize import materialize
from fasttrain.parallel.building.pretrained import load_pretrained
from fasttrain.parallel.building.rules import Constant, Normal, Ones, Rule, TruncNormal, Uniform, Zeros

__all__ = ["Constant", "Normal", "Ones", "Rule", "TruncNormal", "Uniform", "Zeros", "load_pretrained", "materialize"]
