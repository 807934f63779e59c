"""The log of a run that is killed and goes on."""

import json
import math

import numpy as np
import pytest
import torch

from fasttrain.train.config import BadInput
from fasttrain.train.journal import Journal, in_use, records


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


def test_values_of_all_kinds(tmp_path):
    path = tmp_path / "ünï ☃"
    write(path, step(1, a=np.float32(0.5), b=torch.tensor(2), c=[1, (math.nan, None)],
                     d={"e": [torch.tensor(math.inf)]}))
    (record,) = records(path)
    assert record == step(1, a=0.5, b=2, c=[1, ["nan", None]], d={"e": ["inf"]})
    journal = Journal(path)
    with pytest.raises(TypeError, match=r"a record holds tensor\(\[1\., 1\.\]\), a Tensor: give numbers"):
        journal.write(step(2, loss=torch.ones(2)))
    journal.write(step(2))
    journal.close()
    assert records(path)[1:] == [step(2)]


def test_a_second_writer_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "log"
    assert not in_use(path)
    journal = Journal(path)
    journal.write(step(1))
    with open(path, "ab") as file:
        file.write(b'{"event": "tr')  # under way
    before = path.read_bytes()
    assert in_use(path)
    with pytest.raises(BadInput, match="is being written by another process"):
        Journal(path)
    assert path.read_bytes() == before
    journal.close()
    assert not in_use(path)
    write(path, step(2))
    assert records(path) == [step(1), step(2)]
