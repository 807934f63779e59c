"""The names of CUDA kernels, and the source of one that is compiled at run time: our headers and one instantiation.

A kernel of the list in `csrc/cuda` is asked for by its name; any other by its rule, which is printed into the source,
and storages that the templates there can take.
"""

from __future__ import annotations

import re

import torch

from fasttrain.kernels.emit_cpp import digest, struct
from fasttrain.precision.codecs import NUMBER, POSITIVE, STOCHASTIC, codec
from fasttrain.rule import Rule

NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
MACROS = {("move", 2): "MOVE", ("move", 3): "FEEDBACK", ("encode", 1): "ENCODE", ("encode", 2): "ENCODE_LOST"}
FRONT = '#define FT_ON_DEMAND\n#include "cuda/step.cu"\n'

# What csrc/cuda/eight.cuh reads and writes (`Lane`); the rest is Triton's.
GRADIENTS = {NUMBER["f32"], NUMBER["bf16"]}
NUMBERS = {*GRADIENTS, NUMBER["bf16"] | STOCHASTIC}
PARAMETERS = {*NUMBERS, NUMBER["split16"], NUMBER["split8"], NUMBER["master_bf16"]}
STATES = {*NUMBERS, NUMBER["int8"], NUMBER["int8"] | POSITIVE}


def codec_name(number: int) -> str:
    """A codec in a kernel's name."""
    flags = "P" * bool(number & POSITIVE) + "S" * bool(number & STOCHASTIC)
    return codec(number).name.upper().replace("_", "") + flags


def why_not(rule: Rule, dtypes: tuple[torch.dtype, ...], codecs: tuple[int, ...]) -> str | None:
    """Why the templates cannot step such items (`fasttrain.kernels.item.Item`)."""
    if not (rule.name.isidentifier() and rule.name.isascii()):
        return f"the rule's name {rule.name!r} is not an identifier of ASCII letters: choose another one"
    if codecs:
        if len(codecs) != 2 + len(rule.state):
            return "an EMA is Triton's"
        p, g, *states = codecs
        others = [number for number, known in ((p, PARAMETERS), (g, GRADIENTS), *((s, STATES) for s in states))
                  if number not in known]
        return f"what is kept as {codec_name(others[0]).lower()} is Triton's" if others else None
    if any(dtype not in NAMES for dtype in dtypes):
        return f"no kernel takes {', '.join(str(dtype) for dtype in dtypes)}"
    return "states of several dtypes are Triton's" if len(set(dtypes[2:])) > 1 else None


def own(rule: Rule, dtypes: tuple[torch.dtype, ...], codecs: tuple[int, ...]) -> tuple[str, str]:
    """The name and the source of a kernel that is not in the list. Two rules of one name have different kernels.

    Example:
        >>> descent = Rule("Descent", (), lambda step, lr: {"lr": lr}, lambda p, g, k: p - k.lr * g)
        >>> name, text = own(descent, (torch.float32, torch.bfloat16), ())
        >>> name, text.splitlines()[-1]
        ('step_DescentC7F51932_F32_BF16_F32', 'FT_STEP_KERNEL(step_DescentC7F51932_F32_BF16_F32, 2, own::Descent, \
float, F32, BF16, F32)')
    """
    rule_name = f"{rule.name}{digest(rule):08X}"
    if codecs:
        kept = [codec_name(number) for number in codecs]
        name = "_".join(("kept", rule_name, *kept))
        made = f"FT_KEPT_KERNEL({name}, own::{rule.name}, {', '.join(kept)})"
    else:
        p, g, *states = (NAMES[dtype] for dtype in dtypes)
        kept = [p, g, states[0] if states else p]
        name = "_".join(("step", rule_name, *kept))
        blocks = 1 if p == "F64" else 2  # at least, on a multiprocessor: left alone, ptxas spills rather than pass 64
        made = f"FT_STEP_KERNEL({name}, {blocks}, own::{rule.name}, {computed(p)}, {', '.join(kept)})"
    return name, (f"{FRONT}\nnamespace fasttrain {{\nnamespace own {{\n\n{struct(rule)}\n"
                  f"}}  // namespace own\n}}  // namespace fasttrain\n\n{made}\n")


def listed(name: str) -> str:
    """The source of a kernel of the list; those of Adafactor in one dtype come together.

    Raises:
        KeyError: it is of no kind that is known here.

    Example:
        >>> listed("stage_LAMBApply_BF16_F32_F32").splitlines()[-1]
        'FT_STAGE_KERNEL(LAMBApply, float, BF16, F32, F32)'
    """
    kind, *parts = name.split("_")
    match kind, parts:
        case "step" | "stage", [rule, p, g, s]:
            macro = "FT_KERNEL" if kind == "step" else "FT_STAGE_KERNEL"
            made = f"{macro}({rule}, {computed(p)}, {p}, {g}, {s})"
        case "kept", [rule, *kept]:
            made = f"FT_KEPT_KERNEL({name}, {rule}, {', '.join(kept)})"
        case "squares", [dtype]:
            made = f"FT_SQUARES_KERNEL({dtype})"
        case "sum", [chunks, result]:
            made = f"FT_SUM_KERNEL({chunks}, {result})"
        case "move" | "encode", [*kept]:
            made = f"FT_{MACROS[kind, len(kept)]}_KERNEL({', '.join(kept)})"
        case "factored", [_, dtype]:
            made = f"FT_FACTORED_OF(FT_FACTORED_KERNEL, {dtype})"
        case "tree" | "prologue" | "keyed" | "chunks" | "count", _:
            made = f"FT_{name.upper()}_KERNEL({name})"
        case _:
            raise KeyError(f"no source is known for the kernel {name}: add its kind to {__name__}")
    return f"{FRONT}\n{made}\n"


def computed(parameter: str) -> str:
    """The type that a rule is computed in, by the parameter's."""
    return "double" if parameter == "F64" else "float"


def included(text: str, read: dict[str, str]) -> dict[str, str]:
    """Those headers, of all that `read` has, that a source includes, by their names and directly or not.

    Example:
        >>> included('#include "a.h"', {"a.h": '#include "b.h"', "b.h": "", "c.h": ""})
        {'a.h': '#include "b.h"', 'b.h': ''}
    """
    found: dict[str, str] = {}
    left = [text]
    while left:
        for name in re.findall(r'^\s*#include "([^"]+)"', left.pop(), re.MULTILINE):
            if name not in found and name in read:
                found[name] = read[name]
                left.append(read[name])
    return dict(sorted(found.items()))
