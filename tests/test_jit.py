"""Rules that are compiled at first use: the reference's bits, one compilation, and a reason where there is none."""

import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch
from helpers import (
    REALS,
    ROOT,
    Case,
    Configuration,
    assert_same_bits,
    assert_same_run,
    covering,
    generator,
    needs_native,
    normal,
    python,
    run,
)
from torch.nn import Parameter

from fasttrain.kernels import cache, jit, native, triton
from fasttrain.kernels.emit_cpp import digest
from fasttrain.optim import RULES, AdamW, Optimizer
from fasttrain.rule import Rule, maximum, sqrt, where

GXX = shutil.which("g++") or shutil.which("clang++")
pytestmark = [needs_native, pytest.mark.skipif(GXX is None, reason="neither g++ nor clang++ is on PATH")]


class Own(Optimizer):
    """Nearly every word of the vocabulary, two states, and a coefficient of the step."""

    state = ("exp_avg", "peak")

    @staticmethod
    def coefficients(step, lr, beta, eps):
        return dict(keep=beta, add=1 - beta, rate=lr / (1 - beta**step), eps=eps)

    @staticmethod
    def element(p, g, exp_avg, peak, k):
        exp_avg = k.keep * exp_avg + k.add * g
        peak = maximum(k.keep * peak, abs(g))
        step = where(~(g == 0.0) & (peak > k.eps), -exp_avg / (sqrt(peak) + k.eps), exp_avg)
        return p + k.rate * step, exp_avg, peak

    def __init__(self, params, lr=0.1, beta=0.9, eps=1e-8, **options):
        super().__init__(params, dict(lr=lr, beta=beta, eps=eps), **options)


def descent(sign: float = 1.0, name: str = "Descent") -> Rule:
    """A small rule, and others of the same name."""
    return Rule(name, (), lambda step, lr: {"lr": sign * lr}, lambda p, g, k: p - k.lr * (g * sign))


def page(rule: Rule) -> type[Optimizer]:
    class Page(Optimizer):
        rules = (rule,)

        def __init__(self, params, lr=0.5, **options):
            super().__init__(params, dict(lr=lr), **options)

    return Page


def step(rule: Rule, steps: int = 1, backend: str | None = None) -> list[float]:
    p = Parameter(torch.zeros(3))
    optimizer = page(rule)([p], backend=backend)
    for _ in range(steps):
        p.grad = torch.ones(3)
        optimizer.step()
    return p.tolist()


def load(rule: Rule, module: object = None) -> tuple[int | None, str]:
    return jit.load(rule, module or native.module(), native.build_info())


Forget = Callable[[], None]


@pytest.fixture
def forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Forget:
    """An empty cache; calling it makes the process forget what it loaded or could not compile."""
    def forget() -> None:
        monkeypatch.setattr(jit, "known", {})
        native.say_not_compiled.cache_clear()
        jit.find_compiler.cache_clear()

    monkeypatch.setenv("FASTTRAIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTTRAIN_JIT", raising=False)
    forget()
    return forget


class Compiler:
    """A script in the place of the compiler, which keeps count."""

    def __init__(self, folder: Path):
        self.path, self.log = folder / "compiler", folder / "log"
        self.does(f'exec {GXX} "$@"')

    def does(self, what: str, version: str = "1") -> None:
        self.path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo {version}; exit; fi\n'
                             f"echo once >> {self.log}\n{what}\n")
        self.path.chmod(0o700)

    @property
    def count(self) -> int:
        return len(self.log.read_text().split()) if self.log.exists() else 0


