"""Print a traced rule as C++ that g++, nvcc and NVRTC read alike."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import cache

from fasttrain.kernels.trace import Graph, Symbol, statements, trace
from fasttrain.rule import Rule

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==",
         "ne": "!=", "and": "&", "or": "|"}

HEADER = """\
// GENERATED from fasttrain.optim by `make rules`. Do not edit: change the equation and generate again.
//
// One struct per rule. `element` is the arithmetic of one element; every operation is one IEEE operation,
// so this file must be compiled without contraction into fused multiply-adds.
#pragma once
#include "common.h"

namespace fasttrain {
inline namespace FT_ISA {
"""

FOOTER = """\
}  // namespace FT_ISA
}  // namespace fasttrain

// The order of this list is the number of a rule. For GPUs the common ones are compiled ahead of time in every usual
// combination of storages, the others in float32 and in float64, and those that are parts of an optimizer are not.
#define FASTTRAIN_RULES(X) FASTTRAIN_COMMON_RULES(X) FASTTRAIN_OTHER_RULES(X) FASTTRAIN_PART_RULES(X)
"""


def expression(node: Symbol, names: dict[Symbol, str], top: bool = True) -> str:
    """The C++ of one node; a node with a name is its name."""
    if node in names and not (top and node.arguments):
        return names[node]
    if node.kind == "coefficient":
        return f"k.{node.op}"
    if node.kind == "constant":
        return f"T({node.value!r})"
    parts = [expression(argument, names, top=False) for argument in node.arguments]
    if node.op == "neg":
        return f"-{parts[0]}" if top else f"(-{parts[0]})"  # without them, -(-x) would print as a decrement
    if node.op == "not":
        return f"!{parts[0]}"
    if node.op in ("sqrt", "abs"):
        inner = expression(node.arguments[0], names, top=node.arguments[0] not in names)
        return f"{'square_root' if node.op == 'sqrt' else 'absolute'}({inner})"
    if node.op == "where":
        text = f"{parts[0]} ? {parts[1]} : {parts[2]}"
    else:
        text = f"{parts[0]} {INFIX[node.op]} {parts[1]}"
    return text if top else f"({text})"


@cache
def digest(rule: Rule) -> int:
    """32 bits that tell one equation from another: a compiled rule is used only for the equation that it came from."""
    return zlib.crc32("\n".join(_lines(rule, trace(rule), with_digest=False)).encode())


def struct(rule: Rule) -> str:
    """The struct of one rule."""
    return "\n".join(_lines(rule, trace(rule))) + "\n"


def _lines(rule: Rule, graph: Graph, with_digest: bool = True) -> Iterable[str]:
    named, names = statements(graph)
    yield f"// {rule.name}: {graph.flops} flops an element, {graph.bytes_per_element(4, 4, 4)} bytes in fp32"
    yield "template <class T>"
    yield f"struct {rule.name} {{"
    yield f"  static constexpr int states = {len(rule.state)};"
    yield f"  static constexpr int coefficients = {len(graph.coefficients)};"
    if rule.sums is not None:
        changed = sum(1 << i for i, moved in enumerate(graph.changed) if moved)
        yield f"  static constexpr int sums = {len(rule.sums)};"
        yield f"  static constexpr u32 changed = {changed};  // of p and the states, bit by bit"
    if with_digest:
        yield f"  static constexpr u32 digest = 0x{digest(rule):08X};"
    yield "  struct K {"
    if graph.coefficients:
        yield f"    T {', '.join(graph.coefficients)};"
        yield "    HOST_DEVICE explicit K(const T* row)"
        yield "        : " + ", ".join(f"{name}(row[{i}])" for i, name in enumerate(graph.coefficients)) + " {}"
    else:
        yield "    HOST_DEVICE explicit K(const T*) {}"
    yield "  };"
    targets = (*rule.state, *(rule.sums or ()))
    any_use = "" if rule.sums is None else "[[maybe_unused]] "  # a stage may measure g alone, say
    operands = ("T& p", "T g", *(f"T& {name}" for name in targets), "const K& k")
    arguments = ", ".join(any_use + operand for operand in operands)
    yield f"  HOST_DEVICE static void element({arguments}) {{"
    for name, node in named:
        yield f"    const {'bool' if node.kind == 'condition' else 'T'} {name} = {expression(node, names)};"
        names[node] = name
    # Inputs are overwritten one after the other, so an output that is computed here must not read a changed input.
    results = []
    for output, target in zip(graph.outputs, ("p", *targets), strict=True):
        text = names.get(output) or expression(output, names)
        if text == target:
            continue
        if output not in names or output.kind == "input":
            yield f"    const T new_{target} = {text};"
            text = f"new_{target}"
        results.append((target, text))
    for target, text in results:
        yield f"    {target} = {text};"
    yield "  }"
    yield "};"


def stages_header(rules: Iterable[Rule]) -> str:
    """The whole text of `csrc/stage_rules.h`: the rules that have `sums`."""
    rules = list(rules)
    body = "\n".join(struct(rule) for rule in rules)
    return (HEADER + "\n" + body + "\n" + "}  // namespace FT_ISA\n}  // namespace fasttrain\n\n"
            "// The order of this list is the number of a stage.\n#define FASTTRAIN_STAGES(X)"
            + "".join(f" \\\n  X({rule.name})" for rule in rules) + "\n")


def header(rules: Iterable[Rule], common: Iterable[Rule] = (), parts: Iterable[Rule] = ()) -> str:
    """The whole text of `csrc/rules.h`.

    Arguments:
        rules: each once, in the order of their numbers.
        common: the first of them, which are compiled ahead of time for GPUs in every usual combination of storages.
        parts: more of them, which follow: rules of optimizers that are not elementwise, not compiled for GPUs.
    """
    rules, common, parts = list(rules), list(common), list(parts)
    if rules[: len(common)] != common:
        raise ValueError("the common rules must be the first ones, in their order")
    body = "\n".join(struct(rule) for rule in (*rules, *parts))
    lists = [f"#define FASTTRAIN_{name}_RULES(X)" + "".join(f" \\\n  X({rule.name})" for rule in listed) + "\n"
             for name, listed in (("COMMON", common), ("OTHER", rules[len(common) :]), ("PART", parts))]
    return HEADER + "\n" + body + "\n" + FOOTER + "".join(lists)
