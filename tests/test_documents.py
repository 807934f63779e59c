"""Every Python example in README and docs runs."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = [pytest.param(code, id=f"{path.name}-{number}")
            for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
            for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code):
    if code.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(code, {}, "example", None, 0)
        assert doctest.DocTestRunner().run(test).failed == 0
    else:
        exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
