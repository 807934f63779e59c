"""Print a traced rule as a Triton kernel over the chunk table of items that are not plain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fasttrain.kernels import kept_table
from fasttrain.kernels.emit_triton import addresses, coefficient_names, element
from fasttrain.kernels.table import ALIGNED
from fasttrain.kernels.trace import trace
from fasttrain.rule import Rule

AVERAGE = "ema"  # the operand after the rule's own


def kernel(rule: Rule, codecs: Sequence[int]) -> str:
    """The source of two functions: `element`, and `step`, which walks one chunk of operands kept with these codecs.

    Arguments:
        codecs: of p, g, the states, and the EMA if there is one.
    """
    return "\n".join(element(rule)) + "\n\n\n" + "\n".join(_step(rule, codecs)) + "\n"


def _step(rule: Rule, codecs: Sequence[int]) -> Iterable[str]:
    names = ["p", "g", *rule.state, AVERAGE][: len(codecs)]
    random = kept_table.random_operands(codecs)
    coefficients = coefficient_names(trace(rule))
    after = 1 + len(coefficients)
    yield "@jit"
    yield "def step(table, rows, width, gradients, skip, wide: tl.constexpr, block: tl.constexpr, clip: tl.constexpr,"
    yield "         interpreted: tl.constexpr):"
    yield f"    chunk = table + tl.program_id(0).to(tl.int64) * {kept_table.columns(codecs)}"
    column = len(codecs)
    yield from addresses(names)
    for operand in kept_table.extra_operands(codecs):
        yield f"    beside_{names[operand]} = tl.load(chunk + {column})"
        column += 1
    yield f"    count = tl.load(chunk + {column})"
    yield f"    number = tl.load(chunk + {column + 1})"
    yield "    elements = count"
    yield "    if skip is not None:  # of which only the gradient is zeroed"
    yield "        count = tl.where(tl.load(skip + number) != 0, 0, count)"
    yield "    row = rows + number * width"
    yield f"    flags = tl.load(chunk + {column + 2})"
    yield "    scale = tl.load(row)"
    for index, name in enumerate(coefficients):
        yield f"    {name} = tl.load(row + {1 + index})"
    yield f"    limit = tl.load(row + {after})"
    yield "    offsets = tl.arange(0, block)"
    yield "    inside = offsets < count"
    if random:
        places = ", ".join(f"tl.load(chunk + {column + 3 + i})" for i in range(4))
        yield f"    index = full_index(offsets, {places})"
    yield f"    if ((flags & 1) == 1) & (at_g % {ALIGNED} == 0) & (count == block):"
    yield from _body(rule, names, codecs, coefficients, whole=True)
    yield "    else:"
    yield from _body(rule, names, codecs, coefficients, whole=False)


def _body(rule: Rule, names: list[str], codecs: Sequence[int], coefficients: list[str], whole: bool) -> Iterable[str]:
    indent = " " * 8
    extras, random = kept_table.extra_operands(codecs), kept_table.random_operands(codecs)
    after = 1 + len(coefficients)

    def where(operand: int) -> str:
        beside = f"beside_{names[operand]}" if operand in extras else "0"
        return f"at_{names[operand]}, {beside}, offsets, inside, count"

    for operand, name in enumerate(names):
        yield f"{indent}{name} = fetch({where(operand)}, {codecs[operand]}, wide, block, {whole}, interpreted)"
    yield f"{indent}g = g * scale"
    yield f"{indent}if clip:"
    yield f"{indent}    g = clipped(g, limit)"
    outputs = ["p", *rule.state]
    yield f"{indent}{', '.join(outputs)} = element({', '.join(['p', 'g', *rule.state, *coefficients])}, wide)"
    for name in rule.state:
        yield f"{indent}{name} = without_denormal({name}, wide)"
    if AVERAGE in names:
        yield f"{indent}{AVERAGE} = {AVERAGE} * tl.load(row + {after + 1}) + p * tl.load(row + {after + 2})"
    for operand, name in enumerate(names):
        if operand == 1:
            continue
        bits = f"random_bits(index, row + {after + 3 + 2 * random.index(operand)})" if operand in random else "0"
        yield f"{indent}put({where(operand)}, {name}, {bits}, {codecs[operand]}, block, {whole}, interpreted)"
    yield f"{indent}if (flags & 2) != 0:"
    yield f"{indent}    zeros = tl.full((block,), 0.0, tl.float64 if wide else tl.float32)"
    yield f"{indent}    store(at_g, offsets, offsets < elements, zeros, {codecs[1]}, {whole}, interpreted)"
