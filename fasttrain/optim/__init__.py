"""Optimizers with the face of `torch.optim` and one fused pass over memory.

To add one: write its page (a small file beside `lion.py`) and name its class in `OPTIMIZERS`.
"""

from fasttrain.optim.adafactor import Adafactor
from fasttrain.optim.adamw import Adam, AdamW
from fasttrain.optim.lion import Lion
from fasttrain.optim.muon import Muon
from fasttrain.optim.optimizer import Optimizer
from fasttrain.optim.sgd import SGD
from fasttrain.rule import Rule

__all__ = ["Adafactor", "Adam", "AdamW", "Lion", "Muon", "Optimizer", "SGD"]

OPTIMIZERS: tuple[type[Optimizer], ...] = (AdamW, SGD, Lion)
COMPOSED: tuple[type[Optimizer], ...] = (Muon, Adafactor)  # not elementwise

# Every rule once, in the order of `csrc/rules.h`.
RULES: tuple[Rule, ...] = tuple(
    dict.fromkeys(rule for optimizer in (*OPTIMIZERS, *COMPOSED) for rule in optimizer.rules))
