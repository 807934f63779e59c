"""The main job on token files: it learns, bytes give the numbers of text, and what cannot work is refused at once."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from test_loop import TINY, losses, make_text, run
from test_resume import part
from test_resume import run as resumed
from tokens import TOKENIZER, write_shard

from fasttrain import cli
from fasttrain.checkpoint.find import complete
from fasttrain.data.dataset import FORMAT, INDEX, Part, checksum
from fasttrain.data.encoders import Bytes
from fasttrain.data.errors import BadShard
from fasttrain.data.shard import Header
from fasttrain.train import compare, page, rank, report, source, tokens
from fasttrain.train.config import BadInput
from fasttrain.train.journal import records
from fasttrain.train.meeting import meet
from fasttrain.train.validation import held_out_nats, validation

VOCABULARY = 300


def write_splits(folder, splits, **options):
    """A directory as `fasttrain tokenize` leaves it: {split: shards, each a list of documents}."""
    folder.mkdir(parents=True)
    index = {"format": FORMAT, "splits": {}}
    for split, shards in splits.items():
        paths = [write_shard(folder / f"{split}-{number:05}.tokens", documents, **options)
                 for number, documents in enumerate(shards)]
        index["splits"][split] = {"shards": [dataclasses.asdict(Part.of(p, Header.read(p))) for p in paths]}
    (folder / INDEX).write_text(json.dumps({**index, "xxh3": checksum(index)}))
    return folder


def chain(length, seed):
    """Tokens each of which is one of two that the last one allows."""
    made, numbers = [1], np.random.default_rng(seed).integers(0, 2, length)
    for choice in numbers[1:]:
        made.append((made[-1] * 7 + 3 + int(choice)) % VOCABULARY)
    return np.array(made)


def write_chain(folder, seed=0, held_out=500):
    shards = {"train": [[chain(6000, seed)], [chain(3000, seed + 1)]], "validation": [[chain(held_out, seed + 2)]]}
    return write_splits(folder, shards, vocabulary=VOCABULARY)


def train_on(wire, config, *model):
    return run(wire, config, source.load(config), *model)


def config_on(folder, **options):
    return dataclasses.replace(TINY, tokens=folder, lr=3e-2, steps=24, **options)


@functools.cache
def trained(folder):
    """Records of two ranks; one run serves several tests."""
    return ranks.run(train_on, 2, config_on(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chain(tmp_path_factory.mktemp("data") / "tokens")


def test_it_learns_and_counts_in_tokens(folder):
    (records, weights), (others, _) = trained(folder)
    looks = [r for r in records if r["event"] == "validation"]
    assert looks[0]["bits_per_token"] == pytest.approx(math.log2(VOCABULARY), abs=1e-4)
    assert looks[-1]["bits_per_token"] < looks[0]["bits_per_token"] - 2
    assert looks[-1]["tokens"] == 500
    assert not any("bits_per_byte" in r for r in records)
    assert losses(records) == losses(others)
    assert {tuple(w.shape) for w in weights} >= {(VOCABULARY, TINY.width)}


def test_bytes_as_tokens_give_the_numbers_of_text_to_the_bit(tmp_path):
    text = make_text()
    splits = {"train": [[text.train[:7000]], [text.train[7000:]]], "validation": [[text.held_out]]}
    written = write_splits(tmp_path / "bytes", splits, tokenizer=Bytes.fingerprint)
    config = dataclasses.replace(TINY, optimizer="AdamW", steps=6)
    (plain, weights), = ranks.run(run, 1, config, None, 4)
    (records, others), = ranks.run(train_on, 1, dataclasses.replace(config, tokens=written), 4)
    assert losses(records) == losses(plain)
    looks, expected = ([(r["bits_per_byte"], r["bytes"]) for r in rows if r["event"] == "validation"]
                       for rows in (records, plain))
    assert looks == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


class Bigram(torch.nn.Module):
    """Logits that depend on the last token alone."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, x):
        return self.table(x)


def bigram_nats(wire, folder):
    torch.manual_seed(0)
    model, stream = Bigram(), tokens.load(folder, TINY.sequence).held_out
    smoothed = dataclasses.replace(TINY, label_smoothing=0.3, z_loss=0.1)  # which validation does not look at
    quick = validation(model, stream, TINY, wire, 3, "token", VOCABULARY)
    nats = {held_out_nats(model, stream, config, wire, None, VOCABULARY) for config in (TINY, smoothed)}
    log_p = model(torch.from_numpy(stream.gather(np.array([0]), len(stream)).astype(np.int64)))[0].log_softmax(-1)
    later = torch.from_numpy(stream.gather(np.array([1]), len(stream) - 1)[0].astype(np.int64))
    return nats, -log_p[:-1].gather(1, later[:, None]).double().sum().item() + math.log(VOCABULARY), quick


def test_validation_counts_every_token_once(folder):
    for found, expected, quick in ranks.run(bigram_nats, 2, folder):
        (nats, count), = found
        assert count == 500
        assert nats == pytest.approx(expected, rel=1e-6)
        assert quick["bits_per_token"] == pytest.approx(expected / 500 / math.log(2), rel=0.2)
        assert quick["tokens"] < 100


def test_opening_reads_no_tokens(folder):
    opened = tokens.load(folder, TINY.sequence)
    assert not any(shard._sound.any() for part in (opened.train, opened.held_out) for shard in part.shards)
    assert (opened.unit, opened.vocabulary, len(opened.train)) == ("token", VOCABULARY, 9000)


def test_smoothing_and_z_loss_are_of_training_alone():
    """A uniform guess has a cross-entropy of log 256 and a z-loss of 0.1 log(256)^2."""
    (plain, _), = ranks.run(run, 1, TINY)
    (records, _), = ranks.run(run, 1, dataclasses.replace(TINY, steps=4, log_every=1, z_loss=0.1))
    looks = [[r["bits_per_byte"] for r in rows if r["event"] == "validation"] for rows in (plain, records)]
    assert looks[0][0] == looks[1][0]
    assert losses(records)[0] == pytest.approx(math.log(256) + 0.1 * math.log(256) ** 2, rel=1e-5)
    (smoothed, _), (others, _) = ranks.run(run, 2, dataclasses.replace(TINY, label_smoothing=0.2))
    assert losses(smoothed) == losses(others)
    assert losses(smoothed)[-1] > losses(plain)[-1] + 0.2
    assert [r["bits_per_byte"] for r in smoothed if r["event"] == "validation"][-1] < 7


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16", "accumulate": 2},
                                     {"precision": "bf16-pure", "zero": 3}, {"zero": 2, "wire": "bf16"}], ids=str)
def test_smoothing_in_other_precisions(options):
    config = dataclasses.replace(TINY, optimizer="AdamW", label_smoothing=0.1, z_loss=1e-2)
    (plain, _), = ranks.run(run, 1, config)
    records, _ = ranks.run(run, 2, dataclasses.replace(config, **options))[0]
    assert losses(records) == pytest.approx(losses(plain), rel=3e-2)


def test_a_run_that_was_stopped_ends_in_the_same_bits(folder, tmp_path):
    config = config_on(folder, optimizer="AdamW", rows=64, save_every=4, log_every=2)
    weights, log = resumed(tmp_path / "whole", config, size=1)
    others, again = resumed(tmp_path / "stopped", config, stops=(7,), size=1)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert losses(again) == losses(log)


def test_guards_and_checkpoints_look_at_bits_per_token(folder, tmp_path):
    """A rate that is far too high makes it worse soon."""
    config = config_on(folder, patience=2, save_every=1, keep=1, validate_every=1, warmup=6)
    (reason, _), = ranks.run(part, 1, tmp_path, dataclasses.replace(config, lr=1.0))
    assert "no better" in reason
    bits = {r["step"]: r["bits_per_token"] for r in records(tmp_path / "log.jsonl")[1:] if r["event"] == "validation"}
    best, newest = min(bits, key=bits.__getitem__), max(bits)
    assert best == newest - 3
    assert {one.step for one in complete(tmp_path / "checkpoints")} == {best, newest}


def finished(config, records, out):
    """The directory of a run with these records."""
    read = source.load(config)
    directory = report.begin(dataclasses.replace(config, out=out), report.header(config, read))
    (directory / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory, report.conclude(directory, read.held_out, wall_s=1.0)


def test_reports_are_per_token(folder, tmp_path):
    config = config_on(folder)
    directory, said = finished(config, trained(folder)[0][0], tmp_path / "one")
    assert "bits per token of 1 held-out documents (500 tokens); trained on 2 others (9,000 tokens):" in said
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["validation_bits_per_token"] == trained(folder)[0][0][-2]["bits_per_token"]
    assert not any("byte" in name for name in summary)
    assert "zlib" not in said
    other, _ = finished(config, trained(folder)[0][0], tmp_path / "two")
    assert "validation bits/token" in compare.compare(directory, other)
    html = page.page([report.read(directory)])
    assert "Loss in bits per token" in html
    assert f"{summary['validation_bits_per_token']:.4f}" in html


def test_runs_in_bytes_and_in_tokens_beside_each_other(folder, tmp_path):
    ours, _ = finished(config_on(folder), trained(folder)[0][0], tmp_path / "tokens")
    (tmp_path / "words").write_text("some words " * 200)
    text = dataclasses.replace(TINY, text=tmp_path / "words", steps=24)
    renamed = [{{"bits_per_token": "bits_per_byte", "tokens": "bytes"}.get(k, k): v for k, v in r.items()}
               for r in trained(folder)[0][0]]
    bytes_, said = finished(text, renamed, tmp_path / "bytes")
    assert "zlib -9" in said
    said = compare.compare(ours, bytes_)
    assert "validation bits/byte or token" in said
    assert "different texts" in said
    assert "Loss in bits per byte or token" in page.page([report.read(ours), report.read(bytes_)])


def test_a_run_goes_on_with_its_own_tokens_wherever_they_lie(folder, tmp_path):
    config = config_on(folder, out=tmp_path / "run", resume="auto")
    assert report.begin(config, report.header(config, source.load(config))) == tmp_path / "run"
    moved = dataclasses.replace(config, tokens=write_chain(tmp_path / "moved"))
    assert report.begin(moved, report.header(moved, source.load(moved))) == tmp_path / "run"
    other = dataclasses.replace(config, tokens=write_chain(tmp_path / "other", seed=7))
    with pytest.raises(BadInput, match="another text"):
        report.begin(other, report.header(other, source.load(other)))


def meets(wire, place, seeds):
    """What a rank brings home whose tokens lie in a place of its own."""
    written = write_chain(place / f"tokens{wire.rank}", seeds[wire.rank])
    try:
        read, _ = meet(config_on(written, out=place / "out"), wire)
    except BadInput as error:
        return str(error)
    return read.sha256


def test_ranks_that_torchrun_started_compare_their_tokens(tmp_path):
    first, second = ranks.run(meets, 2, tmp_path / "alike", (0, 0))
    assert first == second
    assert len(first) == 64
    first, second = ranks.run(meets, 2, tmp_path / "unlike", (0, 5))
    assert first == second
    assert "not started alike: the text is 9,500 tokens in 3 documents, sha256 " in first


def spoil(path, place, value=None):
    content = bytearray(path.read_bytes())
    if value is None:
        del content[place:]
    else:
        content[place] ^= value
    path.write_bytes(content)


REFUSED = [
    ("--tokens nowhere", "--tokens nowhere: does not exist; give the directory"),
    ("--tokens tokens/train-00000.tokens", "is a file; give the directory"),
    ("--tokens words", "dataset.json cannot be read: No such file"),
    ("--tokens tokens --text words", "--text words with --tokens tokens: a run reads text or tokens"),
    ("--tokens tokens --held-out 0.1", "what is held out was chosen when the tokens were made"),
    ("--tokens tokens --sequence 500", "--sequence 500 is too long for tokens: there are 500 tokens held out, and must "
                                       "be at least 501"),
    ("--tokens tokens --sequence 5000", "there are 9000 tokens to train on, and must be at least 10001"),
    ("--tokens unsplit", "no tokens are held out for validation"),
    ("--tokens bare", "bare (validation) has no tokens"),
    ("--tokens mixed", "was made with the tokenizer"),
    ("--tokens header", "the header is damaged"),
    ("--tokens short", "it is cut off; restore it"),
    ("--tokens lost", "cannot be read: No such file"),
    ("--label-smoothing 1", "--label-smoothing 1.0: must be a share"),
    ("--label-smoothing nan", "--label-smoothing nan: must be a share"),
    ("--z-loss -1", "--z-loss -1.0: must be finite and not negative"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    (place / "words").mkdir()
    for name in ("tokens", "header", "short", "lost"):
        write_chain(place / name)
    write_splits(place / "unsplit", {"train": [[chain(500, 0)]]}, vocabulary=VOCABULARY)
    write_splits(place / "bare", {"train": [[chain(500, 0)]], "validation": [[[]]]}, vocabulary=VOCABULARY)
    write_splits(place / "mixed", {"train": [[chain(500, 0)]], "validation": [[chain(500, 0)]]}, vocabulary=VOCABULARY)
    os.replace(place / "mixed" / "validation-00000.tokens", place / "mixed" / "spare")
    other = write_shard(place / "mixed" / "validation-00000.tokens", [chain(500, 0)], vocabulary=VOCABULARY,
                        tokenizer=TOKENIZER[::-1])
    index = json.loads((place / "mixed" / INDEX).read_text())
    del index["xxh3"]
    index["splits"]["validation"]["shards"] = [dataclasses.asdict(Part.of(other, Header.read(other)))]
    (place / "mixed" / INDEX).write_text(json.dumps({**index, "xxh3": checksum(index)}))
    spoil(place / "header" / "train-00001.tokens", 40, value=1)
    spoil(place / "short" / "validation-00000.tokens", 700)
    (place / "lost" / "train-00000.tokens").unlink()
    return place


@pytest.mark.parametrize("arguments, message", REFUSED)
def test_what_cannot_work_is_one_line_and_writes_nothing(place, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert cli.main(["train", *arguments.split()]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert message in said.err
    assert sorted(place.rglob("*")) == before


def test_damage_that_a_rank_finds_is_one_line(tmp_path, monkeypatch, capsys):
    """A chunk of tokens is checked when it is first read."""
    written = write_chain(tmp_path / "tokens")
    spoil(written / "train-00001.tokens", 2000, value=1)
    opened = tokens.load(written, TINY.sequence)
    ended = []
    monkeypatch.setattr(rank, "end_process", ended.append)
    with rank.told(3):
        opened.train.gather(np.arange(8500, 8510), 33)
    assert ended == [rank.BAD_INPUT]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"fasttrain: rank 3: {written / 'train-00001.tokens'}, bytes 128 to ")
    with pytest.raises(BadShard, match="the checksum is wrong"):
        opened.train.gather(np.arange(8500, 8510), 33)


@pytest.mark.slow
def test_by_the_command(tmp_path):
    """Two true processes, on what the command makes of text with a tokenizer, smoothed."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    (tmp_path / "words").mkdir()
    for i in range(20):
        (tmp_path / "words" / f"{i}.txt").write_text(f"{i} bottles stand on the wall\n" * 40)
    made.train([str(p) for p in (tmp_path / "words").iterdir()],
               tokenizers.trainers.BpeTrainer(vocab_size=80, special_tokens=["[UNK]", "</s>"]))
    made.save(str(tmp_path / "tokenizer.json"))
    assert cli.main(["tokenize", str(tmp_path / "words"), "--out", str(tmp_path / "tokens"), "--held-out", "0.2",
                     "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    ended = subprocess.run(
        [sys.executable, "-m", "fasttrain", "train", "--tokens", "tokens", "--out", "run", "--sequence", "32",
         "--layers", "1", "--width", "16", "--heads", "2", "--batch", "4", "--warmup", "2", "--steps", "8",
         "--log-every", "2", "--label-smoothing", "0.1", "--z-loss", "1e-4"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True,
        check=False)
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["validation_bits_per_token"] < 7
    assert "bits per token of" in ended.stdout
    header = json.loads((tmp_path / "run" / "config.json").read_text())
    assert header["text"]["vocabulary"] == json.loads((tmp_path / "tokens" / INDEX).read_text())["vocabulary"]
