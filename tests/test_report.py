"""What a run leaves: the summary's numbers, the picture, and runs that are not."""

import json
import lzma
import zlib

import numpy as np
import pytest

from fasttrain.train import report
from fasttrain.train.config import BadInput, TrainConfig
from fasttrain.train.journal import Journal


def make_run(directory, *, optimizer="AdamW", losses=(3.0, 2.0), steps=20, sha="s", final=2.5, **options):
    directory.mkdir(parents=True)
    config = TrainConfig(optimizer=optimizer, steps=steps, batch=8, sequence=100, **options).as_json()
    text = dict(train_bytes=8000, train_files=3, held_out_bytes=900, held_out_files=1, sha256=sha)
    (directory / "config.json").write_text(json.dumps({"config": config, "text": text}))
    shares = dict(data=0.1, forward_backward=0.6, communication=0.2, optimizer=0.1)
    records = [dict(event="validation", step=0, bits_per_byte=8.0, bytes=90)]
    records += [dict(event="train", step=10 * i, loss=loss, lr=0.1, tokens_per_s=1000.0 * i, seconds=8.0 * i,
                     share=shares) for i, loss in enumerate(losses, 1)]
    records.append(dict(event="wire", step=steps, bytes=10_000.0, formula=9_000.0, exposed_s=0.005))
    if final is not None:
        records.append(dict(event="validation", step=steps, bits_per_byte=final, bytes=900))
    (directory / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory


def test_baselines():
    stream = np.frombuffer(b"the quick brown fox " * 100, dtype=np.uint8)
    bits = report.baselines(stream)
    data = stream.tobytes()
    assert len(zlib.decompress(zlib.compress(data, 9))) * bits["zlib -9"] / 8 == len(zlib.compress(data, 9))
    assert bits["xz -9e"] == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / 2000
    by_hand = -sum(data.count(c) / 2000 * np.log2(data.count(c) / 2000) for c in set(data))
    assert bits["order0"] == pytest.approx(by_hand)
    assert report.baselines(np.arange(256, dtype=np.uint8))["order0"] == 8


def test_summary(tmp_path):
    run = report.read(make_run(tmp_path / "run"))
    stream = np.frombuffer(b"ab" * 450, dtype=np.uint8)
    summary = report.summarise(run, stream, wall_s=12.0)
    assert summary["tokens"] == 16000
    assert summary["passes_over_text"] == 2.0
    assert summary["tokens_per_s"] == 1500
    assert summary["validation_bits_per_byte"] == 2.5
    assert summary["train_loss"] == 2.0
    assert summary["share"]["forward_backward"] == pytest.approx(0.6)
    said = report.describe(summary, run.header)
    assert "this model, AdamW           2.500" in said
    assert "order-0 entropy             1.000" in said
    assert "forward-backward 60.0%" in said
    assert summary["wire"] == dict(bytes=10_000, formula=9_000, exposed_s=0.005)
    assert "communication of a process: 10,000 bytes a step, 9,000 by the formula; exposed: 5.0 ms" in said


def test_picture(tmp_path):
    runs = [report.read(make_run(tmp_path / name)) for name in "ab"]
    report.draw(runs[:1], tmp_path / "one.png")
    report.draw(runs, tmp_path / "two.png")
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one.startswith(b"\x89PNG")
    assert one != two


def test_an_unfinished_run_is_readable_and_says_so(tmp_path):
    run = report.read(make_run(tmp_path / "run", final=None))
    assert run.final is None
    assert len(run.train) == 2


def test_a_run_goes_on_with_its_own_options(tmp_path):
    directory = make_run(tmp_path / "run")
    header = json.loads((directory / "config.json").read_text())
    report.check_same(directory, header)
    header["config"]["processes"] = 7
    report.check_same(directory, header)
    divided = {"tensor": 2, "pipeline": 2, "expert": 2, "context": 2, "zero": 3, "copies": 2, "accumulate": 4,
               "stages": 2, "sequence_parallel": True, "pipeline_schedule": "zbv", "recompute": "full"}
    report.check_same(directory, {**header, "config": {**header["config"], **divided}})
    with pytest.raises(BadInput, match=r"holds a run with --experts 0, not 4"):
        report.check_same(directory, {**header, "config": {**header["config"], "experts": 4}})
    with pytest.raises(BadInput, match=r"holds a run with --lr None, not 0\.1"):
        report.check_same(directory, {**header, "config": {**header["config"], "lr": 0.1}})
    with pytest.raises(BadInput, match="another text"):
        report.check_same(directory, {**header, "text": {**header["text"], "sha256": "t"}})


def test_a_command_that_was_killed_at_its_beginning_can_be_given_again(tmp_path):
    header = json.loads((make_run(tmp_path / "other") / "config.json").read_text())
    config = TrainConfig(out=tmp_path / "run", resume="auto")
    for left in ((), (".config.json",)):
        (tmp_path / "run").mkdir(exist_ok=True)
        for name in left:
            (tmp_path / "run" / name).write_text("{")
        assert report.begin(config, header) == tmp_path / "run"
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
        (tmp_path / "run" / "config.json").unlink()


def test_a_run_that_still_goes_on_or_cannot_be_read_is_not_gone_on_with(tmp_path, monkeypatch):
    directory = make_run(tmp_path / "run")
    content = (directory / "config.json").read_bytes()
    header = json.loads(content)
    config = TrainConfig(out=directory, resume="auto")
    monkeypatch.setattr(report, "ENDING_S", 0.2)
    journal = Journal(directory / "log.jsonl")
    with pytest.raises(BadInput, match="its run is still going on; end it first"):
        report.begin(config, header)
    journal.close()
    assert report.begin(config, header) == directory
    for spoilt in (b"", b"[]", b'{"config": {}}', b"\xff"):
        (directory / "config.json").write_bytes(spoilt)
        with pytest.raises(BadInput, match=r"config\.json is not what fasttrain train has written"):
            report.begin(config, header)
    (directory / "config.json").write_bytes(content)
    (directory / ".config.json").mkdir()
    with pytest.raises(BadInput, match="cannot be written: Is a directory"):
        report.begin(config, header)
    assert json.loads((directory / "config.json").read_text()) == header


@pytest.mark.parametrize("spoil, message", [
    (lambda d: (d / "config.json").unlink(), "config.json: No such file"),
    (lambda d: (d / "log.jsonl").unlink(), "log.jsonl: No such file"),
    (lambda d: (d / "config.json").write_text("{"), "not a run of fasttrain train: JSONDecodeError"),
    (lambda d: (d / "config.json").write_text("{}"), "not a run of fasttrain train: KeyError"),
    (lambda d: (d / "log.jsonl").write_text(""), "ended before its first line"),
])
def test_what_is_no_run_is_refused(tmp_path, spoil, message):
    directory = make_run(tmp_path / "run")
    spoil(directory)
    with pytest.raises(BadInput, match=message):
        report.read(directory)
