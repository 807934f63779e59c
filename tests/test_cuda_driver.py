"""The CUDA backend end to end without a GPU: a driver that the test compiles, whose launches walk the kernels' own text
on the host, with host memory in the place of device memory.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cuda_host
import kept
import numpy as np
import pytest
import torch
from fake_place import FakePlace
from helpers import Case, assert_same_bits, assert_same_run, generator, needs_native, normal
from helpers import run as run_case
from test_cuda_walk import oracle, row_of, states_of
from test_storage_cuda import COMBINATIONS, case_of, name_of

from fasttrain.kernels import cuda, cuda_factored, cuda_sums, dispatch, kept_table, native, norm, nvrtc, resident, ring
from fasttrain.kernels.item import Item
from fasttrain.kernels.trace import trace
from fasttrain.optim import LAMB, RULES, SGD, Adafactor, Adam, Lion

SOURCE = Path(__file__).with_name("fake_libcuda.cpp")
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
NO_COMPILER = "no C++ compiler to build the fake driver with"
pytestmark = [needs_native, pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)]

LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, *[ctypes.c_ulonglong] * 2,
                          ctypes.c_longlong, *[ctypes.c_ulonglong] * 2)
STREAM = FakePlace.STREAM
CPU = torch.device("cpu")
KEPT = {name_of(combination): kept.numbers_of(case_of(combination).codecs) for combination in COMBINATIONS}


def compile_library(source: Path, to: Path) -> Path:
    subprocess.run([str(COMPILER), "-std=c++17", "-shared", "-fPIC", "-O1", "-o", str(to), str(source)], check=True)
    return to


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_library(SOURCE, tmp_path_factory.mktemp("driver") / "libcuda.so.1")


@pytest.fixture
def fake(library, tmp_path, monkeypatch):
    """The backend with the fake driver; `launches` holds (kernel, blocks, threads, stream) of each. `own` are kernels
    that the compiled module has not: of (table, chunks, rows, gradients, blocks, warps).
    """
    loaded = ctypes.CDLL(str(library))
    loaded.fake_log.restype = ctypes.c_char_p
    loaded.fake_reset()
    launches, errors, own, host = [], [], {}, cuda_host.Device()
    rules = {rule.name: rule for rule in RULES}

    @LAUNCH
    def launch(kernel, blocks, threads, stream, table_at, chunks, rows_at, gradients_at):
        try:
            name = kernel.decode()
            launches.append((name, blocks, threads, stream))
            if name in own:
                own[name](table_at, chunks, rows_at, gradients_at, blocks, threads)
                return 0
            if not name.startswith(("step_", "kept_")):
                cuda_host.walk(host, name, blocks, table_at, chunks, rows_at, gradients_at)
                return 0
            rule, wide = rules[name.split("_")[1]], name.split("_")[2] == "F64"
            columns, width = len(rule.state) + 5, 1 + len(trace(rule).coefficients)
            row_at = columns - 2
            if name in KEPT:
                columns, random = kept_table.columns(KEPT[name]), len(kept_table.random_operands(KEPT[name]))
                width += 3 + 2 * random
                row_at = columns - 2 - (4 if random else 0)
            words = (ctypes.c_longlong * (chunks * columns)).from_address(table_at)
            table = np.ctypeslib.as_array(words).reshape(chunks, columns).astype(np.int64)
            count = int(table[:, row_at].max()) + 1
            kept = ctypes.c_double if wide else ctypes.c_float
            rows = np.ctypeslib.as_array((kept * (count * width)).from_address(rows_at)).reshape(count, width)
            moving = np.ctypeslib.as_array((ctypes.c_longlong * chunks).from_address(gradients_at))
            native.module().cuda_host_walk(name, table, rows, blocks, threads, list(range(blocks)), moving)
        except Exception as error:  # it cannot pass through C
            errors.append(error)
            return 999
        return 0

    loaded.fake_set(launch, 13000, 9, 0)
    image = tmp_path / "step.fatbin"
    image.write_bytes(b"an image\0")
    for cached in (cuda.driver, cuda.code, cuda.kernel_of):
        cached.cache_clear()
    places = {}
    monkeypatch.setattr(cuda, "LIBRARY", str(library))
    monkeypatch.setattr(cuda, "IMAGE", image)
    monkeypatch.setattr(cuda, "place_of", lambda device: places.setdefault(device, FakePlace(device)))
    monkeypatch.setattr(ring, "rings", {})
    for owner, name in ((cuda, "tables"), (cuda_sums, "kept"), (cuda_factored, "kept")):
        monkeypatch.setattr(owner, name, cuda.Tables())
    monkeypatch.setattr(nvrtc, "cupy", lambda: (None, "CuPy is not here"))
    yield SimpleNamespace(lib=loaded, launches=launches, errors=errors, callback=launch, own=own, places=places,
                          place=cuda.place_of(CPU),
                          log=lambda: loaded.fake_log().decode().splitlines())
    for cached in (cuda.driver, cuda.code, cuda.kernel_of):
        cached.cache_clear()
    assert errors == []
    assert loaded.fake_current_contexts() == 0, "a context was left current"


def items_of(rules, dtypes, numbers, sizes=(5, 0, 4096, 10_001)):
    """Items with step counts, of each rule in each combination of dtypes (p, g, states)."""
    made = []
    for rule in rules:
        for p, g, s in dtypes:
            for index, size in enumerate(sizes):
                tensors = (normal((size,), p, numbers), normal((size,), g, numbers), *states_of(rule, size, s, numbers))
                counter = torch.tensor(float(index))
                made.append(Item(f"{rule.name} {size}", rule, tensors, row_of(rule, 1 + index), counter))
    return made


F32, BF16, F64 = ((torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float64,) * 3)


def test_step_end_to_end(fake):
    """Values, counters, versions; one launch for each rule and combination, one upload for all, over several steps."""
    items = items_of([Adam.rules[0], SGD.rules[0], Lion.rules[0]], [F32, BF16, F64], generator(1))
    for step in range(3):
        wanted = oracle(items)
        versions = [[tensor._version for tensor in item.tensors] for item in items]
        cuda.step(items)
        for item, right, before in zip(items, wanted, versions, strict=True):
            for got, tensor in zip(item.tensors, right.tensors, strict=True):
                assert_same_bits(got, tensor, item.name)
            written = [1 if index != 1 else 0 for index in range(len(item.tensors))]
            assert [t._version - b for t, b in zip(item.tensors, before, strict=True)] == written
        assert len(fake.launches) == 9 * (step + 1)
    assert sum(item.counter.item() for item in items) == 9 * (0 + 1 + 2 + 3) + 3 * len(items)
    assert {(threads, stream) for _, _, threads, stream in fake.launches} == {(256, STREAM)}
    assert len(fake.place.uploads) == 1, "nothing changed"


def test_kept_items_end_to_end(fake):
    """One launch for each storage, whatever is zeroed or clipped; keys and coefficients change the rows, not the table.
    Versions count every array that is written.
    """
    numbers = generator(3)
    items = [case_of(combination, zero=size > 99, clip=0.5 if size > 999 else np.inf).random(size, numbers, key=size)
             for combination in COMBINATIONS for size in (0, 5, 100, 10_001)]
    items += items_of([Lion.rules[0]], [F32], numbers)
    for step in range(3):
        wanted = kept.oracle(items)
        arrays = [[*item.tensors, *(extra for extra in item.extras if extra is not None)] for item in items]
        before = [[array._version for array in own] for own in arrays]
        cuda.step(items)
        kept.compare(items, wanted, f"step {step}")
        for item, own, versions in zip(items, arrays, before, strict=True):
            counted = [1 if index != 1 or item.zero else 0 for index in range(len(own))]
            assert [array._version - b for array, b in zip(own, versions, strict=True)] == counted
        assert len(fake.launches) == (len(COMBINATIONS) + 1) * (step + 1)
        kept.new_gradients(items, numbers)
        items = [replace(item, key=item.key + 1) for item in items]
    first, *others = fake.place.uploads
    assert len(others) == 2
    assert max(others) < first / 2, "the tables did not change"


def test_kept_items_without_a_kernel_go_elsewhere(fake):
    """The reference takes them here, where nothing is on a GPU, and a warning says so."""
    items = [kept.Case("AdamW", "kahan_bf16 bf16 int4 int4+P f32").random(300, generator(4))]
    wanted = kept.oracle(items)
    with pytest.warns(RuntimeWarning, match="AdamW with kahanbf16, bf16, int4, int4p, f32 has no CUDA kernel"):
        cuda.step(items)
    kept.compare(items, wanted, "elsewhere")
    assert fake.launches == []


def moved(item, past=0):
    """The item with its gradient elsewhere, `past` elements behind a multiple of 16 bytes."""
    storage = torch.zeros(past + item.tensors[1].numel(), dtype=item.tensors[1].dtype)
    storage[past:] = item.tensors[1]
    return replace(item, tensors=(item.tensors[0], storage[past:], *item.tensors[2:]))


def stepped(fake, items):
    """Step, compare with the oracle, and return the bytes of the copies to the device."""
    wanted, before = oracle(items), len(fake.place.uploads)
    cuda.step(items)
    for item, right in zip(items, wanted, strict=True):
        for got, tensor in zip(item.tensors, right.tensors, strict=True):
            assert_same_bits(got, tensor, item.name)
    return fake.place.uploads[before:]


def test_only_what_changed_is_sent(fake):
    """In one copy: the rows, the addresses of new gradients, both, or nothing; all of it for new parameters."""
    adam, numbers = Adam.rules[0], generator(2)
    sizes = (5, 4096, 3 * 4096 + 1, 7)
    chunks = 1 + 1 + 4 + 1
    items = items_of([adam], [F32, BF16], numbers, sizes)
    rows = len(sizes) * (1 + len(trace(adam).coefficients)) * 4
    whole, = stepped(fake, items)
    assert whole > 2 * chunks * 8 * 7, "tables of at least seven columns"
    assert stepped(fake, items) == []
    items = [replace(item, row=row_of(adam, 9 + index)) for index, item in enumerate(items)]
    sent, = stepped(fake, items)
    assert rows < sent <= 2 * rows + 16, "rows of both launches"
    other = [moved(item) for item in items]
    assert stepped(fake, other) == [2 * chunks * 8 + 8], "both columns of gradients, and what aligns the second"
    one = [*other[:3], moved(other[3]), *other[4:]]
    assert stepped(fake, one) == [8], "one address"
    both = [replace(moved(item), row=row_of(adam, 20 + index)) for index, item in enumerate(one)]
    sent, = stepped(fake, both)
    assert 2 * chunks * 8 + rows < sent <= 2 * (rows + chunks * 8) + 64
    new = items_of([adam], [F32, BF16], numbers, sizes)
    assert stepped(fake, new) == [whole]
    assert stepped(fake, both) == [], "what was known stays"
    assert len(fake.launches) == 2 * 8


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_gradients_that_lose_their_alignment(fake, combination):
    """A table that was made for aligned gradients serves others; a misaligned wide access would stop the walk."""
    numbers = generator(12)
    case = case_of(combination)
    items = [case.random(size, numbers, key=size) for size in (5, 1000, 9001)]
    for past in (0, 1, 3, 0):
        items = [moved(item, past) for item in items]
        wanted = kept.oracle(items)
        cuda.step(items)
        kept.compare(items, wanted, f"{past} past")
    assert len(cuda.tables.known) == 1


def test_report_of_a_step(fake, monkeypatch):
    """What an optimizer sends: once its tables, then rows and new addresses; nothing where neither changed."""
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    params = [torch.nn.Parameter(normal((size,), torch.float32, generator(size))) for size in (5, 4096, 9000)]
    for make, changes in ((Adam, True), (Lion, False)):
        optimizer = make(params, lr=0.1, backend="cuda")
        reports = []
        for step in range(4):
            for p in params:
                p.grad = torch.ones_like(p) if step != 3 else p.grad
            kept_alive = [p.grad for p in params]
            optimizer.step()
            reports.append((optimizer.last_step.copies, optimizer.last_step.bytes_sent))
            del kept_alive
        assert reports[0][0] == 1
        assert reports[0][1] > 200
        assert all(copies <= 1 and size <= 5 * 8 + 64 for copies, size in reports[1:])
        assert reports[3] == ((1, reports[3][1]) if changes else (0, 0))
        assert optimizer.last_step.host_syncs == 0


def test_tables_kept_are_few(fake, monkeypatch):
    """So many, and of no more than so many bytes."""
    monkeypatch.setattr(cuda.tables, "most", 3)
    alive = [items_of([SGD.rules[0]], [F32], generator(seed), sizes=(8,)) for seed in range(5)]
    for items in alive:
        stepped(fake, items)
    assert len(cuda.tables.known) == len(cuda.tables.sizes) == 3
    monkeypatch.setattr(cuda.tables, "most", 1000)
    assert cuda.tables.bytes == sum(entry.on_device.memory.nbytes for entry in cuda.tables.known.values()) > 0
    monkeypatch.setattr(resident, "ROOM", 2 * cuda.tables.bytes // 3)
    stepped(fake, alive[0])
    assert len(cuda.tables.known) == 2
    monkeypatch.setattr(resident, "ROOM", 1)
    assert stepped(fake, alive[0]) == []
    assert len(cuda.tables.known) == 1, "but the last"


# --- Several GPUs -----------------------------------------------------------------------------------------------------

class OnSecond(torch.Tensor):
    """A tensor in host memory that says that it is on the second GPU."""

    device = torch.device("cuda:1")


class OnFirst(torch.Tensor):
    device = torch.device("cuda:0")


def test_several_gpus(fake):
    """One launch on each, with its own context, stream, tables and ring, while it is the current device."""
    items = items_of([Lion.rules[0]], [F32], generator(13), (5, 4096, 9000, 70))
    wanted = oracle(items)
    kinds = (OnFirst, OnSecond, OnFirst, OnSecond)
    there = [replace(item, tensors=tuple(tensor.as_subclass(kind) for tensor in item.tensors), counter=None)
             for item, kind in zip(items, kinds, strict=True)]
    cuda.step(there)
    for item, right in zip(items, wanted, strict=True):
        assert_same_bits(item.tensors[0], right.tensors[0], item.name)
    assert [(name, stream) for name, _, _, stream in fake.launches] == [
        ("step_Lion_F32_F32_F32", STREAM), ("step_Lion_F32_F32_F32", STREAM + 1)]
    first, second = (fake.places[torch.device("cuda", index)] for index in (0, 1))
    assert len(first.uploads) == len(second.uploads) == 1
    assert first.guards == second.guards == 0
    log = fake.log()
    assert log.count("cuDevicePrimaryCtxRetain(100)") == log.count("cuDevicePrimaryCtxRetain(101)") == 1
    assert set(ring.rings) == {OnFirst.device, OnSecond.device}

    second.room = 0
    before = [item.tensors[0].clone() for item in items]
    with pytest.raises(torch.OutOfMemoryError, match="on cuda:1, and no parameter was stepped"):
        cuda.step([moved(there[index]) for index in (2, 0, 3, 1)])
    assert len(fake.launches) == 2, "nor of the other GPU"
    for item, old in zip(items, before, strict=True):
        assert_same_bits(item.tensors[0], old)


# --- Memory that is not there -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["device", "pinned", "cuModuleGetFunction", "cuFuncGetAttribute"])
def test_out_of_memory(fake, where):
    """One error that says what to do; nothing is stepped, of no group; and the next step works."""
    items = items_of([Lion.rules[0], SGD.rules[0]], [F32], generator(14), (5, 4096))
    before = [[tensor.clone() for tensor in (*item.tensors, item.counter)] for item in items]

    def refused(size):
        raise RuntimeError("CUDA error: out of memory")

    if where == "device":
        fake.place.room = 100
    elif where == "pinned":
        fake.place.pinned = refused
    else:
        fake.lib.fake_fail(where.encode(), 2)
    said = "(?i)no memory left for the tables of a step on cpu, and no parameter was stepped: take.*out.of.memory"
    with pytest.raises(torch.OutOfMemoryError, match=said) as caught:
        cuda.step(items)
    assert caught.value.__cause__ is not None
    assert fake.launches == []
    for item, tensors in zip(items, before, strict=True):
        for got, tensor in zip((*item.tensors, item.counter), tensors, strict=True):
            assert_same_bits(got, tensor, item.name)
    fake.place.room = 1 << 40
    fake.place.__dict__.pop("pinned", None)
    fake.lib.fake_fail(where.encode(), 0)
    assert len(stepped(fake, items)) == 1


@pytest.mark.parametrize("where", ["device", "cuModuleGetFunction"])
@pytest.mark.parametrize("make", [LAMB, Adafactor], ids=lambda make: make.__name__)
def test_out_of_memory_for_a_workspace(fake, monkeypatch, make, where):
    """Parameters are untouched, the error says what to do, and the next step is the reference's."""
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    params = [torch.nn.Parameter(normal(shape, torch.float32, generator(15))) for shape in ((40, 30), (9,))]
    before = [p.detach().clone() for p in params]
    optimizer = make(params, lr=0.1, backend="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    fake.place.room = 100 if where == "device" else 1 << 40
    fake.lib.fake_fail(b"cuModuleGetFunction", 2 if where != "device" else 0)
    with pytest.raises(torch.OutOfMemoryError, match=r"no memory left for the workspace of .*no parameter was stepped"):
        optimizer.step()
    assert fake.launches == []
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p, old)
    fake.place.room = 1 << 40
    fake.lib.fake_fail(b"cuModuleGetFunction", 0)
    optimizer.step()
    assert {stream for *_, stream in fake.launches} == {STREAM}
    other = [torch.nn.Parameter(old) for old in before]
    reference = make(other, lr=0.1, backend="reference")
    for p in other:
        p.grad = torch.ones_like(p)
    reference.step()
    for p, right in zip(params, other, strict=True):
        assert torch.allclose(p, right, rtol=1e-6, atol=1e-7)


