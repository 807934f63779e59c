"""The step on a real GPU against the CPU reference, bit for bit. Needs torch, triton, numpy and pytest only."""

from __future__ import annotations

import struct

import pytest
import torch
from helpers import BY_NAME, LAYOUTS, assert_same_bits, assert_same_run, generator, needs_native, normal, specials
from helpers import make as make_layout
from test_cuda_walk import COMBINATIONS, DTYPES, PAIR_NAMES, PAIRS, make, oracle, row_of, states_of, walk

from fasttrain.kernels import cuda, dispatch, native, reference
from fasttrain.kernels.item import Item
from fasttrain.optim import SGD, Adam, AdamW, Lion

pytestmark = [pytest.mark.gpu, needs_native]
GPU = torch.device("cuda", 0)
SIZES = (0, 1, 7, 8, 33, 1000, 4099, 100_003)


@pytest.fixture(params=("cuda", "triton"))
def backend(request):
    if request.param == "cuda" and not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    module = dispatch.load(request.param)
    assert module.why_not(GPU) is None
    return module


def on_gpu(item: Item) -> Item:
    """The item on the GPU, each tensor as far past a multiple of 64 bytes as it was."""
    tensors = []
    for tensor in item.tensors:
        past = tensor.data_ptr() % 64 // tensor.element_size() if tensor.numel() else 0
        storage = torch.zeros(past + tensor.numel(), dtype=tensor.dtype, device=GPU)
        storage[past:].copy_(tensor)
        tensors.append(storage[past:])
    return Item(item.name, item.rule, tuple(tensors), item.row, None)


def compare(items: list[Item], wanted: list[Item], what: str) -> None:
    for item, right in zip(items, wanted, strict=True):
        for name, got, expected in zip(("p", "g", *item.rule.state), item.tensors, right.tensors, strict=True):
            assert_same_bits(got, expected, f"{what}, {item.name} {name}")


@pytest.mark.parametrize(("rule", "kinds"), PAIRS, ids=PAIR_NAMES)
def test_bits(backend, rule, kinds):
    """Every rule and combination of storages, aligned, misaligned alike and misaligned apart, three steps."""
    numbers = generator(len(rule.name) + 7 * COMBINATIONS.index(kinds))
    for offsets in ((0, 0, 0), (1, 1, 1), (1, 0, 2)):
        items, _ = make(rule, kinds, offsets, numbers, sizes=SIZES)
        moved = [on_gpu(item) for item in items]
        for step in range(3):
            reference.step(items)
            backend.step(moved)
            compare(moved, items, f"offsets {offsets}, step {step}")


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("rule", [Adam.rules[1], SGD.rules[5], Lion.rules[0]], ids=lambda rule: rule.name)
def test_special_values(backend, rule, kinds):
    """Every triple of NaN, infinities, zeros, denormals and ends of the range."""
    p, g, s = (DTYPES[kind] for kind in kinds)
    pairs = [(a, b) for a in specials(p) for b in specials(g)]
    param = torch.tensor([a for a, _ in pairs], dtype=torch.float64).to(p)
    grad = torch.tensor([b for _, b in pairs], dtype=torch.float64).to(g)
    items = []
    for value in specials(s):
        states = [torch.full((len(pairs),), value, dtype=torch.float64).to(s) for _ in rule.state]
        items.append(Item(f"state {value}", rule, (param.clone(), grad.clone(), *states), row_of(rule, 2, 1.0), None))
    moved = [on_gpu(item) for item in items]
    reference.step(items)
    backend.step(moved)
    compare(moved, items, rule.name)


@pytest.mark.parametrize("kinds", [("F32",) * 3, ("F64",) * 3], ids="-".join)
def test_division_and_root_of_random_patterns(backend, kinds):
    """Random bit patterns, denormals, infinities and NaN among them, through one division and one root per element."""
    dtype, numbers = DTYPES[kinds[0]], generator(21)
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    limits = torch.iinfo(integers)
    tensors = [torch.randint(limits.min, limits.max, (1 << 18,), dtype=integers, generator=numbers).view(dtype)
               for _ in range(4)]
    item = Item("patterns", Adam.rules[0], tuple(tensors), row_of(Adam.rules[0], 3, 1.0), None)
    moved = on_gpu(item)
    reference.step([item])
    backend.step([moved])
    compare([moved], [item], "patterns")