@pytest.fixture
def compiler(forget: Forget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler(tmp_path)
    monkeypatch.setenv("CXX", str(made.path))
    return made


NO_CODE = 'for last; do :; done; while [ "$1" != -o ]; do shift; done; echo no code > "$2"'


class Module:
    """The compiled module, which takes anything for a rule: what is tested is what it is given."""

    def __init__(self) -> None:
        self.given: list[bytes] = []
        self.refuses: list[bytes] = []

    def headers(self) -> str:
        return native.module().headers()

    def isa(self) -> str:
        return native.module().isa()

    def load_rule(self, path: str, name: str, number: int) -> int:
        self.given.append(Path(path).read_bytes()[:-32])
        if self.given[-1] in self.refuses:
            raise RuntimeError("refused")
        return 100


@pytest.fixture
def module(compiler: Compiler) -> Module:
    compiler.does(NO_CODE)
    return Module()


# --- Bits -------------------------------------------------------------------------------------------------------------

# Parameter, gradient and state dtypes: every pair of them.
KINDS = covering(REALS, (None, *REALS), (None, *REALS))


def own(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(lr=(1e-3, 0.3), beta=(0.1, 0.99), eps=(1e-10, 1e-3))
    monkeypatch.setitem(helpers.BY_NAME, "Own", Configuration("Own", Own, options))


def test_the_bits_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    own(monkeypatch)
    number = native.number_of(Own.rules[0])
    assert number is not None
    assert number >= len(RULES)
    for seed, kinds in enumerate(KINDS):
        case = Case("Own", *kinds, seed=seed)
        assert_same_run(run(case, "cpu"), run(case, "reference"), str(case))


def test_triton_has_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := helpers.usable("triton"):
        pytest.skip(reason)
    own(monkeypatch)
    for seed, kinds in enumerate(((torch.float32, None, None), (torch.bfloat16, torch.float32, torch.float32))):
        case = Case("Own", *kinds, layouts=("empty", "odd", "strided"), steps=2, seed=seed)
        assert_same_run(run(case, "triton"), run(case, "cpu"), str(case))


PROCESS = """
import sys, torch
from helpers import generator, normal
from torch.nn import Parameter
from fasttrain.kernels import native
from test_jit import Own
numbers = generator(0)
p = Parameter(normal((1021,), torch.float32, numbers))
optimizer = Own([p])
for _ in range(3):
    p.grad = normal(p.shape, p.dtype, numbers)
    optimizer.step()
assert native.number_of(Own.rules[0]) is not None, native.find(Own.rules[0])
torch.save(p.detach(), sys.argv[1])
print(native.module().isa())
"""


OTHERS = [isa for isa in native.build_info().get("isas", []) if native.load()[0] and isa != native.module().isa()]


def expected() -> torch.Tensor:
    numbers = generator(0)
    p = Parameter(normal((1021,), torch.float32, numbers))
    optimizer = Own([p], backend="reference")
    for _ in range(3):
        p.grad = normal(p.shape, p.dtype, numbers)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("isa", OTHERS)
def test_instruction_sets(isa: str, tmp_path: Path) -> None:
    done = python(PROCESS, str(tmp_path / "p"), FASTTRAIN_ISA=isa)
    if "this processor lacks it" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == isa
    assert_same_bits(torch.load(tmp_path / "p", weights_only=True), expected(), isa)


# --- The cache --------------------------------------------------------------------------------------------------------

def test_a_rule_is_compiled_once(compiler: Compiler, forget: Forget) -> None:
    number, _ = load(descent())
    assert number is not None
    assert load(descent()) == (number, "")  # another object of the same text
    assert compiler.count == 1
    forget()  # as another process
    assert load(descent())[0] is not None
    assert compiler.count == 1


def test_processes_share_what_they_compiled(compiler: Compiler, tmp_path: Path) -> None:
    """Several at once on an empty cache, and one more after them."""
    answers: list[subprocess.CompletedProcess[str]] = []

    def start(index: int) -> None:
        answers.append(python(PROCESS, str(tmp_path / f"p{index}")))

    def start_all(indices: range) -> None:
        threads = [threading.Thread(target=start, args=(index,)) for index in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    start_all(range(2))
    assert 1 <= compiler.count <= 2
    before = compiler.count
    start_all(range(2, 3))
    assert compiler.count == before
    assert [(done.returncode, done.stderr) for done in answers] == [(0, "")] * 3
    for index in range(3):
        assert_same_bits(torch.load(tmp_path / f"p{index}", weights_only=True), expected())
    assert len(list(cache.directory().iterdir())) == 1, "something was left beside the entry"


def test_threads_share_one_compilation(compiler: Compiler) -> None:
    found: list[tuple[int | None, str]] = []
    threads = [threading.Thread(target=lambda: found.append(load(descent()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.count == 1
    assert len(set(found)) == 1
    assert found[0][0] is not None


@pytest.mark.parametrize("damaged", [lambda whole: whole[: len(whole) // 2], lambda whole: b"",
                                     lambda whole: whole[:3] + bytes(len(whole) - 3)])
def test_a_damaged_entry_is_made_anew(compiler: Compiler, module: Module, forget: Forget, damaged) -> None:
    load(descent(), module)
    (entry,) = cache.directory().iterdir()
    entry.write_bytes(damaged(entry.read_bytes()))
    forget()
    assert load(descent(), module) == (100, "")
    assert compiler.count == 2
    assert module.given == [b"no code\n"] * 2, "what was loaded is not what the compiler makes"


def test_what_the_module_refuses_is_made_anew(compiler: Compiler, module: Module, forget: Forget) -> None:
    load(descent(), module)
    (entry,) = cache.directory().iterdir()
    cache.put(entry.name, b"old")
    module.refuses = [b"old"]
    forget()
    assert load(descent(), module) == (100, "")
    assert compiler.count == 2
    assert module.given[1:] == [b"old", b"no code\n"]


def test_the_key_has_all_that_matters(compiler: Compiler, module: Module, forget: Forget, monkeypatch) -> None:
    info, isa = native.build_info(), module.isa()
    changes: list[Callable[[], dict | None]] = [
        lambda: None,
        lambda: compiler.does(NO_CODE, version="2"),
        lambda: compiler.does(f"{NO_CODE} # other text"),
        lambda: monkeypatch.setattr("fasttrain.__version__", "0.0.0"),
        lambda: {**info, "flags": {isa: [*info["flags"][isa], "-DOTHER"]}},
        lambda: monkeypatch.setenv("CXX", f"env {compiler.path}"),
    ]
    for made, change in enumerate(changes, start=1):
        changed = change() or info
        for _ in range(2):
            forget()
            assert jit.load(descent(), module, changed) == (100, "")
        assert compiler.count == made
    forget()
    load(descent(sign=-1.0), module)
    assert compiler.count == made + 1


# --- Rules apart ------------------------------------------------------------------------------------------------------

def test_one_name_and_two_equations(compiler: Compiler) -> None:
    up = Rule("Descent", (), lambda step, lr: {"lr": lr}, lambda p, g, k: p + k.lr * g)
    down = Rule("Descent", (), lambda step, lr: {"lr": lr}, lambda p, g, k: p - k.lr * g)
    assert native.number_of(up) != native.number_of(down)
    assert (step(up), step(down), step(up)) == ([0.5] * 3, [-0.5] * 3, [0.5] * 3)
    assert compiler.count == 2


def test_one_name_and_two_equations_in_triton() -> None:
    """Triton reads a kernel's source by the name of its file, and reads it late."""
    if reason := helpers.usable("triton"):
        pytest.skip(reason)
    rules = [Rule("Descent", (), lambda step, lr: {"lr": lr}, element)
             for element in (lambda p, g, k: p + k.lr * g, lambda p, g, k: p - k.lr * g)]
    for rule in rules:
        triton.compile_rule(rule, True)  # cached, as the step asks for it
    assert [step(rule, backend="triton") for rule in rules] == [[0.5] * 3, [-0.5] * 3]


def test_the_name_of_a_compiled_rule(compiler: Compiler) -> None:
    """A rule of the package's name with another equation does not get the package's kernel."""
    rule = replace(AdamW.rules[0], element=lambda p, g, m, v, k: (p - k.rate * g, m, v))
    assert native.number_of(rule) not in (None, native.number_of(AdamW.rules[0]))
    p = Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    optimizer = type("Other", (AdamW,), dict(rule_of=lambda self, group: rule))([p], lr=0.5)
    optimizer.step()
    (rate,) = optimizer._row(rule, optimizer.param_groups[0], 1, 1.0)[1:]
    assert_same_bits(p, torch.full((2,), -rate))


@pytest.mark.parametrize("name", ["Stream", "RuleKernels"])
def test_names_that_the_kernels_use_too(name: str, forget: Forget) -> None:
    number, reason = load(descent(name=name))
    assert number is not None, reason


def test_plans_go_on_while_rules_are_added(forget: Forget) -> None:
    p = Parameter(torch.zeros(3))
    optimizer = page(descent())([p])
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
        (entry,) = cache.directory().iterdir()
        for _ in range(200):
            native.module().load_rule(str(entry), "Descent", digest(descent()))
    assert p.tolist() == [-1.5] * 3


# --- What is refused --------------------------------------------------------------------------------------------------

def made(text: str, isa: str | None = None) -> Path:
    """The entry of a source that was tampered with."""
    module, info = native.module(), native.build_info()
    command = [str(GXX), *info["flags"][isa or module.isa()], "-w", f"-I{jit.sources(module, info)}", "-shared"]
    return put(jit.compiled(command, text))


def put(code: bytes) -> Path:
    return cache.put(f"{len(list(cache.directory().iterdir()))}.so", code)  # dlopen knows a path that it has opened


def source(rule: Rule, headers: str | None = None) -> str:
    return jit.FRONT.format(headers=headers or native.module().headers(), struct=jit.struct(rule), name=rule.name)


def refused(path: Path, rule: Rule, number: int | None = None) -> str:
    with pytest.raises(RuntimeError, match=r"is refused|cannot be loaded") as raised:
        native.module().load_rule(str(path), rule.name, digest(rule) if number is None else number)
    return str(raised.value)


# FT_EXPORT_RULE, had RuleKernels grown.
LARGER = """
namespace fasttrain {{ namespace own {{ static const RuleKernels rules[] = {{FT_ROW({name})}}; }} }}
extern "C" {{
__attribute__((visibility("default"))) extern const fasttrain::OnDemand fasttrain_rule_1;
const fasttrain::OnDemand fasttrain_rule_1{{sizeof(fasttrain::RuleKernels) + 8, sizeof(fasttrain::Stream), FT_HEADERS,
                                            FT_TEXT(FT_ISA), fasttrain::own::rules}};
}}
"""


def test_objects_of_another_build_rule_or_processor_are_refused(forget: Forget) -> None:
    rule = descent()
    path = made(source(rule))
    assert refused(path, rule, digest(rule) ^ 1).endswith("it holds another rule")
    assert refused(path, descent(name="Other")).endswith("it holds another rule")
    assert native.module().load_rule(str(path), rule.name, digest(rule)) >= len(RULES)
    assert refused(made(source(rule, headers="0" * 64)), rule).endswith("it was compiled for another build")
    larger = source(rule).replace(f"FT_EXPORT_RULE({rule.name})", LARGER.format(name=rule.name))
    assert refused(made(larger), rule).endswith("it was compiled for another build")
    assert "it exports no fasttrain_rule_1" in refused(made("int nothing;"), rule)
    assert "cannot be loaded" in refused(put(b"no code"), rule)
    for isa in OTHERS[:1]:
        assert f"it was compiled for {isa}, and" in refused(made(source(rule), isa), rule)


def test_a_module_of_other_headers_is_refused(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "headers", lambda: "0" * 64)
    number, reason = load(descent(), module)
    assert number is None
    assert re.fullmatch(r"the headers in .*csrc are not those that .* was built with: build it again", reason)


# --- Without a compiler -----------------------------------------------------------------------------------------------

def falls_back(reason: str) -> None:
    """The reference steps with the right numbers, says why once, and does not try again."""
    rule = descent()
    with pytest.warns(RuntimeWarning, match="rule Descent is not in the compiled module.*slow reference") as said:
        assert step(rule, steps=3) == [-1.5] * 3
    assert len(said) == 1
    assert re.search(reason, str(said[0].message)), said[0].message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(rule, steps=2) == [-1.0] * 3


def test_no_compiler(forget: Forget, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    falls_back(r"no C\+\+ compiler: c\+\+ or g\+\+ or clang\+\+ not found on PATH")


def test_a_compiler_that_is_not_there(forget: Forget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    falls_back(r"no C\+\+ compiler: /nowhere/c\+\+ not found")


@pytest.mark.parametrize("what, reason", [
    ("echo 'In file x:' >&2; echo 'rule.cpp:1: error: the disk is full' >&2; exit 1",
     r"compiler failed: rule.cpp:1: error: the disk is full$"),
    ("exit 3", "compiler failed: exit status 3$"),
    ("exit 0", "compiler reported no error and made no file$"),
    (NO_CODE, "what .*compiler made was refused: it cannot be loaded"),
])
def test_a_broken_compiler_is_tried_once(compiler: Compiler, what: str, reason: str) -> None:
    compiler.does(what)
    falls_back(reason)
    assert load(descent())[0] is None  # another object of the same text
    assert compiler.count == 1


def test_a_compiler_that_never_ends(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.does("exec sleep 60")
    monkeypatch.setattr(jit, "PATIENCE", 0.2)
    falls_back("compiler did not end within 0.2 s$")


def test_a_compiler_without_a_version(forget: Forget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    falls_back("false --version failed: exit status 1$")


def test_a_directory_that_is_refused(compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    falls_back(r"cache can be written by others \(mode 777\)")
    assert compiler.count == 0


def test_a_rule_that_is_too_large_for_a_kernel(forget: Forget) -> None:
    names = tuple(f"s{i}" for i in range(7))
    rule = Rule("Wide", names, lambda step, lr: {"lr": lr}, lambda p, g, *rest: (p - rest[-1].lr * g, *rest[:-1]))
    with pytest.warns(RuntimeWarning, match="static assertion failed.*more states than kernels take"):
        assert step(rule) == [-0.5] * 3


def test_it_can_be_turned_off(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTRAIN_JIT", "off")
    falls_back("FASTTRAIN_JIT=off$")
    assert compiler.count == 0


def test_a_mistyped_setting(forget: Forget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTTRAIN_JIT", "no")
    with pytest.raises(ValueError, match="FASTTRAIN_JIT is 'no', which is neither on nor off"):
        step(descent())


# --- One place for flags ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("isa", native.build_info().get("isas", []))
def test_the_flags_are_those_of_the_build(isa: str) -> None:
    """What CMake recorded, against what it told ninja."""
    module = Path(sys.modules["fasttrain._native"].__file__) if native.load()[0] else Path()
    builds = [path for path in (ROOT / "build").glob("*/build.ninja")
              if (path.parent / module.name).is_file()
              and (path.parent / module.name).read_bytes() == module.read_bytes()]
    if not builds:
        pytest.skip("the module was built elsewhere")
    text = builds[0].read_text()
    block = text[text.index(f"build CMakeFiles/step_{isa}.dir/csrc/cpu/step.cpp.o:"):].split("\n\n")[0]
    used = [word for line in re.findall(r"^  (?:DEFINES|FLAGS) = (.*)", block, re.M) for word in line.split()]
    recorded = native.build_info()["flags"][isa]
    assert set(recorded) <= set(used)
    from_the_environment = os.environ.get("CXXFLAGS", "").split()
    assert set(used) - set(recorded) <= {"-DNDEBUG", *from_the_environment}


def test_the_headers_are_those_that_a_rule_includes() -> None:
    """Every header that is reached from the two that a rule's source names is in the hash."""
    reached, ahead = set(), ["cpu/on_demand.h", "cpu/step_kernel.h"]
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead += re.findall(r'^#include "(.+)"', (ROOT / "csrc" / name).read_text(), re.M)
    assert reached <= set(native.build_info()["headers"])
    assert "rules.h" not in reached
