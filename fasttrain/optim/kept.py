"""The arrays of a parameter whose group does not keep everything as torch does: made, checked, brought up to date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttrain.optim.checks import check_memory, plain
from fasttrain.optim.part import size_of
from fasttrain.optim.placing import cuts_blocks
from fasttrain.precision.codecs import PLAIN, STOCHASTIC, array_shapes, code_dtype, codec, decode, encode
from fasttrain.precision.storage import EXTRA_KEYS, describe, ema_codec, is_plain, param_codec, state_codec
from fasttrain.rule import Rule

EMA = "ema"
BLOCKS = 512  # elements: a whole number of blocks of every code


@dataclass(frozen=True)
class Layout:
    """Where the operands of one parameter are: p, g, the rule's states, and the EMA if there is one.

    Attributes:
        codecs: their numbers.
        keys: names in the optimizer's state of the first arrays; None for p and g.
        extras: names of the second arrays, None where there is none.
        widened: states that are fp32 though the options say a block code, because shards cut its blocks.
    """

    codecs: tuple[int, ...]
    keys: tuple[str | None, ...]
    extras: tuple[str | None, ...]
    widened: tuple[str, ...] = ()

    @property
    def averaged(self) -> bool:
        return self.keys[-1] == EMA

    @property
    def stochastic(self) -> bool:
        return any(number & STOCHASTIC for number in self.codecs)

    def shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...] | None]:
        """The names in the optimizer's state, and the shapes that their arrays have for a parameter of some shape."""
        found: dict[str, tuple[int, ...] | None] = {}
        for number, *names in zip(self.codecs, self.keys, self.extras, strict=True):
            pairs = zip(names, array_shapes(number, shape), strict=True)
            found.update((name, array_shape) for name, array_shape in pairs if name is not None)
        return found


def layout(name: str, p: Tensor, grad_dtype: torch.dtype, group: Mapping[str, Any], rule: Rule,
           scalars: Mapping[str, float]) -> Layout:
    """How the group's options keep a parameter and its states.

    Arguments:
        name: how errors call the parameter.
        scalars: coefficients of the rule at some step after the first.

    Raises:
        ValueError, TypeError: the parameter cannot be kept so.
    """
    if p.is_complex() or p.dtype not in PLAIN or grad_dtype not in PLAIN:
        raise TypeError(f"{name} is {p.dtype} with a gradient of {grad_dtype}; a group with {describe(group)} takes "
                        "real floating-point parameters: put it into a group of its own")
    own = param_codec(name, p.dtype, group)
    states = [state_codec(name, state, p.dtype, size_of(p), group, rule, scalars) for state in rule.state]
    widened: tuple[str, ...] = ()
    if any(codec(number).block for number in states) and cuts_blocks(p, BLOCKS):
        widened = tuple(key for key, number in zip(rule.state, states, strict=True) if codec(number).block)
        states = [PLAIN[torch.float32] if codec(number).block else number for number in states]
    codecs, keys = [own, PLAIN[grad_dtype], *states], [None, None, *rule.state]
    if group.get("ema_decay") is not None:
        codecs.append(ema_codec(p.dtype, group))
        keys.append(EMA)
    scales = [f"{key}_scale" if codec(number).block else None for number, key in zip(codecs, keys, strict=True)]
    extras = [EXTRA_KEYS.get(codec(own).name), None, *scales[2:]]
    return Layout(tuple(codecs), tuple(keys), tuple(extras), widened)


