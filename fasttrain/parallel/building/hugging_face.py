"""The rules of Hugging Face models, those of `PreTrainedModel._init_weights`, and their rotary tables.

transformers is not imported: what a module is shows in its class, its config and its methods.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from fasttrain.parallel.building.rules import Normal, Ones, Padded, Rule, Zeros

DRAWN = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


def is_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    return callable(getattr(module, "_init_weights", None)) and hasattr(
        getattr(module, "config", None), "initializer_range")


def initial(model: Any) -> dict[str, Rule]:
    """The rule of each parameter that `_init_weights` gives values to, by its name in the model."""
    config, found = model.config, {}
    normal = Normal(config.initializer_range or 0.02)
    for path, module in model.named_modules():
        kind = type(module).__name__
        norm = "LayerNorm" in kind or "RMSNorm" in kind or isinstance(module, nn.GroupNorm)
        if not (norm or isinstance(module, DRAWN) or kind == "Conv1D"):
            continue
        for attribute in module._parameters:
            name = f"{path}.{attribute}" if path else attribute
            if attribute == "weight":
                found[name] = Ones() if norm else _padded(module, normal)
                if name.endswith("c_proj.weight") and config.model_type == "gpt2":
                    found[name] = Normal(normal.std / math.sqrt(2 * config.n_layer))  # GPT-2's own _init_weights
            elif attribute == "bias":
                found[name] = Zeros()
    return found


def _padded(module: Any, rule: Rule) -> Rule:
    row = getattr(module, "padding_idx", None)
    return rule if row is None else Padded(rule, row, module.embedding_dim)


def has_tables(module: nn.Module) -> bool:
    """Whether it is a rotary embedding of transformers, whose tables `rotary_tables` makes."""
    return "RotaryEmbedding" in type(module).__name__ and hasattr(module, "original_inv_freq")


def rotary_tables(module: Any) -> dict[str, Tensor]:
    """The buffers of a rotary embedding, made anew by its own functions."""
    make = getattr(module, f"compute_{module.rope_type}_rope_parameters", None)
    if make is None:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        make = ROPE_INIT_FUNCTIONS[module.rope_type]
    table, module.attention_scaling = make(module.config)
    return {"inv_freq": table, "original_inv_freq": table.clone()}
