"""`fasttrain tokenize`: the right tokens, in the right files, however often it was killed on the way."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT

from fasttrain import cli
from fasttrain.data import DataError, TokenDataset, WorkerDied, WrongTokenizer, progress, tokenize
from fasttrain.data import make as making
from fasttrain.data.dataset import INDEX
from fasttrain.data.encoders import PIECE, pieces_of
from fasttrain.data.plan import PLAN
from fasttrain.data.processes import Worker


def texts(root, count=30):
    numbers = np.random.default_rng(0)
    for i in range(count):
        path = root / f"d{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the text {i} — ä\n" * int(numbers.integers(1, 40)))
    return root


def documents(path, split):
    dataset = TokenDataset(path, split, verify="open")
    stream = dataset.gather(np.array([0]), len(dataset))[0]
    ends = [end + int(offset) for shard, offset in zip(dataset.shards, dataset._offsets, strict=False)
            for end in shard.ends().tolist()]
    return [stream[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def word_tokenizer(path, words=("[UNK]", "the", "text", "<|endoftext|>"), **options):
    """A tokenizer of whole words, with settings that would spoil tokens if they were heeded."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(7)
    made.enable_padding(length=50)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[UNK] $A", special_tokens=[("[UNK]", 0)])
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    texts(root / "in")
    return root / "in", tokenize([root / "in"], root / "out", held_out=0.2), root / "out"


def test_every_byte_of_every_file_once(made):
    source, index, out = made
    train, validation = documents(out, "train"), documents(out, "validation")
    found = sorted(bytes(document) for document in [*train, *validation])
    assert found == sorted(path.read_bytes() + b"\0" for path in source.rglob("*.txt"))
    assert 1 <= len(validation) <= 12
    assert index["splits"]["train"]["documents"] == len(train)
    assert sorted(contents(out)) == [INDEX, "train-00000.tokens", "validation-00000.tokens"]


def test_a_second_time_is_quick_and_changes_nothing(made, monkeypatch):
    source, index, out = made
    before = contents(out)
    monkeypatch.setattr(making, "_run", pytest.fail)
    assert tokenize([source], out, held_out=0.2) == index
    assert contents(out) == before


@pytest.mark.parametrize("options, error, message", [
    (dict(held_out=0.1), DataError, "held_out 0.2 instead of 0.1"),
    (dict(shard_mb=1), DataError, "shard_bytes 67108864 instead of 1048576"),
    (dict(split_by="content"), DataError, "split_by path instead of content"),
])
def test_other_options_are_refused(made, options, error, message):
    source, _, out = made
    before = contents(out)
    with pytest.raises(error, match=message):
        tokenize([source], out, **{"held_out": 0.2, **options})
    assert contents(out) == before


def test_another_tokenizer_is_refused(made, tmp_path):
    source, _, out = made
    file = word_tokenizer(tmp_path / "words.json")
    with pytest.raises(WrongTokenizer, match=r"has tokens of the tokenizer bytes [0-9a-f]{32}, not of words\.json"):
        tokenize([source], out, file, held_out=0.2)


def test_a_tokenizer_from_a_file(tmp_path):
    source = texts(tmp_path / "in")
    (tmp_path / "in" / "latin.txt").write_bytes("é".encode("latin-1"))
    file = word_tokenizer(tmp_path / "words.json")
    index = tokenize([source], tmp_path / "out", file, held_out=0.2, processes=2)
    assert index["left_out"] == 1
    dataset = TokenDataset(tmp_path / "out")
    assert (dataset.vocabulary, dataset.separator, dataset.dtype) == (4, 3, np.uint8)
    found = sorted(document.tolist() for split in ("train", "validation")
                   for document in documents(tmp_path / "out", split))
    lines = [len(path.read_text().splitlines()) for path in source.rglob("*.txt") if path.name != "latin.txt"]
    assert found == sorted([1, 2, 0, 0, 0] * count + [3] for count in lines)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == file.read_bytes()
    no_end = word_tokenizer(tmp_path / "b.json", words=("[UNK]", "the", "text"))
    tokenize([source], tmp_path / "no-end", no_end, processes=1)
    assert TokenDataset(tmp_path / "no-end").separator is None
    tokenize([source], tmp_path / "other-end", file, end_token="text", processes=1)
    assert TokenDataset(tmp_path / "other-end").separator == 2
    with pytest.raises(DataError, match="has no token 'x' to end documents with"):
        tokenize([source], tmp_path / "x", file, end_token="x")


