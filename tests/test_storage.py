"""Steps of items that are not plain, on the CPU backend: the reference's bits whatever codecs, layouts and threads."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from coded import F32, F64, SIZES
from forks import python
from helpers import LAYOUTS, Made, generator, make, needs_native, normal, specials
from kept import MIXED, Case, compare, copied, mixtures
from torch import Tensor
from torch.nn import Parameter

from fasttrain.kernels import native, reference
from fasttrain.kernels.item import Item, apart
from fasttrain.precision.codecs import NUMBER, codec
from fasttrain.precision.draws import parameter_key, step_key

pytestmark = needs_native
CASES = mixtures()
ADAM = Case("AdamW", "split16 bf16 int8 int8+P+S")


def mixed(size: int, numbers: torch.Generator) -> Tensor:
    return normal((size,), F32, numbers) * 10.0 ** torch.randint(-6, 2, (size,), generator=numbers)


def steps(item: Item, backend: Any, gradients: list[Tensor]) -> None:
    for step, gradient in enumerate(gradients):
        item.tensors[1].copy_(gradient)
        backend.step([replace(item, key=parameter_key(step_key(3, step), 9))])


def check_case(case: Case, values: Tensor, gradients: list[Tensor], numbers: torch.Generator) -> None:
    wanted = case.like(values, numbers)
    (got,) = copied([wanted])
    steps(wanted, reference, gradients)
    steps(got, native, gradients)
    compare([got], [wanted], str(case))


@pytest.mark.parametrize("part", range(6))
def test_steps(part: int) -> None:
    numbers = generator(20 + part)
    for index in range(part, len(CASES), 6):
        for size in (SIZES[index % len(SIZES)], SIZES[(index * 5 + 3) % len(SIZES)], 1100):
            check_case(CASES[index], mixed(size, numbers), [mixed(size, numbers) for _ in range(3)], numbers)


@pytest.mark.parametrize("part", range(3))
def test_steps_of_special_values(part: int) -> None:
    """NaN, infinities, zeros, denormal and huge numbers in p, g and states, each block a few of them."""
    numbers = generator(30 + part)
    special = torch.tensor(specials(F32))
    finite = special[special.isfinite()]
    for case in CASES[part::3]:
        values = torch.cat([special, finite[torch.randint(len(finite), (1000,), generator=numbers)], special])
        check_case(case, values, [values[torch.randperm(len(values), generator=numbers)] for _ in range(2)], numbers)


def test_steps_of_doubles() -> None:
    numbers = generator(40)
    for rule in MIXED:
        for average in ("", "f64"):
            case = Case.of(rule, *["f64"] * 4, average, clip=0.5 if average else math.inf, zero=not average)
            values = torch.cat([mixed(1000, numbers), torch.tensor(specials(F64), dtype=F64)])
            check_case(case, values, [values.flip(0), values], numbers)


def many_items(numbers: torch.Generator) -> list[Item]:
    return [CASES[i % len(CASES)].like(mixed(size, numbers), numbers)
            for i, size in enumerate([70_001, 3, 600, 140_000, 1, 0, 256, 33_333])]


# --- Layouts ----------------------------------------------------------------------------------------------------------

LAID_OUT = [Case("AdamW", "split16 bf16 f32 f32 f32", zero=True, clip=0.5),
            Case("Lion", "kahan_bf16 f32 bf16", zero=True),
            Case("AdamWAmsgrad", "f32 bf16 int8 int8+P+S int8+P+S bf16+S", zero=True, place=(9, 0, 0)),
            Case("AdamW", "bf16+S bf16 int4 f16", clip=0.5)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """p, g, second arrays and EMA each a view of one layout: in place where a flat loop can walk them, else by a copy.
    Nothing around them is written.
    """
    size = LAYOUTS[layout][0]
    count = math.prod(size)

    def laid_out(number: int, array: Tensor | None, first: bool) -> Tensor | Made | None:
        if array is None or (codec(number).block and not first) or codec(number).name == "int4":
            return None if array is None else array.clone()
        return array.view(size).clone() if codec(number).block else make(layout, lambda size: array.view(size))

    for case in LAID_OUT:
        numbers = generator(60)
        flat = case.like(normal((count,), F32, numbers), numbers)
        ends = []
        for backend in (native, reference):
            pairs = zip(flat.codecs, flat.tensors, flat.extras, strict=True)
            made = [[laid_out(number, main, True), laid_out(number, extra, False)] for number, main, extra in pairs]
            views = [[array.view if isinstance(array, Made) else array for array in pair] for pair in made]
            tensors, extras = zip(*views, strict=True)
            item = replace(flat, tensors=tensors, extras=extras, counter=torch.zeros(()), key=12345)
            backend.step([item])
            for array in (array for pair in made for array in pair):
                if isinstance(array, Made):
                    array.check(f"{case}, {layout}")
            ends.append(item)
        compare(ends[:1], ends[1:], f"{case}, {layout}")


# --- Threads, instruction sets ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    wanted = many_items(generator(50))
    got = copied(wanted)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native.step(got)
    finally:
        torch.set_num_threads(before)
    reference.step(wanted)
    compare(got, wanted, f"{threads} threads")


PROCESS = """
import coded, test_native_codecs, test_storage
from fasttrain.kernels import native
for part in (0, 3):
    test_storage.test_steps(part)