def test_norm_through_the_driver(fake):
    """Bits, launches and one copy; a norm that finds no memory says so."""
    tensors = [normal((size,), torch.bfloat16, generator(size)) for size in (3, 9000, 0)]
    fake.place.room = 10
    with pytest.raises(torch.OutOfMemoryError, match="no memory left for the workspace of a norm"):
        cuda_sums.squares(tensors)
    fake.place.room = 1 << 40
    for _ in range(2):
        sums, flag = cuda_sums.squares(tensors)
        wanted, bad = norm.reference(tensors)
        assert_same_bits(sums, wanted)
        assert bool(flag) == bool(bad)
        assert_same_bits(cuda_sums.total(sums), norm.tree(sums))
    assert [name for name, *_ in fake.launches] == 2 * ["squares_BF16", "tree", "tree", "tree"]
    assert len(fake.place.uploads) == 2, "tables of the norm, and of the total"


def test_other_errors_are_not_called_out_of_memory():
    with pytest.raises(RuntimeError, match=r"^something else$"), resident.making("a table", CPU):
        raise RuntimeError("something else")


def test_strided_and_empty_and_none(fake):
    """What no flat loop can walk is copied and copied back; nothing to do is no launch."""
    cuda.step([])
    empty = items_of([Lion.rules[0]], [F32], generator(3), sizes=(0,))
    cuda.step(empty)
    assert fake.launches == []
    assert empty[0].counter.item() == 1
    numbers = generator(4)
    base = normal((40, 3), torch.float32, numbers)
    item = Item("strided", Lion.rules[0], (base.t()[:, ::2], normal((3, 20), torch.float32, numbers),
                                           normal((20, 3), torch.float32, numbers).t()), row_of(Lion.rules[0], 1), None)
    before, wanted = base.clone(), oracle([item])
    cuda.step([item])
    for got, right in zip(item.tensors, wanted[0].tensors, strict=True):
        assert_same_bits(got, right, "strided")
    assert_same_bits(base[1::2], before[1::2], "between the rows")
    assert len(fake.launches) == 1


