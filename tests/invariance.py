"""What must not change a bit: the number of threads, the parameters beside, the instruction set."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from forks import python
from helpers import assert_same_bits, generator, normal
from torch.nn import Parameter

from fasttrain.kernels import native


def check_threads_and_neighbours(make: Callable[[list[Parameter]], Any], sizes: Sequence[tuple[int, ...]],
                                 dtype: torch.dtype, seed: int) -> None:
    """Two steps of an optimizer have the same bits on any number of threads, of parameters together or each alone."""
    ends = []
    before = torch.get_num_threads()
    try:
        for threads, alone in ((1, False), (2, False), (5, False), (2, True)):
            torch.set_num_threads(threads)
            numbers = generator(seed)
            params = [Parameter(normal(size, dtype, numbers)) for size in sizes]
            optimizers = [make([p]) for p in params] if alone else [make(params)]
            for _ in range(2):
                for p in params:
                    p.grad = normal(p.shape, dtype, numbers)
                for optimizer in optimizers:
                    optimizer.step()
            ends.append([p.detach() for p in params])
    finally:
        torch.set_num_threads(before)
    for other in ends[1:]:
        for a, b in zip(other, ends[0], strict=True):
            assert_same_bits(a, b)


def check_instruction_sets(code: str) -> None:
    """A program that prints the name of its instruction set, and then what it computed, prints the same with each."""
    found = {}
    for isa in native.build_info()["isas"]:
        done = python(code, FASTTRAIN_ISA=isa)
        if "this processor lacks it" not in done.stderr:
            assert done.returncode == 0, done.stderr
            name, ends = done.stdout.split(maxsplit=1)
            assert name == isa
            found[isa] = ends
    assert len(set(found.values())) == 1, found


def check_on_one(isa: str, code: str) -> None:
    """A program that checks itself, and prints the name of its instruction set, runs through with one of them."""
    done = python(code, FASTTRAIN_ISA=isa)
    if "this processor lacks it" in done.stderr:
        pytest.skip(f"this processor lacks {isa}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa
