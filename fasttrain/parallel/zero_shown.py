"""What `p.grad` is while gradients lie in shards: nothing that can be read, so that no clipping clips nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

REMEDY = ("clip with clip_grad_norm_ of the Zero, scale the loss with fasttrain.LossScaler, measure with "
          "grad_statistics(), forget gradients with zero_grad() of the Zero")


class InShards(Tensor):
    """In the place of a gradient of which each rank has its part: without memory; whatever reads or writes it raises.

    With None there `torch.nn.utils.clip_grad_norm_`, a logged norm or `zero_grad(set_to_none=False)` would silently do
    nothing. The next backward pass takes it away; the gradient that autograd adds to it before is kept in `came`.
    """

    of: str  # the parameter's name
    came: Tensor | None

    @staticmethod
    def __new__(cls, p: Tensor, name: str) -> InShards:
        made = Tensor._make_wrapper_subclass(cls, p.shape, strides=p.stride(), dtype=p.dtype, device=p.device)
        made.of, made.came = name, None
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # what torch asks for

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the bound one
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add_.Tensor and isinstance(args[0], cls) and torch._C._current_graph_task_id() != -1:
            held, grad = args[0], args[1]
            held.came = grad if held.came is None else held.came + grad
            return held
        names = list(dict.fromkeys(one.of for one in _found((*args, *(kwargs or {}).values()))))
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        raise RuntimeError(f"{func} finds no gradient of {names[0]}{more}: the means over ranks lie in shards, of "
                           f"which each rank has its own (Zero); {REMEDY}")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<the gradient of {self.of} lies in shards over the ranks>"


def _found(given: Iterable[Any]) -> Iterator[InShards]:
    for one in given:
        if isinstance(one, InShards):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from _found(one)


class Shown:
    """Puts `InShards` in the place of the gradients of parameters, and takes them away."""

    def __init__(self, params: Sequence[Tensor], names: Sequence[str]):
        self.params = params
        self._instead = [InShards(p, name) for p, name in zip(params, names, strict=True)]
        self._there = False

    def show(self, used: Sequence[bool]) -> None:
        """Those parameters have gradients, in shards; the others have none."""
        for p, instead, has in zip(self.params, self._instead, used, strict=True):
            p.grad = instead if has else None
        self._there = True

    def clear(self) -> None:
        """Only what came since is a gradient."""
        if not self._there:
            return
        self._there = False
        for p, instead in zip(self.params, self._instead, strict=True):
            if p.grad is instead:
                p.grad, instead.came = instead.came, None
