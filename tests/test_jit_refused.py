"""Compiled rules of another build, rule or processor are refused."""

import re
from pathlib import Path

import pytest
from compiling import GXX, OTHERS, Forget, Module, descent, load, needs_compiler

from fasttrain.kernels import cache, jit, native
from fasttrain.kernels.emit_cpp import digest
from fasttrain.optim import RULES
from fasttrain.rule import Rule

pytestmark = needs_compiler


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