def patterns_around(dtype: torch.dtype) -> torch.Tensor:
    """fp32: every value of a 16-bit format, every midpoint of neighbours, and what lies one place beside each."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).float()
    if dtype == torch.bfloat16:
        midpoints = ((torch.arange(1 << 16, dtype=torch.int64) << 16) + 0x8000).to(torch.int32).view(torch.float32)
    else:
        finite = values[values.isfinite()].unique()
        midpoints = torch.cat([(finite[1:] + finite[:-1]) / 2, torch.tensor([65520.0, -65520.0])])
    near = torch.cat([values, midpoints]).view(torch.int32)
    beside = [near + shift for shift in (-1, 0, 1)]
    return torch.cat(beside).view(torch.float32)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_conversions(backend, kind):
    """Stores: the GPU's conversion of fp32 around every 16-bit value and every tie, against integer arithmetic (the
    kernels' text on the host) and torch. Loads: all 65,536 patterns.
    """
    dtype = DTYPES[kind]
    rule = SGD.rules[0]  # p - lr * g, with p = -0.0 and lr = -1: the gradient itself
    values = patterns_around(dtype)
    item = Item("stores", rule, (torch.full(values.shape, -0.0).to(dtype), values), (1.0, -1.0), None)
    moved, walked = on_gpu(item), oracle([item])  # a copy, which is overwritten
    for got, source in zip(walked[0].tensors, item.tensors, strict=True):
        got.copy_(source)
    walk(walked, chunk=4096)
    reference.step([item])
    backend.step([moved])
    compare([moved], [item], "against torch")
    compare([moved], walked, "against integer arithmetic")

    everything = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    item = Item("loads", Lion.rules[0], (everything.clone(), everything.clone(), everything.clone()),
                row_of(Lion.rules[0], 1, 1.0), None)
    moved = on_gpu(item)
    reference.step([item])
    backend.step([moved])
    compare([moved], [item], "loads")


def test_one_launch_for_many_tensors(backend):
    """A thousand small tensors with rows of coefficients of their own."""
    numbers, rule = generator(22), Adam.rules[0]
    items = []
    for step in range(1, 1001):
        size = step % 37
        tensors = (normal((size,), torch.float32, numbers), normal((size,), torch.float32, numbers),
                   *states_of(rule, size, torch.float32, numbers))
        items.append(Item(f"step {step}", rule, tensors, row_of(rule, step), None))
    moved = [on_gpu(item) for item in items]
    reference.step(items)
    backend.step(moved)
    compare(moved, items, "rows")


def run_on(device: torch.device, backend: str | None, configuration: str, dtype: torch.dtype,
           grad: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters, storages and states after three steps over every layout, from the same numbers on any device."""
    numbers = generator(23)
    options = BY_NAME[configuration].draw(numbers)
    storages, params = [], []
    for layout in LAYOUTS:
        made = make_layout(layout, lambda size: normal(size, dtype, numbers))
        storages.append(made.storage.to(device))
        where = made.view.shape, made.view.stride(), made.view.storage_offset()
        params.append(torch.nn.Parameter(storages[-1].as_strided(*where)))
        if grad != dtype:
            params[-1].grad_dtype = grad
    optimizer = BY_NAME[configuration].optimizer(params, **options, backend=backend)
    for step in range(3):
        for index, p in enumerate(params):
            p.grad = None if (index + step) % 5 == 3 else normal(p.shape, grad, numbers).to(device)
        optimizer.step()
    found = {f"storage {layout}": storage for layout, storage in zip(LAYOUTS, storages, strict=True)}
    for layout, p in zip(LAYOUTS, params, strict=True):
        found |= {f"{layout} {key}": value for key, value in optimizer.state[p].items()}
    return found


@pytest.mark.parametrize("configuration, dtype, grad", [
    ("AdamW", "F32", "F32"), ("AdamW amsgrad", "BF16", "BF16"), ("Adam L2", "F16", "F32"), ("Lion", "F64", "F64"),
    ("SGD nesterov L2", "BF16", "F32"), ("SGD", "F32", "F32"), ("AdamW", "F32", "BF16")])