def test_other_combinations_run_elsewhere(fake):
    """fp32 with bf16 gradients is not compiled ahead of time: the reference takes it on the CPU, and says so once."""
    cuda.say_not_compiled.cache_clear()
    items = items_of([Lion.rules[0]], [(torch.float32, torch.bfloat16, torch.float32), F32], generator(5), sizes=(7,))
    wanted = oracle(items)
    with pytest.warns(RuntimeWarning, match="rule Lion with float32, bfloat16, float32 has no CUDA kernel"):
        cuda.step(items)
    for item, right in zip(items, wanted, strict=True):
        assert_same_bits(item.tensors[0], right.tensors[0], item.name)
    assert len(fake.launches) == 1
    assert [item.counter.item() for item in items] == [1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda.step(items)


@pytest.mark.parametrize("configuration", ["AdamW", "Adam L2 amsgrad maximize", "SGD nesterov L2", "Lion"])
def test_optimizer(fake, monkeypatch, configuration):
    """Whole optimizers, all layouts, gradients that come and go."""
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    case = Case(configuration, steps=3)
    assert_same_run(run_case(case, "cuda"), run_case(case, "reference"), str(case))
    assert fake.launches


def test_contexts_and_functions(fake):
    """The primary context is retained once and current around each call; a function is looked up once."""
    items = items_of([SGD.rules[0]], [F32], generator(6), sizes=(100,))
    cuda.step(items)
    cuda.step(items)
    log = fake.log()
    assert log.count("cuDevicePrimaryCtxRetain(100)") == log.count("cuModuleLoadData(an image)") == 1
    assert log.count("cuModuleGetFunction(step_SGD_F32_F32_F32)") == 1
    assert log.count("cuCtxPushCurrent()") == log.count("cuCtxPopCurrent()") == 4, "load, usage, two launches"
    assert log.count(f"cuLaunchKernel(step_SGD_F32_F32_F32 1 256 {STREAM})") == 2
    assert cuda.code(0)[0].usage("step_SGD_F32_F32_F32", 256) == {"registers": 40, "local_bytes": 0, "blocks": 8}


def test_each_device_has_its_code(fake):
    first, second = cuda.code(0)[0], cuda.code(1)[0]
    assert first is not second
    assert "cuDevicePrimaryCtxRetain(101)" in fake.log()
    assert cuda.code(2) == (None, cuda.code(2)[1])
    assert "cuDeviceGet(2): CUDA_ERROR_INVALID_DEVICE, text of the driver" in cuda.code(2)[1]


def test_chunk_size():
    assert cuda.chunk_size(0, 132) == cuda.TILE
    assert cuda.chunk_size(64 << 20, 132) == 4 * cuda.TILE
    assert cuda.chunk_size(1 << 40, 132) == 16 * cuda.TILE


# --- Why it cannot run ------------------------------------------------------------------------------------------------

GPU = torch.device("cuda:0")


def test_why_not_where_it_runs(fake):
    assert cuda.why_not(GPU) is None
    assert cuda.Place(torch.device("cuda")).ordinal() == 0 or torch.cuda.is_available()
    assert cuda.why_not(CPU) == "it steps tensors in the memory of an NVIDIA GPU, not on cpu"


def test_no_driver(fake, monkeypatch):
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-not-there.so.1")
    assert cuda.why_not(GPU).startswith("there is no CUDA driver: libcuda-that-is-not-there.so.1: cannot open")


def test_not_a_driver(fake, monkeypatch, tmp_path):
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int cuInit(unsigned) { return 0; }\n')
    monkeypatch.setattr(cuda, "LIBRARY", str(compile_library(source, tmp_path / "libother.so")))
    assert "libother.so has no cuDriverGetVersion: it is not a CUDA driver, or too old" in cuda.why_not(GPU)


def test_driver_that_does_not_start(fake):
    fake.lib.fake_fail(b"cuInit", 999)
    assert cuda.why_not(GPU) == "there is no CUDA driver: cuInit: error 999"


def test_no_device_code(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "IMAGE", tmp_path / "absent.fatbin")
    assert cuda.why_not(GPU) == (f"this build has no device code ({native.build_info()['cuda_reason']}), and none can "
                                 "be compiled at run time: CuPy is not here")


def test_old_gpu(fake):
    fake.lib.fake_set(fake.callback, 13000, 7, 5)
    assert cuda.why_not(GPU) == "GPU 0 has compute capability 7.5; these kernels need 8.0 or newer"


@pytest.mark.parametrize("error, text", [(209, "CUDA_ERROR_NO_BINARY_FOR_GPU, no kernel image is available"),
                                         (222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION, the provided PTX was compiled")])
def test_image_that_the_driver_refuses(fake, error, text):
    fake.lib.fake_set(fake.callback, 12040, 9, 0)
    fake.lib.fake_fail(b"cuModuleLoadData", error)
    reason = cuda.why_not(GPU)
    assert f"cuModuleLoadData: {text}" in reason
    assert "The driver is for CUDA 12.4: install a newer driver, or build with an older toolkit" in reason
    with pytest.raises(RuntimeError, match="the CUDA backend cannot step tensors on cpu: GPU 0 cannot load"):
        cuda.step(items_of([SGD.rules[0]], [F32], generator(7), sizes=(3,)))


@pytest.mark.parametrize("what", ["driver", "gpu", "none"])
def test_automatic_choice(fake, monkeypatch, what):
    """A driver or a GPU that is too old leaves the step to Triton, and the reasons say so; a forced backend raises."""
    if what == "driver":
        fake.lib.fake_set(fake.callback, 12040, 9, 0)
        fake.lib.fake_fail(b"cuModuleLoadData", 222)
    elif what == "gpu":
        fake.lib.fake_set(fake.callback, 13000, 7, 5)
    else:
        monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-not-there.so.1")
    said = {"driver": "install a newer driver", "gpu": "kernels need 8.0 or newer", "none": "no CUDA driver"}[what]
    monkeypatch.setattr(dispatch.load("triton"), "why_not", lambda device: None)
    dispatch._best.cache_clear()
    try:
        assert dispatch.choose(GPU) == "triton"
        assert said in (dispatch.reasons(GPU)["cuda"] or "")
        with pytest.raises(RuntimeError, match=f"backend 'cuda' was asked for and cannot run: .*{said}"):
            dispatch.choose(GPU, "cuda")
    finally:
        dispatch._best.cache_clear()


def test_launch_that_fails(fake):
    """The driver's text arrives, and nothing is counted as done."""
    items = items_of([SGD.rules[0]], [F32], generator(8), sizes=(3,))
    fake.lib.fake_fail(b"cuLaunchKernel", 101)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel\(step_SGD_F32_F32_F32\): CUDA_ERROR_INVALID_DEVICE, text"):
        cuda.step(items)
    assert items[0].counter.item() == 0


def test_unknown_kernel(fake):
    with pytest.raises(RuntimeError, match=r"cuModuleGetFunction\(other\): CUDA_ERROR_NOT_FOUND"):
        cuda.code(0)[0].launch(kernel="other", blocks=1, threads=1, stream=0, table=0, chunks=0, rows=0)
