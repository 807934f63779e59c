"""What a step refuses, and in which words: hyperparameters, tensors and step counts that cannot be stepped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.kernels.item import STORAGES, overlaps

COUNTERS = (torch.float32, torch.float64, torch.int32, torch.int64)


def number(value: Any) -> Any:
    """Hyperparameters as Python numbers: tensors (a tensor lr) are read, pairs are read element by element.

    A NumPy number is converted too: left as it is, ``1 - lr`` would be computed in its precision.
    """
    if isinstance(value, (Tensor, np.generic)):
        return value.item()
    return tuple(map(number, value)) if isinstance(value, (tuple, list)) else value


def check_hyperparameters(count: int = 2, **values: Any) -> None:
    """Raise torch's own errors for hyperparameters that are out of range: `lr`, `eps`, `betas` (as many as `count`),
    and others, which must not be negative.
    """
    lr = values.pop("lr")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= lr:
        raise ValueError(f"Invalid learning rate: {lr}")
    eps = values.pop("eps", 0.0)
    if not 0.0 <= eps:
        raise ValueError(f"Invalid epsilon value: {eps}")
    betas = values.pop("betas", None)
    if betas is not None and len(betas) != count:
        raise ValueError(f"betas has {len(betas)} numbers, not {count}: {betas}")
    for index, beta in enumerate(betas or ()):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    for name, value in values.items():
        if not 0.0 <= value:
            raise ValueError(f"Invalid {name} value: {value}")


def check_memory(what: str, tensor: Tensor) -> None:
    """Raise if the elements of a tensor cannot be read and written where its pointer says."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(f"{what} is a {type(tensor).__name__} ({tensor.layout}, on {tensor.device}), which has no "
                        "elements in memory of its own: a step needs dense tensors with data")
    if not what.endswith("gradient") and (tensor.is_conj() or tensor.is_neg()):  # a gradient is only read
        raise TypeError(f"{what} is a conjugated or negated view, whose elements in memory are others: clone() it")
    if tensor._is_zerotensor() or (tensor.numel() and tensor.data_ptr() == 0):
        raise RuntimeError(f"{what} has {tensor.numel()} elements and no memory (its storage was freed)")


def check_counter(name: str, counter: Any) -> None:
    """Raise if a step count cannot be read and incremented."""
    if not isinstance(counter, Tensor):
        raise TypeError(f"{name}: its step count is a {type(counter).__name__}, not a tensor; "
                        "load the checkpoint with load_state_dict, which converts it")
    if counter.numel() != 1 or counter.dtype not in COUNTERS:
        raise TypeError(f"{name}: its step count is {counter.dtype} of shape {tuple(counter.shape)}; it must be one "
                        f"{', '.join(str(dtype).removeprefix('torch.') for dtype in COUNTERS)}")


def check_running(name: str, key: str, state: Mapping[str, Any]) -> None:
    """Raise if a state that is one number for the whole parameter is not."""
    kept = state.get(key)
    if not isinstance(kept, Tensor) or kept.numel() != 1 or not kept.is_floating_point():
        found = f"is {kept.dtype} of shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else f"is {kept!r}"
        raise TypeError(f"{name}: its state {key!r} {found}; it must be one floating-point number in a tensor")


def plain(tensor: Tensor) -> Tensor:
    """The same tensor without its Python subclass."""
    return tensor if type(tensor) in (Tensor, torch.nn.Parameter) else tensor.as_subclass(Tensor)


def check_gradient(name: str, p: Tensor, grad: Tensor) -> None:
    """Raise if the gradient of a parameter does not fit it, or if one of them has no elements in memory."""
    if p.device != grad.device or p.shape != grad.shape:
        raise RuntimeError(f"{name}: its gradient has shape {tuple(grad.shape)} on {grad.device}, the parameter "
                           f"{tuple(p.shape)} on {p.device}; they must agree")
    for what, tensor in (("the parameter", p), ("its gradient", grad)):
        check_memory(f"{name}: {what}", tensor)
    if p.is_complex() != grad.is_complex():
        raise TypeError(f"{name}: the parameter is {p.dtype} and its gradient {grad.dtype}: both must be complex, "
                        "or none")


def reals(name: str, p: Tensor, grad: Tensor, keys: Sequence[str], state: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The parameter, its gradient and the states named by `keys` as plain real tensors that a step can take."""
    tensors = [p, grad.resolve_conj().resolve_neg()]
    for key in keys:
        kept = state.get(key)
        if not isinstance(kept, Tensor):
            raise RuntimeError(f"{name}: its state has no tensor {key!r} (it has {', '.join(map(str, state))}); "
                               "delete optimizer.state[p] to start it afresh")
        if kept.shape != p.shape or kept.device != p.device or kept.is_complex() != p.is_complex():
            raise RuntimeError(f"{name}: its state {key!r} is {kept.dtype} of shape {tuple(kept.shape)} on "
                               f"{kept.device}, the parameter {p.dtype} of {tuple(p.shape)} on {p.device}")
        check_memory(f"{name}: its state {key!r}", kept)
        tensors.append(kept)
    if p.is_complex():  # torch's meaning: a complex number is two real ones
        tensors = [torch.view_as_real(tensor) for tensor in tensors]
    tensors = [plain(tensor) for tensor in tensors]
    for what, tensor in zip(("the parameter", "its gradient", *keys), tensors, strict=True):
        if tensor.dtype not in STORAGES:
            raise TypeError(f"{name}: {what} is {tensor.dtype}; a step takes "
                            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in STORAGES)}")
        if what != "its gradient" and overlaps(tensor):
            raise ValueError(f"{name}: some elements of {what} share memory (an expanded or overlapping view): "
                             "clone() it")
    return tuple(tensors)
