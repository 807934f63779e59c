"""The names of parameters and of their states, by the models of one state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fasttrain.parallel.pipeline import held
from fasttrain.parallel.wrapped import bare, clean_name, inside_of, names_in, strip

__all__ = ["Named", "bare", "names_in", "strip"]


def ties_of_whole(model: nn.Module) -> Mapping[str, str]:
    """The first names of parameters that were tied to others in the model which this is a part of, by their own names.

    What `fasttrain.parallel.pipeline.split` has made knows them. A stage that was made in another way, and has the head
    but not the embedding to which it was tied, has an attribute `whole_ties` that says so:
    ``{"head.weight": "embedding.weight"}``. What the part has under its first name too is tied there.

    Example:
        >>> stage = nn.Linear(2, 2, bias=False)
        >>> stage.whole_ties = {"weight": "embedding.weight"}
        >>> ties_of_whole(stage)
        {'weight': 'embedding.weight'}
    """
    inner = bare(model)
    told: Mapping[str, str] = getattr(inner, "whole_ties", {})
    if hasattr(inner, held.MARK):
        told = held.names_of_whole(inner)
    own = set(names_in(inner, [name for name, _ in inner.named_parameters(remove_duplicate=False)]).values())
    return {name: first for name, first in told.items() if first not in own}


def stages_of_whole(model: nn.Module) -> list[tuple[int, list[str]]]:
    """The names of parameters of each stage that is here, by its number, if `split` has made them of a whole model."""
    inner = bare(model)
    if not hasattr(inner, held.MARK):
        return []
    ties = ties_of_whole(inner)
    return [(number, [ties.get(name, name) for name in names]) for number, names in held.of(inner).names.items()]


class Named:
    """The names of parameters, by the models of one state.

    Arguments:
        models: by their keys in the state.
    """

    def __init__(self, models: Mapping[str, nn.Module]):
        self._known: dict[int, tuple[str, str]] = {}  # by id: key of the model, name in it
        for key, model in models.items():
            inner = bare(model)
            inside, ties = inside_of(inner), ties_of_whole(inner)
            for name, p in inner.named_parameters():
                clean = clean_name(name, inside)
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
