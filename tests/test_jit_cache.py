"""A rule is compiled once, and kept under a key that has all that matters."""

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compiling import NO_CODE, PROCESS, Compiler, Forget, Module, descent, expected, load, needs_compiler
from forks import python
from helpers import assert_same_bits

from fasttrain.kernels import cache, jit, native

pytestmark = needs_compiler


def test_a_rule_is_compiled_once(compiler: Compiler, forget: Forget) -> None:
    number, _ = load(descent())
    assert number is not None
    assert load(descent()) == (number, "")  # another object of the same text
    assert compiler.count == 1
    forget()  # as another process
    assert load(descent())[0] is not None
    assert compiler.count == 1


def test_processes_share_what_they_compiled(compiler: Compiler, tmp_path: Path) -> None:
    """Several at once on an empty cache, and one more after them."""
    answers: list[subprocess.CompletedProcess[str]] = []

    def start(index: int) -> None:
        answers.append(python(PROCESS, str(tmp_path / f"p{index}")))

    def start_all(indices: range) -> None:
        threads = [threading.Thread(target=start, args=(index,)) for index in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    start_all(range(2))
    assert 1 <= compiler.count <= 2
    before = compiler.count
    start_all(range(2, 3))
    assert compiler.count == before
    assert [(done.returncode, done.stderr) for done in answers] == [(0, "")] * 3
    for index in range(3):
        assert_same_bits(torch.load(tmp_path / f"p{index}", weights_only=True), expected())
    assert len(list(cache.directory().iterdir())) == 1, "something was left beside the entry"


def test_threads_share_one_compilation(compiler: Compiler) -> None:
    found: list[tuple[int | None, str]] = []
    threads = [threading.Thread(target=lambda: found.append(load(descent()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.count == 1
    assert len(set(found)) == 1
    assert found[0][0] is not None


@pytest.mark.parametrize("damaged", [lambda whole: whole[: len(whole) // 2], lambda whole: b"",
                                     lambda whole: whole[:3] + bytes(len(whole) - 3)])
def test_a_damaged_entry_is_made_anew(compiler: Compiler, module: Module, forget: Forget, damaged) -> None:
    load(descent(), module)
    (entry,) = cache.directory().iterdir()
    entry.write_bytes(damaged(entry.read_bytes()))
    forget()
    assert load(descent(), module) == (100, "")
    assert compiler.count == 2
    assert module.given == [b"no code\n"] * 2, "what was loaded is not what the compiler makes"


def test_what_the_module_refuses_is_made_anew(compiler: Compiler, module: Module, forget: Forget) -> None:
    load(descent(), module)
    (entry,) = cache.directory().iterdir()
    cache.put(entry.name, b"old")
    module.refuses = [b"old"]
    forget()
    assert load(descent(), module) == (100, "")
    assert compiler.count == 2
    assert module.given[1:] == [b"old", b"no code\n"]


def test_the_key_has_all_that_matters(compiler: Compiler, module: Module, forget: Forget, monkeypatch) -> None:
    info, isa = native.build_info(), module.isa()
    changes: list[Callable[[], dict | None]] = [
        lambda: None,
        lambda: compiler.does(NO_CODE, version="2"),
        lambda: compiler.does(f"{NO_CODE} # other text"),
        lambda: monkeypatch.setattr("fasttrain.__version__", "0.0.0"),
        lambda: {**info, "flags": {isa: [*info["flags"][isa], "-DOTHER"]}},
        lambda: monkeypatch.setenv("CXX", f"env {compiler.path}"),
    ]
    for made, change in enumerate(changes, start=1):
        changed = change() or info
        for _ in range(2):
            forget()
            assert jit.load(descent(), module, changed) == (100, "")
        assert compiler.count == made
    forget()
    load(descent(sign=-1.0), module)
    assert compiler.count == made + 1
