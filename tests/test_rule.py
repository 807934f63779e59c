"""The vocabulary: one row for each word, on every backend; what is refused, and how; names, flops and bytes."""

import ctypes
import math
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CPU, ROOT, assert_same_bits, specials, usable

from fasttrain.kernels import emit_cpp, reference
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import statements, trace
from fasttrain.optim import RULES, AdamW, Lion
from fasttrain.rule import Rule, RuleError, Step, maximum, minimum, sign, sqrt, where

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns of the NaN and overflow that are tested

# A word: what a rule writes on two values, and what it means, on two NumPy scalars of the element type. The meaning
# is written without the vocabulary: the words are the code under test.
Meaning = Callable[[Any, Any], Any]
VOCABULARY: dict[str, tuple[Meaning, Meaning]] = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "sub": (lambda a, b: a - b, lambda a, b: a - b),
    "mul": (lambda a, b: a * b, lambda a, b: a * b),
    "div": (lambda a, b: a / b, lambda a, b: np.divide(a, b)),
    "neg": (lambda a, b: -a, lambda a, b: np.copysign(a, -1.0 if not np.signbit(a) else 1.0)),
    "minus_minus": (lambda a, b: b - -(-a), lambda a, b: b - a),  # noqa: B002
    "abs": (lambda a, b: abs(a), lambda a, b: np.copysign(a, 1.0)),
    "sqrt": (lambda a, b: sqrt(a), lambda a, b: root(a)),
    "sign": (lambda a, b: sign(a), lambda a, b: a if a == 0 or math.isnan(a) else np.copysign(1.0, a)),
    "minimum": (lambda a, b: minimum(a, b), lambda a, b: nan_or(a, b, a if a < b else b)),
    "maximum": (lambda a, b: maximum(a, b), lambda a, b: nan_or(a, b, a if a > b else b)),
    "where": (lambda a, b: where(a < b, a, b), lambda a, b: a if a < b else b),
    "where_not_selected": (lambda a, b: where(a == a, b, a / a), lambda a, b: a / a if math.isnan(a) else b),
    "lt": (lambda a, b: where(a < b, 1.0, 0.0), lambda a, b: float(a < b)),
    "le": (lambda a, b: where(a <= b, 1.0, 0.0), lambda a, b: float(a <= b)),
    "gt": (lambda a, b: where(a > b, 1.0, 0.0), lambda a, b: float(a > b)),
    "ge": (lambda a, b: where(a >= b, 1.0, 0.0), lambda a, b: float(a >= b)),
    "eq": (lambda a, b: where(a == b, 1.0, 0.0), lambda a, b: float(a == b)),
    "ne": (lambda a, b: where(a != b, 1.0, 0.0), lambda a, b: float(a != b)),
    "and": (lambda a, b: where((a < b) & (a > 0.0), a, b), lambda a, b: a if a < b and a > 0 else b),
    "or": (lambda a, b: where((a < b) | (a > 0.0), a, b), lambda a, b: a if a < b or a > 0 else b),
    "not": (lambda a, b: where(~(a < b), a, b), lambda a, b: b if a < b else a),
    "constant_first": (lambda a, b: 1.0 / a - 0.1, lambda a, b: np.divide(one(a), a) - tenth(a)),
    "constant_last": (lambda a, b: a / 3.0 * 0.1, lambda a, b: np.divide(a, one(a) + one(a) + one(a)) * tenth(a)),
    "constant_selected": (lambda a, b: where(a < b, 0.1, -0.0) * b,
                          lambda a, b: (tenth(a) if a < b else -one(a) * 0) * b),
    "integer": (lambda a, b: 2 * a, lambda a, b: a + a),
}


def root(a: Any) -> float:
    """Correctly rounded: through double where that is the wider type, which is exact enough to round once more."""
    return type(a)(math.sqrt(a)) if a >= 0 else math.nan


def nan_or(a: Any, b: Any, otherwise: Any) -> Any:
    return math.nan if math.isnan(a) or math.isnan(b) else otherwise


