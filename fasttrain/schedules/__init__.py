"""Schedules: pure functions of the step, joined with `+` and multiplied with `*`; and how an optimizer follows them.

Only `Scheduler` needs torch; it is imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from fasttrain.schedules.falls import exponential, multi_step, points, step_decay
from fasttrain.schedules.pieces import cosine, inverse_sqrt, linear, polynomial, restarts, warmup
from fasttrain.schedules.plateau import Plateau
from fasttrain.schedules.runs import cyclic, decay, one_cycle, warmup_cosine, warmup_stable_decay
from fasttrain.schedules.schedule import Schedule, as_schedule, constant, first, function, rounded
from fasttrain.schedules.text import parse

if TYPE_CHECKING:
    from fasttrain.schedules.scheduler import Scheduler

__all__ = ["Schedule", "Scheduler", "Plateau", "parse", "as_schedule",
           "constant", "warmup", "linear", "cosine", "restarts", "polynomial", "inverse_sqrt", "exponential",
           "step_decay", "multi_step", "points", "decay", "cyclic", "one_cycle", "warmup_cosine",
           "warmup_stable_decay", "first", "rounded", "function"]


def __getattr__(name: str) -> Any:
    if name == "Scheduler":
        from fasttrain.schedules.scheduler import Scheduler

        return Scheduler
    raise AttributeError(f"module 'fasttrain.schedules' has no attribute {name!r}")
