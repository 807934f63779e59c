"""The log of a run that is killed and goes on."""

import json
import math

import pytest

from fasttrain.train.journal import Journal, records


def write(path, *given):
    journal = Journal(path)
    for record in given:
        journal.write(record)
    journal.close()


def step(n, **more):
    return {"event": "train", "step": n, **more}


def test_every_cut_of_the_file_is_read_and_continued(tmp_path):
    write(tmp_path / "whole", *(step(n) for n in (1, 2, 3)))
    whole = (tmp_path / "whole").read_bytes()
    for cut in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        assert records(path) == [step(n + 1) for n in range(lines)]
        write(path, {"event": "resume", "step": 1}, step(2, again=True))
        kept = [step(1)] if lines else []
        assert records(path) == [*kept, {"event": "resume", "step": 1}, step(2, again=True)]
        path.unlink()


def test_a_run_that_began_again_keeps_only_that_it_did(tmp_path):
    write(tmp_path / "log", step(1), {"event": "restart", "step": 0, "number": 1},
          {"event": "begin", "step": 0, "text": ""}, step(1, again=True), step(2),
          {"event": "restart", "step": 0, "number": 2}, {"event": "resume", "step": 1, "text": ""}, step(2, again=True))
    assert [(r["event"], r["step"], "again" in r) for r in records(tmp_path / "log")] == [
        ("restart", 0, False), ("begin", 0, False), ("train", 1, True), ("restart", 0, False), ("resume", 1, False),
        ("train", 2, True)]


def test_numbers_that_json_has_not(tmp_path):
    write(tmp_path / "log", step(1, loss=math.nan, share={"data": math.inf}), step(2, loss=-math.inf))
    for text in (tmp_path / "log").read_text().splitlines():
        json.loads(text, parse_constant=pytest.fail)
    first, second = records(tmp_path / "log")
    assert math.isnan(first["loss"])
    assert first["share"]["data"] == math.inf
    assert second["loss"] == -math.inf


def test_a_line_that_is_no_record_is_an_error(tmp_path):
    (tmp_path / "log").write_text('{"event": "train", "step": 1}\nnothing\n')
    with pytest.raises(json.JSONDecodeError):
        records(tmp_path / "log")
