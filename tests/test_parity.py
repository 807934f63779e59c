"""Every backend gives the bits of the reference: registry x backend x dtypes x layouts, several steps."""

import functools
import itertools
import math
import tempfile
from pathlib import Path

import pytest
import torch
from forks import python
from helpers import (
    BY_NAME,
    CONFIGURATIONS,
    CPU,
    LAYOUTS,
    REALS,
    Case,
    assert_same_bits,
    assert_same_run,
    bits,
    generator,
    make,
    needs_native,
    normal,
    run,
    same_bits,
    specials,
    usable,
)
from torch.nn import Parameter

from fasttrain.kernels import dispatch, native
from fasttrain.optim import OPTIMIZERS, AdamW

# Not-a-number and overflow are what is tested; NumPy, under the interpreter, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

BACKENDS = [name for name in dispatch.BACKENDS if name not in ("reference", "cuda")]  # CUDA's are in their own file
FAST = [name for name in BACKENDS if name != "triton"]  # the interpreter takes milliseconds for each tensor
F32, F64, BF16, F16 = REALS

# Parameter, gradient and state dtypes; None is the parameter's own.
KINDS = [(F32, None, None), (F64, None, None), (BF16, None, None), (F16, None, None), (F32, BF16, None),
         (BF16, F32, F32), (F16, F32, F32), (F64, F32, F32), (F32, F64, BF16), (BF16, F16, F64)]
NAMES = [configuration.name for configuration in CONFIGURATIONS]
ALL = [Case(name, *kinds, seed=i) for i, (name, kinds) in enumerate(itertools.product(NAMES, KINDS))]
CASES = [case for i, case in enumerate(ALL) if i % 10 == 0 or (i + i // 10) % 3 == 0]  # fp32 and every third other kind
# A few layouts and two steps, every configuration in fp32 and in one more kind: for the interpreter.
SMALL = [Case(name, *kinds, layouts=("empty", "odd", "strided"), steps=2, seed=i)
         for i, name in enumerate(NAMES) for kinds in (KINDS[0], KINDS[1 + i % (len(KINDS) - 1)])]


def needs(backend: str) -> None:
    if reason := usable(backend):
        pytest.skip(f"backend {backend}: {reason}")


@functools.cache
def wanted(case: Case) -> dict[str, torch.Tensor]:
    return run(case, "reference")


def test_the_registry_reaches_every_rule() -> None:
    numbers = generator(0)
    reached = set()
    for configuration in CONFIGURATIONS:
        optimizer = configuration.optimizer([Parameter(torch.ones(1))], **configuration.draw(numbers))
        reached.add(optimizer.rule_of(optimizer.param_groups[0]).name)
    assert reached == {rule.name for optimizer in OPTIMIZERS for rule in optimizer.rules}  # others: test_composed.py
    assert {c.optimizer for c in CONFIGURATIONS} >= set(OPTIMIZERS)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", NAMES)
def test_steps(backend: str, name: str) -> None:
    needs(backend)
    for case in CASES:
        if case.configuration == name:
            assert_same_run(run(case, backend), wanted(case), f"{backend}, {case}")


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - set(FAST)))
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_steps_of_a_slow_backend(backend: str, case: Case) -> None:
    needs(backend)
    assert_same_run(run(case, backend), wanted(case), f"{backend}, {case}")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_all_steps(backend: str, name: str) -> None:
    needs(backend)
    for case in ALL:
        if case.configuration == name:
            assert_same_run(run(case, backend), wanted(case), f"{backend}, {case}")


def test_the_oracle_moves_every_element() -> None:
    """Parity of two runs that do nothing proves nothing."""
    case = Case("AdamW", layouts=("odd", "strided"))
    after = wanted(case)
    assert all(bool((after[key] != 0).all()) for key in after)
    assert not same_bits(after["odd p"], run(Case("AdamW", layouts=("odd", "strided"), steps=2), "reference")["odd p"])


# --- Instruction sets, threads ----------------------------------------------------------------------------------------

PROCESS = """
import sys, torch
from test_parity import CASES, MANY, many_tensors
from helpers import run
from fasttrain.kernels import native
torch.save({"isa": native.module().isa(), "threading": native.module().threading(),
            "runs": {str(i): run(CASES[i], "cpu") for i in range(0, len(CASES), 2)},
            "many": many_tensors(3)}, sys.argv[1])
"""


def in_process(**environment: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        done = python(PROCESS, str(Path(folder, "runs.pt")), **environment)
        if "this processor lacks it" in done.stderr:
            pytest.skip(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr
        return torch.load(Path(folder, "runs.pt"), weights_only=True)


def check_process(answer: dict, what: str) -> None:
    for i, tensors in answer["runs"].items():
        assert_same_run(tensors, wanted(CASES[int(i)]), f"{what}, {CASES[int(i)]}")
    assert_same_run(answer["many"], many_tensors(1), what)


@needs_native
@pytest.mark.parametrize("isa", native.build_info().get("isas", []))
def test_instruction_sets(isa: str) -> None:
    answer = in_process(FASTTRAIN_ISA=isa)
    assert answer["isa"] == isa
    check_process(answer, isa)


@needs_native
@pytest.mark.parametrize("threading", ["pool", "gomp"])
def test_threading(threading: str) -> None:
    answer = in_process(FASTTRAIN_THREADING=threading)
    if not answer["threading"].startswith(threading):
        pytest.skip(f"FASTTRAIN_THREADING={threading}, but the walk runs on {answer['threading']}")
    check_process(answer, threading)


MANY = [*([1, 3, 64, 257] * 500), 100_003, 1, 40_000]


@functools.cache
def many_tensors(threads: int, backend: str = "cpu") -> dict[str, torch.Tensor]:
    """Thousands of small tensors among a few large ones, two steps on some threads."""
    numbers = generator(5)
    params = [Parameter(normal((size,), F32, numbers)) for size in MANY]
    optimizer = AdamW(params, lr=0.1, backend=backend)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(2):
            for p in params:
                p.grad = normal(p.shape, F32, numbers)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    flat = {"p": params, "exp_avg_sq": [optimizer.state[p]["exp_avg_sq"] for p in params],
            "step": [optimizer.state[p]["step"].reshape(1) for p in params]}
    return {key: torch.cat([tensor.detach() for tensor in tensors]) for key, tensors in flat.items()}


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads(threads: int) -> None:
    assert_same_run(many_tensors(threads), many_tensors(1, "reference"), f"{threads} threads")


# --- Special values ---------------------------------------------------------------------------------------------------

SPECIAL = [(backend, dtype, name) for backend in BACKENDS for dtype in REALS for name in NAMES
           if backend in FAST or dtype in (F32, BF16) or name.endswith("defaults")]  # the interpreter is slow


@pytest.mark.parametrize(("backend", "dtype", "name"), SPECIAL, ids=str)
def test_special_values(backend: str, dtype: torch.dtype, name: str) -> None:
    """Every pair of special values in p and g, with every special value in the states; between ordinary neighbours."""
    needs(backend)
    configuration = BY_NAME[name]
    options = configuration.draw(generator(3))
    ends = []
    for kind in (backend, "reference"):
        values = torch.tensor(specials(dtype), dtype=dtype)
        p, g, s = (grid.flatten() for grid in torch.meshgrid(values, values, values, indexing="ij"))
        p, g, s = (torch.stack([x, torch.ones_like(x)], 1).flatten() for x in (p, g, s))
        param = Parameter(p.clone())
        optimizer = configuration.optimizer([param], **options, backend=kind)
        rule = optimizer.rule_of(optimizer.param_groups[0])
        state = optimizer.state[param] if rule.state else {}
        for key in rule.state:  # a mean of squares is not below the square of a mean
            state[key] = 2 * s.abs() if key in rule.positive else s.clone()
        for key in optimizer.running:
            optimizer.state[param][key] = torch.tensor(0.5)
        if optimizer.counts_steps:
            state["step"] = torch.tensor(4.0)
        param.grad = g.clone()
        optimizer.step()
        ends.append({"p": param.detach(), **{key: state[key] for key in rule.state}})
        for key, tensor in ends[-1].items():
            ordinary = tensor[1::2]
            assert bool(ordinary.isfinite().all()), f"{key}: a neighbour was spoilt"
            assert len(bits(ordinary).unique()) == 1, f"{key}: a neighbour changed"
    assert_same_run(*ends, f"{backend}, {name}")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_states_have_no_denormals(backend: str, dtype: torch.dtype) -> None:
    """Zero gradients let moments decay: below the smallest normal number they become zero, and NaN stays."""
    needs(backend)
    smallest = 2.0**-1022 if dtype == F64 else 2.0**-126
    param = Parameter(torch.ones(6, dtype=dtype))
    optimizer = AdamW([param], betas=(0.5, 0.5), backend=backend)
    moment = torch.tensor([smallest, -smallest, 2 * smallest, 4 * smallest, math.nan, 0.0], dtype=dtype)
    optimizer.state[param] = {"step": torch.tensor(1.0), "exp_avg": moment.clone(), "exp_avg_sq": moment.abs()}
    param.grad = torch.zeros(6, dtype=dtype)
    optimizer.step()
    wanted = torch.tensor([0.0, 0.0, smallest, 2 * smallest, math.nan, 0.0], dtype=dtype)
    assert_same_bits(optimizer.state[param]["exp_avg"], wanted)
    assert_same_bits(optimizer.state[param]["exp_avg_sq"], wanted)


@needs_native
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_16_bit_number_is_read_and_every_tie_rounded(dtype: torch.dtype) -> None:
    """p - 1 * g over all 16-bit numbers, and over fp32 numbers on, just above and just below every tie."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    ends = []
    for backend in ("cpu", "reference"):
        exact = Parameter(torch.zeros(2**16))
        exact.grad_dtype = dtype
        exact.grad = -every
        rounded = Parameter(torch.zeros(3 * 2**16, dtype=dtype))
        rounded.grad_dtype = F32
        tie = (every.float().view(torch.int32) + (1 << (15 if dtype == BF16 else 12))).view(F32)
        around = [tie, (tie.view(torch.int32) + 1).view(F32), (tie.view(torch.int32) - 1).view(F32)]
        rounded.grad = -torch.cat(around)
        BY_NAME["SGD"].optimizer([exact, rounded], lr=1.0, backend=backend).step()
        ends.append((exact, rounded))
    for got, wanted in zip(*ends, strict=True):
        assert_same_bits(got, wanted)
    finite = every.isfinite() & (every != 0)
    assert_same_bits(ends[0][0].detach()[finite], every.float()[finite])


# --- Layouts one by one -----------------------------------------------------------------------------------------------

@needs_native
@pytest.mark.parametrize("state_layout", ["contiguous", "guarded"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "expanded", "negated"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, grad_layout: str, state_layout: str) -> None:
    """p, g and states each of its own layout; nothing around them is written."""
    ends = []
    for backend in ("cpu", "reference"):
        numbers = generator(8)
        positive = lambda size, numbers=numbers: normal(size, F32, numbers).abs()  # noqa: E731
        made = {key: make(layout, positive) for key in ("p", "exp_avg", "exp_avg_sq")}
        param = Parameter(made["p"].view)
        optimizer = AdamW([param], lr=0.1, backend=backend)
        guarded = state_layout == "guarded"
        states = {key: m.view if guarded else m.view.contiguous() for key, m in made.items() if key != "p"}
        optimizer.state[param] = {"step": torch.tensor(1.0), **states}
        for _ in range(2):
            grad = normal((1,) * param.dim() if grad_layout == "expanded" else param.shape, F32, numbers)
            param.grad = grad.expand(param.shape) if grad_layout == "expanded" else grad
            if grad_layout == "negated":
                param.grad = torch._neg_view(grad)
            optimizer.step()
        for key, m in made.items():
            m.check(key)
        assert bool((optimizer.state[param]["step"] == 3).all())
        ends.append({"p": param, **states})
    assert_same_run(*ends, layout)


def free_memory() -> int:
    """Bytes that this process may still take, of the machine and of its container."""
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


@pytest.mark.slow
@needs_native
def test_more_than_two_to_the_31_elements() -> None:
    size = 2**31 + 5
    if free_memory() < 6 * size:
        pytest.skip(f"needs {6 * size >> 30} GiB of free memory, {free_memory() >> 30} are free")
    param = Parameter(torch.zeros(size, dtype=BF16, device=CPU))
    param.grad = torch.ones(size, dtype=BF16)
    BY_NAME["SGD"].optimizer([param], lr=1.0).step()
    assert all(bool((part == -1).all()) for part in param.data.split(2**26))
    assert all(bool((part == 1).all()) for part in param.grad.split(2**26))


@needs_native
def test_an_unknown_instruction_set_says_which_there_are() -> None:
    done = python("from fasttrain.kernels import native; native.module().isa()", FASTTRAIN_ISA="mmx")
    assert done.returncode != 0
    assert "FASTTRAIN_ISA=mmx is not an instruction set of this build; it has " in done.stderr
    assert all(isa in done.stderr for isa in native.build_info()["isas"])
