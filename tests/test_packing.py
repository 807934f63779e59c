"""Packed sequences: every token once, documents whole where they fit, hardly a place empty."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokens import some_documents, write_dataset, write_shard

from fasttrain.data import BadShard, DataError, Loader, Packed, TokenDataset, TooSmall, pack
from fasttrain.data.packing import best_fit, pieces_of_documents


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 12))
def test_pieces_predict_every_token_but_the_first_once(lengths, length):
    ends = np.cumsum(lengths)
    firsts, sizes = pieces_of_documents(ends, length)
    predicted = sorted(t for first, size in zip(firsts, sizes, strict=True) for t in range(first + 1, first + size))
    begins = {int(end - size) for end, size in zip(ends, lengths, strict=True) if size}
    assert predicted == [t for t in range(ends[-1]) if t not in begins]
    assert len(sizes) == 0 or sizes.max() <= length + 1
    whole = {(int(end - size), size) for end, size in zip(ends, lengths, strict=True) if 2 <= size <= length + 1}
    assert whole <= set(zip(firsts.tolist(), sizes.tolist(), strict=True)), "what fits stays whole"


def naive_best_fit(sizes, room):
    """Every bin is looked at; of equal ones the last that became so."""
    bins = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [b for b in bins if b["left"] >= sizes[item]]
        least = min((b["left"] for b in fitting), default=None)
        if least is None:
            bins.append({"left": room, "items": [], "at": 0})
            chosen = bins[-1]
        else:
            chosen = max((b for b in fitting if b["left"] == least), key=lambda b: b["at"])
        chosen["items"].append(item)
        chosen["left"] -= sizes[item]
        chosen["at"] = sum(len(b["items"]) for b in bins)
    return [b["items"] for b in bins]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_best_fit_is_the_naive_one(sizes, room):
    bins = best_fit(np.array(sizes, int), room)
    assert bins == naive_best_fit(sizes, room)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in items) <= room for items in bins)


@pytest.fixture
def dataset(tmp_path):
    return TokenDataset(write_dataset(tmp_path / "d", [some_documents(60, 0, 70), some_documents(60, 1, 70)]))


def test_a_pass_has_every_piece_once(dataset, tmp_path):
    packed = dataset.packed(pack(dataset, 32, tmp_path / "packed"), seed=3)
    given = packed.fetch(np.arange(len(packed)))
    assert given["tokens"].shape == (len(packed), 33)
    assert given["positions"].shape == given["counted"].shape == (len(packed), 32)
    stream = dataset.gather(np.array([0]), len(dataset))[0]
    firsts, sizes = pieces_of_documents(dataset.ends(), 32)
    expected = sorted(bytes(stream[first : first + size]) for first, size in zip(firsts, sizes, strict=True))
    found = []
    for tokens, counted in zip(given["tokens"], given["counted"], strict=True):
        begin = 0
        while begin < 32 and counted[begin]:
            more = np.flatnonzero(~counted[begin:])
            size = (int(more[0]) if len(more) else 32 - begin) + 1
            found.append(bytes(tokens[begin : begin + size]))
            begin += size
    assert sorted(found) == expected
    assert packed.filled == pytest.approx(sum(map(len, expected)) / given["tokens"].size)
    assert packed.filled > 0.97
    assert (given["positions"].max(1) <= 31).all()


def test_a_loader_of_packed_sequences(dataset, tmp_path):
    packed = Packed(dataset, pack(dataset, 32, tmp_path / "packed"))
    with Loader(packed, 4, seed=3, workers=2) as loader, Loader(packed, 4, seed=3, workers=1, processes=True) as other:
        batches = [next(loader) for _ in range(30)]
        other.load_state_dict({**loader.state_dict(), "index": 80})
        again = next(other)
    assert torch.equal(again["tokens"], batches[20]["tokens"])
    assert batches[0].keys() == {"tokens", "positions", "counted", "indices"}
    two_passes = packed.reseeded(3).sequences(np.arange(2 * len(packed))).reshape(2, -1)
    assert (np.sort(two_passes, 1) == np.arange(len(packed))).all()
    assert not np.array_equal(*two_passes)


def test_damaged_pieces_are_replaced(dataset, tmp_path):
    path = pack(dataset, 32, tmp_path / "packed")
    (dataset.path / "train-00001.tokens").unlink()
    with pytest.raises(BadShard, match="No such file"):
        TokenDataset(dataset.path)
    packed = TokenDataset(dataset.path, on_bad="skip").packed(path)
    given = packed.fetch(np.arange(len(packed)))
    assert 0.5 < given["replaced"].mean() < 1, "most sequences have a piece of the lost half"


def test_index_files_that_cannot_work(dataset, tmp_path):
    path = pack(dataset, 32, tmp_path / "packed")
    sound = path.read_bytes()
    for offset in range(0, len(sound), 7):
        path.write_bytes(sound[:offset] + bytes([sound[offset] ^ 4]) + sound[offset + 1 :])
        with pytest.raises(DataError, match="packed"):
            Packed(dataset, path)
    for content in (b"", sound[:3], sound[:-1], sound + b"x"):
        path.write_bytes(content)
        with pytest.raises(BadShard, match="packed"):
            Packed(dataset, path)
    path.write_bytes(sound)
    other = TokenDataset(dataset.path / "train-00000.tokens")
    with pytest.raises(DataError, match="was packed from other data"):
        Packed(other, path)
    with pytest.raises(TooSmall, match="no document of two tokens"):
        pack(TokenDataset(write_shard(tmp_path / "a", [[1], [2]])), 8, tmp_path / "b")
    with pytest.raises(DataError, match="at least one"):
        pack(dataset, 0, tmp_path / "b")
