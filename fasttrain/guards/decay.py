"""Parameter groups: what decays, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def kind_of(module: type) -> str:
    """As what the parameters of a class of modules count."""
    if issubclass(module, EMBEDDINGS):
        return "embedding"
    return "norm" if "norm" in module.__name__.lower() else "other"


def decay_groups(model: nn.Module, weight_decay: float | None = None, *, biases: bool = False, norms: bool = False,
                 embeddings: bool = True, decays: Callable[[str, Tensor], bool | None] | None = None,
                 **options: Any) -> list[dict[str, Any]]:
    """The trained parameters of a model in two groups for an optimizer: those that decay, and those that do not.

    Decay pulls weights towards zero. It suits the matrices of a model; a gain belongs near 1, and a bias has a place of
    its own, which decay would only shift (Loshchilov and Hutter, arXiv:1711.05101, decay all; the exceptions are usage
    since BERT). A parameter that several modules share has the kind of any of them that does not decay, also where
    they are on several stages of a pipeline, each of which asks for its own groups.

    Arguments:
        model: named parameters that need no gradient are left out.
        weight_decay: of the first group; None: the optimizer's own.
        biases: decay what has fewer than two dimensions, or is called bias, and belongs to no norm.
        norms: decay the parameters of normalisations: modules with "norm" in the name of their class.
        embeddings: decay those of `nn.Embedding` and `nn.EmbeddingBag`.
        decays: from a name and parameter to True or False, which goes before all of these; None: they decide. What
            several stages of a pipeline have comes with its name in the whole model on each.
        options: further options of both groups.

    Returns:
        One or two groups of named parameters; an empty one is left out.

    Raises:
        ValueError: no parameter needs a gradient.

    Example:
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> [[name for name, _ in group["params"]] for group in decay_groups(model, 0.1, embeddings=False)]
        [['2.weight'], ['0.weight', '1.weight', '1.bias', '2.bias']]
    """
    kinds: dict[int, set[str]] = {}
    names: dict[int, str] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            kinds.setdefault(id(p), set()).add(kind_of(type(module)))
        for here, (whole, types) in vars(module).get("tied_in_whole", {}).items():  # of a pipeline: on other stages too
            p = module.get_parameter(here)
            names[id(p)] = whole
            kinds.setdefault(id(p), set()).update(map(kind_of, types))

    def decaying(name: str, p: Tensor) -> bool:
        name = names.get(id(p), name)
        chosen = None if decays is None else decays(name, p)
        if chosen is not None:
            return chosen
        known = kinds.get(id(p), {"other"})
        if "norm" in known:
            return norms
        if p.ndim < 2 or name.rpartition(".")[2] == "bias":
            return biases
        return embeddings or "embedding" not in known

    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"no parameter of this {type(model).__name__} needs a gradient: there is nothing to group")
    with_decay = [one for one in named if decaying(*one)]
    chosen = {id(p) for _, p in with_decay}
    without = [one for one in named if id(one[1]) not in chosen]
    first = options if weight_decay is None else {**options, "weight_decay": weight_decay}
    return [group for group in ({"params": with_decay, **first}, {"params": without, **options, "weight_decay": 0.0})
            if group["params"]]
