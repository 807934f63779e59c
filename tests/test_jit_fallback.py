"""Where a rule cannot be compiled, the reference steps and says why, once."""

import re
import warnings
from pathlib import Path

import pytest
from compiling import NO_CODE, Compiler, Forget, descent, load, needs_compiler, step

from fasttrain.kernels import jit
from fasttrain.rule import Rule

pytestmark = needs_compiler


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
