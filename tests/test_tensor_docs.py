"""What docs/tensor-parallel.md shows runs on several ranks too, and what it says of words is what there is."""

from __future__ import annotations

import re
from typing import Any

from helpers import ROOT
from ranks import run

from fasttrain.parallel.tensor.parallelize import STYLES

PAGE = (ROOT / "docs" / "tensor-parallel.md").read_text()


def shown(wire: Any) -> float:
    code, = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    module: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "example", "exec"), module)
    assert module["mesh"].sizes["tensor"] == wire.size
    return module["loss"].item()


def test_the_example_on_two_ranks() -> None:
    first, second = run(shown, 2)
    assert first == second


def test_every_word_is_explained() -> None:
    words = set(re.findall(r'^\| `"(\w+)"`', PAGE, re.M))
    assert words == set(STYLES)