def test_pieces_are_the_file(tmp_path):
    path = tmp_path / "a"
    whole = "äöü€😀".encode() * 200_000 + b"\n" + b"line\n" * 300_000
    path.write_bytes(whole)
    pieces = list(pieces_of(path, 0, len(whole)))
    assert b"".join(pieces) == whole
    assert len(pieces) > 3
    assert all(len(piece) <= 2 * PIECE for piece in pieces)
    assert "".join(piece.decode() for piece in pieces) == whole.decode()


def test_split_by_content_keeps_equal_documents_together(tmp_path):
    for i in range(40):
        path = tmp_path / "in" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {i % 5}")
    tokenize([tmp_path / "in"], tmp_path / "out", held_out=0.4, split_by="content", processes=1)
    train, validation = ({bytes(d) for d in documents(tmp_path / "out", split)} for split in ("train", "validation"))
    assert not train & validation
    assert len(train) + len(validation) == 5


def test_one_document_is_cut_between_characters(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("é" * 101)
    tokenize([path], tmp_path / "out", held_out=0.25, processes=1)
    train, validation = (documents(tmp_path / "out", split)[0] for split in ("train", "validation"))
    assert bytes(train[:-1]).decode() + bytes(validation[:-1]).decode() == "é" * 101
    assert 25 <= len(bytes(validation).decode()) <= 27
    index = tokenize([path], tmp_path / "all", held_out=0)
    assert list(index["splits"]) == ["train"]


def test_files_are_closed_when_they_are_large_enough(tmp_path):
    for i in range(5):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}").write_bytes(b"x" * 700_000)
    index = tokenize([tmp_path / "in"], tmp_path / "out", held_out=0, shard_mb=1, processes=2)
    assert [part["documents"] for part in index["splits"]["train"]["shards"]] == [2, 2, 1]


def test_what_is_not_text(tmp_path, capsys):
    source = texts(tmp_path / "in", 5)
    (source / "binary").write_bytes(b"ab\0c")
    (source / "empty").write_bytes(b"")
    (source / ".hidden").write_text("no")
    index = tokenize([source], tmp_path / "out", processes=1)
    assert (index["left_out"], index["empty"]) == (1, 1)
    assert f"left out: {source / 'binary'} is not text: it contains a zero byte" in capsys.readouterr().out
    with pytest.raises(DataError, match="binary is not text: it contains a zero byte; leave it out"):
        tokenize([source / "binary", source / "d0"], tmp_path / "named", processes=1)
    with pytest.raises(DataError, match="empty is empty: leave it out"):
        tokenize([source / "empty"], tmp_path / "named2")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "a").write_bytes(bytes(99))
    with pytest.raises(DataError, match="no text to make train of: 1 files that are not text"):
        tokenize([tmp_path / "junk"], tmp_path / "nothing", held_out=0)
    assert list((tmp_path / "nothing").iterdir()) == []


def test_the_output_below_the_input_is_no_input(tmp_path):
    source = texts(tmp_path / "in")
    first = tokenize([source], source / "tokens", processes=1)
    assert tokenize([source], source / "tokens") == first


def test_one_at_a_time(made):
    source, _, out = made
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        with pytest.raises(DataError, match="is in use: another"):
            tokenize([source], out, held_out=0.2)
    finally:
        os.close(folder)


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(DataError, match=r"is not empty, and no tokens were begun there \(it has mine\)"):
        tokenize([texts(tmp_path / "in")], tmp_path / "out")


def test_a_full_disk_is_foreseen_and_named(tmp_path, monkeypatch):
    source = texts(tmp_path / "in")
    monkeypatch.setattr(making.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(DataError, match=r"the tokens need [\d,]+ bytes, and 100 are free"):
        tokenize([source], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_on_the_way(tmp_path, monkeypatch):
    source = texts(tmp_path / "in")
    sync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").count("validation"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device, [\d,]+ bytes are free; make room, and the same"):
        tokenize([source], tmp_path / "out", processes=1)
    assert sorted(contents(tmp_path / "out")) == [PLAN, "train-00000.tokens"]
    monkeypatch.undo()
    tokenize([source], tmp_path / "out", processes=1)
    tokenize([source], tmp_path / "unbroken", processes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_a_directory_that_nobody_may_write(tmp_path, monkeypatch):
    def refused(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(making, "write_durably", refused)
    with pytest.raises(DataError, match="out cannot be written: Permission denied"):
        tokenize([texts(tmp_path / "in")], tmp_path / "out")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.Progress(total=1000, done=100) as shown:
        shown.show(400, "")
        shown.show(500, "left out: a [b] is not text")
    said = capsys.readouterr().out
    assert "left out: a [b] is not text" in said
    if not terminal:
        assert said.startswith("going on: 100 of 1,000 bytes were done\n50% of 1,000 bytes, ")
        assert said.count("\n") == 4


def test_input_that_changed_meanwhile_is_refused(tmp_path, monkeypatch):
    source = texts(tmp_path / "in")
    monkeypatch.setattr(making, "_run", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokenize([source], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PLAN]
    monkeypatch.undo()
    (source / "d0" / "0.txt").write_text("another text")
    with pytest.raises(DataError, match=r"made from other input or options \(input "):
        tokenize([source], tmp_path / "out")


def test_a_killed_worker_is_named_and_the_same_call_goes_on(tmp_path, monkeypatch):
    source = texts(tmp_path / "in")
    ask = Worker.ask

    def killed(self, method, job):
        ask(self, method, job)
        if job.file.startswith("validation"):
            self.process.kill()

    monkeypatch.setattr(Worker, "ask", killed)
    with pytest.raises(WorkerDied, match=r"worker \d of tokenize \(process \d+\) was killed by SIGKILL: out of memory"):
        tokenize([source], tmp_path / "out")
    monkeypatch.undo()
    tokenize([source], tmp_path / "out")
    tokenize([source], tmp_path / "unbroken")
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


KILLED = """
import sys
from fasttrain.data.make import tokenize
tokenize([sys.argv[1]], sys.argv[2], shard_mb=1, processes=2)
"""


def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path):
    """Real processes and SIGKILL; the same command goes on until it is through."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(20):
        (source / f"{i}.txt").write_bytes(bytes([65 + i]) * 600_000)
    tokenize([source], tmp_path / "unbroken", shard_mb=1)
    expected = contents(tmp_path / "unbroken")
    numbers = np.random.default_rng(int(os.environ.get("SEED", "0")))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills = 0
    while not (out / INDEX).exists():
        enough = len(list(out.glob("*.tokens"))) + 1
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(source), str(out)], env=environment,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and len(list(out.glob("*.tokens"))) < enough and kills:
            time.sleep(0.001)
        time.sleep(float(numbers.uniform(0, 0.02 if kills else 0.3)))
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        for path in out.glob("*.tokens"):
            assert path.read_bytes() == expected[path.name], "what is there is complete"
    assert kills >= 3, "too few kills to prove anything"
    tokenize([source], out, shard_mb=1)
    assert contents(out) == expected


def test_verify_names_what_is_damaged(tmp_path, capsys):
    (tmp_path / "words").mkdir()
    for i in range(20):
        (tmp_path / "words" / f"{i}.txt").write_text(f"{i} bottles stand on the wall\n" * 40)
    tokens = tmp_path / "tokens"
    assert cli.main(["tokenize", str(tmp_path / "words"), "--out", str(tokens), "--held-out", "0.2"]) == 0
    capsys.readouterr()
    assert cli.main(["verify", str(tokens)]) == 0
    assert "all bytes are those that were written" in capsys.readouterr().out
    shard = max(tokens.glob("train*"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert cli.main(["verify", str(tokens)]) == 1
    assert f"damaged: {shard}" in capsys.readouterr().out