def one(a: Any) -> Any:
    return type(a)(1)


def tenth(a: Any) -> Any:
    return type(a)(0.1)


def word(name: str) -> Rule:
    def element(p: Any, g: Any, k: Any) -> Any:
        return VOCABULARY[name][0](p, g)

    return Rule(f"Word_{name}", (), lambda step: {}, element)


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of special values, and ordinary ones whose square root is hard to round."""
    values = torch.tensor(specials(dtype), dtype=dtype)
    hard = torch.rand(500, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 100
    a, b = torch.cartesian_prod(values, values).T
    return torch.cat([a, hard]).contiguous(), torch.cat([b, hard.flip(0)]).contiguous()


def meant(name: str, dtype: torch.dtype) -> torch.Tensor:
    a, b = (tensor.numpy() for tensor in operands(dtype))
    return torch.tensor([VOCABULARY[name][1](x, y) for x, y in zip(a, b, strict=True)], dtype=torch.float64).to(dtype)


# --- Backends ---------------------------------------------------------------------------------------------------------

def eager(name: str, dtype: torch.dtype) -> torch.Tensor:
    return reference.evaluate(word(name), operands(dtype), 1.0, {})[0]


def step_with(backend: str, name: str, dtype: torch.dtype) -> torch.Tensor:
    import importlib

    p, g = operands(dtype)
    importlib.import_module(f"fasttrain.kernels.{backend}").step([Item(name, word(name), (p, g), (1.0,), None)])
    return p


def triton(name: str, dtype: torch.dtype) -> torch.Tensor:
    if reason := usable("triton"):
        pytest.skip(reason)
    return step_with("triton", name, dtype)


LOOPS = """
#include "rules_of_words.h"
using namespace fasttrain;
template <template <class> class Rule, class T>
void loop(T* p, const T* g, long n) {
  const typename Rule<T>::K k(nullptr);
  for (long i = 0; i < n; ++i) Rule<T>::element(p[i], g[i], k);
}
#define FT_LOOPS(Name) \\
  extern "C" void Name##_32(float* p, const float* g, long n) { loop<Name, float>(p, g, n); } \\
  extern "C" void Name##_64(double* p, const double* g, long n) { loop<Name, double>(p, g, n); }
