"""What keeps a model from being divided by a plan, found before anything is changed, on every rank alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import Placement

from fasttrain.optim.local import is_dtensor
from fasttrain.parallel.tensor.names import shown
from fasttrain.parallel.tensor.styles import Column, Row, Style, Whole

WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


def check_bare(model: nn.Module, device_type: str) -> None:
    """Raise if the model is wrapped or sharded already, or lies on another device than the mesh."""
    for name, module in model.named_modules():
        if type(module).__name__ in WRAPPERS:
            raise ValueError(f"{name or 'the model'} is wrapped in {type(module).__name__} already: call "
                             "tensor_parallel on the bare model first, and wrap or compile what it returns")
    p: Any  # a DTensor has more attributes than a Parameter
    for name, p in model.named_parameters():
        if is_dtensor(p) and not getattr(model.get_submodule(name.rpartition(".")[0]), "divides_itself", False):
            raise ValueError(f"{name} is a DTensor already, placed {tuple(p.placements)}: call tensor_parallel once, "
                             "on the bare model, before shard or fully_shard")
        if not p.is_meta and p.device.type != device_type:
            raise ValueError(f"{name} is on {p.device}, and the mesh is of {device_type} devices: move the model there "
                             "first, or make it on the meta device")


def check_styles(model: nn.Module, styles: Mapping[str, tuple[str, Any]], size: int) -> None:
    """Raise if a module cannot have its style over so many ranks: once for all that one pattern means."""
    said: dict[str, tuple[str, str]] = {}
    more: dict[str, int] = {}
    for name, (pattern, style) in styles.items():
        if isinstance(style, Style) and (problem := style.problem(model.get_submodule(name), size)):
            said.setdefault(pattern, (name or "the model", problem))
            more[pattern] = more.get(pattern, -1) + 1
    if said:
        raise ValueError(f"the model cannot be divided over the {size} ranks of the tensor axis: " + "; ".join(
            f"{name}" + (f" (and {more[pattern]} more by {pattern!r})" if more[pattern] else "") + f": {problem}"
            for pattern, (name, problem) in said.items()))


def check_pairs(styles: Mapping[str, tuple[str, Any]]) -> None:
    """Raise if what leaves columns is not read by rows, or rows do not read columns, in the block around both."""
    kinds = {"column": [name for name, (_, style) in styles.items() if isinstance(style, Column)],
             "row": [name for name, (_, style) in styles.items() if isinstance(style, Row)]}
    for kind, other, so in (("column", "row", "what leaves it would stay cut: make the layer that reads it"),
                            ("row", "column", "what it reads would not be cut: make the layers that give it")):
        for name in kinds[kind]:
            block = block_of(name)
            if not any(found.startswith(block) for found in kinds[other]):
                raise ValueError(f"the plan contradicts itself: {name} is \"{kind}\" and nothing in "
                                 f"{block.rstrip('.') or 'the model'} is \"{other}\", so {so} \"{other}\"")


def check_told(model: nn.Module, styles: Mapping[str, tuple[str, Any]]) -> None:
    """Raise if positions are divided and the plan does not say what becomes of some parameters.

    A module that is not named may get a part of the positions; each rank would take its addend for the whole gradient.
    """
    untold = [name for name, p in model.named_parameters() if p.requires_grad and not any(
        name.startswith(f"{owner}." if owner else "") and says(style, name, owner)
        for owner, (_, style) in styles.items())]
    if untold:
        raise ValueError(f"sequence=True divides positions, and the plan says nothing of {', '.join(untold[:3])}"
                         + (f" and {len(untold) - 3} more parameters" if len(untold) > 3 else "") + ": name their "
                         "modules, \"sequence\" where each position is treated by itself (norms), \"replicate\" "
                         "where all are needed; fasttrain.parallel.tensor.styles.Style() for what comes before they "
                         "are divided")


def says(style: Any, name: str, owner: str) -> bool:
    """Whether the style of the module `owner` is meant for a parameter in it.

    What only places the inputs of a module says nothing of its parameters.
    """
    if not isinstance(style, Style) or isinstance(style, Whole) or style.addends:
        return True
    return name.rpartition(".")[0] == owner and (type(style) is not Style or style.input is None)


def block_of(name: str) -> str:
    """The names of what is in a module's block begin so; a block is an element of a list, or the model.

    Example:
        >>> block_of("blocks.3.feed.up"), block_of("feed.0")
        ('blocks.3.', '')
    """
    parts = name.split(".")
    depth = next((depth for depth in range(len(parts) - 1, 0, -1) if parts[depth - 1].isdigit()), 0)
    return "".join(f"{part}." for part in parts[:depth])


def check_tied(model: nn.Module, styles: Mapping[str, tuple[str, Any]]) -> dict[int, Placement]:
    """How each parameter is to be placed, by its id; those that stay plain are left out.

    Raises:
        ValueError: a parameter that several modules share would be placed in several ways.
    """
    placed: dict[tuple[str, int], Placement] = {}
    for name, (_, style) in styles.items():
        module = model.get_submodule(name)
        for inner, placement in style.cuts(module).items() if isinstance(style, Style) else ():
            placed[f"{name}.{inner}" if name else inner, id(module.get_parameter(inner))] = placement
    foreign = {id(p): shown(style) for name, (_, style) in styles.items() if not isinstance(style, Style)
               for p in model.get_submodule(name).parameters()}
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    for identity, names in owners.items():
        ways = [placed.get((name, identity)) for name in names]
        if len(names) > 1 and (identity in foreign or any(way != ways[0] for way in ways)):
            told = ", ".join(f"{name} {foreign.get(identity) or way or 'whole'}"
                             for name, way in zip(names, ways, strict=True))
            raise ValueError(f"{names[0]} is one parameter with {', '.join(names[1:])}, and the plan places it in "
                             f"several ways ({told}): give all its modules the same (an Embedding and the Linear that "
                             "is tied to it: \"vocabulary\")")
    return {identity: placement for (_, identity), placement in placed.items()}
