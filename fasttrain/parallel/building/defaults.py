"""Which rule a parameter has if the user gives none: that of its model, else that of the class of its module.

The classes are torch's, with the distributions of their `reset_parameters`, and transformers' Conv1D. What a module
says itself comes before: a method `initial()` that returns {pattern of its parameters' names: rule}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fasttrain.parallel.building import hugging_face
from fasttrain.parallel.building.rules import Constant, Normal, Ones, Padded, Rule, Uniform, Zeros
from fasttrain.parallel.building.tensors import Held
from fasttrain.parallel.wrapped import bare, clean_name, inside_of

Rules = Mapping[str, Rule]
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
FANNED = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
OF_NORMS: dict[str, Rule] = {"weight": Ones(), "bias": Zeros(), "running_mean": Zeros(), "running_var": Ones(),
                             "num_batches_tracked": Zeros()}


def rules_of(model: nn.Module, found: Sequence[Held], rules: Rules | None = None) -> dict[str, Rule | None]:
    """The rule of each parameter or buffer by its name; None where there is none.

    The first of `rules` whose pattern fits a name (as of `fnmatch`, case counts) goes before those of `initial()`, of
    which that of the outermost module goes first, and these before those of the classes.

    Raises:
        TypeError: one is no rule.
    """
    given = checked(rules or {}, "rules")
    own = [(path, checked(said, f"initial() of {path or 'the model'}")) for path, said in of_modules(bare(model))]
    chosen: dict[str, Rule | None] = {}
    for one in found:  # what is tied may be here twice, by the same name: each would do for both
        chosen[one.name] = chosen.get(one.name) or _first(one, given, own)
    return chosen


def checked(rules: Any, what: str) -> Rules:
    if not isinstance(rules, Mapping):
        raise TypeError(f"{what} is {rules!r}: it is a dict from patterns of names to rules")
    for pattern, rule in rules.items():
        if not isinstance(rule, Rule):
            raise TypeError(f"{what}: {pattern!r} has {rule!r}, which is no rule; rules are objects such as "
                            "Normal(0.02) of fasttrain.parallel.building")
    return rules


def of_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """(path, what `initial()` returns) of each module that has it, the outermost first; and of transformers' models."""
    inside, found = inside_of(model), []
    for path, module in model.named_modules():
        if callable(getattr(module, "initial", None)):
            found.append((clean_name(path, inside), module.initial()))
        elif hugging_face.is_model(module):
            found.append((clean_name(path, inside), hugging_face.initial(module)))
    return found


def _first(one: Held, given: Rules, own: Sequence[tuple[str, Rules]]) -> Rule | None:
    names = [one.name, *(name for name in one.names if name != one.name)]
    for path, rules in [("", given), *own]:
        for name in names:
            inner = name.removeprefix(f"{path}.") if path else name
            for pattern, rule in rules.items() if inner != name or not path else ():
                if fnmatchcase(inner, pattern):
                    return rule
    if one.absent:
        return None  # what it is tied to is elsewhere, and may be of another class
    module, attribute = one.sites[one.names.index(one.name)]
    return by_class(module, attribute, one.tensor.shape)


def by_class(module: Any, attribute: str, shape: Sequence[int]) -> Rule | None:
    """As of `reset_parameters` of torch's modules; None for others."""
    if isinstance(module, NORMS):
        return OF_NORMS.get(attribute)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) and attribute == "bias":
        return Zeros()  # the last layer of attention, by its `_reset_parameters`
    if isinstance(module, FANNED) and attribute in ("weight", "bias"):
        return uniform_of_fan(module.weight.shape[:2] if isinstance(module, nn.Bilinear) else module.weight.shape)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return padded(Normal(1.0), module.padding_idx, shape)
    if isinstance(module, nn.MultiheadAttention):
        return of_attention(module, attribute, shape)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return symmetric(1 / math.sqrt(module.hidden_size) if module.hidden_size else 0.0)
    if isinstance(module, nn.PReLU):
        return Constant(float(module.init))
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of transformers
        return Normal(0.02) if attribute == "weight" else Zeros()
    return None


def of_attention(module: Any, attribute: str, shape: Sequence[int]) -> Rule | None:
    """Of `nn.MultiheadAttention`: Xavier's distributions, by the sizes of both sides."""
    if attribute.endswith("proj_weight"):
        return symmetric(math.sqrt(6 / sum(shape)))
    if attribute in ("bias_k", "bias_v"):
        return Normal(math.sqrt(2 / (shape[1] * math.prod(shape[2:]) + shape[0] * math.prod(shape[2:]))))
    return Zeros() if attribute == "in_proj_bias" else None


def uniform_of_fan(weight: Sequence[int]) -> Rule:
    """Uniform within 1 / sqrt(inputs of an output)."""
    fan = math.prod(weight[1:])
    return symmetric(1 / math.sqrt(fan) if fan else 0.0)


def symmetric(bound: float) -> Rule:
    return Uniform(-bound, bound)


def padded(rule: Rule, row: int | None, shape: Sequence[int]) -> Rule:
    return rule if row is None else Padded(rule, row, math.prod(shape[1:]))
