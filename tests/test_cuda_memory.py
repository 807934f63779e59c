"""The CUDA backend where memory is short: what is kept, and errors that leave every parameter as it was."""

from __future__ import annotations

import pytest
import torch
from fake_driver import CPU, F32, STREAM, items_of, needs_driver, stepped
from fake_driver import fake as fake
from fake_driver import library as library
from helpers import assert_same_bits, generator, normal

from fasttrain.kernels import cuda, cuda_sums, norm, resident
from fasttrain.optim import LAMB, SGD, Adafactor, Lion

pytestmark = needs_driver


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
