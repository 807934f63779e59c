"""What each part of a model costs: measured where it is real, counted where it is on the meta device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fasttrain.parallel.pipeline.parts import parted


def measured(model: nn.Module, sample: Any, repeat: int = 5) -> list[float]:
    """Seconds of each part for forward and backward, the median of several; the model is left as it was.

    Arguments:
        model: whole; its parameters are real.
        sample: a micro-batch of its inputs, on the device of the model.
        repeat: how often each part runs, after once for warming up.
    """
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    found = []
    with torch.random.fork_rng(devices), torch.enable_grad():
        x = sample
        for name in parted(model).parts():
            seconds, x = _seconds(model, name, x, repeat)
            found.append(seconds)
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
    return found


def _seconds(model: nn.Module, part: str, given: Any, repeat: int) -> tuple[float, Any]:
    params = [p for p in model.parameters() if p.requires_grad]
    taken = []
    for _ in range(repeat + 1):
        x = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), given)
        _settle(params)
        begun = time.perf_counter()
        y = parted(model).run([part], x)
        outputs = [t for t in _tensors(y) if t.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, [*params, *(t for t in _tensors(x) if t.requires_grad)],
                                [torch.ones_like(t) for t in outputs], allow_unused=True)
        _settle(params)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:]), tree_map_only(Tensor, Tensor.detach, y)


def _settle(params: Sequence[Tensor]) -> None:
    if params and params[0].is_cuda:
        torch.cuda.synchronize(params[0].device)


def _tensors(given: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, Tensor)]


def counted(model: nn.Module, sample: Any = None) -> list[float]:
    """Costs of each part without running it: floating-point operations, or the number of parameters.

    Arguments:
        model: whole; it may be on the meta device.
        sample: a micro-batch of its inputs, of which only shape and dtype are looked at; the cost is then the number
            of operations in matrix products and attention. None: the number of parameters but for embeddings, of which
            few rows are read.
    """
    if sample is None:
        return [float(sum(p.numel() for p in _held(model, name))) for name in parted(model).parts()]
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    found = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        x = tree_map_only(Tensor, lambda t: mode.from_tensor(t) if t.device.type != "meta" else t, sample)
        for name in parted(model).parts():
            with FlopCounterMode(display=False) as counter:
                x = parted(model).run([name], x)
            found.append(3.0 * counter.get_total_flops())  # a product has two more in its backward pass
    return found


def _held(model: nn.Module, part: str) -> Iterable[Tensor]:
    """The parameters of a part, without embeddings."""
    from fasttrain.parallel.pipeline.parts import names_in

    rows = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return [p for p in map(model.get_parameter, names_in(model, [part])) if id(p) not in rows]