test_storage.test_steps_of_special_values(0)
for number in (*coded.ALONE, *coded.BLOCKS):
    test_native_codecs.test_codecs(number)
test_storage.test_threads(2)
print("isa", native.module().isa())
"""


@pytest.mark.parametrize("isa", [isa for isa in native.build_info().get("isas", []) if isa != "avx512"])
def test_instruction_sets(isa: str) -> None:
    done = python(PROCESS, timeout=600, FASTTRAIN_ISA=isa)
    if "this processor lacks it" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"isa {isa}")


# --- The plan ---------------------------------------------------------------------------------------------------------

class Planned:
    """A plan of some items, whose arrays it finds in a state dict as an optimizer's would be."""

    def __init__(self, items: list[Item], watched: bool = True):
        self.items, self.watched = items, watched
        self.params = [Parameter(item.tensors[0], requires_grad=False) for item in items]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        for p, item in zip(self.params, items, strict=True):
            p.grad_dtype = None
            p.grad = item.tensors[1]
            names = [*(f"main {o}" for o in range(2, len(item.tensors)))]
            self.state[p] = dict(zip(names, item.tensors[2:], strict=True)) | {"step": item.counter}
            self.state[p] |= {f"extra {o}": extra for o, extra in enumerate(item.extras) if extra is not None}
        self.plan = native.module().Plan(native.reader(), [self.params])

    def kept(self, index: int) -> tuple:
        item = self.items[index]
        extra_keys = tuple(None if extra is None else f"extra {o}" for o, extra in enumerate(item.extras))
        return item.codecs, extra_keys, item.averaged, item.zero, 9 + index, item.place, self.watched

    def set(self, index: int) -> bool:
        item = self.items[index]
        keys = (*(f"main {o}" for o in range(2, len(item.tensors))), "step")
        return self.plan.set(index, native.number_of(item.rule), item.dtype == F64, self.state[self.params[index]],
                             keys, True, False, self.kept(index))

    def step(self, seed: int = 3, threads: int = 2) -> list[int]:
        """Returns the parameters that had to be described."""
        attention = self.plan.scan(self.state, [self.params])
        for index in attention:
            assert self.set(index)
        rows = self.plan.rows(each=True)
        drawn = [step_key(seed, int(step)) for _, step, _ in rows]
        keys = torch.tensor([key - (key >> 63 << 64) for key in drawn])
        width = max(len(item.row) for item in self.items)
        table = torch.zeros(len(rows), width, dtype=F64)
        for row, item in zip(table, self.items, strict=True):
            row[: len(item.row)] = torch.tensor(item.row, dtype=F64)
        self.plan.run(table.numpy(), keys.view(torch.uint64).numpy(), threads, torch.autograd.graph.increment_version)
        self.plan.release()
        return attention


def test_plan() -> None:
    """Several steps of many parameters at once, fresh gradients each time."""
    numbers = generator(70)
    wanted = [case.like(mixed(size, numbers), numbers) for case, size in
              zip(CASES, [1, 0, 300, 1025, *([77] * (len(CASES) - 6)), 70_001, 512], strict=False)]
    planned = Planned(copied(wanted))
    for step in range(3):
        for i, (p, item) in enumerate(zip(planned.params, wanted, strict=True)):
            gradient = mixed(p.numel(), numbers).to(item.tensors[1].dtype)
            item.tensors[1].copy_(gradient)
            p.grad = gradient
            planned.items[i] = replace(planned.items[i], tensors=(p.data, gradient, *planned.items[i].tensors[2:]))
        versions = [[tensor._version for tensor in item.written] for item in planned.items]
        assert planned.step() == (list(range(len(wanted))) if step == 0 else [])
        key = step_key(3, step + 1)
        reference.step([replace(item, key=parameter_key(key, 9 + i)) for i, item in enumerate(wanted)])
        for i, item in enumerate(planned.items):
            compare([item], wanted[i:i + 1], f"step {step}, {i}: {CASES[i]}")
            own = [tensor._version for tensor in item.written[1:]]  # not the parameter, another object over its memory
            assert own == [version + 1 for version in versions[i][1:]]


def test_a_parameter_that_somebody_else_wrote_is_reported() -> None:
    numbers = generator(71)
    for watched in (True, False):
        planned = Planned([ADAM.like(mixed(300, numbers), numbers) for _ in range(3)], watched)
        assert planned.step() == [0, 1, 2]
        assert planned.step() == []
        with torch.no_grad():
            planned.params[1].mul_(1)
        assert planned.step() == ([1] if watched else [])
        assert planned.step() == []