def arrays(number: int, like: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Both arrays of an operand, zero or encoding the values.

    Arguments:
        like: the parameter, whose shape, order and device they take.
        values: of the parameter's shape.
    """
    kept = codec(number)
    main_shape, extra_shape = array_shapes(number, like.shape)
    extra: Tensor | None = None
    if kept.block:
        main = torch.zeros(main_shape, dtype=code_dtype(number), device=like.device)
        extra = torch.zeros(extra_shape or (), dtype=kept.extra, device=like.device)
    else:
        main = torch.zeros_like(like, dtype=kept.main, memory_format=torch.preserve_format)
        extra = torch.zeros_like(main, dtype=kept.extra) if kept.extra is not None else None
    if values is not None and like.numel():
        values = values.to(torch.float64 if kept.name == "f64" else torch.float32)
        encode(number & ~STOCHASTIC, values.reshape(-1) if kept.block else values, main, extra, None)
    return main, extra


def values(number: int, main: Tensor, extra: Tensor | None, shape: torch.Size) -> Tensor:
    """What an operand stands for, of the parameter's shape."""
    return decode(number, main, extra, shape.numel()).reshape(shape)


def complete(p: Tensor, state: dict[str, Any], kept: Layout, fresh: bool) -> list[str]:
    """Make what is missing, and turn states that torch just made into what the layout wants; the names of both."""
    before = dict(state)
    own = codec(kept.codecs[0])
    if kept.extras[0] is not None and kept.extras[0] not in state:
        second = torch.zeros_like(p, dtype=own.extra, memory_format=torch.preserve_format)
        state[kept.extras[0]] = second.copy_(p) if own.name.startswith("master") else second
    for number, key, extra_key in list(zip(kept.codecs, kept.keys, kept.extras, strict=True))[2:]:
        assert key is not None
        if key == EMA and EMA not in state:
            state[EMA] = arrays(number, p, _exact(p, state, kept))[0]
        elif fresh and key in state and (state[key].dtype != code_dtype(number) or extra_key is not None):
            state[key], extra = arrays(number, p, state[key])
            if extra_key is not None:
                state[extra_key] = extra
    return [key for key, value in state.items() if before.get(key) is not value]


def _exact(p: Tensor, state: Mapping[str, Any], kept: Layout) -> Tensor:
    extra = None if kept.extras[0] is None else plain(state[kept.extras[0]])
    return values(kept.codecs[0], p.detach(), extra, p.shape)


def full_precision(p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """A parameter with all the digits that its master keeps."""
    number = PLAIN[p.dtype] if is_plain(group) else param_codec("the parameter", p.dtype, group)
    key = EXTRA_KEYS.get(codec(number).name)
    if key is None or key not in state:
        return p.detach().to(torch.float64 if p.dtype == torch.float64 else torch.float32).clone()
    return values(number, plain(p.detach()), plain(state[key]), p.shape)


def set_full_precision(name: str, p: Tensor, value: Tensor, state: Mapping[str, Any],
                       group: Mapping[str, Any]) -> Tensor | None:
    """Set a parameter and its second array from a weight in fp32; the array, if the state has none to be written."""
    number = PLAIN[p.dtype] if is_plain(group) else param_codec(name, p.dtype, group)
    main, extra = arrays(number & ~STOCHASTIC, p, value.to(p.device))
    p.copy_(main)
    if extra is None:
        return None
    key = EXTRA_KEYS[codec(number).name]
    if key in state:
        state[key].copy_(extra)
        return None
    return extra


def follow(p: Tensor, state: Mapping[str, Any], kept: Layout) -> None:
    """Bring master, remainder or compensation up to date with a parameter that was written outside of the step."""
    key = kept.extras[0]
    if key is None:
        return
    extra = state[key]
    if codec(kept.codecs[0]).name.startswith("master"):  # elements that were not touched keep their digits
        extra.copy_(torch.where(extra.to(p.dtype) == p, extra, p.float()))
    else:
        extra.zero_()


def operands(name: str, p: Tensor, grad: Tensor, state: Mapping[str, Any], kept: Layout,
             group: Mapping[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The first and the second arrays, checked.

    Raises:
        RuntimeError, TypeError: an array is missing, or is not what the group's options say.
    """
    mains, extras = [p, grad], [None if kept.extras[0] is None else state.get(kept.extras[0]), None]
    for key, extra_key in list(zip(kept.keys, kept.extras, strict=True))[2:]:
        mains.append(state.get(key))  # type: ignore[arg-type]
        extras.append(None if extra_key is None else state.get(extra_key))
    for index, number in enumerate(kept.codecs):
        shapes = array_shapes(number, p.shape)
        dtypes = (code_dtype(number), codec(number).extra)
        for array, shape, dtype, key in zip((mains[index], extras[index]), shapes, dtypes,
                                            (kept.keys[index], kept.extras[index]), strict=True):
            if key is None:
                continue
            if not isinstance(array, Tensor) or array.dtype != dtype or tuple(array.shape) != shape:
                found = (f"{array.dtype} of shape {tuple(array.shape)}" if isinstance(array, Tensor)
                         else f"missing (there are {', '.join(map(str, state))})")
                raise RuntimeError(f"{name}: its state {key!r} is {found}; a group with {describe(group)} keeps "
                                   f"{dtype} of shape {shape}. Convert the state dict (fasttrain.optim.convert) before "
                                   "it is loaded, or delete optimizer.state[p] to start it afresh")
            if array.device != p.device:
                raise RuntimeError(f"{name}: its state {key!r} is on {array.device}, the parameter on {p.device}")
            check_memory(f"{name}: its state {key!r}", array)
    return tuple(plain(main) for main in mains), tuple(None if extra is None else plain(extra) for extra in extras)
