"""What of a driven step's tables may change, when it is sent, and what becomes part of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kept
import pytest
import torch
from fake_place import FakePlace
from helpers import assert_same_bits, generator, normal
from test_cuda_driver import fake as fake
from test_cuda_driver import library as library
from test_driven_kernels import CASES, F32, Run, same
from test_driven_kernels import backend as backend

from fasttrain.kernels import cuda, driven, norm, reference_driven, ring, triton, triton_sums
from fasttrain.optim import AdamW, Lion

RULE = AdamW.rules[0]


@pytest.fixture
def place(backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakePlace:
    """The device's side, on which a capture can be played."""
    if backend == "cuda":
        return request.getfixturevalue("fake").place
    made = FakePlace()
    monkeypatch.setattr(triton, "place_of", lambda device: made)
    monkeypatch.setattr(ring, "rings", {})
    for owner, name in ((triton, "tables"), (triton_sums, "kept")):
        monkeypatch.setattr(owner, name, cuda.Tables())
    return made


def pair(run: Run, backend: str) -> tuple[Any, Any, Run]:
    twin = run.twin()
    return (driven.driven(run.items, run.rows, run.row_of, backend),
            reference_driven.driven(twin.items, twin.rows, twin.row_of), twin)


def moved(run: Run) -> None:
    """Gradients elsewhere, of other values."""
    run.items = [replace(item, tensors=(item.tensors[0], item.tensors[1].clone(), *item.tensors[2:]))
                 for item in run.items]
    kept.new_gradients(run.items, generator(5))


def check(run: Run, twin: Run, steps: tuple[Any, Any], what: str) -> None:
    for step in steps:
        step.launch()
    same(run, twin, what)


def test_refresh(backend: str, place: FakePlace) -> None:
    """Other numbers and another seed, in one copy; nothing where nothing changed."""
    run = Run(4).plain(RULE, F32, (5, 900)).kept(CASES[1], (70, 3))
    ours, naive, twin = pair(run, backend)
    before = len(place.uploads)
    ours.refresh(run.rows)
    assert len(place.uploads) == before
    for one, step in ((run, ours), (twin, naive)):
        one.rows = [replace(row, scale=2.0, seed=5, clip_value=row.clip_value and 0.1) for row in one.rows]
        step.refresh(one.rows)
    assert len(place.uploads) == before + 1
    check(run, twin, (ours, naive), "refreshed")
    place.graph = True
    ours.refresh(run.rows)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        ours.refresh([replace(row, scale=3.0) for row in run.rows])


def test_update(backend: str, place: FakePlace) -> None:
    """Addresses alone are sent; in a capture the copy is the graph's, and then nobody else's."""
    run = Run(6).plain(RULE, F32, (5, 900)).kept(CASES[2], (600, 3))
    ours, naive, twin = pair(run, backend)
    chunks = sum(map(len, ours.chunks))
    for captured in (False, True):
        before = len(place.uploads)
        place.graph = captured
        for one, step in ((run, ours), (twin, naive)):
            moved(one)
            step.update(one.items)
            step.update(one.items)
        assert [size for size in place.uploads[before:] if size <= 8 * chunks + 16] == place.uploads[before:]
        assert len(place.uploads) == before + 1
        check(run, twin, (ours, naive), f"updated, captured: {captured}")
    place.replay()
    check(run, twin, (ours, naive), "replayed")
    alive = run.items
    for place.graph in (True, False):
        moved(run)
        with pytest.raises(RuntimeError, match="the addresses of gradients are part of a CUDA graph"):
            ours.update(run.items)
    del alive


def no_counter(run: Run) -> None:
    run.rows = run.rows[:-1]


def other_structure(run: Run) -> None:
    run.rows[0] = replace(run.rows[0], hyperparameters=dict(run.rows[0].hyperparameters, betas=(0.1, 0.2, 0.3)))


def other_draws(run: Run) -> None:
    run.rows[0] = replace(run.rows[0], draws=torch.tensor(1))


@pytest.mark.parametrize("change, text", [(no_counter, "1 rows are given for a step of 2"),
                                          (other_structure, "row 0 are of another structure"),
                                          (other_draws, "rows have other counts of draws")])
def test_other_rows_are_refused(backend: str, place: FakePlace, change: Callable[[Run], None], text: str) -> None:
    run = Run(7).plain(RULE, F32, (5, 9))
    ours = driven.driven(run.items, run.rows, run.row_of, backend)
    before = len(place.uploads)
    change(run)
    with pytest.raises(ValueError, match=text):
        ours.refresh(run.rows)
    assert len(place.uploads) == before


def test_other_items_are_refused(backend: str, place: FakePlace) -> None:
    run = Run(8).plain(RULE, F32, (64, 9))
    ours = driven.driven(run.items, run.rows, run.row_of, backend)
    first, *others = run.items
    p, g, *states = first.tensors
    with pytest.raises(ValueError, match="1 items are given for a step of 2"):
        ours.update(others)
    for wrong in ((p, g.double(), *states), (p, torch.ones(128)[::2], *states), (p.clone(), g, *states),
                  (p, g.view(8, 8), *states)):
        with pytest.raises(ValueError, match="AdamW 64 is not what the step was made for"):
            ours.update([replace(first, tensors=wrong), *others])


