"""Evaluation with the averaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def ema(*optimizers: Any, model: nn.Module | None = None, required: bool = True) -> Iterator[bool]:
    """The parameters hold their averages (`ema_decay=`) inside the block, and afterwards the bits that they had.

    Also after an exception, with `fasttrain.parallel.Zero` (every rank enters it) and on shards of `fully_shard`. What
    is no parameter, as the running statistics of a batch normalisation, has no average and stays.

    Arguments:
        optimizers: of this package, or `Zero`; those without an average leave their parameters as they are.
        model: put into evaluation mode, and each of its modules back into the mode that it had.
        required: that there is an average at all; else the block runs with the weights themselves.

    Yields:
        Whether there is an average.

    Raises:
        RuntimeError: no optimizer keeps an average, and `required`; or the block is inside another.

    Example:
        >>> import torch
        >>> from fasttrain.optim import SGD
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = SGD(model.parameters(), lr=1.0, ema_decay=0.5)
        >>> weight = model.weight.item()
        >>> model(torch.ones(1, 1)).sum().backward()
        >>> optimizer.step()
        >>> with ema(optimizer, model=model):
        ...     round(weight - model.weight.item(), 6), model.training
        (0.5, False)
        >>> round(weight - model.weight.item(), 6), model.training
        (1.0, True)
    """
    keeping = [one for one in optimizers if hasattr(one, "ema_weights")
               and any(group.get("ema_decay") is not None for group in one.param_groups)]
    if required and not keeping:
        kinds = ", ".join(type(one).__name__ for one in optimizers) or "no optimizer"
        raise RuntimeError(f"{kinds}: there is no average of the weights; give an optimizer of fasttrain "
                           "ema_decay=0.999, for example")
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for optimizer in keeping:
            stack.enter_context(optimizer.ema_weights())
        if model is not None:
            model.eval()
        try:
            yield bool(keeping)
        finally:
            for module, training in modes:
                module.training = training
