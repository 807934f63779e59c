"""Rules of one name and of names that are taken, and plans that go on while rules are added."""

from dataclasses import replace

import helpers
import pytest
import torch
from compiling import Compiler, Forget, descent, load, needs_compiler, page, step
from helpers import assert_same_bits
from torch.nn import Parameter

from fasttrain.kernels import cache, native, triton
from fasttrain.kernels.emit_cpp import digest
from fasttrain.optim import AdamW
from fasttrain.rule import Rule

pytestmark = needs_compiler


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
