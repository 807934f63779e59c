"""Mixtures: every data set gets its share of any first n samples, with random access."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokens import write_shard

from fasttrain.data import DataError, Loader, Mixture, TokenDataset, Windows, WrongTokenizer
from fasttrain.data.mixture import LONGEST, quota, shares

WEIGHTS = st.lists(st.integers(1, 60), min_size=1, max_size=9)


def streams(count, size=300):
    """Streams that share no byte value."""
    return [np.arange(size, dtype=np.uint8) % 20 + 25 * j for j in range(count)]


def mixture(weights, seed=0, length=8):
    return Mixture({f"set{j}": (Windows(stream, length), weight)
                    for j, (stream, weight) in enumerate(zip(streams(len(weights)), weights, strict=True))}, seed)


@given(WEIGHTS)
def test_every_first_n_have_their_shares(counts):
    order, period = quota(counts), sum(counts)
    for j, count in enumerate(counts):
        so_far = np.append(0, np.cumsum(np.tile(order, 2) == j))
        exact = np.arange(2 * period + 1) * count
        assert (so_far >= exact // period).all()
        assert (so_far <= -(-exact // period)).all()


@given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=6))
def test_shares_are_near_the_weights(weights):
    counts, period = shares(weights)
    assert sum(counts) == period <= LONGEST
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count / period - weight / sum(weights)) <= 1.0001 / LONGEST


@given(WEIGHTS.filter(lambda weights: len(weights) <= 5), st.integers(0, 10**9))
def test_random_access_is_the_sequence(weights, begin):
    whole = mixture(weights)
    indices = np.arange(begin, begin + 50)
    homes, numbers = whole.locate(indices)
    before, after = whole.counts(begin), whole.counts(begin + 50)
    for j, name in enumerate(whole.names):
        assert numbers[homes == j].tolist() == list(range(before[name], after[name])), "each its own running number"
        share = whole.weights[name] * begin
        assert share.__floor__() <= before[name] <= share.__ceil__()
    shuffled = np.random.default_rng(0).permutation(50)
    again = whole.locate(indices[shuffled])
    assert np.array_equal(again[0], homes[shuffled])
    assert np.array_equal(again[1], numbers[shuffled])


def test_samples_are_those_of_their_data_sets():
    whole = mixture([0.5, 0.3, 0.2], seed=3)
    given = whole.fetch(np.arange(1000, 1100))
    homes, numbers = whole.locate(np.arange(1000, 1100))
    assert np.array_equal(given["source"], homes)
    for row, home, number in zip(given["tokens"], homes, numbers, strict=True):
        assert np.array_equal(row, whole.sources[home].batch(int(number), 1)[0])
        assert set(row.tolist()) <= set(range(25 * home, 25 * home + 20))
    assert whole.weights == {"set0": Fraction(1, 2), "set1": Fraction(3, 10), "set2": Fraction(1, 5)}


def test_a_data_set_added_leaves_the_order_of_others():
    two, three = mixture([1, 1], seed=3), mixture([1, 1, 1], seed=3)
    assert np.array_equal(two.sources[1].batch(0, 9), three.sources[1].batch(0, 9))
    assert not np.array_equal(two.sources[0].starts(np.arange(30)), two.sources[1].starts(np.arange(30)))


def test_a_loader_of_a_mixture_resumes():
    with Loader(mixture([3, 2]), 10, seed=7) as loader:
        assert loader.source.seed == 7
        found = [next(loader) for _ in range(3)]
        state = loader.state_dict()
        assert [int((batch["source"] == 1).sum()) for batch in found] == [4, 4, 4]
        following = next(loader)["tokens"]
    for rank in range(2):
        with Loader(mixture([3, 2]), 10, seed=7, rank=rank, world=2, workers=0) as loader:
            loader.load_state_dict(state)
            assert torch.equal(next(loader)["tokens"], following[5 * rank : 5 * rank + 5])


@pytest.mark.parametrize("weights, message", [
    ([1, 0], r"weights \[1, 0\]: each must be positive"),
    ([1, float("nan")], "each must be positive"),
    ([1, float("inf")], "each must be positive"),
    ([1e6, 1], "less than 1/65536 of all weights"),
])
def test_weights_that_cannot_work(weights, message):
    with pytest.raises(DataError, match=message):
        mixture(weights)


def test_mixtures_that_cannot_work(tmp_path):
    with pytest.raises(DataError, match="no data sets"):
        Mixture({})
    a, b = streams(2)
    with pytest.raises(DataError, match=r"different lengths \({'a': 8, 'b': 9}\)"):
        Mixture({"a": (Windows(a, 8), 1), "b": (Windows(b, 9), 1)})
    files = [TokenDataset(write_shard(tmp_path / name, [[1, 2] * 50], tokenizer=16 * name.encode())) for name in "ab"]
    with pytest.raises(WrongTokenizer, match="different tokenizers"):
        Mixture({"a": (files[0].windows(8), 1), "b": (files[1].windows(8), 1)})


def test_damaged_samples_of_a_mixture_are_counted(tmp_path):
    """Only one of the sources can have any."""
    path = write_shard(tmp_path / "a", [np.arange(250)] * 1000)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    source = TokenDataset(path, on_bad="skip").windows(8)
    both = Mixture({"a": (source, 1), "b": (Windows(streams(1)[0], 8), 1)})
    given = both.fetch(np.arange(100))
    assert 10 < given["replaced"].sum() < 50
    assert not given["replaced"][given["source"] == 1].any()
