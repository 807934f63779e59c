"""The ring of pinned slots: what is sent arrives, however far the device is behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_place import FakePlace

from fasttrain.kernels import ring, triton


@pytest.fixture
def place():
    return FakePlace()


def arrays(count, sizes, seed=0):
    numbers = np.random.default_rng(seed)
    return [numbers.integers(0, 256, size=int(numbers.integers(1, sizes)), dtype=np.uint8) for _ in range(count)]


def send(place, own, data):
    targets = [torch.zeros(len(one), dtype=torch.uint8) for one in data]
    for one, target in zip(data, targets, strict=True):
        own.send(one, target)
        one[:] = 0  # the caller's memory is its own again
    return targets


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("count", [1, ring.FEWEST + 1, ring.MOST, 3 * ring.MOST])
def test_what_is_sent_arrives(place, behind, count):
    """A slot is used again only after its event: copies that are still queued would carry what came later."""
    own, data = ring.Ring(place), arrays(count, 10_000)
    place.behind = behind
    wanted = [torch.from_numpy(one.copy()) for one in data]
    before = ring.sent.now()
    got = send(place, own, data)
    place.catch_up()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    copies, size, waits = (now - then for now, then in zip(ring.sent.now(), before, strict=True))
    assert (copies, size) == (count, sum(map(len, data)))
    assert waits == place.waited == (max(count - ring.MOST, 0) if behind else 0)
    assert len(own.slots) == (min(max(count, ring.FEWEST), ring.MOST) if behind else ring.FEWEST)


def test_memory_stays(place):
    """Pinned memory is made as slots are first used and grow; after that nothing is allocated."""
    own = ring.Ring(place)
    send(place, own, arrays(10 * ring.FEWEST, ring.SMALLEST))
    assert place.pins == ring.FEWEST
    send(place, own, [np.zeros(ring.SMALLEST + 1, np.uint8) for _ in range(10)])
    assert place.pins == 2 * ring.FEWEST
    assert {len(slot.words) for slot in own.slots} == {2 * ring.SMALLEST}


def test_a_graph_is_refused(place):
    place.graph = True
    with pytest.raises(RuntimeError, match="take a step with the same parameters and gradients before the capture"):
        ring.Ring(place).send(np.zeros(1, np.uint8), torch.zeros(1, dtype=torch.uint8))


def test_upload(place, monkeypatch):
    monkeypatch.setattr(ring, "rings", {})
    data = np.arange(12, dtype=np.int64).reshape(3, 4)
    made = ring.upload(place, data.T)
    assert torch.equal(made.view(torch.int64).view(4, 3), torch.from_numpy(data.T.copy()))
    assert len(ring.upload(place, np.empty((0, 4)))) == 0
    assert len(place.uploads) == 1


def test_tables_of_triton(place, monkeypatch):
    """Its uploads to a GPU go through the ring, and keep their shape and type."""
    monkeypatch.setattr(ring, "rings", {})
    monkeypatch.setattr(triton, "place_of", lambda device: place)
    for data in (np.arange(6.0).reshape(2, 3), np.arange(4, dtype=np.int64), np.empty((0, 3), np.float32)):
        made = triton.upload(data, torch.device("cuda"))
        assert torch.equal(made, torch.from_numpy(data))
        assert made.dtype == torch.from_numpy(data).dtype
    assert place.uploads == [48, 32]
