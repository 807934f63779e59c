"""`csrc/rules.h` is what the equations say now, compiles alone, and is what the compiled module holds."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT, needs_native

from fasttrain.kernels import emit_cpp, native
from fasttrain.kernels.trace import trace
from fasttrain.optim import COMMON_RULES, ELEMENTWISE_RULES, RULES, AdamW, header
from fasttrain.rule import Rule

HEADER = ROOT / "csrc" / "rules.h"


def test_the_header_is_the_equations() -> None:
    wanted = emit_cpp.header(ELEMENTWISE_RULES, COMMON_RULES, RULES[len(ELEMENTWISE_RULES) :])
    assert HEADER.read_text() == wanted, "csrc/rules.h is stale: `make rules`, check it in, and build"


def test_common_rules_come_first() -> None:
    with pytest.raises(ValueError, match="the common rules must be the first ones"):
        emit_cpp.header(RULES, RULES[1:3])


def test_make_rules_writes_it(tmp_path: Path) -> None:
    written = tmp_path / "rules.h"
    header.main([str(written)])
    assert written.read_text() == HEADER.read_text()
    done = subprocess.run([sys.executable, "-m", "fasttrain.optim.header"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "usage" in done.stderr


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_it_compiles_alone(tmp_path: Path, compiler: str, isa: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    source = tmp_path / "alone.cpp"
    use = "#define FT_USE(Name) template struct fasttrain::Name<float>; template struct fasttrain::Name<double>;\n"
    source.write_text(f'#include "rules.h"\n{use}FASTTRAIN_RULES(FT_USE)\n')
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-DFT_ISA={isa}", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([*command, "-fsyntax-only", str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_device_sources_see_only_our_headers() -> None:
    """NVRTC has no system headers."""
    for name in ("rules.h", "common.h"):
        included = re.findall(r"#include\s+(\S+)", (ROOT / "csrc" / name).read_text())
        assert all(path.startswith('"') for path in included), (name, included)


@needs_native
def test_the_compiled_module_holds_these_rules_in_this_order() -> None:
    wanted = [(rule.name, emit_cpp.digest(rule)) for rule in RULES]
    assert native.module().rules() == wanted, "the compiled module is older than the equations: build again"
    assert [native.number_of(rule) for rule in RULES] == list(range(len(RULES)))
    assert all(map(native.is_built, RULES))


def changed(p, g, exp_avg, exp_avg_sq, k):
    new, *states = AdamW.rules[0].element(p, g, exp_avg, exp_avg_sq, k)
    return new - k.rate * g, *states


@needs_native
def test_a_compiled_rule_is_used_for_its_own_equation_only() -> None:
    rule = AdamW.rules[0]
    same = Rule(rule.name, rule.state, rule.coefficients, lambda *arguments: rule.element(*arguments))
    assert emit_cpp.digest(same) == emit_cpp.digest(rule)
    for other in (replace(rule, element=changed), replace(rule, name="Other")):
        assert emit_cpp.digest(other) != emit_cpp.digest(rule)
        assert not native.is_built(other)


def test_digests_tell_rules_apart() -> None:
    assert len({emit_cpp.digest(rule) for rule in RULES}) == len(RULES)


def test_rules_have_one_name_each_and_fit_the_tables() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    limits = dict(re.findall(r"constexpr int (kMax\w+) = (\d+)", (ROOT / "csrc" / "common.h").read_text()))
    for rule in RULES:
        assert len(rule.state) <= int(limits["kMaxStates"])
        assert 1 + len(trace(rule).coefficients) <= int(limits["kMaxCoefficients"])


def test_a_rule_without_coefficients_compiles(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    odd = Rule("Odd", ("m",), lambda step: {}, lambda p, g, m, k: (m - -(-g), -(-p) + m))  # noqa: B002
    (tmp_path / "odd.h").write_text(emit_cpp.header([odd]))
    (tmp_path / "odd.cpp").write_text('#include "odd.h"\ntemplate struct fasttrain::Odd<float>;\n')
    done = subprocess.run([compiler, "-std=c++17", f"-I{ROOT / 'csrc'}", "-fsyntax-only", str(tmp_path / "odd.cpp")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
