"""Items that are not plain on a real GPU against the CPU reference, bit for bit: tests/test_storage_triton.py and
tests/test_storage_cuda.py, on what they cannot show. Needs torch, triton, numpy and pytest only.
"""

from __future__ import annotations

import math
from dataclasses import replace

import kept
import pytest
import torch
from helpers import generator, needs_native
from test_storage_cuda import COMBINATIONS, KEEPS, case_of, midpoints

from fasttrain.kernels import cuda, dispatch, native, reference
from fasttrain.kernels.item import Item

pytestmark = [pytest.mark.gpu, needs_native]
GPU = torch.device("cuda", 0)
SIZES = (0, 1, 255, 256, 257, 511, 512, 513, 5000, 70_001)


@pytest.fixture
def triton():
    module = dispatch.load("triton")
    assert module.why_not(GPU) is None
    return module


@pytest.fixture(params=("cuda", "triton"))
def backend(request):
    """Both, for what both have kernels for."""
    if request.param == "cuda" and not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    module = dispatch.load(request.param)
    assert module.why_not(GPU) is None
    return module


def on_gpu(item: Item) -> Item:
    """The item on the GPU, each array as far past a multiple of 64 bytes as it was."""
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        past = tensor.data_ptr() % 64 // tensor.element_size() if tensor.numel() else 0
        storage = torch.zeros(past + tensor.numel(), dtype=tensor.dtype, device=GPU)
        storage[past:].copy_(tensor.reshape(-1))
        return storage[past:].view(tensor.shape)

    return replace(item, tensors=tuple(map(moved, item.tensors)),
                   extras=tuple(extra if extra is None else moved(extra) for extra in item.extras),
                   counter=None if item.counter is None else item.counter.to(GPU))


def run(backend, items: list[Item], what: str, steps: int = 3) -> None:
    """Step the items here and on the GPU."""
    numbers = generator(17)
    there = [on_gpu(item) for item in items]
    for index in range(steps):
        reference.step(items)
        backend.step(there)
        kept.compare(there, items, f"{what}, step {index}")
        kept.new_gradients(items, numbers)
        for item, other in zip(items, there, strict=True):
            other.tensors[1].copy_(item.tensors[1])
        items = [replace(item, key=item.key + 1) for item in items]
        there = [replace(item, key=item.key + 1) for item in there]


@pytest.mark.parametrize("case", kept.some_cases(), ids=str)
def test_every_storage(triton, case):
    numbers = generator(len(case.codecs))
    run(triton, [case.random(size, numbers, key=(1 << 63) + size, step=3) for size in SIZES], str(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", kept.all_pairs(), ids=str)
def test_every_pair(triton, case):
    numbers = generator(len(case.codecs))
    run(triton, [case.random(size, numbers, key=size) for size in (513, 5000)], str(case))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_usual_storages(backend, combination):
    """Those that have a CUDA kernel, at every place, with zeroing and clipping."""
    numbers = generator(len(combination))
    for index, (place, clip) in enumerate([((0, 0, 0), math.inf), (kept.SHARD, 0.4), ((1 << 32, 7, 9), 0.1),
                                           (((1 << 32) - 300, 0, 0), math.inf)]):
        case = case_of(combination, zero=index % 2 == 1, clip=clip, place=place)
        items = [case.random(size, numbers, key=(1 << 64) - 9 - size) for size in SIZES]
        run(backend, items, f"{combination}, {place}")


@pytest.mark.parametrize("offsets", [(1,), (0, 1, 0, 0), (8,), (3, 0, 5, 1)])
@pytest.mark.parametrize("combination", [COMBINATIONS[3], COMBINATIONS[4]])
def test_misaligned(backend, combination, offsets):
    numbers = generator(4)
    case = case_of(combination, zero=True)
    run(backend, [case.random(size, numbers, offsets=offsets) for size in (1000, 257)], str(offsets))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_difficult_values(backend, combination):
    """Blocks that are broken, zero, denormal, or have an outlier; parameters of every kind of bits."""
    case, values = case_of(combination), kept.difficult()
    states = [values.flip(0).abs() if one & kept.POSITIVE else values.flip(0)
              for one in kept.numbers_of(case.codecs)[2:]]
    run(backend, [case.item([values, values.roll(1280), *states], key=3)], combination)


@pytest.mark.parametrize("average", kept.AVERAGES)
@pytest.mark.parametrize("p", kept.PARAMS)
def test_difficult_parameters(triton, p, average):
    run(triton, [kept.difficult_parameter(p, average)], p, steps=1)


@pytest.mark.parametrize("state", kept.STATES)
def test_difficult_states(triton, state):
    run(triton, [kept.difficult_state(state)], state)


@pytest.mark.parametrize("keep", KEEPS)
def test_midpoints_of_square_codes(backend, keep):
    """Where the GPU's estimate of a root decides, were it not corrected."""
    run(backend, [midpoints(keep)], f"keep {keep}", steps=1)


def test_a_million_elements(backend):
    numbers = generator(19)
    run(backend, [case_of(COMBINATIONS[-1]).random(1 << 20, numbers)], "random")


def test_one_launch_for_many_tensors(backend):
    """A thousand small tensors with keys and rows of their own."""
    numbers = generator(22)
    case = case_of(COMBINATIONS[5])
    run(backend, [case.random(step % 700, numbers, step=step, key=step) for step in range(1, 1001)], "many", steps=1)


def test_loaded_kernels_use_no_local_memory():
    """As the driver reports it for this GPU; and at least two blocks run at a time."""
    if not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    code = cuda.code(0)[0]
    for name in sorted(cuda.compiled()):
        if name.startswith("kept_"):
            usage = code.usage(name, cuda.THREADS)
            assert usage["local_bytes"] == 0, (name, usage)
            assert usage["blocks"] >= 2, (name, usage)
