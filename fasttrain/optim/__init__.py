"""Optimizers with the face of `torch.optim` and one fused pass over memory.

To add one: write its page (a small file beside `lion.py`) and name its class in `OPTIMIZERS`.
"""

from fasttrain.optim.adadelta import Adadelta
from fasttrain.optim.adafactor import Adafactor
from fasttrain.optim.adagrad import Adagrad
from fasttrain.optim.adamax import Adamax
from fasttrain.optim.adamw import Adam, AdamW
from fasttrain.optim.adan import Adan
from fasttrain.optim.ademamix import AdEMAMix
from fasttrain.optim.asgd import ASGD
from fasttrain.optim.clip import clip_grad_norm
from fasttrain.optim.lamb import LAMB
from fasttrain.optim.lars import LARS
from fasttrain.optim.lion import Lion
from fasttrain.optim.muon import Muon
from fasttrain.optim.nadam import NAdam
from fasttrain.optim.optimizer import Optimizer
from fasttrain.optim.radam import RAdam
from fasttrain.optim.rmsprop import RMSprop
from fasttrain.optim.rprop import Rprop
from fasttrain.optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from fasttrain.optim.sgd import SGD
from fasttrain.optim.soap import SOAP
from fasttrain.optim.stable_adamw import StableAdamW
from fasttrain.optim.statedict import consolidate, convert, distribute
from fasttrain.rule import Rule

__all__ = ["ASGD", "AdEMAMix", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Adan", "LAMB", "LARS",
           "Lion", "Muon", "NAdam", "Optimizer", "RAdam", "RMSprop", "Rprop", "SGD", "SOAP", "ScheduleFreeAdamW",
           "ScheduleFreeSGD", "StableAdamW", "clip_grad_norm", "consolidate", "convert",
           "distribute"]

# Compiled for GPUs ahead of time in every usual combination of storages; the others in float32 and in float64.
COMMON: tuple[type[Optimizer], ...] = (AdamW, SGD, Lion)
OPTIMIZERS: tuple[type[Optimizer], ...] = (
    *COMMON, Adadelta, Adagrad, Adamax, Adan, AdEMAMix, ASGD, NAdam, RAdam, RMSprop, Rprop, ScheduleFreeAdamW,
    ScheduleFreeSGD)
COMPOSED: tuple[type[Optimizer], ...] = (Muon, Adafactor, LAMB, LARS, StableAdamW, SOAP)  # not elementwise


def rules_of(optimizers: tuple[type[Optimizer], ...]) -> tuple[Rule, ...]:
    return tuple(dict.fromkeys(rule for optimizer in optimizers for rule in optimizer.rules if rule.sums is None))


# Every rule once, in the order of `csrc/rules.h`.
ELEMENTWISE_RULES: tuple[Rule, ...] = rules_of(OPTIMIZERS)
RULES: tuple[Rule, ...] = rules_of((*OPTIMIZERS, *COMPOSED))
COMMON_RULES: tuple[Rule, ...] = rules_of(COMMON)
# The stages of optimizers with reductions, in the order of `csrc/stage_rules.h`.
STAGES: tuple[Rule, ...] = tuple(
    dict.fromkeys(rule for optimizer in COMPOSED for rule in optimizer.rules if rule.sums is not None))
