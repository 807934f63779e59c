"""Ready plans, found by the names of a model's modules: the GPT of the main job, and transformers' Llama and GPT-2.

A plan is a table of styles for one `Layout`, and knows every parameter inside of blocks: a model that has others there
gets an error, not a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from fasttrain.parallel.tensor.dropout import Dropped
from fasttrain.parallel.tensor.moves import CUT, JOIN, enter, leave
from fasttrain.parallel.tensor.names import matches
from fasttrain.parallel.tensor.styles import Column, Row, Style
from fasttrain.parallel.tensor.vocabulary import Head, Lookup


class Ready(NamedTuple):
    """A plan that fits a model.

    Attributes:
        family: how errors call it.
        plan: styles by pattern; some patterns may mean nothing in this model.
        inside: patterns of the modules in which the plan has to know all parameters.
    """

    family: str
    plan: dict[str, Style]
    inside: tuple[str, ...]


def first_like(model: nn.Module, pattern: str) -> Any:
    """The first module that a pattern means, or None."""
    return next((module for name, module in model.named_modules() if matches(name, pattern)), None)


def gpt(model: nn.Module, sequence: bool, whole: bool) -> Ready | None:
    """`fasttrain.train.model.GPT`: `qkv` by key heads, a gate or experts or neither, the head tied or not.

    What leaves a norm goes to columns only, so it is brought to them there, once. A mixture of experts divides its own
    matrices, and takes and gives all positions whole.
    """
    block = first_like(model, "blocks.*")
    if not all(hasattr(block, name) for name in ("norm_attention", "qkv", "out", "norm_feed", "mixture", "shared")):
        return None
    norm = Style(output=enter(sequence), addends=sequence)
    if block.mixture is not None:
        feed = {"blocks.*.norm_feed": Style(output=JOIN if sequence else None, addends=sequence),
                "blocks.*.mixture": Style(output=CUT if sequence else None), "blocks.*.mixture.router": Style(),
                "blocks.*.mixture.experts": Style()}
    else:
        feed = {"blocks.*.norm_feed": norm, "blocks.*.gate": Column(None), "blocks.*.up": Column(None),
                "blocks.*.down": Row(leave(sequence), sequence)}
    return Ready("the GPT of the main job", {
        "embedding.bytes": Lookup(None), "embedding.endings.*": Lookup(None),  # their addends are added before the sum
        "embedding": Style(output=leave(sequence)),
        "blocks.*.norm_attention": norm,
        "blocks.*.qkv": Column(None, unit=(block.shared + 2) * block.features, units="heads of keys"),
        "blocks.*.out": Row(leave(sequence), sequence), **feed,
        "norm": norm, "head": Head(None, whole),
        **({"drop*": Dropped(), "blocks.*.drop*": Dropped()} if sequence else {}),
    }, ("blocks.*",))


def llama(model: nn.Module, sequence: bool, whole: bool) -> Ready | None:
    """Models of transformers with q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj: Llama and its kin.

    Their attention asks its input for the length of sequences, so that is whole there; and between embedding and
    blocks, where positions are counted.
    """
    base = next((base for base in ("model.", "") if first_like(model, f"{base}layers.*.self_attn.q_proj")), None)
    if base is None or not first_like(model, f"{base}layers.*.mlp.gate_proj"):
        return None
    layer = f"{base}layers.*"
    unit = getattr(first_like(model, f"{layer}.self_attn"), "head_dim", 1)
    columns, rows = Column(None), Row(leave(sequence), sequence)
    keys = Column(None, unit=unit, units="heads of keys")
    plan: dict[str, Style] = {
        f"{base}embed_tokens": Lookup(leave(False)),
        f"{layer}.self_attn": Style(enter(sequence), divide=("num_heads", "num_key_value_heads")),
        f"{layer}.self_attn.q_proj": Column(None, unit=unit, units="heads"),
        f"{layer}.self_attn.k_proj": keys, f"{layer}.self_attn.v_proj": keys, f"{layer}.self_attn.o_proj": rows,
        f"{layer}.self_attn.[qk]_norm": Style(addends=True),  # over the features of a head, of which each rank has some
        f"{layer}.mlp": Style(enter(sequence)),
        f"{layer}.mlp.gate_proj": columns, f"{layer}.mlp.up_proj": columns, f"{layer}.mlp.down_proj": rows,
        "lm_head": Head(enter(False), whole),
    }
    if sequence:
        plan |= {f"{base}layers.0": Style(CUT), f"{layer}.*layernorm": Style(addends=True),
                 f"{base}norm": Style(output=JOIN, addends=True)}
    return Ready("Llama", plan, (layer,) if sequence else (f"{layer}.self_attn", f"{layer}.mlp"))


def gpt2(model: nn.Module, sequence: bool, whole: bool) -> Ready | None:
    """GPT-2 of transformers: queries, keys and values lie side by side in one Conv1D; a rank has its heads of each."""
    base = next((base for base in ("transformer.", "") if first_like(model, f"{base}h.*.attn.c_attn")), None)
    if base is None or not first_like(model, f"{base}h.*.mlp.c_fc"):
        return None
    block = f"{base}h.*"
    unit = first_like(model, f"{block}.attn").head_dim
    rows = Row(leave(sequence), sequence)
    plan: dict[str, Style] = {
        f"{base}wte": Lookup(leave(False)),
        f"{block}.attn": Style(enter(sequence), divide=("num_heads", "split_size")),
        f"{block}.attn.c_attn": Column(None, pieces=3, unit=unit, units="heads"), f"{block}.attn.c_proj": rows,
        f"{block}.mlp": Style(enter(sequence)), f"{block}.mlp.c_fc": Column(None), f"{block}.mlp.c_proj": rows,
        "lm_head": Head(enter(False), whole),
    }
    if sequence:
        plan |= {f"{base}h.0": Style(CUT), f"{block}.ln_[12]": Style(addends=True),
                 f"{block}.attn.resid_dropout": Dropped(), f"{block}.mlp.dropout": Dropped(),
                 f"{base}ln_f": Style(output=JOIN, addends=True)}
    return Ready("GPT-2", plan, (block,) if sequence else (f"{block}.attn", f"{block}.mlp", f"{block}.crossattention"))


FAMILIES: tuple[Callable[[nn.Module, bool, bool], Ready | None], ...] = (gpt, llama, gpt2)


def ready_plan(model: nn.Module, sequence: bool, whole: bool) -> dict[str, Style]:
    """The plan that fits a model, without the patterns that mean nothing in it.

    Raises:
        ValueError: none fits, or the one that does not knows all parameters inside of its blocks.
    """
    found = next((ready for family in FAMILIES if (ready := family(model, sequence, whole)) is not None), None)
    kind = type(model).__name__
    if found is None:
        raise ValueError(f"there is no ready plan for {kind}: there are those of fasttrain's GPT, and of transformers' "
                         "models with the modules of Llama or GPT-2; give plan={pattern of module names: \"column\", "
                         "\"row\", \"vocabulary\", \"sequence\" or \"replicate\"}")
    names = [name for name, _ in model.named_modules()]
    plan = {pattern: style for pattern, style in found.plan.items() if any(matches(name, pattern) for name in names)}
    for name, _ in model.named_parameters(remove_duplicate=False):
        owners = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        inside = any(matches(owner, pattern) for owner in owners for pattern in found.inside)
        if inside and not any(knows(style, name, owner) for owner in owners
                              for pattern, style in plan.items() if matches(owner, pattern)):
            raise ValueError(f"the ready plan of {found.family} does not know {name}, so it does not fit {kind}: give "
                             "plan= with a style for it and for all others of its block")
    return plan


def knows(style: Style, name: str, owner: str) -> bool:
    """Whether a style of the module `owner` is right for this parameter.

    What only brings an input to columns says nothing of parameters beside them: their gradients would be addends.
    """
    return style.addends or (name.rsplit(".", 1)[0] == owner and (type(style) is not Style or style.input is None))
