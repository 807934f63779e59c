"""Parts of parameters: flat tensors that are an interval of a parameter, or of what a process holds of one.

What depends on the whole (random draws, how large it is) is then as it would be for the whole, so that a parameter
that is stepped in parts comes out in the same bits. `fasttrain.parallel.Zero` makes them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Part(NamedTuple):
    """Where a part belongs.

    Attributes:
        identity: 64 bits that stand for the whole parameter in random draws.
        first: the part's first element, counted in the row-major whole.
        elements: of the whole.
        run, pitch: its elements lie in runs of this length that begin `pitch` apart in the whole, the first of them at
            `first`; a run of 0 is endless.
        blocks: blocks of elements that begin with it are blocks of the whole.
    """

    identity: int
    first: int
    elements: int
    run: int = 0
    pitch: int = 0
    blocks: bool = True


_parts: WeakIdKeyDictionary = WeakIdKeyDictionary()
_names: WeakIdKeyDictionary = WeakIdKeyDictionary()


def declare(tensor: Tensor, part: Part) -> None:
    """Let a tensor be a part, before an optimizer is made of it."""
    _parts[tensor] = part


def pass_on(tensor: Tensor, twin: Tensor) -> None:
    """Let a twin be the part that a tensor is, if it is one, and have its name."""
    if (part := declared(tensor)) is not None:
        declare(twin, part)
    if (name := called(tensor)) is not None:
        call(twin, name)


def declared(tensor: Tensor) -> Part | None:
    """Of what the tensor is a part; None if it is a whole."""
    return _parts.get(tensor) if _parts else None


def call(p: Tensor, name: str) -> None:
    """Let a parameter stand under this name in random draws, whatever an optimizer is told: copies that several
    processes have under several names then stay equal."""
    _names[p] = name


def called(p: Tensor) -> str | None:
    """The name of a parameter in random draws, if it has one of its own."""
    return _names.get(p) if _names else None


def size_of(tensor: Tensor) -> int:
    """The elements of the whole."""
    part = declared(tensor)
    return tensor.numel() if part is None else part.elements