def test_what_changes_is_described_again() -> None:
    numbers = generator(72)
    planned = Planned([ADAM.like(mixed(300, numbers), numbers) for _ in range(3)])
    planned.step()
    state = planned.state[planned.params[2]]
    state["extra 0"] = state["extra 0"].clone()
    assert planned.step() == [2]
    planned.params[0].grad = planned.params[0].grad.float()
    planned.items[0] = replace(planned.items[0], codecs=(NUMBER["split16"], 0, *planned.items[0].codecs[2:]))
    assert planned.step() == [0]
    planned.params[1].grad = None
    assert planned.plan.scan(planned.state, [planned.params]) == []
    assert len(planned.plan.rows()) == 1
    assert len(planned.plan.rows(each=True)) == 2


BYTES = [  # design.md, section 5: how p, g and states are kept; memory beyond the gradient, traffic
    ("f32 f32 f32 f32", 12, 28), ("master_bf16 bf16 f32 f32", 14, 28), ("split16 bf16 f32 f32", 12, 26),
    ("split16 bf16 bf16 bf16", 8, 18), ("split16 bf16 int8 int8+P", 6.03, 14.06),
    ("split8 bf16 int8 int8+P", 5.03, 12.06), ("bf16+S bf16 int8 int8+P", 4.03, 10.06),
    ("bf16+S bf16 int4 int4+P", 3.06, 8.125),
]


@pytest.mark.parametrize(("codecs", "memory", "traffic"), BYTES)
def test_bytes(codecs: str, memory: float, traffic: float) -> None:
    """The table of section 5: bytes of each element, those of the arrays and those that the walk counts."""
    count = 256 * 40
    for zero in (False, True):
        item = Case("AdamW", codecs, zero=zero).like(torch.ones(count), generator(0))
        planned = Planned([item])
        planned.step()
        g = item.tensors[1]
        kept = sum(tensor.nbytes for tensor in (item.tensors[0], *item.tensors[2:], *item.extras) if tensor is not None)
        assert kept / count == pytest.approx(memory, abs=0.005)
        last = planned.plan.last
        rounded = count * 2 if codecs.startswith("master") else 0  # from the master: not read
        written = kept + (g.nbytes if zero else 0)
        assert last == dict(launches=1, bytes_read=kept - rounded + g.nbytes, bytes_written=written, parameters=1,
                            elements=count)
        if not zero:
            assert (last["bytes_read"] + last["bytes_written"]) / count == pytest.approx(traffic, abs=0.005)


def test_shared_memory_is_found() -> None:
    """Two parameters with one second array are stepped one after the other, by one thread."""
    numbers = generator(73)
    items = [ADAM.like(mixed(70_001, numbers), numbers) for _ in range(2)]
    items[1] = replace(items[1], extras=(items[0].extras[0], *items[1].extras[1:]))
    assert not apart(items)
    wanted = copied(items)
    wanted[1] = replace(wanted[1], extras=(wanted[0].extras[0], *wanted[1].extras[1:]))
    Planned(items).step(threads=3)
    reference.step([replace(item, key=parameter_key(step_key(3, 1), 9 + i)) for i, item in enumerate(wanted)])
    compare(items, wanted, "shared")


def test_what_cannot_be_kept_is_refused() -> None:
    numbers = generator(74)
    planned = Planned([ADAM.like(mixed(300, numbers), numbers)])
    item = planned.items[0]
    for codecs, message in (((4, 2, 14, 10), "codec 14"), ((20, 2, 10, 10), "codec 20"), ((4, 4, 10, 26), "operand 1"),
                            ((4, 2, 10), "3 codecs")):
        planned.items[0] = replace(item, codecs=codecs)
        with pytest.raises(ValueError, match=message):
            planned.set(0)
    for extras in ((None, *item.extras[1:]), (*item.extras[:3], item.extras[3][:1].clone())):
        with pytest.raises(ValueError, match="second array"):
            native.step([replace(item, extras=extras)])
    planned.items[0] = replace(item, codecs=(NUMBER["split8"], *item.codecs[1:]))
    assert not planned.set(0)  # its remainder has 16 bits
    planned.items[0] = item
    planned.plan.scan(planned.state, [planned.params])
    assert planned.set(0)
    planned.plan.rows()
    with pytest.raises(ValueError, match="one 64-bit key"):
        planned.plan.run(torch.zeros(1, 11, dtype=F64).numpy(), None, 1, torch.autograd.graph.increment_version)
    with pytest.raises(ValueError, match="more coefficients"):
        planned.plan.run(torch.zeros(1, 10, dtype=F64).numpy(), None, 1, torch.autograd.graph.increment_version)