def test_optimizers(backend, configuration, dtype, grad):
    """Whole optimizers over every layout: as on the CPU with the reference, and nothing written around the views."""
    kinds = configuration, DTYPES[dtype], DTYPES[grad]
    wanted = run_on(torch.device("cpu"), "reference", *kinds)
    got = run_on(GPU, backend.__name__.rpartition(".")[2], *kinds)
    assert_same_run({key: value.cpu() for key, value in got.items()}, wanted, configuration)


def test_the_chosen_backend():
    expected = "triton" if cuda.why_not(GPU) else "cuda"
    assert dispatch.choose(GPU) == expected


def test_work_is_ordered_on_the_current_stream(backend):
    """A step on a side stream sees what that stream wrote before it, and what follows sees the step."""
    count, lr, side = 1 << 22, 0.5, torch.cuda.Stream(GPU)
    p, g = torch.zeros(count, device=GPU), torch.empty(count, device=GPU)
    item = Item("w", SGD.rules[0], (p, g), (1.0, lr), None)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for step in range(20):
            g.fill_(step)
            backend.step([item])
            p.add_(1.0)
    side.synchronize()
    assert bool((p == 20 - lr * sum(range(20))).all())


def test_a_step_does_not_wait():
    """The host goes on while a launch waits behind other work: no synchronisation is hidden in the CUDA backend."""
    if not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    p, g = torch.zeros(1024, device=GPU), torch.ones(1024, device=GPU)
    item = Item("w", SGD.rules[0], (p, g), (1.0, 0.5), None)
    for _ in range(2):  # the table goes up, and memory for what follows is found
        cuda.step([item])
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    cuda.step([item])
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()
    assert p[0].item() == -1.5


def test_loaded_kernels_use_no_local_memory():
    """As the driver reports it, for the code that it chose for this GPU; and at least two blocks run at a time."""
    if not cuda.IMAGE.is_file():
        pytest.skip(f"no device code in this build: {native.build_info()['cuda_reason']}")
    code = cuda.code(0)[0]
    for name in sorted(cuda.compiled()):
        usage = code.usage(name, cuda.THREADS)
        assert usage["local_bytes"] == 0, (name, usage)
        assert usage["blocks"] >= 2, (name, usage)


def test_more_than_two_to_the_31_elements(backend):
    """Offsets are 64 bits wide."""
    count = (1 << 31) + 11
    if torch.cuda.mem_get_info(GPU)[0] < 12 * count:
        pytest.skip("needs 24 GiB of free GPU memory")
    p = torch.ones(count, dtype=torch.bfloat16, device=GPU)
    g = torch.full_like(p, 2.0)
    ends = torch.tensor([0, 1, 1 << 20, (1 << 31) - 1, 1 << 31, count - 1], device=GPU)
    g[ends] = 4.0
    backend.step([Item("w", SGD.rules[0], (p, g), (1.0, 0.25), None)])
    assert bool((p[ends] == 0.0).all())
    p[ends] = 0.5
    assert all(bool((part == 0.5).all()) for part in p.split(1 << 28))


def test_gpu_optimizer_checkpoints_load_on_the_cpu():
    """The same run, half on the GPU and half on the CPU."""
    torch.manual_seed(0)
    start = torch.randn(1000)
    grads = [torch.randn(1000) for _ in range(4)]

    def steps(p, optimizer, which):
        for grad in which:
            p.grad = grad.to(p.device)
            optimizer.step()

    whole = torch.nn.Parameter(start.clone())
    optimizer = AdamW([whole], lr=0.1, backend="reference")
    steps(whole, optimizer, grads)
    first = torch.nn.Parameter(start.to(GPU))
    on_device = AdamW([first], lr=0.1)
    steps(first, on_device, grads[:2])
    second = torch.nn.Parameter(first.detach().cpu())
    resumed = AdamW([second], lr=0.1)
    resumed.load_state_dict(on_device.state_dict())
    steps(second, resumed, grads[2:])
    assert_same_bits(second, whole)
    assert struct.pack("f", resumed.state[second]["step"].item()) == struct.pack("f", 4.0)
