"""A rule is compiled with the flags and the headers of the build."""

import os
import re
import sys
from pathlib import Path

import pytest
from compiling import needs_compiler
from helpers import ROOT

from fasttrain.kernels import native

pytestmark = needs_compiler


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
