"""Norms and stages with sums in Triton's interpreter against the eager tree, bit for bit; their code is looked at in
tests/test_triton_compile.py, and tests/test_gpu_sums.py runs it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_two_stage as two_stage
import torch
from helpers import CPU, LAYOUTS, REALS, assert_same_bits, generator, make, normal, specials, usable
from torch import Tensor
from torch.nn import Parameter

from fasttrain.kernels import norm, stages
from fasttrain.kernels.triton import range_interpreted
from fasttrain.optim import LAMB, LARS, STAGES, StableAdamW

# Not-a-number and overflow are what is tested; NumPy, under the interpreter, warns of them.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
              pytest.mark.skipif(bool(usable("triton")), reason=str(usable("triton")))]
triton_sums = pytest.importorskip("fasttrain.kernels.triton_sums")

SHORT = {key: value for key, value in LAYOUTS.items() if key != "chunks"}  # 20,001 elements take seconds


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one block, so that a few thousand elements make several."""
    monkeypatch.setattr(triton_sums, "BLOCKS_INTERPRETED", 1)


def check(tensors: list[Tensor], what: str = "") -> None:
    sums, nonfinite = norm.squares(tensors, "triton")
    wanted, wanted_nonfinite = norm.reference(tensors)
    assert_same_bits(sums, wanted, what)
    assert (nonfinite.dtype, nonfinite.shape) == (torch.bool, ())
    assert bool(nonfinite) == bool(wanted_nonfinite), what


def test_sizes_and_storages() -> None:
    """All storages in one call, each with tensors of every kind of end."""
    numbers = generator(1)
    check([normal((size,), dtype, numbers) for size in (0, 1, 15, 16, 17, 511, 513) for dtype in REALS])


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_whole_and_broken_chunks(dtype: torch.dtype, small_chunks: None) -> None:
    """A whole chunk and the rest of one, aligned; and misaligned."""
    storage = normal((4096 + 77,), dtype, generator(2))
    check([storage, storage[1:4097]])


@pytest.mark.parametrize("layout", SHORT)
def test_layouts(layout: str) -> None:
    check([make(layout, lambda size, d=d: normal(size, d, generator(3))).view for d in REALS[:3]], layout)


def test_views_and_complex_numbers() -> None:
    numbers = generator(4)
    value = torch.complex(*(normal((7, 5), torch.float64, numbers) for _ in "ab"))
    check([value, value.conj(), value.conj().imag, value[::2], value.to(torch.complex64),
           normal((1, 7), torch.float32, numbers).expand(5, 7), torch._neg_view(normal((33,), torch.float32, numbers)),
           Parameter(normal((3,), torch.bfloat16, numbers))])


@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_the_flag_comes_from_the_elements(dtype: torch.dtype) -> None:
    for value in specials(dtype):
        tensor = torch.ones(36, dtype=dtype)
        for place in (35,) if math.isfinite(value) else (0, 15, 35):
            check([torch.ones(3, dtype=dtype), tensor.index_fill(0, torch.tensor(place), value)], f"{value} at {place}")
    largest = torch.full((40,), torch.finfo(dtype).max, dtype=dtype)
    sums, nonfinite = norm.squares([largest], "triton")
    assert not nonfinite
    assert bool(sums.isfinite().all()) == (dtype != torch.float64)


def test_the_flag_of_whole_chunks(small_chunks: None) -> None:
    for place in (0, 4095):
        tensor = torch.ones(4096)
        tensor[place] = math.inf
        check([tensor], str(place))


def test_nothing() -> None:
    sums, nonfinite = norm.squares([torch.zeros(0), torch.zeros(0, 3, dtype=torch.float64)], "triton")
    assert sums.tolist() == [0.0, 0.0]
    assert not nonfinite
    assert norm.squares([], "triton")[0].shape == (0,)
    with pytest.raises(TypeError, match=r"torch\.int64; it takes float32"):
        norm.squares([torch.ones(3, dtype=torch.int64)], "triton")


def test_neighbours_do_not_matter(small_chunks: None) -> None:
    numbers = generator(5)
    tensors = [normal((size,), torch.float32, numbers) for size in (70, 5000, 3)]
    together = norm.squares(tensors, "triton")[0]
    assert_same_bits(together, torch.cat([norm.squares([tensor], "triton")[0] for tensor in tensors]))


