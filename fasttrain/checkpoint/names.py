"""Names of tensors in the original model, whatever is wrapped around it: the one place where prefixes are taken off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fasttrain.parallel import DataParallel

WRAPPERS = (DataParallel, nn.parallel.DistributedDataParallel, nn.DataParallel)  # hold the model as `module`
RESERVED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # nobody else has modules of these names


def bare(model: nn.Module) -> nn.Module:
    """The model without what is wrapped around it as a whole: data parallelism, `torch.compile`.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> bare(nn.DataParallel(model)) is model
        True
    """
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def strip(name: str) -> str:
    """A name without the prefixes that wrappers put into it, as far as a name alone tells.

    Example:
        >>> strip("module._orig_mod.blocks.0._checkpoint_wrapped_module.weight")
        'blocks.0.weight'
    """
    parts = [part for part in name.split(".") if part not in RESERVED]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def names_in(model: nn.Module, entries: Iterable[str]) -> dict[str, str]:
    """The names in the original model of some tensors of the bare one.

    Arguments:
        model: without what is wrapped around it as a whole (`bare`).
        entries: of its state dict.

    Raises:
        ValueError: two of them have one name, without their wrappers.
    """
    inside = _inside(model)
    found = {name: _clean(name, inside) for name in entries}
    seen: dict[str, str] = {}
    for name, clean in found.items():
        if clean in seen:
            raise ValueError(f"{seen[clean]} and {name} are both {clean!r} without their wrappers: rename one")
        seen[clean] = name
    return found


def _inside(model: nn.Module) -> list[str]:
    """Where wrappers inside a model hold what they wrap, innermost first."""
    found = [f"{path}.module" if path else "module" for path, part in model.named_modules(remove_duplicate=False)
             if isinstance(part, WRAPPERS)]
    return sorted(found, key=len, reverse=True)


def _clean(name: str, inside: Sequence[str]) -> str:
    for path in inside:
        if name.startswith(f"{path}."):
            name = path.removesuffix("module").removesuffix(".") + name[len(path):]
            name = name.removeprefix(".")
    if any(part in name for part in RESERVED):
        return ".".join(part for part in name.split(".") if part not in RESERVED)
    return name


def ties_of_whole(model: nn.Module) -> Mapping[str, str]:
    """The first names of parameters that were tied to others in the model which this is a part of, by their own names.

    A pipeline's stage that has the head, and not the embedding to which it was tied, has an attribute `whole_ties`
    that says so: ``{"head.weight": "embedding.weight"}``. What the part has under its first name too is tied there.

    Example:
        >>> stage = nn.Linear(2, 2, bias=False)
        >>> stage.whole_ties = {"weight": "embedding.weight"}
        >>> ties_of_whole(stage)
        {'weight': 'embedding.weight'}
    """
    inner = bare(model)
    told: Mapping[str, str] = getattr(inner, "whole_ties", {})
    own = set(names_in(inner, [name for name, _ in inner.named_parameters(remove_duplicate=False)]).values())
    return {name: first for name, first in told.items() if first not in own}


class Named:
    """The names of parameters, by the models of one state.

    Arguments:
        models: by their keys in the state.
    """

    def __init__(self, models: Mapping[str, nn.Module]):
        self._known: dict[int, tuple[str, str]] = {}  # by id: key of the model, name in it
        for key, model in models.items():
            inner = bare(model)
            inside, ties = _inside(inner), ties_of_whole(inner)
            for name, p in inner.named_parameters():
                clean = _clean(name, inside)
                self._known.setdefault(id(p), (key, ties.get(clean, clean)))

    def of(self, optimizer: Any, key: str) -> dict[int, str]:
        """The name of every parameter of an optimizer, by the parameter's id.

        Those of a model in the same state have their names in it; if there are several models, with the model's key
        before them. Others have the names that the optimizer was given.

        Raises:
            ValueError: a parameter has no name, or two have one.
        """
        found: dict[int, str] = {}
        params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        several = len({self._known[id(p)][0] for p in params if id(p) in self._known}) > 1
        own = {id(p): name for group in optimizer.param_groups
               for p, name in zip(group["params"], group.get("param_names") or [], strict=False)}
        own |= {id(p): name for p, name in getattr(optimizer, "_names", {}).items()}  # of `Zero`
        for g, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if id(p) in self._known:
                    model, name = self._known[id(p)]
                    found[id(p)] = f"{model}.{name}" if several else name
                elif id(p) in own:
                    found[id(p)] = strip(own[id(p)])
                else:
                    raise ValueError(f"{key}: parameter {i} of group {g} (shape {tuple(p.shape)}) has no name, which "
                                     "is the address of its state: put the model into the same state, or make the "
                                     "optimizer of model.named_parameters()")
        by_name: dict[str, int] = {}
        for number, name in found.items():
            if by_name.setdefault(name, number) != number:
                raise ValueError(f"{key}: two of its parameters are called {name!r}: give named parameters of one "
                                 "model")
        return found