def test_what_cannot_be_driven(backend: str, place: FakePlace) -> None:
    """Draws without a count; a step count of a type that is not counted in."""
    run = Run(9).kept(CASES[1], (5, 9))
    with pytest.raises(ValueError, match=r"size 5 is rounded at random.*count of draws None: give an int64 tensor"):
        driven.driven(run.items, [replace(row, draws=None) for row in run.rows], run.row_of, backend)
    run = Run(9).plain(RULE, F32, (5, 9))
    items = [replace(item, counter=torch.tensor(True)) for item in run.items]
    with pytest.raises(TypeError, match=r"the step count of AdamW 5 is a tensor of torch.bool"):
        driven.driven(items, run.rows, run.row_of, backend)


def test_no_memory(backend: str, place: FakePlace) -> None:
    run = Run(10).plain(RULE, F32, (5, 9))
    place.room = 10
    with pytest.raises(torch.OutOfMemoryError, match="no memory left for the tables of a step"):
        driven.driven(run.items, run.rows, run.row_of, backend)


def test_counts_of_every_type(backend: str, place: FakePlace) -> None:
    run = Run(11).plain(RULE, F32, (5, 9, 6, 7, 8, 4, 3))
    dtypes = (torch.float32, torch.float64, torch.int32, torch.int64)
    run.items = [replace(item, counter=None if index == 6 else torch.zeros((), dtype=dtypes[index % 4]))
                 for index, item in enumerate(run.items)]
    run.rows = [replace(row, counter=run.items[run.row_of.index(own)].counter) for own, row in enumerate(run.rows)]
    ours, naive, twin = pair(run, backend)
    run.found[1].fill_(1.0), twin.found[1].fill_(1.0)
    check(run, twin, (ours, naive), "counted")
    assert sum(float(item.counter) for item in run.items if item.counter is not None) == 4


def test_a_norm_in_a_capture(backend: str, place: FakePlace) -> None:
    """Its tables are the graph's own: replays read them, whatever is sent to those of other steps."""
    pytest.importorskip("triton", reason="triton is not installed")
    numbers = generator(12)
    tensors = [normal((size,), dtype, numbers) for size in (5, 0, 9000) for dtype in (torch.float32, torch.bfloat16)]
    wanted = norm.reference(tensors)[0]
    norm.squares(tensors, backend)
    norm.total(wanted, backend)
    pins, place.graph = place.pins, True
    others = [tensor.clone() for tensor in tensors]
    found = norm.squares(others, backend)[0]
    assert_same_bits(found, wanted)
    assert_same_bits(norm.total(found, backend), norm.tree(wanted))
    assert place.pins == pins, "pinned memory was made before"
    assert len(place.copies) == 2
    place.graph = False
    before = len(place.uploads)
    assert_same_bits(norm.squares(tensors, backend)[0], wanted)
    assert len(place.uploads) == before, "what is kept is as it was"


# --- Triton's steps that the host drives ------------------------------------------------------------------------------

def test_what_triton_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables once, in one copy for all launches; then rows, addresses of new gradients, or nothing."""
    pytest.importorskip("triton", reason="triton is not installed")
    place = FakePlace()
    monkeypatch.setattr(triton, "place_of", lambda device: place)
    monkeypatch.setattr(ring, "rings", {})
    monkeypatch.setattr(triton, "tables", cuda.Tables())
    for make, changes in ((AdamW, True), (Lion, False)):
        params = [torch.nn.Parameter(torch.ones(size)) for size in (5, 900)]
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        ours, wanted = make(params, lr=0.1, backend="triton"), make(twins, lr=0.1, backend="reference")
        sent = []
        for step in range(4):
            for p, twin in zip(params, twins, strict=True):
                p.grad = p.grad if step == 3 else normal(p.shape, torch.float32, generator(step))
                twin.grad = p.grad
            alive = [p.grad for p in params]
            ours.step()
            wanted.step()
            sent.append((ours.last_step.copies, ours.last_step.bytes_sent))
            for p, twin in zip(params, twins, strict=True):
                assert_same_bits(p.detach(), twin.detach())
            del alive
        assert sent[0][0] == 1
        assert sent[0][1] > 2 * sent[1][1]
        assert all(copies <= 1 and size <= 2 * 8 + 64 for copies, size in sent[1:])
        assert (sent[3] == (0, 0)) == (not changes)


def test_a_step_without_memory_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    place = FakePlace()
    place.room = 10
    monkeypatch.setattr(triton, "place_of", lambda device: place)
    monkeypatch.setattr(triton, "tables", cuda.Tables())
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    with pytest.raises(torch.OutOfMemoryError, match="no parameter was stepped"):
        AdamW([p], backend="triton").step()
    assert p.tolist() == [1.0] * 5