@pytest.mark.parametrize("width", [1, 3])
def test_the_tree(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over segments that one branch holds, and that take several."""
    monkeypatch.setattr(triton_sums, "BRANCH", 8)
    counts = np.array([0, 1, 2, 3, 7, 8, 9, 16, 33, 64])
    segments = np.stack([np.cumsum(counts) - counts, counts], axis=1)
    rows = normal((int(counts.sum()), width), torch.float64, generator(6))
    sums = triton_sums.add_up(rows, torch.from_numpy(segments), CPU)
    wanted = torch.stack([norm.tree(rows[first : first + count]) for first, count in segments.tolist()], dim=1)
    assert_same_bits(sums, wanted)
    with pytest.raises(ValueError, match="a tensor has 65 chunks, and sums are made of 64 at most"):
        triton_sums.checked(np.array([[0, 65]]))


def test_a_bound_of_the_interpreters_loops() -> None:
    """Triton 3.6 leaves it in an array of shape (1,), of which NumPy 2.4 makes no index."""
    bound = SimpleNamespace(handle=SimpleNamespace(data=np.array([3])))
    assert list(range_interpreted(0, bound, 2)) == [0, 2]


def test_total() -> None:
    sums = normal((700,), torch.float64, generator(7)).square()  # two branches
    assert_same_bits(norm.total(sums, "triton"), norm.tree(sums))
    assert norm.total(sums[:0], "triton").item() == 0.0


# --- Stages -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("index", range(len(STAGES)), ids=lambda index: STAGES[index].name)
def test_stages(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule, with kinds in turn, over every layout but the longest."""
    monkeypatch.setattr(two_stage, "LAYOUTS", SHORT)
    rule, kinds = STAGES[index], two_stage.KINDS[index % len(two_stage.KINDS)]
    compare(two_stage.items(rule, kinds), two_stage.items(rule, kinds))


@pytest.mark.slow
@pytest.mark.parametrize("kinds", two_stage.KINDS, ids=str)
@pytest.mark.parametrize("rule", STAGES, ids=lambda rule: rule.name)
def test_every_stage_and_kind(rule: Any, kinds: Any) -> None:
    compare(two_stage.items(rule, kinds), two_stage.items(rule, kinds))


@pytest.mark.parametrize("kinds", [two_stage.KINDS[0], two_stage.KINDS[2]], ids=str)
def test_whole_chunks_of_a_stage(kinds: Any, small_chunks: None) -> None:
    """Aligned, misaligned and cut, through the rows that one thread reads together."""
    rule = STAGES[0]
    both = []
    for _ in range(2):
        numbers, made = generator(8), []
        for begin, end in ((0, 4096), (0, 4200), (1, 4097)):
            tensors = [normal((end + 8,), dtype, numbers).abs()[begin:end] for dtype in (*kinds, kinds[2])]
            made.append(stages.Item("x", rule, tuple(tensors), two_stage.items(rule, kinds)[0].row, torch.tensor(1.0)))
        both.append(made)
    compare(*both)


def compare(got: list[Any], wanted: list[Any]) -> None:
    rule = got[0].rule
    sums, right = stages.run(got, "triton"), stages.run(wanted, "reference")
    assert sums.shape == right.shape == (len(got), len(rule.sums))
    assert_same_bits(torch.from_numpy(sums.copy()), torch.from_numpy(right.copy()), "sums")
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.counter.item() == theirs.counter.item()
        for index, (a, b) in enumerate(zip(mine.tensors, theirs.tensors, strict=True)):
            assert_same_bits(a, b, f"{mine.name}, tensor {index}")


OPTIMIZERS = [(LAMB, {}, 3), (LARS, {}, 3), (LARS, dict(momentum=0.0), 3), (LARS, dict(nesterov=True), 3),
              (StableAdamW, {}, 3)]


@pytest.mark.parametrize("optimizer, options, launches", OPTIMIZERS, ids=lambda value: str(value))
def test_optimizers(optimizer: Any, options: dict[str, Any], launches: int) -> None:
    """The bits of the CPU, for parameters of all storages at once; three launches for each combination of storages,
    whatever the number of parameters: a walk, the sums of all, a step.
    """
    ends = []
    for backend in ("triton", "cpu" if usable("cpu") is None else "reference"):
        numbers = generator(9)
        params = [Parameter(normal(size, dtype, numbers)) for dtype in REALS for size in ((33, 7), (5,), (0, 2), ())]
        opt = optimizer(params, lr=0.1, **options, backend=backend)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = None if (i + step) % 7 == 6 else normal(p.shape, p.dtype, numbers)
            if step:
                params[1].grad[2] = math.nan
            opt.step()
        ends.append([*params, *(value for p in params for _, value in sorted(opt.state.get(p, {}).items()))])
        if backend == "triton":
            assert opt.last_step.launches == 2 * len(REALS) + 1
            assert opt.last_step.host_syncs == 0  # in CPU memory
            few = optimizer([Parameter(torch.ones(3))], lr=0.1, **options, backend=backend)
            few.param_groups[0]["params"][0].grad = torch.ones(3)
            few.step()
            assert few.last_step.launches == launches
    for index, (a, b) in enumerate(zip(*ends, strict=True)):
        assert_same_bits(a, b, f"tensor {index}")