FASTTRAIN_RULES(FT_LOOPS)
"""


def numeric_flags() -> list[str]:
    """The flags that the build compiles every file with."""
    text = (ROOT / "CMakeLists.txt").read_text()
    listed = re.search(r"set\(common_options (.*?)\)", text, re.S)
    assert listed is not None
    assert "-ffp-contract=off" in listed[1]
    return shlex.split(listed[1])


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Every word, traced to C++ and compiled with the build's own flags."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("words")
    Path(folder, "rules_of_words.h").write_text(emit_cpp.header(word(name) for name in VOCABULARY))
    Path(folder, "words.cpp").write_text(LOOPS)
    command = [compiler, "-std=c++17", *numeric_flags(), "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", f"-I{folder}",
               str(folder / "words.cpp"), "-o", str(folder / "words.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "words.so"))


@pytest.fixture(params=["eager", "cpp", "triton"])
def backend(request: pytest.FixtureRequest) -> Callable[[str, torch.dtype], torch.Tensor]:
    if request.param != "cpp":
        return {"eager": eager, "triton": triton}[request.param]
    library = request.getfixturevalue("compiled")

    def cpp(name: str, dtype: torch.dtype) -> torch.Tensor:
        p, g = operands(dtype)
        function = getattr(library, f"Word_{name}_{torch.finfo(dtype).bits}")
        function(ctypes.c_void_p(p.data_ptr()), ctypes.c_void_p(g.data_ptr()), ctypes.c_long(p.numel()))
        return p

    return cpp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", VOCABULARY)
def test_a_word_means_the_same_everywhere(name: str, dtype: torch.dtype, backend: Any) -> None:
    a, b = operands(dtype)
    got, wanted = backend(name, dtype), meant(name, dtype)
    differ = [i for i in range(len(a)) if struct.pack("d", got[i].item()) != struct.pack("d", wanted[i].item())
              and not (got[i].isnan() and wanted[i].isnan())]
    rows = [f"{name}({a[i].item()}, {b[i].item()}) = {got[i].item()}, not {wanted[i].item()}" for i in differ[:5]]
    assert not differ, f"{len(differ)} differ\n" + "\n".join(rows)
    assert_same_bits(got, wanted)


def test_every_word_of_the_docstring_has_a_row() -> None:
    import fasttrain.rule

    table = re.findall(r"^``(\w+)\(", fasttrain.rule.__doc__ or "", re.M)
    assert set(table) == {"sqrt", "abs", "sign", "minimum", "maximum", "where"} <= VOCABULARY.keys()


def test_eager_constants_have_the_element_type() -> None:
    """Whatever the default dtype: a constant beside a condition has only the condition to take a type from."""
    rule = Rule("Selected", (), lambda step: {}, lambda p, g, k: where(p < g, 0.1, 0.2) * g)
    p, g = torch.zeros(()), torch.ones(())
    torch.set_default_dtype(torch.float64)
    try:
        [got] = reference.evaluate(rule, [p, g], 1.0, {})
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(got, torch.tensor(0.1))
    [wide] = reference.evaluate(rule, [p.double(), g.double()], 1.0, {})
    assert_same_bits(wide, torch.tensor(0.1, dtype=torch.float64))


def test_plain_numbers_work_in_coefficients() -> None:
    assert (sqrt(9.0), sign(-2.0), sign(0.0), minimum(1.0, 2.0), maximum(1.0, 2.0)) == (3.0, -1.0, 0.0, 1.0, 2.0)
    assert math.isnan(minimum(math.nan, 1.0))
    assert math.isnan(maximum(1.0, math.nan))


# --- Step -------------------------------------------------------------------------------------------------------------

def test_powers_of_a_step() -> None:
    for exponent in (0, 1, 2, 3, 17, 1000, 123_456):
        for base in (0.9, 0.999, 0.5, 0.0, 1.0):
            # What is used is 1 - b^n; b^n itself is off by n half units, each squaring doubles the error before it.
            assert math.isclose(1 - base ** Step(exponent), 1 - base**exponent, rel_tol=1e-12), (base, exponent)


def test_powers_of_a_step_are_repeated_squaring() -> None:
    base = 0.999  # b^11 = (b)(b^2)(b^8): host and device must multiply in this order
    squares = [base, base * base]
    squares += [squares[1] * squares[1]]
    squares += [squares[2] * squares[2]]
    assert base ** Step(11) == 1.0 * squares[0] * squares[1] * squares[3]


def test_a_step_count_reaches_coefficients_as_a_step() -> None:
    seen = []
    rule = Rule("Seen", (), lambda step, lr: seen.append(step) or {"lr": lr}, lambda p, g, k: p - k.lr * g)
    rule.scalars(3, {"lr": 0.1})
    assert type(seen[0]) is Step
    assert trace(rule).row(3, {"lr": 0.1}) == [0.1]


# --- Refusals ---------------------------------------------------------------------------------------------------------

def python_if(p, g, k):
    if g > 0:
        return p
    return g


def python_and(p, g, k):
    return where(g > 0 and p > 0, p, g)


def python_max(p, g, k):
    return max(p, g)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "if": (python_if, r"python_if|if g > 0.*where\(condition, a, b\)"),
    "and": (python_and, r"g > 0 and p > 0.*& \| and ~"),
    "max": (python_max, r"max\(p, g\).*where"),
    "torch function": (lambda p, g, k: torch.exp(g), r"torch\.exp\(g\).*torch\.exp is outside.*\+ - \* /"),
    "math function": (lambda p, g, k: math.sqrt(g), r"math\.sqrt\(g\).*use sqrt\(\)"),
    "power": (lambda p, g, k: g**2, r"g\*\*2.*power.*multiply"),
    "power of a constant": (lambda p, g, k: 2**g, r"2\*\*g.*power"),
    "remainder": (lambda p, g, k: g % 2, r"g % 2.*use /"),
    "scalars": (lambda p, g, k: p - k.lr * k.decay * g,
                r"'mul' combines scalars only \(k\.lr, k\.decay\).*one coefficient"),
    "scalar and constant": (lambda p, g, k: p - (1.0 - k.lr) * g, r"'sub' combines scalars only \(1\.0, k\.lr\)"),
    "scalar root": (lambda p, g, k: p - sqrt(k.lr) * g, r"'sqrt' combines scalars only \(k\.lr\)"),
    "condition as a value": (lambda p, g, k: p * (g > 0), r"'mul' takes a value there.*where\(\)"),
    "value as a condition": (lambda p, g, k: where(g, p, g), r"'where' takes a comparison there"),
    "value in logic": (lambda p, g, k: where(g & p, p, g), r"'and' takes a comparison there"),
    "string": (lambda p, g, k: p + "1", r"str is not a value of a rule"),
    "bool": (lambda p, g, k: where(True, p, g), r"bool is not a value of a rule"),
    "tensor": (lambda p, g, k: p + torch.ones(1), r"torch\.\w*add\w* is outside|Tensor is not a value"),
    "infinite constant": (lambda p, g, k: minimum(p, math.inf), r"constant inf.*finite"),
    "word of C++": (lambda p, g, k: p * k.double, r"cannot be called 'double'"),
    "iteration": (lambda p, g, k: p + sum(g), r"sum\(g\).*iteration.*one element"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_line_and_remedy(what: str) -> None:
    function, wanted = REFUSED[what]
    with pytest.raises(RuleError, match=wanted) as error:
        trace(Rule("Refused", (), lambda step: {"lr": 1.0, "decay": 1.0, "double": 1.0}, function))
    line = function.__code__.co_firstlineno
    assert re.search(rf"{re.escape(__file__)}:({line}|{line + 1}): ", str(error.value)), str(error.value)


@pytest.mark.parametrize(("state", "function", "wanted"), [
    (("m",), lambda p, g, m, k: p, r"must return 2 values, the new p, m"),
    ((), lambda p, g, k: (p, g), r"must return 1 values"),
    ((), lambda p, g, k: None, r"it returned \(?None"),
    ((), lambda p, g, k: k.lr, r"must return"),
    ((), lambda p, g, k: p > g, r"must return"),
    (("m", "m"), lambda p, g, m, n, k: (p, m, n), r"'m'.*choose another name"),
    (("new",), lambda p, g, new, k: (p, new), r"'new'.*choose another name"),
    (("g",), lambda p, g, h, k: (p, h), r"'g'.*choose another name"),
])
def test_refused_rule(state: tuple[str, ...], function: Any, wanted: str) -> None:
    with pytest.raises(RuleError, match=wanted):
        trace(Rule("Refused", state, lambda step: {"lr": 1.0}, function))


def test_a_coefficient_that_is_missing_is_named() -> None:
    rule = Rule("Missing", (), lambda step, lr: {"lr": lr}, lambda p, g, k: p - k.rate * g)
    with pytest.raises(RuleError, match=r"rule Missing: element\(\) uses k\.rate, which .* \(it returns lr\)"):
        trace(rule).row(1, {"lr": 1.0})


# --- What the graph knows ---------------------------------------------------------------------------------------------

def test_common_subexpressions_are_one() -> None:
    rule = Rule("Twice", (), lambda step: {"a": 1.0}, lambda p, g, k: (g * k.a + p) * (g * k.a + p) - g * k.a)
    graph = trace(rule)
    assert graph.uses == {"mul": 2, "add": 1, "sub": 1}
    assert graph.flops == 5  # the gradient's scale is one
    text = emit_cpp.struct(rule)
    assert text.count("g * k.a") == 1


def test_dead_code_is_not_counted() -> None:
    def element(p, g, k):
        unused = sqrt(g) / p  # noqa: F841
        return p - k.a * g

    graph = trace(Rule("Dead", (), lambda step: {"a": 1.0}, element))
    assert graph.uses == {"mul": 1, "sub": 1}
    assert "sqrt" not in emit_cpp.struct(graph.rule)


def test_values_keep_their_authors_names() -> None:
    def element(p, g, m, k):
        double = g * k.a
        new_p = double * double
        m = m + new_p
        k = where(m > 0.0, m, g)
        return p - k, m

    graph = trace(Rule("Named", ("m",), lambda step: {"a": 1.0}, element))
    names = [name for name, _ in statements(graph)[0]]
    assert names == ["double1", "new_p1", "m1", "k1"]  # not those that mean something else in C++
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_flops_are_the_operations_of_the_printed_code(name: str) -> None:
    rule = next(rule for rule in RULES if rule.name == name)
    text = emit_cpp.struct(rule).split("element(")[1].split("{", 1)[1]
    printed = len(re.findall(r" [-+*/] |square_root\(|= -", text))
    assert trace(rule).flops == printed + 1


@pytest.mark.parametrize(("rule", "sizes", "wanted"), [
    (AdamW.rules[0], (4, 4, 4), 28), (AdamW.rules[0], (2, 2, (4, 4)), 22), (AdamW.rules[1], (4, 4, 4), 36),
    (Lion.rules[0], (2, 2, 2), 10), (Lion.rules[0], (2, 4, 4), 16),
])
def test_bytes_per_element(rule: Rule, sizes: Any, wanted: int) -> None:
    assert trace(rule).bytes_per_element(*sizes) == wanted


def test_outputs_that_are_inputs_are_not_mixed_up(tmp_path: Path) -> None:
    """Outputs are assigned one after the other: none may read an input that is changed already."""
    rule = Rule("Rotate", ("a", "b"), lambda step: {}, lambda p, g, a, b, k: (a, b, p))
    values = [torch.tensor([float(i)]) for i in range(4)]
    assert [tensor.item() for tensor in reference.evaluate(rule, values, 1.0, {})] == [2.0, 3.0, 0.0]
    body = emit_cpp.struct(rule)
    assert body.index("new_b = p") < body.index("    p = new_p")
    if usable("triton") is None:
        from fasttrain.kernels import triton as backend

        backend.step([Item("rotate", rule, tuple(values), (1.0,), None)])
        assert [tensor.item() for tensor in values] == [2.0, 1.0, 3.0, 0.0]


def test_the_profile_function_of_the_caller_is_restored() -> None:
    import sys

    calls: list[str] = []

    def profiler(frame: Any, event: str, argument: Any) -> None:
        calls.append(event)

    sys.setprofile(profiler)
    try:
        trace(Rule("Profiled", (), lambda step: {}, lambda p, g, k: p - g))
        assert sys.getprofile() is profiler
        with pytest.raises(RuleError):
            trace(Rule("Profiled", (), lambda step: {}, python_if))
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


def test_reference_steps_on_the_meaning_of_a_rule() -> None:
    """Item by item: scale first, states and the count written, nothing else."""
    rule = Lion.rules[0]
    p, g, m, count = torch.tensor([1.0]), torch.tensor([8.0]), torch.tensor([0.5]), torch.tensor(3.0)
    row = [0.25, *(dict(b1=0.5, a1=0.5, keep=1.0, lr=0.125, b2=0.5, a2=0.5)[name] for name in trace(rule).coefficients)]
    reference.step([Item("p", rule, (p, g, m), row, count)])
    assert (p.item(), g.item(), m.item(), count.item()) == (0.875, 8.0, 1.25, 4.0)
    assert reference.why_not(CPU) is None
