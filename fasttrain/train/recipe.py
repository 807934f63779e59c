"""From a name to an optimizer with settings that suit the model of this package."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from fasttrain.train.config import BadInput, TrainConfig

RECIPES: dict[str, dict[str, Any]] = {
    "AdamW": dict(lr=6e-3, betas=(0.9, 0.95), weight_decay=0.1),
    "Adam": dict(lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0),
    "Lion": dict(lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1),
    "SGD": dict(lr=1.0, momentum=0.9, weight_decay=0.0, nesterov=True),
    "Adadelta": dict(lr=10.0, weight_decay=0.0),
    "Adagrad": dict(lr=3e-2, weight_decay=0.0),
    "Adamax": dict(lr=1.2e-2, betas=(0.9, 0.95), weight_decay=0.0),
    "LAMB": dict(lr=6e-3, betas=(0.9, 0.95), weight_decay=0.1),
    "Muon": dict(lr=6e-3, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    "StableAdamW": dict(lr=6e-3, betas=(0.9, 0.95), weight_decay=0.1),
    "Adan": dict(lr=3e-2, weight_decay=0.02),
    "AdEMAMix": dict(lr=6e-3, betas=(0.9, 0.95, 0.999), weight_decay=0.1),
    "NAdam": dict(lr=6e-3, betas=(0.9, 0.95), weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": dict(lr=6e-3, betas=(0.9, 0.95), weight_decay=0.1, decoupled_weight_decay=True),
    "RMSprop": dict(lr=3e-3, alpha=0.95, weight_decay=0.0),
}

UNFIT = {
    "torch.LBFGS": "its step calls the model again, which the loop does not let it",
    "torch.Muon": "it takes matrices only, and the model has gains; Muon without torch. steps those with AdamW",
    "torch.SparseAdam": "it takes sparse gradients only, and the model's are not",
}
UNFIT_FOR_SHARDS = ("torch.Adafactor", "torch.Rprop")  # write, in place, what DTensor would have to lay out anew


def optimizer_class(name: str) -> type:
    """`X` is ``fasttrain.optim.X``, `torch.X` is ``torch.optim.X``.

    Raises:
        BadInput: there is none of that name; the message lists those there are.
    """
    module, _, stem = name.rpartition(".")
    if module not in ("", "torch"):
        raise BadInput(f"--optimizer {name}: write X for fasttrain.optim.X, or torch.X for torch.optim.X")
    space = importlib.import_module("torch.optim" if module else "fasttrain.optim")
    from torch.optim import Optimizer

    known = sorted(n for n, v in vars(space).items() if inspect.isclass(v) and issubclass(v, Optimizer)
                   and v is not Optimizer and n != "Optimizer")
    if stem not in known:
        prefix = "torch." if module else ""
        raise BadInput(f"--optimizer {name}: unknown; there are {', '.join(prefix + n for n in known)}")
    return getattr(space, stem)


def settings(config: TrainConfig) -> dict[str, Any]:
    """The optimizer's arguments: its recipe, with what the user gave in its place.

    Raises:
        BadInput: the optimizer has no recipe and no `--lr` was given.
    """
    chosen = dict(RECIPES.get(config.optimizer.removeprefix("torch."), {}))
    chosen.update({k: v for k in ("lr", "weight_decay") if (v := getattr(config, k)) is not None})
    if "lr" not in chosen:
        raise BadInput(f"--optimizer {config.optimizer} has no usual learning rate here; give one with --lr")
    return chosen


def build(config: TrainConfig, model: Any, **options: Any) -> Any:
    """The optimizer over two groups: matrices, which decay, and gains (one dimension), which do not.

    Args:
        model: with `config.zero` of 1 or 2 a `fasttrain.parallel.DataParallel`, of 3 one that is sharded already.
        options: further arguments of the optimizer, as those of `fasttrain.precision.storage`.
    """
    chosen = settings(config)
    from fasttrain.guards.decay import decay_groups  # torch, which `check` need not load
    from fasttrain.train.making import precision_of

    if config.ema is not None:
        options = {"ema_decay": config.ema, **options}
    groups = precision_of(config).groups(decay_groups(model))
    kind = optimizer_class(config.optimizer)
    if config.zero in (1, 2):
        from fasttrain.parallel import Zero

        return Zero(groups, kind, stage=config.zero, **{**chosen, **options})
    return kind(groups, **{**chosen, **options})


def check(config: TrainConfig) -> None:
    """Refuse an optimizer that does not exist or does not take its settings, before anything is started.

    The default and its stock twin are known to exist: for them torch, which takes a second, is not imported.
    """
    if config.optimizer in ("AdamW", "torch.AdamW"):
        return
    if why := UNFIT.get(config.optimizer):
        raise BadInput(f"--optimizer {config.optimizer}: {why}")
    if config.zero == 3 and config.optimizer in UNFIT_FOR_SHARDS:
        raise BadInput(f"--zero 3 with --optimizer {config.optimizer}: torch's cannot step shards of parameters; use "
                       f"{config.optimizer.removeprefix('torch.')}, which can, or --zero 2")
    accepted = inspect.signature(optimizer_class(config.optimizer)).parameters
    if extra := [k for k in settings(config) if k not in accepted]:
        raise BadInput(f"--optimizer {config.optimizer} does not take --{extra[0].replace('_', '-')}")
    cut = "--tensor" if config.tensor > 1 else "--expert" if config.expert > 1 else ""
    if not config.optimizer.startswith("torch.") and (config.ema is not None or cut):
        _check_elements(config, cut)


def _check_elements(config: TrainConfig, cut: str) -> None:
    """Refuse what only optimizers that step every element by itself can do."""
    import torch

    optimizer = optimizer_class(config.optimizer)([torch.nn.Parameter(torch.ones(2, 2))], **settings(config))
    if all(map(optimizer.takes_storage, optimizer.param_groups)):
        return
    if config.ema is not None:
        raise BadInput(f"--ema with --optimizer {config.optimizer}: it does not step every element by itself, and "
                       "keeps no average; use AdamW")
    if config.zero in (1, 2):
        raise BadInput(f"--zero {config.zero} with {cut} and --optimizer {config.optimizer}: it needs whole "
                       "parameters, of which no process has any; use --zero 3, or 0")
