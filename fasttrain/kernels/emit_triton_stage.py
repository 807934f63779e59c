"""Print a stage with sums (`Rule.sums`) as a Triton kernel: the step's walk in the order of `kernels.triton_lanes`."""

from __future__ import annotations

from collections.abc import Iterable

from fasttrain.kernels.emit_triton import addresses, coefficient_names, element
from fasttrain.kernels.table import ALIGNED
from fasttrain.kernels.trace import trace
from fasttrain.rule import Rule


def kernel(rule: Rule, together: int) -> str:
    """The source of `element`, and of `step`, which walks one chunk and stores its partial sums.

    Arguments:
        together: rows of 16 elements of every block that are read before anything is written; a power of two.
    """
    return "\n".join(element(rule)) + "\n\n\n" + "\n".join(_step(rule, together)) + "\n"


def _step(rule: Rule, together: int) -> Iterable[str]:
    inputs, coefficients = ["p", "g", *rule.state], coefficient_names(trace(rule))
    columns, sums = len(inputs) + 3, rule.sums or ()
    yield "@jit"
    yield "def step(table, rows, width, gradients, skip, partials,"
    yield f"         {', '.join(f'{name}_storage: tl.constexpr' for name in inputs)},"
    yield "         wide: tl.constexpr, blocks: tl.constexpr, size: tl.constexpr, levels: tl.constexpr,"
    yield "         interpreted: tl.constexpr):"
    yield "    program = tl.program_id(0).to(tl.int64)"
    yield f"    chunk = table + program * {columns}"
    yield from addresses(inputs)
    yield f"    count = tl.load(chunk + {columns - 3})"
    yield f"    number = tl.load(chunk + {columns - 2})"
    yield "    if skip is not None:  # of which nothing is left to do"
    yield "        count = tl.where(tl.load(skip + number) != 0, 0, count)"
    yield "    row = rows + number * width"
    yield "    scale = tl.load(row)"
    for column, name in enumerate(coefficients):
        yield f"    {name} = tl.load(row + {column + 1})"
    yield "    first = tile_of(blocks)"
    yield "    nothing = tl.full((), 0.0, tl.float64)"
    for name in sums:
        yield f"    lanes_{name} = tl.full((blocks, 16), 0.0, tl.float64)"
    yield f"    if (tl.load(chunk + {columns - 1}) == 1) & (at_g % {ALIGNED} == 0) & (count == blocks * 4096):"
    yield f"        for line in range(0, 256, {together}):"
    yield from _rows(rule, inputs, coefficients, together, whole=True)
    yield "    else:"
    yield f"        for line in range(0, tl.minimum((count + 15) // 16, 256).to(tl.int32), {together}):"
    yield from _rows(rule, inputs, coefficients, together, whole=False)
    for column, name in enumerate(sums):
        yield f"    put_partial(partials, program * {len(sums)} + {column}, lanes_{name}, size, levels)"


def _rows(rule: Rule, inputs: list[str], coefficients: list[str], together: int, whole: bool) -> Iterable[str]:
    """All loads stand before the first store: the compiler cannot know that no address is that of another."""
    indent, sums = " " * 12, rule.sums or ()
    for more in range(together):
        yield f"{indent}places_{more} = first + (line + {more}) * 16"
        yield f"{indent}inside_{more} = places_{more} < count"
        for name in inputs:
            yield (f"{indent}{name}_{more} = load(at_{name}, places_{more}, inside_{more}, {name}_storage, wide, "
                   f"{whole}, interpreted)")
    outputs = ["p", *rule.state]
    for more in range(together):
        yield f"{indent}g_{more} = g_{more} * scale"
        given = ", ".join([*(f"{name}_{more}" for name in inputs), *coefficients])
        made = ", ".join([*(f"new_{name}" for name in outputs), *(f"term_{name}" for name in sums)])
        yield f"{indent}{made} = element({given}, wide)"
        for name, changed in zip(outputs, trace(rule).changed, strict=True):
            if changed:
                value = f"new_{name}" if name == "p" else f"without_denormal(new_{name}, wide)"
                yield (f"{indent}store(at_{name}, places_{more}, inside_{more}, {value}, {name}_storage, {whole}, "
                       "interpreted)")
        for name in sums:
            term = f"term_{name}.to(tl.float64)"
            kept = term if whole else f"tl.where(inside_{more}, {term}, nothing)"
            yield f"{indent}lanes_{name} = lanes_{name} + {kept}"
