"""What tests of rules compiled at first use share: small rules, an empty cache, and compilers that keep count."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import generator, needs_native, normal
from torch.nn import Parameter

from fasttrain.kernels import jit, native
from fasttrain.optim import Optimizer
from fasttrain.rule import Rule, maximum, sqrt, where

GXX = shutil.which("g++") or shutil.which("clang++")
needs_compiler = [needs_native, pytest.mark.skipif(GXX is None, reason="neither g++ nor clang++ is on PATH")]


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


PROCESS = """
import sys, torch
from helpers import generator, normal
from torch.nn import Parameter
from fasttrain.kernels import native
from compiling import Own
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
