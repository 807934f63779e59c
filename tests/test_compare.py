"""Runs side by side."""

import re

import pytest
from test_report import make_run

from fasttrain import cli
from fasttrain.train.compare import compare
from fasttrain.train.config import BadInput


def rows(said):
    cells = [re.split(r"\s{2,}", line) for line in said.splitlines()]
    return {name: values for name, *values in cells}


def test_side_by_side(tmp_path):
    a = make_run(tmp_path / "ours", losses=(3.0, 2.0))
    b = make_run(tmp_path / "stock", optimizer="torch.AdamW", losses=(3.001, 2.0), final=2.6)
    said = compare(a, b)
    table = rows(said)
    assert table[""] == ["ours", "stock"]
    assert table["optimizer"] == ["AdamW", "torch.AdamW"]
    assert table["validation bits/byte"] == ["2.5000", "2.6000"]
    assert table["tokens/s"] == ["1,500", "1,500"]
    assert table["ms per step, comm"] == ["106.67", "106.67"]  # 800 tokens at 1,500 tokens/s, of which 20%
    assert "seed" not in table, "options that are the same are not shown"
    assert "differ by at most 1.00e-03 (at step 10, of 2 common steps)" in said
    assert "note" not in said


def test_equal_curves_and_unequal_texts(tmp_path):
    said = compare(make_run(tmp_path / "a"), make_run(tmp_path / "b", sha="other", final=None))
    assert "training losses are equal at all 2 common steps" in said
    assert "different texts" in said
    assert "unfinished" in said


def test_nothing_in_common(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (b / "log.jsonl").write_text((b / "log.jsonl").read_text().replace('"step": 10', '"step": 7').replace(
        '"step": 20', '"step": 8'))
    with pytest.raises(BadInput, match="no logged step in common"):
        compare(a, b)


def test_by_the_command(tmp_path, capsys):
    a, b = (str(make_run(tmp_path / name)) for name in "ab")
    assert cli.main(["compare", a, b, "--png", str(tmp_path / "both.png")]) == 0
    assert "validation bits/byte" in capsys.readouterr().out
    assert (tmp_path / "both.png").stat().st_size > 5000
    assert cli.main(["compare", a, b, "--png", str(tmp_path / "no" / "both.png")]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err
