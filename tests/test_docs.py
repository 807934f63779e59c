"""What the documents show runs: every docstring's example, and the Python of the README."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from helpers import ROOT, python

import fasttrain

MODULES = sorted(module.name for module in pkgutil.walk_packages(fasttrain.__path__, "fasttrain.")
                 if module.name not in ("fasttrain._native", "fasttrain.__main__"))
README = ROOT / "README.md"


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:  # an extra that is not installed
        pytest.skip(f"{name} cannot be imported: {error}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed (printed above)"


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Lion"])
def test_every_optimizer_has_an_example(name: str) -> None:
    import fasttrain.optim

    parts = ("Arguments:", "State:", "Raises:", "Example:", "Reference:", ".. math::", ">>> optimizer.step()")
    text = getattr(fasttrain.optim, name).__doc__
    assert [part for part in parts if part not in text] == []


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S) if path.is_file() else []


@pytest.mark.skipif(not blocks(README), reason="README.md has no Python yet")
def test_the_readme_runs() -> None:
    done = python("\n".join(blocks(README)))
    assert done.returncode == 0, done.stderr


def test_documents_name_files_that_are_there() -> None:
    """`make` targets, files and modules that CONTRIBUTING names."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = re.findall(r"`((?:fasttrain|csrc|tests)/[\w./]+\.\w+)`", text)
    assert files
    assert [file for file in files if "NAME" not in file and not (ROOT / file).exists()] == []
    targets = re.findall(r"`make ([\w-]+)`", text)
    rules = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", rules, re.M)] == []
