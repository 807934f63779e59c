"""Token files: what was written is read, and whatever is damaged is found, named, or replaced alike on every rank."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from tokens import TOKENIZER, some_documents, write_dataset, write_shard

from fasttrain.data import BadShard, DataError, Loader, ShardWriter, TokenDataset, WrongTokenizer, cu_seqlens
from fasttrain.data.dataset import FORMAT, INDEX, Part, checksum
from fasttrain.data.shard import CHUNK, LAYOUT, Header, Shard


def flip(path, offset, bit=0):
    with open(path, "r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1 << bit]))


def large(folder, shards=2):
    """Files of three chunks each, of one document."""
    numbers = np.random.default_rng(0)
    return write_dataset(folder, [[numbers.integers(0, 256, 2 * CHUNK + 1000)] for _ in range(shards)])


@pytest.mark.parametrize("vocabulary, dtype", [
    (200, np.uint8), (256, np.uint8), (257, np.int32), (1 << 16, np.int32), ((1 << 16) + 1, np.int64),
    (1 << 32, np.int64)])
def test_what_was_written_is_read(tmp_path, vocabulary, dtype):
    documents = [*some_documents(20, vocabulary=vocabulary), [vocabulary - 1, 0]]
    dataset = TokenDataset(write_shard(tmp_path / "é.tokens", documents, vocabulary), verify="open")
    expected = np.concatenate(documents)
    assert (len(dataset), dataset.documents, dataset.vocabulary) == (len(expected), 21, vocabulary)
    found = dataset.gather(np.array([0]), len(expected))[0]
    assert found.dtype == dtype
    assert np.array_equal(found, expected)
    assert dataset.shards[0].ends().tolist() == np.cumsum([len(d) for d in documents]).tolist()
    assert list(tmp_path.iterdir()) == [tmp_path / "é.tokens"]


def test_large_documents_cross_chunks(tmp_path):
    stream = np.random.default_rng(0).integers(0, 60_000, 3 * CHUNK + 17)
    with ShardWriter(tmp_path / "a", 60_000, TOKENIZER) as shard:
        for piece in np.array_split(stream, 7):
            shard.add(piece, end=False)
        shard.add(np.empty(0, int))
    dataset = TokenDataset(tmp_path / "a", verify="open")
    assert dataset.shards[0].header.chunks == 7
    assert np.array_equal(dataset.gather(np.array([0]), len(stream))[0], stream)


def test_the_same_tokens_make_the_same_bytes(tmp_path):
    a, b = (write_shard(tmp_path / name, some_documents()) for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_nothing_is_left_of_what_was_not_finished(tmp_path):
    with pytest.raises(DataError, match="tokens from 3 to 256 for a vocabulary of 256"):
        write_shard(tmp_path / "a", [[3, 256]])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    documents = [some_documents(7, seed, most=40) for seed in range(3)]
    return TokenDataset(write_dataset(folder, [documents[0], [], documents[1], documents[2]])), documents


@given(st.data())
def test_gather_is_the_concatenation(three, data):
    dataset, documents = three
    stream = np.concatenate([document for shard in documents for document in shard])
    width = data.draw(st.integers(1, len(stream)))
    starts = np.array(data.draw(st.lists(st.integers(0, len(stream) - width), min_size=1, max_size=9)))
    assert np.array_equal(dataset.gather(starts, width), np.stack([stream[s : s + width] for s in starts]))


@given(st.data())
def test_positions_begin_again_with_each_document(three, data):
    dataset, documents = three
    in_document = np.concatenate([np.arange(len(document)) for shard in documents for document in shard])
    length = data.draw(st.integers(1, len(in_document)))
    start = data.draw(st.integers(0, len(in_document) - length))
    expected = in_document[start : start + length].copy()
    first = np.flatnonzero(expected == 0)
    expected[: first[0] if len(first) else length] = np.arange(first[0] if len(first) else length)
    found = dataset.positions(np.array([start, 0]), length)
    assert found.dtype == np.int32
    assert found[0].tolist() == expected.tolist()
    lengths = np.diff(cu_seqlens(found))
    assert lengths.sum() == 2 * length
    assert np.array_equal(np.concatenate([np.arange(n) for n in lengths]), found.reshape(-1))


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    folder = write_dataset(tmp_path / "d", [some_documents(5, most=60)])
    path = folder / "train-00000.tokens"
    for offset in range(path.stat().st_size):
        flip(path, offset, offset % 8)
        with pytest.raises(BadShard, match=str(path)) as caught:
            TokenDataset(folder, verify="open")
        first, count = caught.value.place or (0, 1 << 60)
        assert first <= offset < first + count
        flip(path, offset, offset % 8)
    assert TokenDataset(folder, verify="open").damage() == []


def test_a_flipped_bit_in_the_index(tmp_path):
    folder = write_dataset(tmp_path / "d", [some_documents(5)])
    for offset in range((folder / INDEX).stat().st_size):
        flip(folder / INDEX, offset, offset % 7)
        with pytest.raises(DataError, match=INDEX):
            TokenDataset(folder)
        flip(folder / INDEX, offset, offset % 7)


def page_of_zeros(path):
    with open(path, "r+b") as file:
        file.seek(8192)
        file.write(bytes(4096))


def swap(path):
    other = path.with_name("train-00001.tokens")
    path.rename(path.with_name("x"))
    other.rename(path)
    path.with_name("x").rename(other)


DAMAGE = {
    "missing": (lambda p: p.unlink(), "cannot be read: No such file"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "one byte": (lambda p: os.truncate(p, 1), "not a token file|is cut off"),
    "header only": (lambda p: os.truncate(p, LAYOUT.size), "it is cut off"),
    "half": (lambda p: os.truncate(p, p.stat().st_size // 2), "it is cut off"),
    "one byte less": (lambda p: os.truncate(p, p.stat().st_size - 1), "should have .* it is cut off"),
    "one byte more": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "longer than it was written"),
    "text": (lambda p: p.write_text("some words\n" * 20), "does not begin with FTTOKENS"),
    "directory": (lambda p: (p.unlink(), p.mkdir()), "Is a directory"),
    "swapped": (swap, "another file than the one that dataset.json lists"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files(tmp_path, kind):
    """Row 23 of the faults: at construction, naming the file; or skipped, and the stream keeps its length."""
    folder = large(tmp_path / "d", 3)
    length = len(TokenDataset(folder))
    path = folder / "train-00000.tokens"
    do, message = DAMAGE[kind]
    do(path)
    with pytest.raises(BadShard, match=message) as caught:
        TokenDataset(folder)
    assert caught.value.path == path
    dataset = TokenDataset(folder, on_bad="skip")
    assert len(dataset) == length
    assert [error.path for error in dataset.bad][:1] == [path]
    assert len(dataset.bad) == (2 if kind == "swapped" else 1)
    given = dataset.windows(1000).fetch(np.arange(300))
    assert 0.2 < given["replaced"].mean() < 0.8


def test_lost_page_is_found_when_it_is_touched(tmp_path):
    folder = large(tmp_path / "d")
    page_of_zeros(folder / "train-00001.tokens")
    dataset = TokenDataset(folder)
    first = int(dataset._offsets[1])
    dataset.gather(np.array([0, first - 100, first + CHUNK]), 100)
    for _ in range(2):
        with pytest.raises(BadShard, match=r"train-00001\.tokens, bytes 128 to 131199: the checksum is wrong"):
            dataset.gather(np.array([first + 5]), 100)
    assert dataset.sound(0, first)
    assert not dataset.sound(first - 5, 10)
    damage = dataset.damage()
    assert [error.place for error in damage] == [(LAYOUT.size, CHUNK)]
    with pytest.raises(BadShard, match="checksum is wrong"):
        TokenDataset(folder, verify="open")
    assert TokenDataset(folder, verify="never").gather(np.array([first + 8192]), 9)[0, 0] == 0


def test_damaged_samples_are_replaced_alike_on_every_rank_and_worker(tmp_path, capsys):
    folder = large(tmp_path / "d")
    page_of_zeros(folder / "train-00001.tokens")

    def batches(rank, world, **way):
        source = TokenDataset(folder, on_bad="skip").windows(900)
        with Loader(source, 12, seed=4, rank=rank, world=world, **way) as loader:
            return torch.stack([next(loader)["tokens"] for _ in range(6)]), loader.replaced

    whole, replaced = batches(0, 1, workers=0)
    assert 3 < replaced < 40
    for world, way in ((3, dict(workers=1)), (2, dict(workers=1, processes=True))):
        parts, counts = zip(*(batches(rank, world, **way) for rank in range(world)), strict=True)
        assert torch.equal(torch.cat(parts, 1), whole)
        assert sum(counts) == replaced
    assert "are damaged, and others stand in their place" in capsys.readouterr().err
    sound = TokenDataset(large(tmp_path / "sound")).windows(900, seed=4)
    same = (torch.from_numpy(sound.batch(0, 72)) == whole.reshape(72, -1)).all(1)
    assert int(same.sum()) == 72 - replaced, "sound samples are those of an undamaged data set"


def test_too_little_is_sound(tmp_path):
    folder = large(tmp_path / "d", 1)
    for chunk in range(3):
        flip(folder / "train-00000.tokens", 5000 + chunk * CHUNK if chunk < 2 else 2 * CHUNK + 500)
    with pytest.raises(DataError, match="sample 0 is damaged, and so are 1000 others"):
        TokenDataset(folder, on_bad="skip").windows(100).fetch(np.arange(3))
    (folder / "train-00000.tokens").unlink()
    with pytest.raises(BadShard, match="No such file"):
        TokenDataset(folder, on_bad="skip")


def test_damaged_ends_of_documents(tmp_path):
    folder = write_dataset(tmp_path / "d", [some_documents(99), [np.arange(250)] * 800])
    path = folder / "train-00001.tokens"
    flip(path, Shard(path).header.ends_at + 100)
    with pytest.raises(BadShard, match="checksum"):
        TokenDataset(folder).windows(50, positions=True).fetch(np.arange(200))
    given = TokenDataset(folder, on_bad="skip").windows(50, positions=True).fetch(np.arange(200))
    assert given["replaced"].sum() > 10
    alone = TokenDataset(folder / "train-00000.tokens")
    first = np.stack([alone.gather(np.array([s]), 3)[0] for s in range(len(alone) - 3)])
    assert all((first == row[:3]).all(1).any() for row in given["tokens"]), "all from the undamaged file"


def test_cut_off_after_it_was_opened(tmp_path):
    folder = large(tmp_path / "d", 1)
    dataset = TokenDataset(folder)
    os.truncate(folder / "train-00000.tokens", CHUNK)
    with pytest.raises(BadShard, match="cut off after it was opened"):
        dataset.gather(np.array([2 * CHUNK]), 10)


def rewritten(path, **changes):
    """A file whose header says something else, with the right checksum."""
    header = dataclasses.replace(Header.read(path), **changes).pack()
    path.write_bytes(header + path.read_bytes()[len(header):])
    return path


def test_token_out_of_range(tmp_path):
    path = rewritten(write_shard(tmp_path / "a", [np.arange(90), [93, 99, 4]]), vocabulary=99)
    with pytest.raises(BadShard, match="a, bytes 219 to 219: token 91 is 99, out of range for a vocabulary of 99"):
        TokenDataset(path).gather(np.array([0]), 3)


def test_a_vocabulary_that_is_too_small(tmp_path):
    path = write_shard(tmp_path / "a", [np.arange(90)], vocabulary=100)
    assert TokenDataset(path, vocabulary=100).vocabulary == 100
    with pytest.raises(WrongTokenizer, match=r"vocabulary of 99 cannot read .*go up to 99.*at least 100"):
        TokenDataset(path, vocabulary=99)


def test_tokenizers_that_do_not_match(tmp_path):
    folder = write_dataset(tmp_path / "d", [[np.arange(90)], [np.arange(9)]])
    assert TokenDataset(folder, tokenizer=TOKENIZER.hex()).tokenizer == TOKENIZER.hex()
    with pytest.raises(WrongTokenizer, match=f"{TOKENIZER.hex()}, not with {bytes(16).hex()}"):
        TokenDataset(folder, tokenizer=bytes(16).hex())
    parts = [dataclasses.asdict(Part.of(path, Header.read(path))) for path in (
        folder / "train-00000.tokens", rewritten(folder / "train-00001.tokens", tokenizer=bytes(16)))]
    index = {"format": FORMAT, "splits": {"train": {"shards": parts}}}
    (folder / INDEX).write_text(json.dumps({**index, "xxh3": checksum(index)}))
    with pytest.raises(WrongTokenizer, match="made with 2 different tokenizers"):
        TokenDataset(folder)


@pytest.mark.parametrize("arguments, message", [
    (dict(on_bad="ignore"), "on_bad='ignore'"),
    (dict(verify="always"), "verify='always'"),
    (dict(on_bad="skip", verify="never"), "use verify='touch'"),
    (dict(split="test"), "split='test': .* has train"),
])
def test_options_that_cannot_work(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        TokenDataset(write_dataset(tmp_path / "d", [some_documents()]), **arguments)


def test_no_tokens(tmp_path):
    with pytest.raises(DataError, match="has no tokens"):
        TokenDataset(write_shard(tmp_path / "a", [[], []]))
    with pytest.raises(DataError, match="no token files"):
        TokenDataset(write_dataset(tmp_path / "d", []))
    (tmp_path / "e").mkdir()
    with pytest.raises(DataError, match=r"e/dataset\.json cannot be read: No such file"):
        TokenDataset(tmp_path / "e")


def test_another_version_names_itself(tmp_path):
    path = write_shard(tmp_path / "a", [np.arange(90)])
    header = bytearray(path.read_bytes()[: LAYOUT.size - 8])
    header[8] = 9
    path.write_bytes(header + xxhash.xxh3_64_intdigest(header).to_bytes(8, "little") + path.read_bytes()[LAYOUT.size:])
    with pytest.raises(BadShard, match="is of version 9 of the format, and this package reads version 1"):
        TokenDataset(path)


def test_a_copy_elsewhere_is_the_same_data(tmp_path):
    folder = large(tmp_path / "d")
    shutil.copytree(folder, tmp_path / "copy")
    a, b = (TokenDataset(tmp_path / name).windows(50).fingerprint() for name in ("d", "copy"))
    assert a == b
    assert TokenDataset(large(tmp_path / "less", 1)).windows(50).fingerprint() != a
