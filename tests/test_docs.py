"""What the documents show runs: every docstring's example, and the Python of README and docs."""

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
import types

import pytest
from helpers import ROOT

import fasttrain
import fasttrain.optim

MODULES = sorted(module.name for module in pkgutil.walk_packages(fasttrain.__path__, "fasttrain.")
                 if module.name not in ("fasttrain._native", "fasttrain.__main__"))
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
CLIENTS = ("transformers", "accelerate", "lightning", "torchdata")  # extras: a bare machine lacks them
EXAMPLES = [pytest.param(code, id=f"{path.name}-{number}") for path in PAGES
            for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S))]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:  # an extra that is not installed
        pytest.skip(f"{name} cannot be imported: {error}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed (printed above)"


@pytest.mark.parametrize("name", [name for name in sorted(fasttrain.optim.__all__)
                                  if inspect.isclass(getattr(fasttrain.optim, name)) and name != "Optimizer"])
def test_every_optimizer_has_an_example(name: str) -> None:
    parts = ("Arguments:", "State:", "Raises:", "Example:", "Reference:", ".. math::", ">>> optimizer.step()")
    text = getattr(fasttrain.optim, name).__doc__
    assert [part for part in parts if part not in text] == []


@pytest.mark.parametrize("code", EXAMPLES)
def test_document_examples(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if code.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(code, {}, "example", None, 0)
        assert doctest.DocTestRunner().run(test).failed == 0
        return
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # torch.compile looks for it
    try:
        exec(compile(code, "example", "exec"), module.__dict__)
    except ModuleNotFoundError as error:
        if error.name not in CLIENTS:
            raise
        pytest.skip(f"needs {error.name} (pip install fasttrain[clients])")


def test_readme_and_documents_have_examples() -> None:
    assert len(EXAMPLES) >= 4


def test_links_lead_somewhere() -> None:
    for path in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_documents_name_files_that_are_there() -> None:
    """`make` targets, files and modules that CONTRIBUTING names."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = re.findall(r"`((?:fasttrain|csrc|tests)/[\w./]+\.\w+)`", text)
    assert files
    assert [file for file in files if "NAME" not in file and not (ROOT / file).exists()] == []
    targets = re.findall(r"`make ([\w-]+)`", text)
    rules = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", rules, re.M)] == []
